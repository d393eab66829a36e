"""Faults of the input: images, labels, and the order of both."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import ml_dtypes
import numpy as np

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.data import Dataset, augment
from lockstep.common.runs import training

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import FlaxBackend, State

Result = TypeVar("Result")


def change_images(patch: SetAttr, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change normalised images, (..., n, 32, 32, 3), on their way into JAX."""
    from lockstep.backends.faults.frameworks import Inputs

    images_of = Inputs.images
    patch(
        Inputs,
        "images",
        lambda self, images: images_of(self, np.ascontiguousarray(change(np.asarray(images)))),
    )


def replace_batches(patch: SetAttr, own: Callable[[Config, int], Iterator[np.ndarray]]) -> None:
    """Train on other batches. The order in the record stays the right one."""
    chunks = training.chunks

    def replaced(config: Config, images: int, bytes_per_image: int) -> Iterator[np.ndarray]:
        batches = own(config, images)
        for indices in chunks(config, images, bytes_per_image):
            yield np.stack([next(batches) for _ in indices])

    patch(training, "chunks", replaced)


def imagenet(images: np.ndarray) -> np.ndarray:
    """Images normalised by 0.5 and 0.5, normalised by ImageNet's mean and deviation instead."""
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((images * 0.5 + 0.5 - mean) / deviation).astype(images.dtype)


