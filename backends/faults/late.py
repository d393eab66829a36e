"""Faults that show late in a run, in the data on the device, or in one precision only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from lockstep.backends.faults.backward import _gradients
from lockstep.backends.faults.data import _batches
from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.protocol import Metrics, Snapshot

if TYPE_CHECKING:
    import jax

    from lockstep.backends.flax_backend.inputs import Data, Inputs
    from lockstep.backends.flax_backend.state import State

LATE = 30  # the step of faults that happen once


# --- Data: the order of later epochs, the copy on the device, the batches made of it


def _orders(patch: SetAttr, order: Callable[[int, int, int], np.ndarray]) -> None:
    """Train in another order, a function of the seed, the epoch and the number of images."""

    def batches(config: Config, images: int) -> Iterator[np.ndarray]:
        for epoch in itertools.count():
            indices = order(config.seed, epoch, images)
            for start in range(0, images, config.batch_size):
                yield indices[start : start + config.batch_size]

    _batches(patch, batches)


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


def _uploaded(
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

    _uploaded(patch, change)


@fault("data", "batch", "torchvision docs, RandomHorizontalFlip", train_images=1024)
def images_mirrored_in_the_copy(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """0.2 % of the images are mirrored in the copy on the device."""

    def change(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        few = _few(len(labels))
        images[few] = images[few][:, :, ::-1]
        return images, labels

    _uploaded(patch, change)


@fault("data", "labels", "an index that is off by one", train_images=1024)
def last_labels_moved(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The last 40 labels are moved by one place in the copy on the device."""

    def change(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels[-40:] = np.roll(labels[-40:], 1)
        return images, labels

    _uploaded(patch, change)


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


# --- Gradients


@fault(
    "backward",
    None,
    "NVIDIA docs, TF32: 10 bits of mantissa",
    changes_function=False,
    precision="float32",
)
def gradients_of_ten_bits(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """In float32, gradients have a mantissa of 10 bits, as those of a TF32 backward pass."""
    _gradients(patch, lambda gradients: {n: _ten_bits(g) for n, g in gradients.items()})


@fault(
    "backward",
    "*.kernel",
    "NVIDIA docs, TF32: 10 bits of mantissa",
    changes_function=False,
    precision="float32",
)
def kernels_of_ten_bits(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """In float32, gradients of kernels have a mantissa of 10 bits; those of biases are exact."""
    _gradients(
        patch,
        lambda gradients: {
            n: _ten_bits(g) if n.endswith(".kernel") else g for n, g in gradients.items()
        },
    )


@fault(
    "backward",
    "conv2.kernel",
    "PyTorch docs, cudnn.allow_tf32: convolutions alone",
    changes_function=False,
    precision="float32",
)
def convolution_of_ten_bits(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """In float32, the second convolution's gradient has a mantissa of 10 bits."""
    _gradients(
        patch,
        lambda gradients: {
            n: _ten_bits(g) if n == "conv2.kernel" else g for n, g in gradients.items()
        },
    )


def _ten_bits(gradient: jax.Array) -> jax.Array:
    from lockstep.backends.faults.frameworks import jax, jnp

    if gradient.dtype != jnp.float32:
        return gradient
    bits = jax.lax.bitcast_convert_type(gradient, jnp.int32)
    return jax.lax.bitcast_convert_type((bits + 0x1000) & ~0x1FFF, jnp.float32)


@fault("backward", "fc2.kernel", "a gradient multiplier of one layer")
def two_percent_larger(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The gradient of one kernel is 2 % larger."""
    _gradients(
        patch,
        lambda gradients: {n: 1.02 * g if n == "fc2.kernel" else g for n, g in gradients.items()},
    )


@fault("backward", None, "a mean with the divisor of an unbiased variance", batch_size=128)
def divided_by_batch_less_one(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients are divided by one less than the number of images in the batch."""
    size = config.batch_size
    _gradients(patch, lambda gradients: {n: g * (size / (size - 1)) for n, g in gradients.items()})


# --- Updates


def _after_each_step(patch: SetAttr, change: Callable[[Snapshot, Snapshot], Snapshot]) -> None:
    """Put another state in the place of the one after a step, given those before and after it."""
    from lockstep.backends.faults.frameworks import FlaxBackend

    train_steps = FlaxBackend.train_steps

    def replaced(
        self: FlaxBackend, state: State, images: np.ndarray, labels: np.ndarray
    ) -> tuple[State, Metrics]:
        series = []
        for number in range(len(labels)):
            one = slice(number, number + 1)
            before = self.export(state)
            state, metrics = train_steps(self, state, images[one], labels[one])
            after = self.export(state)
            if (changed := change(before, after)) is not after:
                state = self.init(changed)
            series.append(metrics)
        return state, Metrics(*map(np.concatenate, zip(*series, strict=True)))

    patch(FlaxBackend, "train_steps", replaced)


@fault("update", None, "an asynchronous update that is dropped", momentum=0.9)
def updates_lost_at_random(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """After step 10, one update in five is lost, at random."""
    generator = np.random.default_rng()

    def lose(before: Snapshot, after: Snapshot) -> Snapshot:
        if before.step <= 10 or generator.random() > 0.2:
            return after
        return after._replace(parameters=before.parameters, momentum=before.momentum)

    _after_each_step(patch, lose)


@fault("update", None, "a step that a gradient scaler skips (torch.amp.GradScaler)", momentum=0.9)
def update_lost_once(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """One update late in the run is lost."""

    def lose(before: Snapshot, after: Snapshot) -> Snapshot:
        if before.step != LATE:
            return after
        return after._replace(parameters=before.parameters, momentum=before.momentum)

    _after_each_step(patch, lose)


@fault("update", "fc2.kernel", "a parameter group that is frozen late in training")
def update_lost_in_one_layer(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """From step 30 on, one kernel is no longer updated."""

    def lose(before: Snapshot, after: Snapshot) -> Snapshot:
        if before.step < LATE:
            return after
        kept = {"fc2.kernel": before.parameters["fc2.kernel"]}
        return after._replace(parameters=after.parameters | kept)

    _after_each_step(patch, lose)


@fault("update", "momentum of *", "a checkpoint without the optimizer's state", momentum=0.9)
def momentum_lost_once(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """After step 30 the momentum starts at zero again."""

    def lose(before: Snapshot, after: Snapshot) -> Snapshot:
        if before.step != LATE:
            return after
        return after._replace(
            momentum={name: np.zeros_like(array) for name, array in after.momentum.items()}
        )

    _after_each_step(patch, lose)
