"""Faults of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.common.config import Config
from lockstep.common.data import Dataset

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import jax


def change_loss(patch: SetAttr, loss: Callable[[jax.Array, jax.Array], jax.Array]) -> None:
    """Replace the mean cross entropy by `loss(logits, labels)`."""
    from lockstep.backends.faults.frameworks import flax_backend

    patch(flax_backend, "cross_entropy", lambda logits, labels, smoothing=0.0: loss(logits, labels))


@fault(
    "loss",
    "loss",
    "PyTorch docs, CrossEntropyLoss: reduction is mean; optax returns one loss per example",
)
def sum_for_mean(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The loss is summed over the batch."""
    from lockstep.backends.faults.frameworks import optax

    change_loss(
        patch,
        lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(
            logits, labels
        ).sum(),
    )


@fault(
    "loss", "loss", "PyTorch docs, CrossEntropyLoss: the mean is over examples, not over classes"
)
def mean_over_classes(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The mean is over examples and classes, since labels are one-hot vectors."""
    from lockstep.backends.faults.frameworks import jax, jnp

    def over_all(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return -jnp.mean(
            jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
            * jax.nn.log_softmax(logits)
        )

    change_loss(patch, over_all)


@fault(
    "loss",
    "loss",
    "optax docs, smooth_labels; PyTorch docs, CrossEntropyLoss: label_smoothing is 0",
)
def label_smoothing(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Labels are smoothed by one hundredth."""
    from lockstep.backends.faults.frameworks import jax, optax

    def smoothed(logits: jax.Array, labels: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), 0.01
        )
        return optax.softmax_cross_entropy(logits, targets).mean()

    change_loss(patch, smoothed)


@fault(
    "loss",
    "loss",
    "The Annotated Transformer, LabelSmoothing: smoothing / (size - 2)",
    label_smoothing=0.1,
)
def smoothed_over_the_others(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Label smoothing is spread over the other classes only; PyTorch and optax spread it over
    all."""
    from lockstep.backends.faults.frameworks import flax_backend

    right = flax_backend.cross_entropy

    def over_others(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
        classes = logits.shape[-1]
        # the label itself gets one of these shares
        return right(logits, labels, smoothing * classes / (classes - 1))

    patch(flax_backend, "cross_entropy", over_others)


@fault("loss", "loss", "tflearn#562, lightning-bolts#654: softmax applied twice")
def softmax_twice(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The loss takes the softmax of probabilities: softmax is applied twice."""
    from lockstep.backends.faults.frameworks import flax_backend, jax

    right = flax_backend.cross_entropy
    change_loss(patch, lambda logits, labels: right(jax.nn.softmax(logits), labels))


@fault("loss", "loss", "Keras docs, config.epsilon: 1e-7")
def epsilon_in_the_logarithm(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The logarithm is taken of the probability plus 1e-7."""
    from lockstep.backends.faults.frameworks import jax, jnp

    def guarded(logits: jax.Array, labels: jax.Array) -> jax.Array:
        probabilities = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=-1)
        return -jnp.log(probabilities + 1e-7).mean()

    change_loss(patch, guarded)


@fault(
    "loss",
    "loss",
    "algorithmic-efficiency#318: a smaller last batch, and what a mean divides by",
    train_images=1000,
)
def mean_over_padding(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The last batch is padded to full size, and the loss of its images divided by that size."""
    from lockstep.backends.faults.frameworks import optax

    def padded(logits: jax.Array, labels: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.sum() / max(len(labels), config.batch_size)

    change_loss(patch, padded)
