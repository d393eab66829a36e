"""Convolution and pooling as the device likes them best, with the numbers of the library, up to
rounding; and norms, dense layers and dropout as PyTorch computes them.

Training steps per second of `Net` on two cores, jax 0.10. At batch 4 in float32 the lower three
were measured in turn in one process; the others at other times, under other loads:

    convolution          pooling     batch 4, float32   batch 4, float64   batch 128, float32
    library              library                  350                230
    one pixel a row      library                  900                620                   42
    2 x 2 pixels a row   library                1,000
    2 x 2 pixels a row   `max_pool`             1,340                710                   91

What was tried beside it: `common/evidence/bench.py`.

Milliseconds for a training step at batch 32 on the same cores, busier; of three calls of six steps
the last one:

                                                              float64   float32   bfloat16
    ResNet20, step by step, its plain convolutions in blocks      400       227        242
    ResNet20, step by step, all by the library                    749       150        140
    ResNet20, `lax.scan`, its plain convolutions in blocks        570       369        370
    ConvNeXt, step by step, all by the library                    200        84         76
    ConvNeXt, `lax.scan`, all by the library                      620       511        446

XLA brings a convolution into the form that its quick kernels take in the entry computation only,
and not in the body of a loop: the gradient of a kernel of 3 x 3 x 16 x 16 took 5 ms alone and 186
in a loop. So on the CPU, networks that the library convolves take one step after the other
(`FlaxBackend.train_steps`), and blocks are for few channels and for float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

MANY_CHANNELS = 16  # of the images, from which on the library convolves, but in float64; all but the first of ResNet20


def convolution(device: str) -> Any:
    """What `nnx.Conv` should convolve with on `device`, in place of `jax.lax.conv_general_dilated`.

    On the CPU, XLA's convolution and its gradients are far slower than its matrix product. On a GPU
    the library's is left in place.
    """
    return im2col_conv if device == "cpu" else jax.lax.conv_general_dilated


def max_pooling(device: str) -> Any:
    """The largest of each 2 x 2 pixels: (n, height, width, channels) to (n, height / 2, width / 2,
    channels)."""
    return (
        max_pool if device == "cpu" else partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
    )


def im2col_conv(
    images: jax.Array,
    kernel: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **options: Any,
) -> jax.Array:
    """The convolution as one matrix product, each row of which gives 2 x 2 pixels.

    A row holds what the four pixels see, a window that is one larger than the kernel; the matrix
    holds the kernel four times, moved by a pixel. For a 5 x 5 kernel that is 44 % more
    multiplications than with one pixel a row, but a third of the copying, and a product with four
    times as many columns. What does not pay (many channels, but for float64; strides, groups, even
    kernels, an odd number of pixels) is left to JAX.
    """
    padding = ((0, 0),) * (images.ndim - 2) if padding == "VALID" else padding
    library = partial(
        jax.lax.conv_general_dilated, images, kernel, window_strides, padding, **options
    )
    ones = [
        window_strides,
        options.get("lhs_dilation") or (1,),
        options.get("rhs_dilation") or (1,),
    ]
    plain = (
        images.ndim == 4
        and all(set(each) == {1} for each in ones)
        and options.get("feature_group_count", 1) == 1
    )
    plain = plain and options.get("preferred_element_type") is None
    if isinstance(padding, str) or not plain or min(map(min, padding)) < 0:
        return library()
    n, height, width, channels = images.shape
    kernel_height, kernel_width, _, features = kernel.shape
    height, width = (
        height + sum(padding[0]) - kernel_height + 1,
        width + sum(padding[1]) - kernel_width + 1,
    )
    fits = kernel_height % 2 == kernel_width % 2 == 1 and height % 2 == width % 2 == 0 < min(
        height, width
    )
    if not fits or (channels >= MANY_CHANNELS and images.dtype != jnp.float64):
        return library()
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    height, width = height // 2, width // 2  # from here on, of the blocks
    # pixels by twos
    row_pairs = images.reshape(n, images.shape[1] // 2, 2, images.shape[2] // 2, 2 * channels)
    row_pairs = row_pairs[:, :, 0], row_pairs[:, :, 1]  # even and odd
    views = [
        row_pairs[y % 2][:, y // 2 : y // 2 + height, x : x + width]
        for y in range(kernel_height + 1)
        for x in range((kernel_width + 1) // 2)
    ]
    patches = jnp.concatenate(views, axis=-1).reshape(n * height * width, -1)
    # with features first, XLA takes 0.7 of the time for its gradient
    kernel = kernel.transpose(3, 0, 1, 2)
    shifted = [
        jnp.pad(kernel, ((0, 0), (y, 1 - y), (x, 1 - x), (0, 0))) for y in (0, 1) for x in (0, 1)
    ]
    matrix = jnp.concatenate(shifted).reshape(4 * features, -1)
    product = (patches @ matrix.T).reshape(n, height, width, 2, 2, features)
    return product.transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * height, 2 * width, features)


def max_pool(x: jax.Array) -> jax.Array:
    """Among equal pixels the first one is chosen, and gets the gradient, as in the library and in
    PyTorch.

    `x.reshape(...).max(axis=(2, 4))` would share the gradient out among them.
    """
    n, height, width, channels = x.shape
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width].reshape(n, height, 2, width, 2, channels).swapaxes(2, 3)
    pixels = jax.lax.split(x.reshape(n, height, width, 4, channels), (1, 1, 1, 1), axis=3)
    # after the comparisons, a step takes 1.3 times as long
    a, b, c, d = (pixel.squeeze(3) for pixel in pixels)
    return maximum_first(maximum_first(a, b), maximum_first(c, d))


def maximum_first(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a`, unless `b` is larger, or not a number."""
    return jnp.where((a < b) | (b != b), b, a)


