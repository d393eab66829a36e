"""Layers of the networks that are not the library's own: convolution and pooling that are fast on
the device; norms, dense layers, dropout and recurrent cells as PyTorch computes them. Equal to
`flax.nnx` up to rounding. Reads next to backends/torch_backend/layers.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights
from flax.nnx.nn.dtypes import promote_dtype
from jax.typing import DTypeLike

from lockstep.backends.flax_backend.kernels import im2col_conv, max_pool


def convolution(device: str) -> Callable[..., jax.Array]:
    """The function that `nnx.Conv` convolves with on `device`: on the CPU, one that is a matrix
    product where that is faster."""
    return im2col_conv if device == "cpu" else jax.lax.conv_general_dilated


def max_pooling(device: str) -> Callable[[jax.Array], jax.Array]:
    """The largest of each 2 x 2 pixels: (n, height, width, channels) to (n, height / 2, width / 2,
    channels)."""
    library = partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
    return max_pool if device == "cpu" else library


def in_float32(function: Callable[..., jax.Array], x: jax.Array, **options: object) -> jax.Array:
    """`function(x, **options)`; bfloat16 is computed in float32 and rounded at the end, as most of
    PyTorch's kernels do by themselves. JAX rounds after each operation."""
    return function(x.astype(jnp.promote_types(x.dtype, jnp.float32)), **options).astype(x.dtype)


class BatchNorm(nnx.BatchNorm):
    """`nnx.BatchNorm` as `torch.nn.BatchNorm2d` computes it.

    Both normalise by the batch's biased variance. The running variance takes that one in Flax, and
    the unbiased one in PyTorch and here.

    Args:
        momentum: Flax's, which is 1 - PyTorch's.
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
            # not the faster E[x^2] - E[x]^2, which cancels
            mean, var = x.mean(axes), x.var(axes)
            self.mean[...] = (rate * mean + self.momentum * old_mean).astype(self.mean.dtype)
            self.var[...] = (rate * var * pixels / (pixels - 1) + self.momentum * old_var).astype(
                self.var.dtype
            )
        x = (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * self.scale) + self.bias
        return x.astype(dtype)


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` with the variance as PyTorch takes it; Flax's default, E[x^2] - E[x]^2,
    cancels.

    One that `user_module.use_exact_sums` puts into a user's module keeps the variance that the
    module was built with.
    """

    def __init__(self, num_features: int, epsilon: float, rngs: nnx.Rngs) -> None:
        super().__init__(num_features, epsilon=epsilon, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        # JAX sums the gradient of the scale in the dtype of `x`.
        return in_float32(super().__call__, x, mask=mask)


class Linear(nnx.Linear):
    """`nnx.Linear`; a bias of bfloat16 is added, and its gradient summed, in float32.

    `user_module.use_exact_sums` puts it into a module, with `promote_bias`.
    """

    def __call__(self, inputs: jax.Array, out_sharding: object = None) -> jax.Array:
        dtype = jnp.result_type(inputs, self.kernel[...])
        return super().__call__(inputs, out_sharding=out_sharding).astype(dtype)


class Conv(nnx.Conv):
    """`nnx.Conv`; a bias of bfloat16 is added, and its gradient summed, in float32."""

    def __call__(self, inputs: jax.Array, out_sharding: object = None) -> jax.Array:
        dtype = jnp.result_type(inputs, self.kernel[...])
        return super().__call__(inputs, out_sharding=out_sharding).astype(dtype)


def promote_bias(
    tensors: tuple[jax.Array, jax.Array, jax.Array | None], *, dtype: DTypeLike | None = None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """How `Linear` and `Conv` promote inputs, kernel and bias: the bias to float32 at least."""
    inputs, kernel, bias = promote_dtype(tensors, dtype=dtype)
    if bias is not None:
        bias = bias.astype(jnp.promote_types(bias.dtype, jnp.float32))
    return inputs, kernel, bias


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """`nnx.dot_product_attention`, whose softmax is float32 whatever its inputs are; of float64 it
    is float64 here. (n, length, heads, head dim), as there."""
    if query.dtype != jnp.float64:
        return nnx.dot_product_attention(query, key, value, bias, mask, **options)
    weights = dot_product_attention_weights(query, key, bias, mask, **options)
    value = jnp.repeat(value, query.shape[-2] // value.shape[-2], -2)  # heads that share a value
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


class Mask(nnx.Variable):
    """The mask of a dropout: bool (n, *shape); True is kept."""


class Dropout(nnx.Module):
    """`nnx.Dropout` with a given mask: before each training step, `lockstep.common.data.dropout`
    draws `mask`.

    Args:
        rate: the share that is left out, 0 <= rate < 1; what is kept is divided by 1 - rate.
        shape: of the mask of one image. Along axes of size 1, all is kept or left out together:
            `(1, 1, 1)` leaves out all of an image, as in stochastic depth.
    """

    def __init__(self, rate: float, shape: tuple[int, ...]) -> None:
        if not 0 <= rate < 1:
            raise ValueError(f"a rate of {rate:g}: give 0 or more, and less than 1")
        self.rate, self.deterministic = rate, False  # `train` and `eval` set the latter
        self.mask = Mask(jnp.ones((1, *shape), bool))  # (n, *shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x if self.deterministic else x * self.mask / (1 - self.rate)


class LSTMCell(nnx.OptimizedLSTMCell):
    """`nnx.OptimizedLSTMCell` as a layer of `torch.nn.LSTM`, for `nnx.RNN`: with both of PyTorch's
    biases, which train as one with twice the learning rate.

    It starts from zeros in the precision of its parameters, where Flax's has float32.
    """

    def __init__(self, in_features: int, hidden_features: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(in_features, hidden_features, rngs=rngs)
        self.dense_i = nnx.Linear(in_features, 4 * hidden_features, rngs=rngs)

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: object = None, carry_init: object = None
    ) -> tuple[jax.Array, jax.Array]:
        zeros = zero_carry(self.dense_h, self.hidden_features, input_shape)
        return zeros, zeros


class GRUCell(nnx.GRUCell):
    """`nnx.GRUCell` as a layer of `torch.nn.GRU`, in the same way."""

    def __init__(self, in_features: int, hidden_features: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(in_features, hidden_features, rngs=rngs)
        self.dense_h = nnx.Linear(hidden_features, 3 * hidden_features, rngs=rngs)

    def initialize_carry(
        self, input_shape: tuple[int, ...], rngs: object = None, carry_init: object = None
    ) -> jax.Array:
        return zero_carry(self.dense_h, self.hidden_features, input_shape)


def zero_carry(layer: nnx.Linear, width: int, input_shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros((*input_shape[:-1], width), layer.kernel[...].dtype)
