"""The network of PyTorch's tutorial 'Training a Classifier', as a `flax.nnx.Module`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Net(nnx.Module):
    """Images (n, 32, 32, 3) to logits (n, classes)."""

    def __init__(self, classes: int, device: str, rngs: nnx.Rngs) -> None:
        convolve = convolution(device)
        self.conv1 = nnx.Conv(3, 6, kernel_size=(5, 5), padding="VALID", conv_general_dilated=convolve, rngs=rngs)
        self.pool = partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
        self.conv2 = nnx.Conv(6, 16, kernel_size=(5, 5), padding="VALID", conv_general_dilated=convolve, rngs=rngs)
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


def convolution(device: str) -> Any:
    """What `nnx.Conv` should convolve with on `device`, in place of `jax.lax.conv_general_dilated`.

    On the CPU, XLA's convolution and its gradients are far slower than its matrix product. Whole training steps per
    second of `Net`, two cores, jax 0.10, library convolution / patches times matrix: batch 4 in float32 350 / 990,
    batch 4 in float64 230 / 620. On a GPU the library's is left in place.
    """
    return _patches_times_matrix if device == "cpu" else jax.lax.conv_general_dilated


def _patches_times_matrix(
    images: jax.Array, kernel: jax.Array, window_strides: Any, padding: Any, **options: Any
) -> jax.Array:
    """The convolution as one matrix product; what `Net` does not need (strides, padding, groups) is left to JAX.

    The patch of a pixel is laid out as the kernel is, (height, width, channels), so that both flatten alike.
    """
    plain = padding == "VALID" and all(stride == 1 for stride in window_strides)
    plain = plain and options.get("feature_group_count", 1) == 1
    plain = plain and all(set(options.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation"))
    if not plain:
        return jax.lax.conv_general_dilated(images, kernel, window_strides, padding, **options)
    n, height, width, _ = images.shape
    kernel_height, kernel_width, channels, features = kernel.shape
    height, width = height - kernel_height + 1, width - kernel_width + 1
    shifted = [images[:, y : y + height, x : x + width] for y in range(kernel_height) for x in range(kernel_width)]
    patches = jnp.concatenate(shifted, axis=-1).reshape(n * height * width, -1)
    product = patches @ kernel.reshape(kernel_height * kernel_width * channels, features)
    return product.reshape(n, height, width, features)
