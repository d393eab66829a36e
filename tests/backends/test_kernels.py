"""Convolution and pooling by matrix products, compared with the libraries' own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from lockstep.backends.flax_backend import layers as flax_layers
from lockstep.backends.torch_backend import kernels as torch_kernels
from lockstep.backends.torch_backend import layers as torch_layers
from tests.marks import slow_except

# images (n, height, width, channels), kernel (height, width, channels, features); the last two are
# left to the library
SHAPES = {
    "first of Net": ((3, 32, 32, 3), (5, 5, 3, 6)),
    "second of Net": ((3, 14, 14, 6), (5, 5, 6, 16)),
    "oblong": ((2, 10, 8, 2), (3, 1, 2, 3)),
    "one pixel": ((2, 4, 6, 2), (1, 1, 2, 3)),
    "even kernel": ((2, 9, 9, 2), (4, 4, 2, 3)),
    "odd result": ((2, 9, 9, 2), (3, 3, 2, 3)),
}

BOUND = 1e-12  # measured 2.3e-13, on sums of up to 2,352 products; a kernel moved the wrong way, below: 34


@pytest.fixture(autouse=True)
def float64() -> None:
    jax.config.update("jax_enable_x64", True)


def drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def in_jax(
    convolve: Callable, images: np.ndarray, kernel: np.ndarray, padding: Any = "VALID"
) -> list[np.ndarray]:
    """The result, and the gradients of a sum of it with fixed weights."""
    convolve = partial(
        convolve,
        window_strides=(1, 1),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    result, pull = jax.vjp(convolve, jnp.asarray(images), jnp.asarray(kernel))
    return [np.asarray(array) for array in (result, *pull(jnp.asarray(drawn(result.shape, 2))))]


def in_torch(
    layer: type[nn.Conv2d], images: np.ndarray, kernel: np.ndarray, bias: bool = False
) -> list[np.ndarray]:
    """The same, in JAX's order of axes; with a bias of 0, 1, ... its gradient, too."""
    height, width, channels, features = kernel.shape
    convolve = layer(channels, features, (height, width), bias=bias, dtype=torch.float64)
    if convolve.bias is not None:
        convolve.bias.data = torch.arange(features, dtype=torch.float64)
    convolve.weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
    given = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    result = compiled(convolve)(given).permute(0, 2, 3, 1)
    weights = torch.from_numpy(drawn(tuple(result.shape), 2))
    gradients = torch.autograd.grad((result * weights).sum(), (given, *convolve.parameters()))
    found = (
        result,
        gradients[0].permute(0, 2, 3, 1),
        gradients[1].permute(2, 3, 1, 0),
        *gradients[2:],
    )
    return [array.detach().numpy() for array in found]


def compiled(layer: nn.Module) -> Callable:
    """Compiled, but with PyTorch's own kernels: blocks are for compiled code."""
    torch.compiler.reset()  # after eight programs of a function it would not be compiled any more
    return torch.compile(layer, backend="eager", fullgraph=True)


