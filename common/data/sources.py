"""Data sets as uint8 NHWC arrays, their one normalisation, and the order in which a run sees them.

Environment:
    LOCKSTEP_DATA: a folder that holds `cifar-10-batches-py`, looked into before the cache.
    LOCKSTEP_OFFLINE: if set (and not 0), nothing is downloaded.
    XDG_CACHE_HOME: where the cache `lockstep` lies; `~/.cache` if unset.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import struct
import tempfile
import time
import tokenize
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.common.config import Config
from lockstep.common.errors import DataError, printable
from lockstep.common.system import environment

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_FOLDER = "cifar-10-batches-py"  # what the archive unpacks to
CIFAR10_BYTES = 2**25  # no file of it is larger
# The names are those of the PyTorch tutorial.
CIFAR10_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SOCKET_SECONDS = 20.0  # longest silence of the server that is put up with
DOWNLOAD_SECONDS = 900.0  # longest download, 163 MiB
DIGITS_TEST_IMAGES = 360  # the last of scikit-learn's 1797
MAX_CLASSES = 10_000  # a larger label in an archive without class names is taken for a mistake
MAX_UNPACKED = 2**29  # bytes of arrays in an archive of any size; CIFAR-10 takes 184 million
MAX_PACKED = 4  # an archive larger than that must take at least a fourth of its arrays; pictures hardly shrink
MAX_PIXELS = 50_000_000  # of one picture: at most 16 bytes each while it is decoded, so 800 MB
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp")
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "PPM",
    "WEBP",
)  # the only decoders that a file can reach, whatever its name
ORDER_STREAM = int.from_bytes(
    b"data", "big"
)  # keeps the order apart from all else that is drawn from the same seed

CHOICES = "auto, cifar10, digits, an .npz file, or a folder of class folders"
REMEDY = (
    f"unpack {CIFAR10_URL} and point --data-dir or $LOCKSTEP_DATA at the folder that holds {CIFAR10_FOLDER}, "
    "or choose --data digits"
)
# What parsers let through when they stumble over a damaged file.
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    SyntaxError,
    ArithmeticError,
    MemoryError,
)
_DAMAGE += (RuntimeError, struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile)
_BLOCK = 1 << 15  # pixels that are normalised at a time
_TABLE = (np.arange(256, dtype=np.float64) / 255 - 0.5) / 0.5


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits of labelled pictures. Labels lie between 0 and len(classes) - 1, and no split is
    empty."""

    name: str  # "cifar10", "digits", or the path's last component
    train_images: np.ndarray  # uint8 (n, 32, 32, 3)
    train_labels: np.ndarray  # int64 (n,)
    test_images: np.ndarray  # uint8 (m, 32, 32, 3)
    test_labels: np.ndarray  # int64 (m,)
    classes: tuple[str, ...]  # by label, verbatim

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of the class names and of both splits' shapes, pixels and labels;
        not of `name`."""
        splits = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        # The shapes say where one array ends and the next begins.
        digest = hashlib.sha256(
            json.dumps([self.classes, [array.shape for array in splits]]).encode()
        )
        for array in splits:
            digest.update(
                np.ascontiguousarray(array, "<i8" if array.ndim == 1 else np.uint8).reshape(-1).data
            )
        return digest.hexdigest()


def load(
    choice: str,
    data_dir: Path | None = None,
    announce: Callable[[str], None] = print,
    progress: bool = True,
) -> Dataset:
    """Load a data set.

    CIFAR-10 is looked for in `data_dir` if given, else in `$LOCKSTEP_DATA` and then in the cache;
    where it is in none of them, it is downloaded to `data_dir` or the cache.

    Args:
        choice: "auto" (CIFAR-10, or digits where it can be neither found nor downloaded),
            "cifar10", "digits", or a path: an `.npz` file with x_train, y_train, x_test, y_test and
            perhaps classes; or a folder of class folders, or of `train` and `test` folders with
            these in them.
        data_dir: the only place to look for CIFAR-10; other choices do not use it.
        announce: is given each line that the user should read.
        progress: whether a download draws a progress bar, on standard error.

    Raises:
        DataError: if the data is missing, damaged or of the wrong form; the message is one line and
            names the remedy. Damaged CIFAR-10 is an error under "auto" too, and no damaged file is
            unpickled.
    """
    try:
        return _load(choice, data_dir, announce, progress)
    except MemoryError as error:
        remedy = "choose smaller data, or a machine with more memory"
        raise DataError(
            f"data {choice!r} does not fit into the memory of this machine: {remedy}"
        ) from error


def _load(
    choice: str, data_dir: Path | None, announce: Callable[[str], None], progress: bool
) -> Dataset:
    if choice in ("auto", "cifar10"):
        return _load_cifar10(choice, data_dir, announce, progress)
    if choice == "digits":
        return _load_digits()
    if os.path.isdir(choice):
        return _load_folder(Path(choice), announce)
    if os.path.isfile(choice) and choice.endswith(".npz"):
        return _load_npz(Path(choice))
    problem = "is neither a folder nor an .npz file" if os.path.exists(choice) else "does not exist"
    raise DataError(f"data {choice!r} {problem}: choose {CHOICES}")


def normalise(images: np.ndarray, dtype: Any) -> np.ndarray:
    """Map 0..255 to -1..1 by (x / 255 - 0.5) / 0.5, the tutorial's `ToTensor` and `Normalize(0.5,
    0.5)`.

    The formula is computed in float64 for each of the 256 values and rounded once, so every backend
    gets the same bits.

    Args:
        images: uint8, of any shape.
        dtype: a floating-point NumPy dtype, `ml_dtypes.bfloat16` included.

    Returns:
        An array of that dtype and the images' shape.
    """
    assert images.dtype == np.uint8, images.dtype
    table, normalised = _TABLE.astype(dtype), np.empty(images.shape, dtype)
    pixels, values = images.reshape(-1), normalised.reshape(-1)
    # `table[images]` makes every index eight bytes wide first. Those of a block stay in the
    # processor's cache, which takes half the time; and with `clip`, which no byte needs, `take`
    # writes where it is told to, without a copy.
    for start in range(0, len(pixels), _BLOCK):
        block = slice(start, start + _BLOCK)
        table.take(pixels[block], out=values[block], mode="clip")
    return normalised


def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order of one epoch: an int64 (images,) permutation, a pure function of its arguments;
    epochs count from 0."""
    generator = np.random.default_rng(np.random.SeedSequence((seed, ORDER_STREAM, epoch)))
    return generator.permutation(images).astype(np.int64, copy=False)


def batch_indices(config: Config, images: int) -> Iterator[np.ndarray]:
    """The indices of each step's images: `config.total_steps` int64 (batch,) arrays, over all
    epochs.

    The last batch of an epoch is smaller where the batch size does not divide `images`; with
    `drop_last` it is left out. `config` must be resolved for `images`.
    """
    left, per_epoch, size = config.total_steps, config.batches_per_epoch(images), config.batch_size
    assert per_epoch > 0, "resolve() refuses a batch that is larger than the data"
    for epoch in range(-(-left // per_epoch)):
        order = permutation(config.seed, epoch, images)
        for batch in range(min(left, per_epoch)):
            yield order[batch * size : (batch + 1) * size]
        left -= per_epoch


def order_digest(config: Config, images: int) -> str:
    """SHA-256, hexadecimal, of the length and content of every array that `batch_indices`
    yields."""
    digest = hashlib.sha256()
    for indices in batch_indices(config, images):
        digest.update(struct.pack("<q", len(indices)))
        digest.update(indices.astype("<i8").tobytes())
    return digest.hexdigest()


# CIFAR-10


class _Unreachable(Exception):
    """The server does not answer, stops answering, or takes too long."""


def _load_cifar10(
    choice: str, data_dir: Path | None, announce: Callable[[str], None], progress: bool
) -> Dataset:
    if data_dir is not None and not os.path.isdir(data_dir):
        raise DataError(f"--data-dir {str(data_dir)!r} is not a folder: create it, or name another")
    cache = environment.cache_folder()
    named = os.environ.get("LOCKSTEP_DATA")
    places = [data_dir] if data_dir is not None else [*([Path(named)] if named else []), cache]
    for place in places:
        if os.path.isdir(place / CIFAR10_FOLDER):
            return _read_cifar10(place)
    try:
        return _download_cifar10(places[-1], progress)
    except _Unreachable as error:
        looked = " or ".join(repr(str(place)) for place in places)
        problem = f"CIFAR-10 is not in {looked} and cannot be downloaded ({_line(error)})"
        if choice == "cifar10":
            raise DataError(f"{problem}: {REMEDY}") from error
    announce(
        f"{problem}: using scikit-learn's digits instead; for CIFAR-10, {REMEDY.rpartition(', or ')[0]}"
    )
    return _load_digits()


def _read_cifar10(root: Path) -> Dataset:
    from torchvision.datasets import CIFAR10

    remedy = f"remove {str(root / CIFAR10_FOLDER)!r} so that it is downloaded again, or {REMEDY}"
    meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])

    def checked(listed: list[str]) -> bytes:
        file, md5 = root / CIFAR10_FOLDER / listed[0], listed[1]
        small = file.is_file() and file.stat().st_size <= CIFAR10_BYTES
        content = file.read_bytes() if small else b""
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            problem = "is truncated or altered" if file.exists() else "is missing"
            raise DataError(f"CIFAR-10 file {str(file)!r} {problem}: {remedy}")
        return content

    with ThreadPoolExecutor() as pool:  # to hash and to copy, which does not keep others waiting
        try:
            contents = list(pool.map(checked, (*CIFAR10.train_list, *CIFAR10.test_list, meta)))
        except OSError as error:
            raise DataError(
                f"CIFAR-10 in {str(root)!r} cannot be read ({_line(error)}): {remedy}"
            ) from error
        # Only now, when all files are known to be genuine, is any unpickled, and the very bytes
        # that were checked: CIFAR10 itself would check all files again for each split, and then
        # read them once more.
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
        _Unreachable: if the network or the server fails, or the time is over.
        DataError: if what came is not CIFAR-10, or the disk fails.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    if os.environ.get("LOCKSTEP_OFFLINE", "") not in ("", "0"):
        raise _Unreachable("LOCKSTEP_OFFLINE is set")
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
                    raise DataError(f"{problem}: try again, or {REMEDY}")
                extract_archive(archive, aside)
                dataset = _read_cifar10(Path(aside))
                # Another process may have been faster.
                if not os.path.isdir(root / CIFAR10_FOLDER):
                    os.rename(Path(aside, CIFAR10_FOLDER), root / CIFAR10_FOLDER)
                return dataset
    except OSError as error:
        remedy = "free some space, or choose another --data-dir, or --data digits"
        raise DataError(
            f"CIFAR-10 cannot be written to {str(root)!r} ({_line(error)}): {remedy}"
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
        raise _Unreachable(_line(error)) from error


# Other data


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    grey = np.rint(flat.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # from 0..16
    images = grey.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3)
    labels, cut = labels.astype(np.int64), len(images) - DIGITS_TEST_IMAGES
    return Dataset(
        "digits", images[:cut], labels[:cut], images[cut:], labels[cut:], tuple("0123456789")
    )


def _load_npz(path: Path) -> Dataset:
    shown, expected = repr(str(path)), ("x_train", "y_train", "x_test", "y_test")
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as on headers that Python 2 wrote
            arrays = _unpacked(archive, (*expected, "classes"), os.fstat(file.fileno()).st_size)
    except MemoryError:
        raise  # what it claims has been looked at, so the machine has no room for it
    except _DAMAGE as error:
        raise DataError(
            f"{shown} cannot be read ({_line(error)}): write it again with numpy.savez"
        ) from error
    if missing := [name for name in expected if name not in arrays]:
        raise DataError(
            f"{shown} has no {', '.join(missing)}: write it with numpy.savez, naming {', '.join(expected)}"
        )

    images, labels = {}, {}
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != (32, 32, 3):
            raise DataError(
                f"{shown}: x_{split} is {x.dtype} {x.shape}: it must be uint8 (n, 32, 32, 3)"
            )
        if y.dtype.kind not in "iu" or y.shape not in ((len(x),), (len(x), 1)):
            raise DataError(
                f"{shown}: y_{split} is {y.dtype} {y.shape}: it must hold {len(x)} integers, one per image"
            )
        if not len(x):
            raise DataError(f"{shown}: x_{split} is empty: both splits need images")
        images[split], labels[split] = x, y.reshape(-1)

    largest = max(int(y.max()) for y in labels.values())
    if "classes" in arrays:
        if (
            arrays["classes"].dtype.kind != "U"
            or arrays["classes"].ndim != 1
            or len(arrays["classes"]) < 2
        ):
            raise DataError(
                f"{shown}: classes must be a one-dimensional array of two or more strings"
            )
        if len(arrays["classes"]) > MAX_CLASSES:
            raise DataError(
                f"{shown} has {len(arrays['classes'])} classes: it may have {MAX_CLASSES}"
            )
        classes = tuple(arrays["classes"].tolist())
        if len(set(classes)) < len(classes):
            raise DataError(f"{shown}: two classes have the same name: give each a name of its own")
    else:
        classes = tuple(str(label) for label in range(max(2, min(largest + 1, MAX_CLASSES))))
    if largest >= len(classes) or min(int(y.min()) for y in labels.values()) < 0:
        raise DataError(
            f"{shown}: labels must lie between 0 and {len(classes) - 1}: number the classes from 0"
        )
    train, test = ((images[split], labels[split].astype(np.int64)) for split in ("train", "test"))
    return Dataset(_name(path), *train, *test, classes)


def _unpacked(archive: zipfile.ZipFile, names: Sequence[str], size: int) -> dict[str, np.ndarray]:
    """The arrays of these names that the archive has; all that they claim to take is looked at
    before any is made.

    Args:
        size: of the archive's file, in bytes.

    Raises:
        ValueError: and others of `_DAMAGE`, if the archive is damaged, or claims too much.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name in names and name in members:
            raise ValueError(f"it has two members {name}")
        members[name] = member
    members = {name: members[name] for name in names if name in members}
    for name, member in members.items():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is packed otherwise than numpy.savez does")
    claimed = sum(member.file_size for member in members.values())
    if claimed > max(MAX_UNPACKED, MAX_PACKED * size):
        raise ValueError(f"it claims to hold {claimed} bytes in {size}")
    return {name: _unpacked_array(archive, name, member) for name, member in members.items()}


def _unpacked_array(archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        if version not in readers:
            raise ValueError(f"{name} is of another version of the npy format")
        try:
            shape, _, dtype = readers[version](stream)
        except MemoryError:  # says Python's parser of brackets that are nested too deeply
            raise ValueError(f"{name} has no header") from None
        if dtype.hasobject:
            raise ValueError(f"{name} holds pickled objects, which are not loaded")
        if dtype.itemsize * math.prod(shape) != member.file_size - stream.tell():
            raise ValueError(f"{name} claims to be {dtype} {shape}, which is not what it holds")
    with archive.open(member) as stream:
        return np.asarray(np.lib.format.read_array(stream, allow_pickle=False))


def _load_folder(path: Path, announce: Callable[[str], None]) -> Dataset:
    classes = _entries(path, os.path.isdir)
    given = classes == ["test", "train"]
    if given:
        classes, others = (_entries(path / split, os.path.isdir) for split in ("train", "test"))
        if differing := sorted(set(classes) ^ set(others)):
            raise DataError(
                f"{str(path)!r}: train and test need the same class folders; only one has {differing[0]!r}"
            )
    if len(classes) < 2:
        raise DataError(
            f"{str(path)!r} has {len(classes)} class folders: it needs two or more, with pictures in them"
        )
    if given:
        train, test = (
            [_pictures(path / split / name) for name in classes] for split in ("train", "test")
        )
    else:
        every = [_pictures(path / name) for name in classes]
        train = [[file for index, file in enumerate(files) if index % 5 != 4] for files in every]
        test = [files[4::5] for files in every]
        if not any(test):
            remedy = "add pictures, or sort them into train and test folders"
            raise DataError(
                f"{str(path)!r} has no class of five pictures, so none to test on: {remedy}"
            )
        announce(
            f"{str(path)!r} has no train and test folders: every fifth picture of each class is for testing "
            f"({sum(map(len, train))} training, {sum(map(len, test))} test pictures)"
        )
    return Dataset(_name(path), *_read_pictures(train), *_read_pictures(test), tuple(classes))


def _entries(folder: Path, wanted: Callable[[Path], bool]) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if wanted(folder / name))
    except OSError as error:
        remedy = "check that it is a folder you may read"
        raise DataError(f"{str(folder)!r} cannot be listed ({_line(error)}): {remedy}") from error


def _pictures(folder: Path) -> list[Path]:
    names = [
        name for name in _entries(folder, os.path.isfile) if name.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not names:
        raise DataError(
            f"class folder {str(folder)!r} has no pictures ({' '.join(IMAGE_SUFFIXES)}): add some"
        )
    return [folder / name for name in names]


def _read_pictures(files: list[list[Path]]) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of the files of each class."""
    images = np.stack([_read_picture(file) for of_class in files for file in of_class])
    return images, np.repeat(
        np.arange(len(files), dtype=np.int64), [len(of_class) for of_class in files]
    )


def _read_picture(file: Path) -> np.ndarray:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # such as on palettes with transparency, of which RGB knows nothing
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(
                        f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}"
                    )
                return np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
    except (*_DAMAGE, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"picture {str(file)!r} cannot be read ({_line(error)}): replace or remove it"
        ) from error


def _name(path: Path) -> str:
    return os.path.basename(os.path.abspath(path)) or str(path)


def _line(error: BaseException) -> str:
    """What an error says, on one line, without control characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return printable(text)
