"""The data that a user's pair brings, or that it is given; and what its networks are built for."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.common.config import MODELS
from lockstep.common.data.arrays import NAMES, of_arrays
from lockstep.common.data.dataset import Dataset
from lockstep.common.data.user_data import read_npz
from lockstep.common.errors import DataError, user_code
from lockstep.common.model import pair as pairs
from lockstep.common.protocol import Task


@functools.cache
def example(model: str) -> Dataset | None:
    """The inputs and targets of a pair's `example`, which also are its test data; None without any.

    Raises:
        LockstepError: if what the pair gives is no example.
    """
    found: Any = None if model in MODELS else pairs.load(model).example
    if found is None:
        return None
    remedy = (
        "give inputs and targets, a function that returns them, or an .npz archive with x and y"
    )
    with user_code(f"--model {model}: its example cannot be read", remedy):
        if isinstance(found, str):
            with np.load(pairs.beside(model, found), allow_pickle=False) as archive:
                found = archive["x"], archive["y"]
        give: Any = found if callable(found) else lambda: found
        x, y = given = give()
        if not all(map(np.array_equal, given, give())):
            raise DataError(
                f"--model {model}: its example differs from call to call: give its random numbers a seed"
            )
    arrays: dict[str, Any] = dict(zip(NAMES, (x, y, x, y), strict=True))
    shown, labelled = f"--model {model}, its example", pairs.is_labelled(model)
    count = pairs.class_count(model)
    return of_arrays("the pair's example", shown, arrays, labelled, count, ("x", "y", "x", "y"))


@functools.cache
def own(model: str) -> Dataset | None:
    """The data set of a pair's `data`; None without any.

    Raises:
        LockstepError: if what the pair gives is no data.
    """
    found = None if model in MODELS else pairs.load(model).data
    if found is None:
        return None
    remedy = (
        f"give {', '.join(NAMES)}, a function that returns them, or the path of an .npz archive with "
        "them"
    )
    with user_code(f"--model {model}: its data cannot be read", remedy):
        arrays = _named(model, found)
    shown, labelled = f"--model {model}, its data", pairs.is_labelled(model)
    return of_arrays("the pair's data", shown, arrays, labelled, pairs.class_count(model))


def _named(model: str, given: Any) -> Mapping[str, Any]:
    """The arrays of `Pair.data` by name."""
    if isinstance(given, str):
        return read_npz(pairs.beside(model, given))
    found: Any = given() if callable(given) else given
    if not isinstance(found, Mapping):
        found = dict(zip(NAMES, found, strict=True))
    return {name: found[name] for name in NAMES} | {"classes": found.get("classes")}


def random_pictures(model: str, count: int = 1_000) -> Dataset:
    """Random uint8 pictures (count, 32, 32, 3) with int64 labels (count,), for a pair that brings no
    data and is not trained. Grey pictures would hide a network that takes the colours in another
    order."""
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labelled = model in MODELS or pairs.is_labelled(model)
    classes = (0 if model in MODELS else pairs.class_count(model)) or 10
    names = tuple(map(str, range(classes))) if labelled else ()
    labels = np.arange(count) % (
        classes if labelled else 2
    )  # a loss of the user's own takes 0 and 1
    return Dataset(
        "random pictures", pictures, labels, pictures, labels, names, class_count=classes
    )


def of_archive(model: str, path: Path) -> Dataset:
    """The data of an archive, for a pair.

    Raises:
        DataError: if they cannot be used.
    """
    labelled, count = pairs.is_labelled(model), pairs.class_count(model)
    return of_arrays(path.name, repr(str(path)), read_npz(path), labelled, count)


def task(model: str, classes: int | Task) -> Task:
    """What the networks of a model are built for.

    Args:
        classes: where it is only known how many: for what the pair's example or data are, or for
            pictures of 32 x 32 pixels.
    """
    if isinstance(classes, Task):
        return classes
    found = example(model) or own(model)
    if found is not None:
        return found.task._replace(classes=classes or found.task.classes)
    pictures = np.linspace(-1, 1, 2 * 32 * 32 * 3, dtype=np.float32).reshape(2, 32, 32, 3)
    return Task(classes, pictures, np.zeros(2, np.int64))
