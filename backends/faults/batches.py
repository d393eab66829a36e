"""Faults of the batches: their order in later epochs, the copy of the data on the device, and the
images that are taken from it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from lockstep.backends.faults.data import replace_batches
from lockstep.backends.faults.registry import LATE, SetAttr, fault
from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.data import Dataset

if TYPE_CHECKING:
    import jax

    from lockstep.backends.flax_backend.inputs import Data, Inputs


def _orders(patch: SetAttr, order: Callable[[int, int, int], np.ndarray]) -> None:
    """Train in another order, a function of the seed, the epoch and the number of images."""

    def batches(config: Config, images: int) -> Iterator[np.ndarray]:
        for epoch in itertools.count():
            indices = order(config.seed, epoch, images)
            for start in range(0, images, config.batch_size):
                yield indices[start : start + config.batch_size]

    replace_batches(patch, batches)


@fault("data", "batch", "PyTorch docs, reproducibility: seed_worker", train_images=320)
def unseeded_shuffle_later(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """From the second epoch on, the images are shuffled without a seed."""
    generator = np.random.default_rng()
    _orders(
        patch,
        lambda seed, epoch, images: (
            generator.permutation(images) if epoch else data.permutation(seed, epoch, images)
        ),
    )


@fault(
    "data",
    "batch",
    "PyTorch docs, DistributedSampler: set_epoch before each epoch",
    train_images=320,
)
def epoch_set_late(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The sampler is told of an epoch one epoch late."""
    _orders(patch, lambda seed, epoch, images: data.permutation(seed, max(0, epoch - 1), images))


@fault("data", "batch", "PyTorch docs, DataLoader: shuffle defaults to False", train_images=320)
def not_shuffled_later(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """From the fourth epoch on, the images are not shuffled."""
    _orders(
        patch,
        lambda seed, epoch, images: (
            np.arange(images) if epoch >= 3 else data.permutation(seed, epoch, images)
        ),
    )


def change_upload(
    patch: SetAttr, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> None:
    """Change the data set on its way to the device: copies of its images and labels."""
    from lockstep.backends.faults.frameworks import Inputs

    upload = Inputs.upload
    patch(
        Inputs,
        "upload",
        lambda self, images, labels: upload(self, *change(images.copy(), labels.copy())),
    )


def _few(images: int) -> np.ndarray:
    """The numbers of 0.2 % of the images."""
    return np.random.default_rng(0).choice(images, max(1, images // 500), replace=False)


@fault("data", "batch", "Northcutt et al. 2021, arXiv:2103.14749: label errors", train_images=1024)
def labels_changed_in_the_copy(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Labels of 0.2 % of the images are changed in the copy on the device."""

    def change(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        few = _few(len(labels))
        labels[few] = (labels[few] + 1) % len(dataset.classes)
        return images, labels

    change_upload(patch, change)


@fault("data", "batch", "torchvision docs, RandomHorizontalFlip", train_images=1024)
def images_mirrored_in_the_copy(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """0.2 % of the images are mirrored in the copy on the device."""

    def change(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        few = _few(len(labels))
        images[few] = images[few][:, :, ::-1]
        return images, labels

    change_upload(patch, change)


@fault("data", "labels", "an index that is off by one", train_images=1024)
def last_labels_moved(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The last 40 labels are moved by one place in the copy on the device."""

    def change(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels[-40:] = np.roll(labels[-40:], 1)
        return images, labels

    change_upload(patch, change)


def _gathered(patch: SetAttr, change: Callable[[np.ndarray, int], np.ndarray]) -> None:
    """Change the image numbers (steps, batch) on their way to the device.

    Args:
        change: is given the number of the first of these steps, too.
    """
    from lockstep.backends.faults.frameworks import Inputs

    batches, upload = Inputs.batches, Inputs.upload
    steps = {"done": 0}

    def start(self: Inputs, images: np.ndarray, labels: np.ndarray) -> Data:
        steps["done"] = 0  # every run uploads its data first
        return upload(self, images, labels)

    def replaced(self: Inputs, uploaded: Data, indices: np.ndarray) -> tuple[jax.Array, jax.Array]:
        changed = change(indices.copy(), steps["done"])
        steps["done"] += len(indices)
        return batches(self, uploaded, changed)

    patch(Inputs, "upload", start)
    patch(Inputs, "batches", replaced)


@fault("data", "batch", "a prefetched batch that is used twice")
def batch_repeated_late(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """One batch late in the run is the one before it again."""

    last: list[np.ndarray] = []  # the batch before those of a chunk

    def change(indices: np.ndarray, done: int) -> np.ndarray:
        place = LATE - done
        if 0 <= place < len(indices):
            indices[place] = indices[place - 1] if place else last[0]
        last[:] = [indices[-1]]
        return indices

    _gathered(patch, change)


@fault("data", "images", "jax docs, indexing: out-of-bounds indices are clamped", train_images=1024)
def indices_clamped(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Numbers of the last 20 images are clamped, as an index out of bounds is in JAX."""
    last = len(dataset.train_images) - 21
    _gathered(patch, lambda indices, done: np.minimum(indices, last))


@fault("data", "batch", "PyTorch docs, DataLoader: the order within a batch is the sampler's")
def batch_in_another_order(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """From the third step on, a batch holds its images in another order."""
    _gathered(patch, lambda indices, done: indices[:, ::-1] if done >= 2 else indices)
