"""`load`: a data set by name or path."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from lockstep.common.config import MODELS
from lockstep.common.data import of_pair
from lockstep.common.data.cifar10 import load_cifar10
from lockstep.common.data.dataset import Dataset
from lockstep.common.data.digits import load_digits
from lockstep.common.data.user_data import load_folder, load_npz
from lockstep.common.errors import DataError
from lockstep.common.model.pair import class_count, is_labelled

CHOICES = "auto, cifar10, digits, an .npz file, or a folder of class folders"


def load(
    choice: str,
    data_dir: Path | None = None,
    announce: Callable[[str], None] = print,
    progress: bool = True,
    model: str = "net",
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
        model: what is trained. A user's pair takes arrays of any shape from an `.npz` file; and for
            "auto" the pair's own `data` or `example`, if it has one of them.

    Raises:
        DataError: if the data is missing, damaged or of the wrong form; the message is one line and
            names the remedy. Damaged CIFAR-10 is an error under "auto" too, and no damaged file is
            unpickled.
    """
    try:
        if model not in MODELS:
            return _load_for_pair(model, choice, data_dir, announce, progress)
        return _load(choice, data_dir, announce, progress)
    except MemoryError as error:
        remedy = "choose smaller data, or a machine with more memory"
        raise DataError(
            f"data {choice!r} does not fit into the memory of this machine: {remedy}"
        ) from error


def check(choice: str, data_dir: Path | None = None) -> None:
    """Raise DataError for a path that leads nowhere. Reads nothing."""
    if choice in ("auto", "cifar10"):
        if data_dir is not None and not os.path.isdir(data_dir):
            raise DataError(
                f"--data-dir {str(data_dir)!r} is not a folder: create it, or name another"
            )
    elif choice != "digits" and not os.path.exists(choice):
        raise DataError(f"data {choice!r} does not exist: choose {CHOICES}")


def _load(
    choice: str, data_dir: Path | None, announce: Callable[[str], None], progress: bool
) -> Dataset:
    check(choice, data_dir)
    if choice in ("auto", "cifar10"):
        return load_cifar10(choice, data_dir, announce, progress)
    if choice == "digits":
        return load_digits()
    if os.path.isdir(choice):
        return load_folder(Path(choice), announce)
    if os.path.isfile(choice) and choice.endswith(".npz"):
        return load_npz(Path(choice))
    raise DataError(f"data {choice!r} is neither a folder nor an .npz file: choose {CHOICES}")


def _load_for_pair(
    model: str,
    choice: str,
    data_dir: Path | None,
    announce: Callable[[str], None],
    progress: bool,
) -> Dataset:
    example, own = of_pair.example(model), of_pair.own(model)
    if choice == "auto" and own is not None:
        return own
    if choice == "auto" and example is not None:
        announce(
            f"The data are the {len(example.train_images)} samples of the pair's example, for training "
            "and for testing: name others with --data, or as the pair's data"
        )
        return example
    if os.path.isfile(choice) and choice.endswith(".npz"):
        return of_pair.of_archive(model, Path(choice))
    found = _load(choice, data_dir, announce, progress)
    count = class_count(model)
    if not is_labelled(model):
        return dataclasses.replace(found, classes=(), class_count=count or len(found.classes))
    if count and count != len(found.classes):
        raise DataError(
            f"--model {model}: the pair says {count} classes, and {found.name} has "
            f"{len(found.classes)}: make them equal, or name other data"
        )
    return found
