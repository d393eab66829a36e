"""scikit-learn's handwritten digits, padded to 32 x 32 pixels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from lockstep.common.data.dataset import Dataset

DIGITS_TEST_IMAGES = 360  # the last of scikit-learn's 1797


def load_digits() -> Dataset:
    flat, labels = read_digits()
    grey = np.rint(flat.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # from 0..16
    images = grey.repeat(4, axis=1).repeat(4, axis=2)[..., None].repeat(3, axis=3)
    labels, cut = labels.astype(np.int64), len(images) - DIGITS_TEST_IMAGES
    return Dataset(
        "digits", images[:cut], labels[:cut], images[cut:], labels[cut:], tuple("0123456789")
    )


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 images, a row of 64 values from 0 to 16 each, and their labels.

    The file is read where scikit-learn has it: importing scikit-learn takes a second.
    """
    found = importlib.util.find_spec("sklearn")
    folders = (found and found.submodule_search_locations) or []
    for folder in folders:
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.exists():
            table = np.loadtxt(path, delimiter=",")
            return table[:, :-1], table[:, -1]
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return images, labels
