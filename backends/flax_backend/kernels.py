"""Convolution and pooling as matrix products and comparisons: the library's results up to rounding,
faster on the CPU. Reads next to backends/torch_backend/kernels.py.

The measurements are in results/bench/LOG.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# From this many channels of the images on, the library convolves, except in float64.
MANY_CHANNELS = 16
FEW_CHANNELS = 3  # those of images, which need no gradient: that of a gather is slow

Padding = Sequence[tuple[int, int]]  # before and after, by axis


def im2col_conv(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Padding,
    **options: Any,
) -> jax.Array:
    """The convolution as one matrix product, each row of which gives 2 x 2 pixels, where that is
    faster and possible; else `jax.lax.conv_general_dilated`, whose arguments these are.

    A row holds the patch that the four pixels see, which is one pixel larger than the kernel; the
    matrix holds the kernel four times, shifted by a pixel each. For a 5 x 5 kernel that is 44 %
    more multiplications than with one pixel a row, but a third of the copying, and a product with
    four times as many columns.

    Args:
        images: (n, height, width, channels).
        kernel: (kernel height, kernel width, channels, features).
    """
    if padding == "VALID":
        padding = ((0, 0),) * (images.ndim - 2)
    if isinstance(padding, str) or not supports(images, kernel, window_strides, padding, options):
        return jax.lax.conv_general_dilated(images, kernel, window_strides, padding, **options)
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    n, height, width, channels = images.shape
    kernel_height, kernel_width, _, features = kernel.shape
    height, width = (height - kernel_height + 1) // 2, (width - kernel_width + 1) // 2
    patches_of = copied_patches if channels > FEW_CHANNELS else gathered_patches
    patches = patches_of(images, (kernel_height, kernel_width))
    kernel = kernel.transpose(3, 0, 1, 2)  # features first: XLA's gradient is faster
    shifted = [
        jnp.pad(kernel, ((0, 0), (y, 1 - y), (x, 1 - x), (0, 0))) for y in (0, 1) for x in (0, 1)
    ]
    matrix = jnp.concatenate(shifted).reshape(4 * features, -1)
    product = (patches @ matrix.T).reshape(n, height, width, 2, 2, features)
    return product.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * height, 2 * width, features)


def copied_patches(images: Any, kernel_sizes: tuple[int, int]) -> Any:
    """What each 2 x 2 pixels of the output see, side by side.

    Args:
        images: of JAX or NumPy, (n, height, width, channels).

    Returns:
        (n * pixels / 4, (kernel height + 1) * (kernel width + 1) * channels).
    """
    (n, height, width, channels), (kernel_height, kernel_width) = images.shape, kernel_sizes
    # even rows and odd rows, their pixels by twos
    row_pairs = images.reshape(n, height // 2, 2, width // 2, 2 * channels)
    row_pairs = row_pairs[:, :, 0], row_pairs[:, :, 1]
    height, width = (height - kernel_height + 1) // 2, (width - kernel_width + 1) // 2
    views = [
        row_pairs[y % 2][:, y // 2 : y // 2 + height, x : x + width]
        for y in range(kernel_height + 1)
        for x in range((kernel_width + 1) // 2)
    ]
    concatenate = np.concatenate if isinstance(images, np.ndarray) else jnp.concatenate
    return concatenate(views, axis=-1).reshape(n * height * width, -1)


def gathered_patches(images: jax.Array, kernel_sizes: tuple[int, int]) -> jax.Array:
    """`copied_patches`, by one gather."""
    n, *sizes = images.shape
    numbers = np.arange(math.prod(sizes)).reshape(1, *sizes)
    places = copied_patches(numbers, kernel_sizes)
    return images.reshape(n, -1)[:, places.ravel()].reshape(n * len(places), -1)


def supports(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: Padding,
    options: dict[str, Any],
) -> bool:
    """Whether there are two axes, no stride, dilation or group, an even number of pixels in the
    output, and few channels or float64."""
    unit = [
        window_strides,
        options.get("lhs_dilation") or (1,),
        options.get("rhs_dilation") or (1,),
    ]
    is_plain = (
        images.ndim == 4
        and all(set(each) == {1} for each in unit)
        and options.get("feature_group_count", 1) == 1
        and options.get("preferred_element_type") is None
        and min(map(min, padding)) >= 0
    )
    if not is_plain:
        return False
    _, *sizes, channels = images.shape
    kernel_sizes = kernel.shape[:2]
    sizes = [
        size + sum(pad) - of_kernel + 1
        for size, pad, of_kernel in zip(sizes, padding, kernel_sizes, strict=True)
    ]
    odd_kernel = all(size % 2 == 1 for size in kernel_sizes)
    even_output = all(size > 0 and size % 2 == 0 for size in sizes)
    return odd_kernel and even_output and (channels < MANY_CHANNELS or images.dtype == jnp.float64)


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2 x 2 pixels: (n, height, width, channels) to (n, height // 2,
    width // 2, channels).

    Of equal pixels the first gets the gradient, as in the library and in PyTorch;
    `x.reshape(...).max(axis=(2, 4))` would share it among them.
    """
    # In two halves, so that XLA puts them into memory: the next convolution reads each pixel many
    # times, and would pool it anew each time.
    halves = jax.lax.split(x, (len(x) // 2, len(x) - len(x) // 2))
    return jnp.concatenate([_max_pool(half) for half in halves])


def _max_pool(x: jax.Array) -> jax.Array:
    n, height, width, channels = x.shape
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width].reshape(n, height, 2, width, 2, channels).swapaxes(2, 3)
    pixels = jax.lax.split(x.reshape(n, height, width, 4, channels), (1, 1, 1, 1), axis=3)
    a, b, c, d = (pixel.squeeze(3) for pixel in pixels)  # before the comparisons: it is faster
    return maximum_first(maximum_first(a, b), maximum_first(c, d))


def maximum_first(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a`, unless `b` is larger, or not a number."""
    return jnp.where((a < b) | (b != b), b, a)
