"""A data set as uint8 NHWC arrays, and its one normalisation."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike

from lockstep.common.protocol import Task

_BLOCK = 1 << 15  # pixels that are normalised at a time
_TABLE = (np.arange(256, dtype=np.float64) / 255 - 0.5) / 0.5


IGNORED = -100  # where a sequence of labels has none; PyTorch's `ignore_index`


@dataclass(frozen=True, eq=False)
class Dataset:
    """Two splits of labelled pictures, or the inputs and targets of a user's pair. Labels lie
    between 0 and len(classes) - 1, and no split is empty.

    For a pair, inputs and targets may have any shapes (n, ...). They are uint8 (pictures, of three
    axes or more), int64, float32 or float64.
    """

    name: str  # "cifar10", "digits", or the path's last component
    train_images: np.ndarray  # uint8 (n, 32, 32, 3)
    train_labels: np.ndarray  # int64 (n,)
    test_images: np.ndarray  # uint8 (m, 32, 32, 3)
    test_labels: np.ndarray  # int64 (m,)
    classes: tuple[
        str, ...
    ]  # by label, verbatim; none where a target is not the class of its input
    class_count: int = 0  # for what builds a pair's networks, where there are no `classes`

    @property
    def task(self) -> Task:
        """What a network is built for."""
        count = len(self.classes) or self.class_count
        return Task(count, self.train_images[:2], self.train_labels[:2])

    @property
    def has_pictures(self) -> bool:
        """Whether inputs can be shown: (n, height, width, 3), or of one channel."""
        images = self.train_images
        shaped = images.ndim == 3 or (images.ndim == 4 and images.shape[-1] in (1, 3))
        return images.dtype == np.uint8 and shaped

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
        facts: list[object] = [self.classes, [array.shape for array in splits]]
        if not (self.classes and self.train_images.dtype == np.uint8):  # else pixels and labels
            facts.append([array.dtype.name for array in splits])
        digest = hashlib.sha256(json.dumps(facts).encode())
        for array in splits:
            plain = array.ndim == 1 and array.dtype.kind in "iu"
            little = np.dtype("<i8") if plain else array.dtype.newbyteorder("<")
            digest.update(np.ascontiguousarray(array, little).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


def label_count(labels: np.ndarray) -> int:
    """The weight of a batch in the mean over several: the number of its labels that are not
    IGNORED, of sequences and pixels; of all else, of samples.

    Args:
        labels: (n, ...), or any other targets.
    """
    if labels.ndim > 1 and labels.dtype.kind == "i":
        return int(np.count_nonzero(labels != IGNORED))
    return len(labels)


def bytes_per_input(images: np.ndarray, dtype: np.dtype) -> int:
    """What one input takes that is computed in this precision.

    Args:
        images: (n, ...): of a `Dataset`.
    """
    integers = images.dtype.kind == "i"
    return math.prod(images.shape[1:]) * (images.itemsize if integers else dtype.itemsize)


def normalise(images: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Map 0..255 to -1..1 by (x / 255 - 0.5) / 0.5, the tutorial's `ToTensor` and `Normalize(0.5,
    0.5)`.

    The formula is computed in float64 for each of the 256 values and rounded once, so every backend
    gets the same bits.

    Args:
        images: uint8, of any shape; other inputs are not scaled: floating-point ones are rounded
            to `dtype`, and integers returned.
        dtype: a floating-point NumPy dtype, `ml_dtypes.bfloat16` included.

    Returns:
        An array of that dtype and the images' shape.
    """
    if images.dtype != np.uint8:  # of a user's pair
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
