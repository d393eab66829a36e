"""A multilayer perceptron, as a `flax.nnx.Module`."""

from __future__ import annotations

import jax
from flax import nnx


class MLP(nnx.Module):
    """Images (n, 32, 32, 3) to logits (n, classes), by three dense layers."""

    def __init__(self, classes: int, device: str, rngs: nnx.Rngs) -> None:
        del device  # it chooses a convolution; there is none here
        self.fc1 = nnx.Linear(32 * 32 * 3, 256, rngs=rngs)
        self.fc2 = nnx.Linear(256, 128, rngs=rngs)
        self.fc3 = nnx.Linear(128, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.fc1(x))
        x = nnx.relu(self.fc2(x))
        return self.fc3(x)
