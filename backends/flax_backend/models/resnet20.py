"""The residual network of 20 layers for CIFAR-10, as a `flax.nnx.Module`.

Source: He, Zhang, Ren and Sun, 'Deep Residual Learning for Image Recognition' (arXiv:1512.03385),
section 4.2, with n = 3 and the shortcuts of option A, which have no parameters.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from lockstep.backends.flax_backend.layers import BatchNorm, convolution


class ResNet20(nnx.Module):
    """Images (n, 32, 32, 3) to logits (n, classes)."""

    def __init__(self, classes: int, device: str, rngs: nnx.Rngs) -> None:
        Conv = partial(
            nnx.Conv, use_bias=False, conv_general_dilated=convolution(device), rngs=rngs
        )
        self.conv = Conv(3, 16, kernel_size=(3, 3), padding=1)
        self.bn = BatchNorm(16, epsilon=1e-5, momentum=0.9, rngs=rngs)
        widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)  # before the first block, and after each
        self.blocks = nnx.List(
            [Block(before, after, device, rngs) for before, after in pairwise(widths)]
        )
        self.fc = nnx.Linear(64, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        x = x.mean(axis=(1, 2))
        return self.fc(x)


class Block(nnx.Module):
    """Images (n, height, width, before) to (n, height, width, after), or of half the height and
    width where after is larger than before."""

    def __init__(self, before: int, after: int, device: str, rngs: nnx.Rngs) -> None:
        Conv = partial(
            nnx.Conv, use_bias=False, conv_general_dilated=convolution(device), rngs=rngs
        )
        self.stride = 1 if before == after else 2
        # padding="SAME" would, with a stride of 2, pad 0 on one side and 1 on the other
        self.conv1 = Conv(before, after, kernel_size=(3, 3), strides=self.stride, padding=1)
        self.bn1 = BatchNorm(after, epsilon=1e-5, momentum=0.9, rngs=rngs)
        self.conv2 = Conv(after, after, kernel_size=(3, 3), padding=1)
        self.bn2 = BatchNorm(after, epsilon=1e-5, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x[:, :: self.stride, :: self.stride]
        # zeros: new channels
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, y.shape[3] - x.shape[3])))
        return nnx.relu(y + shortcut)