def gap(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", slow_except(SHAPES, "first of Net", "oblong", "even kernel"))
def test_a_convolution_in_blocks_is_the_librarys(shape: str) -> None:
    images, kernel = SHAPES[shape]
    given = drawn(images, 0), drawn(kernel, 1)
    library = in_jax(jax.lax.conv_general_dilated, *given)
    assert gap(in_jax(flax_layers.convolution("cpu"), *given), library) <= BOUND
    assert gap(in_torch(torch_layers.convolution("cpu"), *given), library) <= BOUND
    with_bias = in_torch(nn.Conv2d, *given, bias=True)
    assert gap(in_torch(torch_layers.convolution("cpu"), *given, bias=True), with_bias) <= BOUND
    if kernel[3] > 1:  # control
        assert gap(with_bias[:1], library[:1]) >= 1
    if kernel[0] > 1:  # control
        turned = given[0], given[1][::-1].copy()
        assert gap(in_jax(flax_layers.convolution("cpu"), *turned)[:1], library[:1]) > 1e-3
        assert gap(in_torch(torch_layers.convolution("cpu"), *turned)[:1], library[:1]) > 1e-3


@pytest.mark.parametrize(
    ("dtype", "channels"), [(torch.float64, 3), (torch.float64, 6), (torch.float32, 3)]
)
def test_uncompiled_pytorch_convolves_in_blocks_few_channels_in_float64_only(
    dtype: torch.dtype, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = torch_layers.convolution("cpu")(channels, 6, 5, dtype=dtype)
    images = torch.from_numpy(drawn((2, channels, 8, 8), 0)).to(dtype)
    monkeypatch.setattr(
        torch_kernels, "im2col_conv", lambda images, weight, bias: images[:1, :1, :1, :1]
    )
    in_blocks = torch.Size([1, 1, 1, 1])
    assert (layer(images).shape == in_blocks) is (dtype == torch.float64 and channels == 3)
    assert compiled(layer)(images).shape == in_blocks


@pytest.mark.parametrize(
    "padding", [((1, 1), (1, 1)), ((2, 0), (1, 3))], ids=["of ResNet20", "uneven"]
)
def test_what_is_padded_is_the_librarys(padding: Any) -> None:
    given = drawn((2, 8, 8, 3), 0), drawn((3, 3, 3, 4), 1)
    library = in_jax(jax.lax.conv_general_dilated, *given, padding)
    assert gap(in_jax(flax_layers.convolution("cpu"), *given, padding), library) <= BOUND
    moved = tuple((low - 1, high + 1) for low, high in padding)  # control
    assert gap(in_jax(jax.lax.conv_general_dilated, *given, moved), library) > 1e-3


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 2}], ids=str
)
def test_what_blocks_cannot_do_is_left_to_the_library(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    blocks = torch_kernels.Im2colConv2d(4, 6, 3, **options)
    plain = nn.Conv2d(4, 6, 3, **options)
    plain.load_state_dict(blocks.state_dict())
    images = torch.randn(2, 4, 12, 12)
    assert torch.equal(compiled(blocks)(images), plain(images))
    if "padding" in options:
        return  # Flax's are padded first: see above
    names = {"stride": "strides", "dilation": "kernel_dilation", "groups": "feature_group_count"}
    given: dict[str, Any] = {"padding": "VALID"} | {
        names.get(name, name): value for name, value in options.items()
    }
    ours, library = (
        nnx.Conv(4, 6, (3, 3), **given, conv_general_dilated=convolve, rngs=nnx.Rngs(0))
        for convolve in (flax_layers.convolution("cpu"), jax.lax.conv_general_dilated)
    )
    channels_last = jnp.asarray(images.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(ours(channels_last), library(channels_last))


@pytest.mark.parametrize(
    ("size", "shape"), [((3,), (2, 9, 4)), ((3, 3, 3), (1, 6, 6, 6, 4)), ((3, 3), (2, 8, 6, 4))]
)
@pytest.mark.parametrize("padding", ["SAME", "VALID", 1])
def test_convolutions_of_any_kind_are_the_librarys(size: tuple, shape: tuple, padding: Any) -> None:
    def convolved(convolution: Any) -> np.ndarray:
        options = {"padding": padding, "conv_general_dilated": convolution, "rngs": nnx.Rngs(0)}
        return np.asarray(
            nnx.Conv(shape[-1], 6, size, **options)(jnp.asarray(drawn(shape, 0), jnp.float32))
        )

    ours, library = (
        convolved(flax_layers.convolution("cpu")),
        convolved(jax.lax.conv_general_dilated),
    )
    np.testing.assert_allclose(ours, library, atol=1e-5)


def pooled(pool: Callable, x: np.ndarray) -> list[np.ndarray]:
    result, pull = jax.vjp(pool, jnp.asarray(x))
    return [np.asarray(array) for array in (result, *pull(jnp.asarray(drawn(result.shape, 3))))]


@pytest.mark.parametrize("ties", [False, True], ids=["no two alike", "ties"])
@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (1, 5, 7, 2)], ids=["even", "odd"])
def test_pooling_chooses_as_the_libraries_do(shape: tuple[int, ...], ties: bool) -> None:
    x = (
        np.random.default_rng(0).integers(0, 3, shape).astype(np.float64)
        if ties
        else drawn(shape, 0)
    )
    ours, library = (
        pooled(flax_layers.max_pooling("cpu"), x),
        pooled(flax_layers.max_pooling("cuda"), x),
    )
    assert all(np.array_equal(a, b) for a, b in zip(ours, library, strict=True))
    for device in ("cpu", "cuda"):
        given = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
        result = compiled(torch_layers.max_pooling(device))(given)
        (
            result * torch.from_numpy(drawn(ours[0].shape, 3).transpose(0, 3, 1, 2).copy())
        ).sum().backward()
        assert given.grad is not None
        assert np.array_equal(ours[0], result.detach().permute(0, 2, 3, 1).numpy())
        assert np.array_equal(ours[1], given.grad.permute(0, 2, 3, 1).numpy())

    def shared(x: jax.Array) -> jax.Array:
        n, height, width, channels = x.shape
        cut = x[:, : height // 2 * 2, : width // 2 * 2]
        return cut.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))

    assert np.array_equal(pooled(shared, x)[1], library[1]) is not ties  # control


def test_what_is_not_a_number_comes_through_pooling() -> None:
    x = np.zeros((1, 4, 4, 1))
    for place in ((0, 0), (0, 3), (3, 0), (3, 3)):
        x[0, *place, 0] = np.nan
    assert np.isnan(np.asarray(flax_layers.max_pooling("cpu")(jnp.asarray(x)))).all()
    assert (
        compiled(torch_layers.max_pooling("cpu"))(torch.from_numpy(x).permute(0, 3, 1, 2))
        .isnan()
        .all()
    )


@pytest.mark.parametrize(
    "options", [{"stride": 1}, {"padding": 1}, {"dilation": 2}, {"ceil_mode": True}], ids=str
)
def test_other_windows_are_left_to_the_library(options: dict[str, Any]) -> None:
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(
        compiled(torch_kernels.Pool2x2(2, **options))(images),
        nn.MaxPool2d(2, **options)(images),
    )
