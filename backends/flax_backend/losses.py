"""The loss, and the norm of all gradients. Reads next to backends/torch_backend/losses.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from lockstep.backends.flax_backend.state import Parameters


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
