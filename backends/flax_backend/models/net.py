"""The network of PyTorch's tutorial 'Training a Classifier', as a `flax.nnx.Module`."""

from __future__ import annotations

import jax
from flax import nnx

from lockstep.backends.flax_backend.layers import convolution, max_pooling


class Net(nnx.Module):
    """Images (n, 32, 32, 3) to logits (n, classes)."""

    def __init__(self, classes: int, device: str, rngs: nnx.Rngs) -> None:
        convolve = convolution(device)
        self.conv1 = nnx.Conv(
            3, 6, kernel_size=(5, 5), padding="VALID", conv_general_dilated=convolve, rngs=rngs
        )
        self.pool = max_pooling(device)
        self.conv2 = nnx.Conv(
            6, 16, kernel_size=(5, 5), padding="VALID", conv_general_dilated=convolve, rngs=rngs
        )
        self.fc1 = nnx.Linear(5 * 5 * 16, 120, rngs=rngs)
        self.fc2 = nnx.Linear(120, 84, rngs=rngs)
        self.fc3 = nnx.Linear(84, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.pool(nnx.relu(self.conv1(x)))
        x = self.pool(nnx.relu(self.conv2(x)))
        x = x.reshape(x.shape[0], -1)
        x = nnx.relu(self.fc1(x))
        x = nnx.relu(self.fc2(x))
        return self.fc3(x)