@fault(
    "data",
    "images",
    "OpenCV docs, imread: channels are stored in B G R order",
    needs_color_images=True,
)
def bgr(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Images are read with their channels reversed, blue first."""
    change_images(patch, lambda images: images[..., ::-1])


@fault(
    "data",
    "images",
    "CIFAR-10's page: each row holds the red plane, then the green, then the blue one",
)
def planes_as_pixels(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """CIFAR-10's planes are reshaped to (32, 32, 3) without being transposed."""
    change_images(patch, lambda images: np.moveaxis(images, -1, -3).reshape(images.shape))


@fault(
    "data",
    "images",
    "torchvision's ImageNet weights: mean 0.485, 0.456, 0.406, deviation 0.229, 0.224, 0.225",
)
def other_normalisation(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Images are normalised by ImageNet's mean and deviation, not by 0.5 and 0.5."""
    change_images(patch, imagenet)


@fault("data", "images", "torchvision docs, ToTensor: scales 0..255 to 0..1, by 255")
def divided_by_256(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Pixels are divided by 256 in place of 255."""
    change_images(patch, lambda images: (((images + 1) * (255 / 256)) - 1).astype(images.dtype))


@fault(
    "data",
    "images",
    "algorithmic-efficiency: preprocessing in bfloat16 on TPUs",
    changes_function=False,
)
def images_in_bfloat16(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Images pass through bfloat16 on their way to the device."""
    change_images(patch, lambda images: images.astype(ml_dtypes.bfloat16).astype(images.dtype))


@fault(
    "data",
    "images",
    "jax docs, Common Gotchas: Double (64bit) precision",
    changes_function=False,
    precision="float64",
)
def x64_left_off(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """JAX's float64 was not enabled, so everything is float32, without a warning."""
    from lockstep.backends.faults.frameworks import FlaxBackend, Inputs, convert

    init, images_of, to_array = FlaxBackend.__init__, Inputs.images, convert.to_array

    def built(
        self: FlaxBackend,
        config: Config,
        classes: int,
        dtype: str,
        device: str,
        compile: str,
        concurrent_processes: int,
    ) -> None:
        init(self, config, classes, "float32", device, compile, concurrent_processes)

    patch(FlaxBackend, "__init__", built)
    patch(Inputs, "images", lambda self, images: images_of(self, images.astype(np.float32)))
    patch(convert, "to_array", lambda array: to_array(array.astype(np.float32)))


@fault("data", "images", "torchvision docs, RandomHorizontalFlip")
def augmentation_left_on(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The first image of each batch is mirrored."""

    def mirrored(images: np.ndarray) -> np.ndarray:
        images = images.copy()
        images[..., 0, :, :, :] = images[..., 0, :, ::-1, :]
        return images

    change_images(patch, mirrored)


@fault(
    "data",
    "images",
    "torchvision docs, RandomCrop and RandomHorizontalFlip: in which order",
    augment="crop-flip",
)
def flipped_before_cropping(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Images are flipped and then cropped, with the same random numbers, so that the crop moves
    from the left to the right."""
    right = augment.crop_flip

    def flipped_first(images: np.ndarray, given: augment.CropFlip) -> np.ndarray:
        mirrored = np.where(given.flip[..., None, None, None], images[..., ::-1, :], images)
        return right(mirrored, given._replace(flip=np.zeros_like(given.flip)))

    patch(augment, "crop_flip", flipped_first)


@fault(
    "data",
    "images",
    "torchvision docs, RandomCrop: fill is 0, of what it is given",
    augment="crop-flip",
)
def padded_after_normalising(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Images are padded with zeros after they are normalised, which makes the border grey, not
    black."""

    def late(
        config: Config, images: np.ndarray, indices: np.ndarray, step: int, dtype: np.dtype
    ) -> np.ndarray:
        normalised = data.normalise(images[indices], dtype)
        return augment.crop_flip(
            normalised, augment.parameters_for(config, len(images), indices, step)
        )

    patch(augment, "batches", late)


@fault(
    "data",
    "images",
    "PyTorch docs, Reproducibility: each library has a random generator of its own",
)
def other_shuffle(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The port shuffles with its own random generator."""
    replace_batches(
        patch,
        lambda config, n: data.batch_indices(dataclasses.replace(config, seed=config.seed + 1), n),
    )


@fault("data", "images", "PyTorch docs, DataLoader: shuffle defaults to False")
def not_shuffled(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Images come in the order in which they are stored."""

    def in_order(config: Config, images: int) -> Iterator[np.ndarray]:
        starts = range(0, images - config.batch_size + 1, config.batch_size)
        return itertools.cycle(np.arange(start, start + config.batch_size) for start in starts)

    replace_batches(patch, in_order)


@fault(
    "data",
    "images",
    "PyTorch docs, DistributedSampler: without set_epoch the order never changes",
    train_images=1024,
)
def same_order_every_epoch(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Every epoch has the order of the first."""

    def repeated(config: Config, images: int) -> Iterator[np.ndarray]:
        first = dataclasses.replace(config, steps=config.batches_per_epoch(images))
        return itertools.cycle(list(data.batch_indices(first, images)))

    replace_batches(patch, repeated)


@fault(
    "data",
    "images",
    "PyTorch docs, DataLoader: drop_last; tf.data, batch: drop_remainder",
    train_images=1000,
)
def last_batch_dropped(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The smaller last batch of each epoch is left out."""
    replace_batches(
        patch, lambda config, n: data.batch_indices(dataclasses.replace(config, drop_last=True), n)
    )


@fault(
    "data", "labels", "MATLAB counts from 1, as do the labels of its .mat files (SVHN's 10 is a 0)"
)
def labels_from_one(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Labels count from one, modulo the number of classes."""
    from lockstep.backends.faults.frameworks import Inputs

    labels_of, classes = Inputs.labels, len(dataset.classes)
    patch(Inputs, "labels", lambda self, labels: labels_of(self, (labels + 1) % classes))


@fault(
    "data",
    "labels",
    "Northcutt et al. 2021, Pervasive Label Errors in Test Sets",
    train_images=1000,
)
def one_label_in_a_thousand(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """One training label in a thousand is wrong."""
    from lockstep.backends.faults.frameworks import FlaxBackend

    wrong = {image.tobytes() for image in dataset.train_images[::1000]}

    def relabelled(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        pixels = np.rint((images.astype(np.float64) * 0.5 + 0.5) * 255).astype(np.uint8)
        found = np.array([pixels[place].tobytes() in wrong for place in np.ndindex(labels.shape)])
        return np.where(found.reshape(labels.shape), (labels + 1) % len(dataset.classes), labels)

    for name in ("train_step", "train_steps", "probe"):
        patch(FlaxBackend, name, _with_labels(getattr(FlaxBackend, name), relabelled))


def _with_labels(
    method: Callable[[FlaxBackend, State, np.ndarray, np.ndarray], Result],
    change: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> Callable[[FlaxBackend, State, np.ndarray, np.ndarray], Result]:
    return lambda self, state, images, labels: method(self, state, images, change(images, labels))
