"""Augmented training images: the same bytes for both backends, for their twins, and for runs that
are resumed.

An image's crop and flip are a pure function of the seed, the epoch and the image's place in the
data set.
No state is carried along, and neither the order of the images nor the size of the batches matters.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from lockstep.common.config import Config
from lockstep.common.data import normalise

PADDING = 4  # pixels on each side, as in the usual recipe for CIFAR-10
AUGMENT_STREAM = int.from_bytes(
    b"crop", "big"
)  # keeps these random numbers apart from those of lockstep.common.data


class CropFlip(NamedTuple):
    """The crop and the flip of each image; all arrays have one shape."""

    top: np.ndarray  # int64, 0 to 2 PADDING: the first row that is kept of the padded image
    left: np.ndarray  # int64, 0 to 2 PADDING: the first column
    flip: np.ndarray  # bool: mirror what was cropped, left to right


def batches(
    config: Config, images: np.ndarray, indices: np.ndarray, step: int, dtype: DTypeLike
) -> np.ndarray:
    """The batches of steps `step`, `step` + 1, ... as training sees them: augmented, if asked for,
    and normalised.

    Args:
        images: uint8 (n, 32, 32, 3), all training images.
        indices: int64 (steps, batch).
        dtype: a floating-point NumPy dtype.

    Returns:
        (steps, batch, 32, 32, 3) of that dtype.
    """
    chosen = images[indices]
    if config.augment is not None:
        # Before they are normalised, so that what is padded is black, as with torchvision's
        # RandomCrop before ToTensor.
        chosen = crop_flip(chosen, parameters_for(config, len(images), indices, step))
    return normalise(chosen, dtype)


def parameters_for(config: Config, images: int, indices: np.ndarray, step: int) -> CropFlip:
    """The draws for the images of steps `step`, `step` + 1, ...: arrays (steps, batch), as
    `indices`."""
    epochs = (step + np.arange(len(indices))) // config.batches_per_epoch(images)
    of_epochs = [draw_parameters(config.seed, int(epoch), images) for epoch in epochs]
    rows = [
        CropFlip(*(array[row] for array in of_epoch))
        for of_epoch, row in zip(of_epochs, indices, strict=True)
    ]
    return CropFlip(*map(np.stack, zip(*rows, strict=True)))


@functools.lru_cache(maxsize=2)  # a chunk of batches may reach into the next epoch
def draw_parameters(seed: int, epoch: int, images: int) -> CropFlip:
    """The crops and flips of one epoch, in the order of the data set; epochs count from 0."""
    generator = np.random.default_rng(np.random.SeedSequence((seed, AUGMENT_STREAM, epoch)))
    top, left = generator.integers(0, 2 * PADDING, (2, images), endpoint=True)
    return CropFlip(top, left, generator.integers(0, 2, images).astype(bool))


def crop_flip(images: np.ndarray, given: CropFlip) -> np.ndarray:
    """Images (..., height, width, channels), padded by zeros, cropped to their size again, and
    mirrored or not.

    That is torchvision's `RandomCrop(32, padding=4)` and then `RandomHorizontalFlip()`, with these
    draws.
    """
    height, width, channels = images.shape[-3:]
    flat = images.reshape(-1, height, width, channels)
    padded = np.pad(flat, ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    cropped = np.empty_like(flat)
    # One by one: that takes a third of what indexing all of them at once takes, pixel by pixel.
    for number, (top, left, flip) in enumerate(
        zip(*(array.ravel().tolist() for array in given), strict=True)
    ):
        crop = padded[number, top : top + height, left : left + width]
        cropped[number] = crop[:, ::-1] if flip else crop
    return cropped.reshape(images.shape)
