"""A data set as uint8 NHWC arrays, and its one normalisation."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

_BLOCK = 1 << 15  # pixels that are normalised at a time
_TABLE = (np.arange(256, dtype=np.float64) / 255 - 0.5) / 0.5


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits of labelled pictures, or of what a pair's example holds. Labels lie between 0 and
    len(classes) - 1, and no split is empty."""

    name: str  # "cifar10", "digits", or the path's last component
    train_images: np.ndarray  # uint8 (n, 32, 32, 3); of an example, any (n, ...)
    train_labels: np.ndarray  # int64 (n,); of an example, any (n, ...)
    test_images: np.ndarray  # uint8 (m, 32, 32, 3)
    test_labels: np.ndarray  # int64 (m,)
    classes: tuple[str, ...]  # by label, verbatim

    def first_test_images(self, count: int) -> Dataset:
        """With at most so many test images: evaluation dominates a short run."""
        return dataclasses.replace(
            self, test_images=self.test_images[:count], test_labels=self.test_labels[:count]
        )

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


def of_example(name: str, inputs: np.ndarray, targets: np.ndarray) -> Dataset:
    """A data set of what a pair's example holds, which also is its test data; integers are
    classes."""
    if targets.dtype.kind == "f":
        return Dataset(name, inputs, targets, inputs, targets, ())
    classes = tuple(map(str, range(int(targets.max()) + 1)))
    targets = targets.astype(np.int64)
    return Dataset(name, inputs, targets, inputs, targets, classes)


def normalise(images: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Map 0..255 to -1..1 by (x / 255 - 0.5) / 0.5, the tutorial's `ToTensor` and `Normalize(0.5,
    0.5)`.

    The formula is computed in float64 for each of the 256 values and rounded once, so every backend
    gets the same bits.

    Args:
        images: uint8, of any shape; other numbers are not scaled: floating-point ones are rounded
            to `dtype`, and integers returned.
        dtype: a floating-point NumPy dtype, `ml_dtypes.bfloat16` included.

    Returns:
        An array of that dtype and the images' shape.
    """
    if images.dtype != np.uint8:  # of a pair's own example
        return images.astype(dtype) if images.dtype.kind == "f" else images
    table, normalised = _TABLE.astype(dtype), np.empty(images.shape, dtype)
    pixels, values = images.reshape(-1), normalised.reshape(-1)
    # `table[images]` makes every index eight bytes wide first. Those of a block stay in the
    # processor's cache, which takes half the time; and with `clip`, which no byte needs, `take`
    # writes where it is told to, without a copy.
    for start in range(0, len(pixels), _BLOCK):
        block = slice(start, start + _BLOCK)
        table.take(pixels[block], out=values[block], mode="clip")
    return normalised
