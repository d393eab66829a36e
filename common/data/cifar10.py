"""CIFAR-10: found on disk, checked, or downloaded.

Environment:
    LOCKSTEP_DATA: a folder that holds `cifar-10-batches-py`, searched before the cache.
    LOCKSTEP_OFFLINE: if set (and not 0), nothing is downloaded.
    XDG_CACHE_HOME: where the cache `lockstep` lies; `~/.cache` if unset.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import os
import pickle
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from lockstep.common.data.dataset import Dataset
from lockstep.common.data.digits import load_digits
from lockstep.common.data.parsing import one_line
from lockstep.common.errors import DataError
from lockstep.common.system import environment

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_FOLDER = "cifar-10-batches-py"  # what the archive unpacks to
CIFAR10_BYTES = 2**25  # no file of it is larger
# MD5 sums, as in `torchvision.datasets.CIFAR10`, which takes two seconds to import
CIFAR10_FILES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
# The names are those of the PyTorch tutorial.
CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SOCKET_SECONDS = 20.0  # longest silence of the server that is put up with
DOWNLOAD_SECONDS = 900.0  # longest download, 163 MiB
HINT = (
    f"unpack {CIFAR10_URL} and point --data-dir or $LOCKSTEP_DATA at the folder that holds {CIFAR10_FOLDER}, "
    "or choose --data digits"
)


class Unreachable(Exception):
    """The server does not answer, stops answering, or takes too long."""


def load_cifar10(
    choice: str, data_dir: Path | None, announce: Callable[[str], None], progress: bool
) -> Dataset:
    cache = environment.cache_folder()
    named = os.environ.get("LOCKSTEP_DATA")
    places = [data_dir] if data_dir is not None else [*([Path(named)] if named else []), cache]
    for place in places:
        if os.path.isdir(place / CIFAR10_FOLDER):
            return _read_cifar10(place)
    try:
        return _download_cifar10(places[-1], progress)
    except Unreachable as error:
        looked = " or ".join(repr(str(place)) for place in places)
        problem = f"CIFAR-10 is not in {looked} and cannot be downloaded ({one_line(error)})"
        if choice == "cifar10":
            raise DataError(f"{problem}: {HINT}") from error
    announce(
        f"{problem}: using scikit-learn's digits instead; for CIFAR-10, {HINT.rpartition(', or ')[0]}"
    )
    return load_digits()


def _read_cifar10(root: Path) -> Dataset:
    remedy = f"remove {str(root / CIFAR10_FOLDER)!r} so that it is downloaded again, or {HINT}"

    def checked(name: str) -> bytes:
        file = root / CIFAR10_FOLDER / name
        small = file.is_file() and file.stat().st_size <= CIFAR10_BYTES
        content = file.read_bytes() if small else b""
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != CIFAR10_FILES[name]:
            problem = "is truncated or altered" if file.exists() else "is missing"
            raise DataError(f"CIFAR-10 file {str(file)!r} {problem}: {remedy}")
        return content

    with ThreadPoolExecutor() as pool:  # to hash and to copy, which does not keep others waiting
        try:
            contents = list(pool.map(checked, CIFAR10_FILES))
        except OSError as error:
            raise DataError(
                f"CIFAR-10 in {str(root)!r} cannot be read ({one_line(error)}): {remedy}"
            ) from error
        # Only now, when all files are known to be genuine, is any unpickled, and the very bytes
        # that were checked.
        *train, test = pool.map(_unpickled, contents[:-1])
    images, labels = map(np.concatenate, zip(*train, strict=True))
    return Dataset("cifar10", images, labels, *test, CIFAR10_CLASSES)


def _unpickled(file: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one of CIFAR-10's batches, which are NCHW."""
    batch = pickle.load(io.BytesIO(file), encoding="latin1")
    planes = batch["data"].reshape(-1, 3, 32, 32).swapaxes(0, 1)
    # `stack` takes half as long as a copy of the transposed array
    return np.stack([*planes], axis=-1), np.array(batch["labels"], np.int64)


def _download_cifar10(root: Path, progress: bool) -> Dataset:
    """Download to a folder aside, check and read it there, and move it into `root` only then.

    Raises:
        Unreachable: if the network or the server fails, or the time is over.
        DataError: if what came is not CIFAR-10, or the disk fails.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    if os.environ.get("LOCKSTEP_OFFLINE", "") not in ("", "0"):
        raise Unreachable("LOCKSTEP_OFFLINE is set")
    # Before anything is written: without a network, a disk that cannot be written to does not
    # matter.
    with _network():
        response = urllib.request.urlopen(CIFAR10_URL, timeout=SOCKET_SECONDS)
    try:
        with response:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".cifar-10-", dir=root) as aside:
                archive = Path(aside, "cifar-10-python.tar.gz")
                _save(response, archive, progress)
                if not check_integrity(archive, CIFAR10.tgz_md5):
                    problem = f"what {CIFAR10_URL} sent is not CIFAR-10 (its checksum differs)"
                    raise DataError(f"{problem}: try again, or {HINT}")
                extract_archive(archive, aside)
                dataset = _read_cifar10(Path(aside))
                # Another process may have been faster.
                if not os.path.isdir(root / CIFAR10_FOLDER):
                    os.rename(Path(aside, CIFAR10_FOLDER), root / CIFAR10_FOLDER)
                return dataset
    except OSError as error:
        remedy = "free some space, or choose another --data-dir, or --data digits"
        raise DataError(
            f"CIFAR-10 cannot be written to {str(root)!r} ({one_line(error)}): {remedy}"
        ) from error


def _save(response: http.client.HTTPResponse, archive: Path, progress: bool) -> None:
    from rich.console import Console
    from rich.progress import Progress

    deadline, total, received = time.monotonic() + DOWNLOAD_SECONDS, response.length, 0
    bar = Progress(
        *Progress.get_default_columns(),
        console=Console(stderr=True),
        disable=not progress,
        transient=True,
    )
    with bar, open(archive, "wb") as file:
        task = bar.add_task("downloading CIFAR-10", total=total)
        while total is None or received < total:
            with _network():
                chunk = response.read1(
                    1 << 18
                )  # returns what there is, so a trickle cannot outlast the deadline
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not done after {DOWNLOAD_SECONDS:g} seconds")
                if not chunk and total is not None:
                    raise ConnectionError(
                        f"the connection closed after {received} of {total} bytes"
                    )
            if not chunk:
                break
            received += file.write(chunk)
            bar.update(task, completed=received)


@contextlib.contextmanager
def _network() -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise Unreachable(one_line(error)) from error
