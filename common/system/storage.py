"""Files that are complete or absent, and checked before use; a lock, so that only one run writes to
a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
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
# Bytes of its names, shapes and metadata; that record's takes 2**15. safetensors allows 10**8.
MAX_HEADER = 2**24
LOCK = ".lock"
TEMP_SUFFIX = ".part"  # of a file that is not complete yet
# A name that `write_atomic` gives; other files are not removed.
STALE_TEMP = re.compile(r"\..+\.[a-z0-9_]{8}" + re.escape(TEMP_SUFFIX))
JsonObject = dict[str, Any]  # a file's metadata: whoever reads it checks it


def write_atomic(path: Path, content: bytes) -> None:
    """Write a temporary file, flush it, and rename it: a reader finds the complete file or the old
    one.

    When this returns, the file survives a power failure: the folder, which holds its name, is
    flushed, too.

    Raises:
        RecordError: if the folder cannot be written.
    """
    try:
        make_folder(path.parent)
        descriptor, temporary = tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=TEMP_SUFFIX, dir=path.parent
        )
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        flush_folder(path.parent)
    except OSError as error:
        raise RecordError(
            f"cannot write {path} ({error.strerror or error}): choose another folder with --out or "
            "free some space"
        ) from error


def make_folder(folder: Path) -> None:
    """Create `folder` and its missing parents; all of them survive a power failure."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        flush_folder(place.parent)


def flush_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power failure, if the system can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_tensors(path: Path, metadata: JsonObject, arrays: Arrays) -> None:
    """Write `metadata` (JSON types) and `arrays` to one safetensors file, with a digest of both.

    Raises:
        RecordError: if the folder cannot be written.
    """
    text = json.dumps(metadata, sort_keys=True)
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_atomic(path, save(arrays, metadata={"facts": text, "digest": _digest(text, arrays)}))


def read_tensors(
    path: Path, schema: int, what: str, hint: str, max_bytes: float = MAX_BYTES
) -> tuple[JsonObject, Arrays]:
    """The metadata, without `schema`, and the arrays that `write_tensors` wrote.

    Args:
        what: the kind of file, for messages, as in "record".
        hint: what to do if it is damaged.
        max_bytes: a larger file is refused.

    Raises:
        RecordError: if it is missing, damaged, or of another version.
    """
    try:
        if not path.is_file():  # a pipe may never end
            raise RecordError(f"there is no {what} {path}: {hint}")
        if path.stat().st_size > max_bytes:
            raise RecordError(
                f"the {what} {path} is larger than the limit of {max_bytes} bytes: {hint}"
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
    """Raise RecordError if nothing can be written to `folder`; asked before hours of training.

    Args:
        option: the command line's name for the folder.
    """
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
    """Inside the block, `folder` exists, can be written, and no other run writes to it.

    Temporary files that an earlier run left are removed.

    Args:
        option: the command line's name for the folder.

    Raises:
        RecordError: if it cannot be written, or another run writes to it.
    """
    from filelock import FileLock, Timeout

    check_writable(folder, option)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RecordError(
            f"another run is writing to {folder}: wait for it, or choose another folder with "
            f"{option}"
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter: the system has no locks
        raise _unwritable(folder, option, error) from error
    try:
        for pattern in (f".*{TEMP_SUFFIX}", f"*/.*{TEMP_SUFFIX}"):
            for path in folder.glob(pattern):
                if STALE_TEMP.fullmatch(path.name):
                    with contextlib.suppress(OSError):  # it does no harm
                        path.unlink(missing_ok=True)
        yield
    finally:
        # The lock file stays: if it were removed, a third run could lock a new one of its name.
        lock.release()
