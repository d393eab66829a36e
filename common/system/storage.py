"""Files that are whole or not there, and are checked before they are used; folders that one run
writes at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lockstep.common.errors import RecordError
from lockstep.common.protocol import Arrays

MAX_BYTES = 2**29  # of one file; the largest record of the recipes takes 2**24
MAX_HEADER = (
    2**24
)  # of its names, shapes and metadata; that record's takes 2**15, and safetensors itself lets 10**8 pass
LOCK = ".lock"
TEMP_SUFFIX = ".part"  # the ending of what is not whole yet
STALE_TEMP = re.compile(
    r"\..+\.[a-z0-9_]{8}" + re.escape(TEMP_SUFFIX)
)  # as `write_atomic` calls it: others' files stay


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` aside, flush it, and give it its name: a reader finds the whole file or the
    one before.

    When this returns, the file outlasts a loss of power: the folder, which knows its name, is
    flushed as well.

    Raises:
        RecordError: if the folder cannot be written.
    """
    try:
        make_folder(path.parent)
        descriptor, aside = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=TEMP_SUFFIX, dir=path.parent
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        finally:
            Path(aside).unlink(missing_ok=True)
        flush_folder(path.parent)
    except OSError as error:
        raise RecordError(
            f"cannot write {path} ({error.strerror or error}): choose another folder with --out or free some space"
        ) from error


def make_folder(folder: Path) -> None:
    """Make `folder`, and those above it, where they are missing; all of them outlast a loss of
    power."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        flush_folder(place.parent)


def flush_folder(folder: Path) -> None:
    """Have the names in `folder` outlast a loss of power, where the system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # some network file systems cannot flush folders
            raise
    finally:
        os.close(descriptor)


def write_tensors(path: Path, metadata: dict[str, Any], arrays: Arrays) -> None:
    """Keep `metadata` (JSON types) and `arrays` in one safetensors file, with a digest of both.

    Raises:
        RecordError: if the folder cannot be written.
    """
    text = json.dumps(metadata, sort_keys=True)
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_atomic(path, save(arrays, metadata={"facts": text, "digest": _digest(text, arrays)}))


def read_tensors(
    path: Path, schema: int, what: str, hint: str, max_bytes: float = MAX_BYTES
) -> tuple[dict[str, Any], Arrays]:
    """The metadata, less their `schema`, and the arrays that `write_tensors` wrote.

    Args:
        what: the kind of file, for messages, as in "record".
        hint: what to do where it is damaged.
        max_bytes: a larger file is refused.

    Raises:
        RecordError: if it is missing, damaged, or of another version.
    """
    try:
        if not path.is_file():  # what is not a file, such as a pipe, may never end
            raise RecordError(f"there is no {what} {path}: {hint}")
        if path.stat().st_size > max_bytes:
            raise RecordError(
                f"the {what} {path} is larger than any is ({max_bytes} bytes): {hint}"
            )
        with path.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
        if size > MAX_HEADER:
            raise RecordError(f"the {what} {path} is damaged (a header of {size} bytes): {hint}")
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            names = file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
        if header["digest"] != _digest(header["facts"], arrays):
            raise RecordError(f"the {what} {path} is damaged (its digest does not match): {hint}")
        metadata = json.loads(header["facts"])
        if metadata.pop("schema") != schema:
            raise RecordError(f"the {what} {path} is of another version of Lockstep: {hint}")
        return metadata, arrays
    except (
        OSError,
        SafetensorError,
        RecursionError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise RecordError(
            f"the {what} {path} cannot be read ({type(error).__name__}): {hint}"
        ) from error


def _digest(text: str, arrays: Arrays) -> str:
    sha = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)  # without a copy
    return sha.hexdigest()


def check_writable(folder: Path, option: str = "--out") -> None:
    """Raise RecordError, before hours of training, if nothing can be written to `folder`, which
    `option` names."""
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, option, error) from error


def _unwritable(folder: Path, option: str, error: Exception) -> RecordError:
    reason = getattr(error, "strerror", None) or error
    return RecordError(f"cannot write to {folder} ({reason}): choose another folder with {option}")


@contextlib.contextmanager
def lock_folder(folder: Path, option: str = "--out") -> Iterator[None]:
    """Within the context, `folder` is there, can be written, and no other run writes to it.

    What another run left half written is removed.

    Args:
        option: the command line's name for the folder.

    Raises:
        RecordError: if it cannot be written, or another run is at it.
    """
    from filelock import FileLock, Timeout

    check_writable(folder, option)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RecordError(
            f"another run is writing to {folder}: wait for it, or choose another folder with {option}"
        ) from None
    except (
        OSError,
        NotImplementedError,
    ) as error:  # the latter: filelock's, where the system has no locks
        raise _unwritable(folder, option, error) from error
    try:
        for aside in itertools.chain(
            folder.glob(f".*{TEMP_SUFFIX}"), folder.glob(f"*/.*{TEMP_SUFFIX}")
        ):
            if STALE_TEMP.fullmatch(aside.name):
                with contextlib.suppress(OSError):  # it is in nobody's way
                    aside.unlink(missing_ok=True)
        yield
    finally:
        lock.release()  # the file stays: if it were removed, a third run could lock another one of its name
