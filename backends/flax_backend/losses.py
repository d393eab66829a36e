"""The loss, and the norm of all gradients. Reads next to backends/torch_backend/losses.py."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lockstep.backends.flax_backend.state import Parameters
from lockstep.common.data.dataset import IGNORED

Loss = Callable[..., jax.Array]  # of outputs and targets


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Mean over the batch of -log softmax(logits)[label], in nats; in float32 at least.

    With `smoothing`, that share of each label is spread evenly over all classes, its own included.
    """
    logits = upcast(logits)
    if smoothing == 0:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    else:  # optax smooths distributions, not integers
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), smoothing
        )
        losses = optax.softmax_cross_entropy(logits, targets)
    return losses.mean()


def of_pair(loss: str | Loss) -> Loss:
    """The loss of a user's pair: its own function, or the one of this name."""
    return LOSSES[loss] if isinstance(loss, str) else loss


def cross_entropy_of_each(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy over the last axis: the mean over all labels but those that are IGNORED."""
    kept = labels != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(
        upcast(logits), jnp.where(kept, labels, 0)
    )
    return jnp.where(kept, losses, 0).sum() / kept.sum()


def mean_squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.squared_error(upcast(outputs), like(targets, outputs)).mean()


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Of targets from 0 to 1, each with a logit of its own."""
    return optax.sigmoid_binary_cross_entropy(upcast(logits), like(targets, logits)).mean()


def huber(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Half the squared error up to 1, linear beyond (Huber 1964, doi:10.1214/aoms/1177703732)."""
    return optax.huber_loss(upcast(outputs), like(targets, outputs)).mean()


LOSSES: dict[str, Loss] = {
    "cross entropy": cross_entropy_of_each,
    "mean squared error": mean_squared_error,
    "binary cross entropy": binary_cross_entropy,
    "huber": huber,
}


def like(targets: jax.Array, outputs: jax.Array) -> jax.Array:
    """In the outputs' shape and dtype, float32 at least; without broadcasting: (n,) fits (n, 1)."""
    return targets.astype(upcast(outputs).dtype).reshape(outputs.shape)


def global_norm(gradients: Parameters) -> jax.Array:
    """The Euclidean norm of all gradients together, in float64: PyTorch's in float32 is too
    inexact on the CPU to compare."""

    def sum_of_squares(gradient: jax.Array) -> jax.Array:
        squares = gradient.astype(jnp.float64).reshape(-1) ** 2
        # By halves: XLA's sum takes one number after the other, slowly and inexactly.
        while squares.size > 500 and squares.size % 2 == 0:
            first, second = jnp.split(squares, 2)
            squares = first + second
        return squares.sum()

    return jnp.sqrt(sum(map(sum_of_squares, gradients.values())))


def upcast(array: jax.Array) -> jax.Array:
    """bfloat16 as float32: three digits are too few to sum in."""
    return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array