def in_float32(function: Callable[..., jax.Array], x: jax.Array, **options: Any) -> jax.Array:
    """`function(x)`; of bfloat16 in float32 and rounded at the end, as most of PyTorch's kernels do
    by themselves.

    JAX rounds after each operation. That put the gradients of `ViT`'s queries off by 64 % of their
    magnitude, and PyTorch's by 5 %.
    """
    return function(x.astype(jnp.promote_types(x.dtype, jnp.float32)), **options).astype(x.dtype)


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` as `torch.nn.BatchNorm2d` computes it; `momentum` is Flax's, 1 less
    PyTorch's.

    Both normalise by the batch's biased variance. Into the running variance, Flax takes that one,
    PyTorch the unbiased.
    """

    scale: nnx.Param[jax.Array]
    bias: nnx.Param[jax.Array]

    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = x.dtype
        x = x.astype(jnp.promote_types(dtype, jnp.float32))  # bfloat16 is too coarse for statistics
        mean, var = self.mean[...].astype(x.dtype), self.var[...].astype(x.dtype)
        if not self.use_running_average:
            axes, pixels = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
            old_mean, old_var, rate = mean, var, 1 - self.momentum
            # not E[x^2] - E[x]^2, the faster way, which cancels
            mean, var = x.mean(axes), x.var(axes)
            self.mean[...] = (rate * mean + self.momentum * old_mean).astype(self.mean.dtype)
            self.var[...] = (rate * var * pixels / (pixels - 1) + self.momentum * old_var).astype(
                self.var.dtype
            )
        x = (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * self.scale) + self.bias
        return x.astype(dtype)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` with the variance as PyTorch takes it: Flax's quicker one, E[x^2] - E[x]^2,
    cancels.

    A user's, which `network.use_exact_sums` makes one of these, keeps the variance that it was built
    with.
    """

    def __init__(self, num_features: int, epsilon: float, rngs: nnx.Rngs) -> None:
        super().__init__(num_features, epsilon=epsilon, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        # In bfloat16, JAX would sum the gradient of the scale in it, too: of 2,048 terms, a third
        # was lost.
        return in_float32(super().__call__, x, mask=mask)


class Linear(nnx.Linear):
    """`nnx.Linear`, with the bias of bfloat16 added in float32: in bfloat16, JAX would sum its
    gradient in it, too.

    Over 32 times 65 tokens, that put it off by 3.8 % of the largest; now 0.3 %.
    `network.use_exact_sums` makes it.
    """

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        dtype = jnp.result_type(inputs, self.kernel[...])
        return super().__call__(inputs, out_sharding=out_sharding).astype(dtype)


class Conv(nnx.Conv):
    """`nnx.Conv`, likewise."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        dtype = jnp.result_type(inputs, self.kernel[...])
        return super().__call__(inputs, out_sharding=out_sharding).astype(dtype)


def promote_bias(tensors: Any, *, dtype: Any = None) -> Any:
    """What such a layer promotes its inputs, kernel and bias with: the bias at least to float32."""
    inputs, kernel, bias = promote_dtype(tensors, dtype=dtype)
    return (
        inputs,
        kernel,
        None if bias is None else bias.astype(jnp.promote_types(bias.dtype, jnp.float32)),
    )


class Mask(nnx.Variable):
    """What a dropout keeps."""


class Dropout(nnx.Module):
    """`nnx.Dropout`, but that it is told what to keep: before each training step, `mask` is drawn
    by `lockstep.common.data.dropout`.

    Args:
        rate: the share that is left out, 0 <= rate < 1; what is kept is divided by 1 - rate.
        shape: of what is drawn for one image. Along axes of size 1, all is kept or left out
            together: `(1, 1, 1)` leaves out all of an image, as in stochastic depth.
    """

    def __init__(self, rate: float, shape: tuple[int, ...]) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"a rate of {rate:g}: give 0 or more, and less than 1")
        self.rate, self.deterministic = rate, False  # the latter is set by `train` and `eval`
        self.mask = Mask(jnp.ones((1, *shape), bool))  # (n, *shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x if self.deterministic else x * self.mask / (1 - self.rate)
