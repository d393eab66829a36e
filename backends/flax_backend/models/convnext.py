"""A small ConvNeXt for images of 32 x 32 pixels, as a `flax.nnx.Module`.

Source: Liu, Mao, Wu, Feichtenhofer, Darrell and Xie, 'A ConvNet for the 2020s' (arXiv:2201.03545),
with three stages instead of four, and narrower ones.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from lockstep.backends.flax_backend.layers import Dropout, LayerNorm, convolution, in_float32


class ConvNeXt(nnx.Module):
    """Images (n, 32, 32, 3) to logits (n, classes)."""

    def __init__(self, classes: int, device: str, rngs: nnx.Rngs) -> None:
        Conv = partial(nnx.Conv, conv_general_dilated=convolution(device), rngs=rngs)
        self.stem = Conv(3, 32, kernel_size=(4, 4), strides=4, padding="VALID")
        self.stem_norm = LayerNorm(32, epsilon=1e-6, rngs=rngs)
        self.blocks = nnx.List(
            [
                Block(32, 0.0, device, rngs),
                Block(32, 0.02, device, rngs),
                Downsample(32, 64, device, rngs),
                Block(64, 0.04, device, rngs),
                Block(64, 0.06, device, rngs),
                Downsample(64, 128, device, rngs),
                Block(128, 0.08, device, rngs),
                Block(128, 0.1, device, rngs),
            ]
        )
        self.norm = LayerNorm(128, epsilon=1e-6, rngs=rngs)
        self.fc = nnx.Linear(128, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        x = self.stem_norm(x)
        for block in self.blocks:
            x = block(x)
        x = x.mean(axis=(1, 2))
        return self.fc(self.norm(x))


class Block(nnx.Module):
    """Images (n, height, width, channels) to the same shape."""

    def __init__(self, channels: int, depth_rate: float, device: str, rngs: nnx.Rngs) -> None:
        Conv = partial(nnx.Conv, conv_general_dilated=convolution(device), rngs=rngs)
        self.conv = Conv(
            channels, channels, kernel_size=(7, 7), padding=3, feature_group_count=channels
        )
        self.norm = LayerNorm(channels, epsilon=1e-6, rngs=rngs)
        self.fc1 = nnx.Linear(channels, 4 * channels, rngs=rngs)
        self.fc2 = nnx.Linear(4 * channels, channels, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((channels,), 1e-6))  # layer scale
        # leaves out an image's whole branch: stochastic depth
        self.dropout = Dropout(depth_rate, (1, 1, 1))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(x)
        y = self.norm(y)
        y = in_float32(nnx.gelu, self.fc1(y), approximate=False)
        y = self.fc2(y)
        # gamma times y; in float32, so that the gradient of gamma is summed in it, too
        y = in_float32(lambda y: self.gamma[...].astype(y.dtype) * y, y)
        return x + self.dropout(y)


class Downsample(nnx.Module):
    """Images (n, height, width, before) to (n, height / 2, width / 2, after)."""

    def __init__(self, before: int, after: int, device: str, rngs: nnx.Rngs) -> None:
        Conv = partial(nnx.Conv, conv_general_dilated=convolution(device), rngs=rngs)
        self.norm = LayerNorm(before, epsilon=1e-6, rngs=rngs)
        self.conv = Conv(before, after, kernel_size=(2, 2), strides=2, padding="VALID")

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        return self.conv(x)
