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
)  # of its names, shapes and facts; that record's takes 2**15, and safetensors itself lets 10**8 pass
LOCK = ".lock"
ASIDE = ".part"  # the ending of what is not whole yet
LEFT_OVER = re.compile(
    r"\..+\.[a-z0-9_]{8}" + re.escape(ASIDE)
)  # as `write_whole` calls it: others' files stay


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` aside, flush it, and give it its name: a reader finds the whole file or the
    one before.

    When this returns, the file outlasts a loss of power: the folder, which knows its name, is
    flushed as well.

    Raises:
        RecordError: if the folder cannot be written.
    """
    try:
        make_folder(path.parent)
        descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=ASIDE, dir=path.parent)
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


def write_tensors(path: Path, facts: dict[str, Any], arrays: Arrays) -> None:
    """Keep `facts` (JSON types) and `arrays` in one safetensors file, with a digest of both.

    Raises:
        RecordError: if the folder cannot be written.
    """
    text = json.dumps(facts, sort_keys=True)
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    write_whole(path, save(arrays, metadata={"facts": text, "digest": _digest(text, arrays)}))


def read_tensors(
    path: Path, schema: int, what: str, remedy: str, most: float = MAX_BYTES
) -> tuple[dict[str, Any], Arrays]:
    """The facts, less their `schema`, and the arrays that `write_tensors` wrote.

    Args:
        what: the kind of file, for messages, as in "record".
        remedy: what to do where it is damaged.
        most: bytes; a larger file is refused.

    Raises:
        RecordError: if it is missing, damaged, or of another version.
    """
    try:
        if not path.is_file():  # what is not a file, such as a pipe, may never end
            raise RecordError(f"there is no {what} {path}: {remedy}")
        if path.stat().st_size > most:
            raise RecordError(f"the {what} {path} is larger than any is ({most} bytes): {remedy}")
        with path.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        if header > MAX_HEADER:
            raise RecordError(
                f"the {what} {path} is damaged (a header of {header} bytes): {remedy}"
            )
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
        if metadata["digest"] != _digest(metadata["facts"], arrays):
            raise RecordError(f"the {what} {path} is damaged (its digest does not match): {remedy}")
        facts = json.loads(metadata["facts"])
        if facts.pop("schema") != schema:
            raise RecordError(f"the {what} {path} is of another version of Lockstep: {remedy}")
        return facts, arrays
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
            f"the {what} {path} cannot be read ({type(error).__name__}): {remedy}"
        ) from error


def _digest(facts: str, arrays: Arrays) -> str:
    sha = hashlib.sha256(facts.encode())
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
def claimed(folder: Path, option: str = "--out") -> Iterator[None]:
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
        for aside in itertools.chain(folder.glob(f".*{ASIDE}"), folder.glob(f"*/.*{ASIDE}")):
            if LEFT_OVER.fullmatch(aside.name):
                with contextlib.suppress(OSError):  # it is in nobody's way
                    aside.unlink(missing_ok=True)
        yield
    finally:
        lock.release()  # the file stays: if it were removed, a third run could lock another one of its name
