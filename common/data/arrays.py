"""Inputs and targets of a user's pair: arrays of any shape, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lockstep.common.data.dataset import IGNORED, Dataset
from lockstep.common.errors import DataError

NAMES = ("x_train", "y_train", "x_test", "y_test")
MAX_CLASSES = 10_000  # a larger label in an archive without class names is taken for a mistake


def of_arrays(
    name: str,
    shown: str,
    arrays: Mapping[str, Any],
    labelled: bool,
    count: int = 0,
    called: Sequence[str] = NAMES,
) -> Dataset:
    """The data set of these arrays: those of NAMES, and perhaps `classes`, of strings.

    Pictures are uint8, of three axes or more. Other integers become int64; floating-point numbers
    are float32 or float64.

    Args:
        name: of the data set.
        shown: the same in an error.
        labelled: whether the loss is a cross entropy, so that targets are labels.
        count: of the classes; 0: as many as labels and names show.
        called: what an error calls the arrays of NAMES.

    Raises:
        DataError: if they are no such data; the message names the remedy.
    """
    x_train, y_train, x_test, y_test = splits = [
        _numbers(shown, word, arrays[key]) for word, key in zip(called, NAMES, strict=True)
    ]
    for one in (0, 2):
        x, y = splits[one : one + 2]
        if len(x) != len(y):
            raise DataError(
                f"{shown}: {called[one]} has {len(x)} samples and {called[one + 1]} {len(y)}: give as "
                "many of both"
            )
    for one in (0, 1):
        train, test = splits[one], splits[one + 2]
        if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
            raise DataError(
                f"{shown}: {called[one]} is {train.dtype} {train.shape}, and {called[one + 2]} "
                f"{test.dtype} {test.shape}: give both one dtype, and the same axes after the first"
            )
    names = class_names(shown, arrays.get("classes"))
    if count and names and count != len(names):
        raise DataError(
            f"{shown}: it names {len(names)} classes, and the pair says {count}: make them equal"
        )
    names = names or tuple(map(str, range(count)))
    found = Dataset(name, x_train, y_train, x_test, y_test, (), class_count=count)
    if y_train.dtype.kind == "f":
        if labelled:
            raise DataError(
                f"{shown}: {called[1]} is {y_train.dtype}, and the loss of the pair is a cross entropy "
                "of integers: name another loss in the pair"
            )
        return found
    return _with_labels(found, shown, names) if labelled else _counted(found, names)


def _numbers(shown: str, key: str, given: Any) -> np.ndarray:
    """An array of numbers that both frameworks take, of two samples or more."""
    try:
        array = np.asarray(given)
    except ValueError as error:  # lists of several lengths
        raise DataError(
            f"{shown}: {key} is no array ({str(error).splitlines()[0]}): give it one shape"
        ) from error
    if array.dtype.kind not in "iuf" or array.ndim < 1 or len(array) < 2 or array.size == 0:
        raise DataError(
            f"{shown}: {key} is {array.dtype} {array.shape}: give numbers of two samples or more"
        )
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise DataError(f"{shown}: {key} has numbers that are not finite: remove these samples")
        return array if array.dtype in (np.float32, np.float64) else _as_float(array)
    if array.dtype == np.uint8 and array.ndim > 2 and key.startswith("x"):
        return array
    if array.dtype == np.uint64 and int(array.max()) >= 2**63:
        raise DataError(f"{shown}: {key} has integers beyond 2**63: give smaller ones")
    return array.astype(np.int64)


def _as_float(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32 if array.dtype == np.float16 else np.float64)


def _counted(found: Dataset, names: Sequence[str]) -> Dataset:
    """The same data, with the number of classes."""
    largest = max(int(found.train_labels.max()), int(found.test_labels.max()))
    return replace(found, class_count=max(0, len(names), largest + 1))


def _with_labels(found: Dataset, shown: str, names: tuple[str, ...]) -> Dataset:
    """The same data, whose targets are labels: of each input, or of parts of it.

    Args:
        names: of the classes; empty: they have none.
    """
    labels = found.train_labels, found.test_labels
    counted = _counted(found, names)
    if labels[0].ndim == 1 or labels[0].shape[1:] == (1,):
        check_labels(shown, labels, len(names) or MAX_CLASSES)
        classes = names or tuple(map(str, range(max(2, counted.class_count))))
        train, test = (of.reshape(-1) for of in labels)
        return replace(found, train_labels=train, test_labels=test, classes=classes)
    kept = [of[of != IGNORED] for of in labels]
    if not all(map(len, kept)) or min(int(of.min()) for of in kept) < 0:
        raise DataError(
            f"{shown}: the labels of a sequence must be 0 or more, or {IGNORED} where there is none; "
            "training and test data need some each"
        )
    if names and counted.class_count > len(names):
        raise DataError(
            f"{shown}: there are {len(names)} classes, and a label of {counted.class_count - 1}: number "
            "the classes from 0"
        )
    return counted


def check_labels(shown: str, labels: Iterable[np.ndarray], classes: int) -> None:
    """Raise DataError unless labels lie between 0 and `classes` - 1."""
    if any(int(of.min()) < 0 or int(of.max()) >= classes for of in labels):
        raise DataError(
            f"{shown}: labels must lie between 0 and {classes - 1}: number the classes from 0"
        )


def class_names(shown: str, given: Any) -> tuple[str, ...]:
    """The names of the classes; none if there are none."""
    if given is None:
        return ()
    names = np.asarray(given)
    if names.dtype.kind != "U" or names.ndim != 1 or len(names) < 2:
        raise DataError(f"{shown}: classes must be a one-dimensional array of two or more strings")
    if len(names) > MAX_CLASSES:
        raise DataError(f"{shown} has {len(names)} classes: it may have {MAX_CLASSES}")
    found = tuple(names.tolist())
    if len(set(found)) < len(found):
        raise DataError(f"{shown}: two classes have the same name: give each a name of its own")
    return found
