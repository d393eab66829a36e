"""Files of a user's own weights: what a file claims is checked before its numbers are read, and
they before use."""

from __future__ import annotations

import contextlib
import itertools
import math
import stat
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lockstep.common.config import MAX_NUMBER
from lockstep.common.errors import DataError, LockstepError, shorten
from lockstep.common.protocol import Arrays

FLOATS = ("float64", "float32", "float16", "bfloat16")
MAX_RATIO = 16  # a file may take so many times what the network takes in float64: names, padding, other layouts
MIN_LIMIT = 2**20  # bytes; for small networks, whose files are mostly names
MAX_FILES = 1000  # of a checkpoint; it has a few for each array
LAYOUT = "name and shape them as `lockstep export` does"


class TensorHeader(NamedTuple):
    """The header of one tensor: its dtype, shape and place, before its numbers are read."""

    shape: tuple[int, ...]
    dtype: str  # one of FLOATS, or what the file calls it


Shapes = Mapping[str, tuple[int, ...]]


def size_limit(shapes: Shapes, times: int = MAX_RATIO) -> int:
    """The bytes that a file with parameters of these shapes may take."""
    return max(MIN_LIMIT, times * sum(8 * math.prod(shape) for shape in shapes.values()))


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder.

    Raises:
        DataError: if it is not there, cannot be looked at, is (or holds) neither file nor folder,
            or holds too many.
    """
    try:
        size = 0
        for number, found in enumerate(itertools.chain([path], path.rglob("*"))):
            if number > MAX_FILES:
                raise DataError(
                    f"{path} holds more than {MAX_FILES} files: give the folder of the checkpoint alone"
                )
            status = found.stat()
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
                raise DataError(
                    f"{found} is no file (a pipe or a device): give a file of weights with --weights"
                )
            size += status.st_size if stat.S_ISREG(status.st_mode) else 0
        return size
    except FileNotFoundError:
        raise DataError(f"there is no {path}: give a file of weights with --weights") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"{path} cannot be read ({reason}): give another file with --weights"
        ) from error


def check_size(path: Path, size: int, room: int) -> None:
    """Raise DataError if the weights in `path` take more bytes than this network's could."""
    if size > room:
        raise DataError(
            f"{path} is too large for this network's weights ({size:,} bytes, {room:,} at most): "
            "save the parameters alone"
        )


def check_headers(path: Path, headers: Mapping[str, TensorHeader], shapes: Shapes) -> None:
    """Raise DataError unless a file claims to hold exactly the tensors of `shapes`, in
    floating-point numbers."""
    missing = [name for name in shapes if name not in headers]
    unknown = [name for name in headers if name not in shapes]
    if missing or unknown:
        sides = {"missing": missing, "not of this network": unknown}
        found = "; ".join(f"{side}: {shorten(names)}" for side, names in sides.items() if names)
        raise DataError(f"{path} does not hold this network's parameters ({found}): {LAYOUT}")
    others = {
        name: claim.shape
        for name, claim in headers.items()
        if tuple(claim.shape) != tuple(shapes[name])
    }
    if others:
        found = shorten(
            (f"{name} {shape} for {tuple(shapes[name])}" for name, shape in others.items()), "; "
        )
        raise DataError(
            f"{path} has other shapes than this network ({found}): {LAYOUT}, and take data of as many classes"
        )
    others = {name: claim.dtype for name, claim in headers.items() if claim.dtype not in FLOATS}
    if others:
        found = shorten(f"{name} {dtype}" for name, dtype in others.items())
        raise DataError(
            f"{path} holds other numbers than {', '.join(FLOATS)} ({found}): convert them to float32"
        )


def check_numbers(path: Path, arrays: Arrays) -> None:
    """Raise DataError unless all numbers are finite, and none is beyond what every
    precision can hold."""
    wrong = {}
    for name, array in arrays.items():
        with np.errstate(invalid="ignore"):  # NaN
            wrong[name] = int((~(np.abs(array.astype(np.float64)) <= MAX_NUMBER)).sum())
    wrong = {name: count for name, count in wrong.items() if count}
    if wrong:
        found = shorten(
            f"{name}: {count:,} of {arrays[name].size:,}" for name, count in wrong.items()
        )
        raise DataError(
            f"{path} holds numbers that are not finite, or beyond {MAX_NUMBER:g} ({found}): "
            "take weights from before the training diverged"
        )


@contextlib.contextmanager
def reader_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn any error of a reader into a DataError: on a damaged file it may raise anything."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except LockstepError:
        raise
    except Exception as error:  # four libraries read here, and each raises its own errors
        raise damaged_file(path, kind, type(error).__name__) from error


def damaged_file(path: Path, kind: str, why: str) -> DataError:
    return DataError(f"{path} is damaged, or no {kind} ({why}): save it again")
