"""Layers and kernels, compared with the libraries' own; and the replacement of a user's layers."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from lockstep.backends.flax_backend import convert as flax_convert
from lockstep.backends.flax_backend import layers as flax_layers
from lockstep.backends.flax_backend import user_module as flax_network
from lockstep.backends.torch_backend import kernels as torch_kernels
from lockstep.backends.torch_backend import layers as torch_layers
from lockstep.backends.torch_backend import user_module as torch_network

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


@pytest.mark.parametrize(("images", "kernel"), SHAPES.values(), ids=SHAPES)
def test_a_convolution_in_blocks_is_the_librarys(
    images: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
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


def normed(
    layer: type[nn.BatchNorm2d], images: np.ndarray, weights: np.ndarray
) -> list[np.ndarray]:
    """The result (n, channels, height, width), the gradient of a sum of it with fixed weights, and
    both statistics."""
    given = torch.from_numpy(images).requires_grad_()
    norm = layer(images.shape[1], dtype=torch.float64)
    result = norm(given)
    (gradient,) = torch.autograd.grad((result * torch.from_numpy(weights)).sum(), given)
    statistics = norm.state_dict()
    found = result.detach(), gradient, statistics["running_mean"], statistics["running_var"]
    return [tensor.numpy() for tensor in found]


def test_batch_norm_sums_exactly_where_the_librarys_does_not() -> None:
    images = drawn((32, 4, 32, 32), 0) + 1
    images[:, :, :8] = -1  # as in pictures with a plain border
    weights = drawn(images.shape, 1)
    x, axes, pixels = images.astype(np.longdouble), (0, 2, 3), 32**3
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    deviation = np.sqrt(var + np.longdouble(1e-5))
    result = (x - mean) / deviation
    along = (weights * result).mean(axes, keepdims=True)
    exact = [
        result,
        (weights - weights.mean(axes, keepdims=True) - result * along) / deviation,
        0.1 * mean.ravel(),
        0.9 + 0.1 * var.ravel() * pixels / (pixels - 1),
    ]

    def off(layer: type[nn.BatchNorm2d]) -> float:
        found = normed(layer, images, weights)
        return max(
            float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, exact, strict=True)
        )

    assert off(torch_layers.BatchNorm2d) < 1e-15  # measured 3.7e-16
    assert (
        1e-14 < off(nn.BatchNorm2d) < 1e-12
    )  # measured 6.8e-14; once this fails, the layer is no longer needed


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (1, 4, 1, 1), (2, 4, 4)])
def test_batch_norm_refuses_what_the_librarys_refuses(shape: tuple[int, ...]) -> None:
    said = []
    for layer in (nn.BatchNorm2d, torch_layers.BatchNorm2d):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            layer(4, dtype=torch.float64)(torch.from_numpy(drawn(shape, 0)))
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_flax_sums_the_gradient_of_a_bias_of_bfloat16_in_float32_and_leaves_other_layers_alone(
    kind: str,
) -> None:
    def layer(**options: Any) -> Any:
        if kind == "linear":
            return nnx.Linear(8, 4, rngs=nnx.Rngs(0), **options)
        return nnx.Conv(8, 4, (1, 1), rngs=nnx.Rngs(0), **options)

    x = jnp.asarray(drawn((32, 16, 16, 8), 0), jnp.bfloat16)
    weights = jnp.asarray(drawn((32, 16, 16, 4), 1) + 1, jnp.bfloat16)

    def off(layer: Any) -> float:
        graph, parameters = nnx.split(layer)
        halves = jax.tree.map(lambda p: p.astype(jnp.bfloat16), parameters)

        def total(parameters: Any) -> jax.Array:
            result = nnx.merge(graph, parameters)(x)
            assert result.dtype == jnp.bfloat16
            return (result.astype(jnp.float32) * weights.astype(jnp.float32)).sum()

        gradient = np.asarray(jax.jit(jax.grad(total))(halves)["bias"][...], np.float64)
        exact = np.asarray(weights, np.float64).sum((0, 1, 2))
        return float(np.abs(gradient / exact - 1).max())

    exact: Any = flax_network.use_exact_sums(layer())
    assert off(exact) < 4e-3  # half an ulp
    assert off(layer()) > 1e-2  # control: the library's
    for told in (layer(dtype=jnp.float32), layer(dtype=jnp.bfloat16)):
        assert flax_network.use_exact_sums(told) is told
    for shape in ((4, 8), (2, 3, 4, 4, 8)) if kind == "linear" else ((4, 4, 8), (2, 3, 4, 4, 8)):
        given = jnp.asarray(drawn(shape, 2), jnp.float32)
        assert np.array_equal(np.asarray(exact(given)), np.asarray(layer()(given)))


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


def test_layer_norm_of_bfloat16_sums_its_gradients_in_float32_where_the_librarys_does_not() -> None:
    tokens, weights = (torch.from_numpy(drawn((32, 65, 64), seed)).bfloat16() for seed in (0, 1))
    tokens, weights = tokens + 1, weights + 1

    def gradients(layer: type[nn.LayerNorm], dtype: torch.dtype) -> list[np.ndarray]:
        norm = layer(64, dtype=dtype)
        total = (norm(tokens.to(dtype)) * weights.to(dtype)).float().sum()
        return [
            gradient.double().numpy()
            for gradient in torch.autograd.grad(total, (norm.weight, norm.bias))
        ]

    exact = gradients(nn.LayerNorm, torch.float64)

    def off(layer: type[nn.LayerNorm]) -> float:
        found = gradients(layer, torch.bfloat16)
        return max(
            float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, exact, strict=True)
        )

    assert off(torch_layers.LayerNorm) < 0.01  # measured 0.0037
    assert (
        off(nn.LayerNorm) > 0.05
    )  # measured 0.22 to 0.24; once this fails, the layer is no longer needed


# --- Layers of a user's module that are replaced


class TorchModule(nn.Module):
    """A norm that is registered twice, stands in a list that PyTorch does not see, and has a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.again = self.norm
        self.norms = [self.norm]
        self.tied = nn.Linear(4, 4)
        self.tied.bias = self.norm.bias
        self.calls: list[str] = []
        self.norm.register_forward_hook(lambda layer, *_: self.calls.append(type(layer).__module__))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tied(self.again(self.norms[0](self.norm(self.conv(x)))).mean((2, 3)))


class FlaxModule(nnx.Module):
    """The same; the list, the dictionary and the tuple are data, in which Flax looks for layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.second = nnx.Linear(4, 4, rngs=rngs)
        self.first = nnx.Linear(4, 4, rngs=rngs)
        self.again = self.second
        self.layers = nnx.List([self.first, nnx.Linear(4, 4, rngs=rngs)])
        self.raw = nnx.data([self.first, {"b": nnx.Linear(4, 4, rngs=rngs), "a": (self.second,)}])
        self.plain = nnx.BatchNorm(4, rngs=rngs)


def test_a_replaced_norm_stands_wherever_the_librarys_stood_with_its_tensors_and_hooks() -> None:
    module = TorchModule()
    module.norm.train(False)
    found = torch_network.use_exact_sums(module)
    assert isinstance(found, TorchModule)
    assert type(module.norm) is nn.BatchNorm2d  # the user's own is as it was
    assert type(found.norm) is torch_layers.BatchNorm2d
    assert found.norm is found.again is found.norms[0] and not found.norm.training
    assert list(found.state_dict()) == list(module.state_dict())
    for name, tensor in module.state_dict(keep_vars=True).items():
        assert found.state_dict(keep_vars=True)[name] is tensor, name
    assert found.tied.bias is found.norm.bias
    assert [name for name, _ in found.named_modules()] == [n for n, _ in module.named_modules()]
    found(torch.ones(2, 3, 8, 8))
    assert module.calls == [torch_layers.__name__] * 3  # the hook was called, by the replacement
    module(torch.ones(2, 3, 8, 8))
    assert module.calls[3:] == [nn.BatchNorm2d.__module__] * 3  # control
    copied = copy.deepcopy(found)  # as for each state of a run
    assert copied.norm is copied.again is copied.norms[0]
    copied.eval()
    assert not copied.norms[0].training
    assert torch_network.use_exact_sums(nn.Linear(2, 2).eval()).training is False
    assert torch_network.use_exact_sums(plain := nn.Linear(2, 2)) is plain


def test_a_replaced_layer_of_flax_stands_wherever_the_librarys_stood_with_its_variables() -> None:
    module = FlaxModule(nnx.Rngs(0))
    names, order = list(flax_convert.flatten(nnx.state(module, nnx.Param))), list(vars(module))
    kernel, plain = module.first.kernel, module.plain
    kinds = {path: type(layer) for path, layer in nnx.iter_modules(module)}
    assert set(kinds.values()) == {FlaxModule, nnx.Linear, nnx.List, nnx.BatchNorm}  # control
    assert flax_network.use_exact_sums(module) is module
    raw: Any = module.raw
    assert type(module.first) is type(module.second) is flax_layers.Linear
    assert module.second is module.again is raw[1]["a"][0]
    assert module.first is module.layers[0] is raw[0]
    assert type(module.layers[1]) is type(raw[1]["b"]) is flax_layers.Linear
    assert module.first.kernel is kernel and module.plain is plain
    assert module.first.promote_dtype is flax_layers.promote_bias
    assert list(flax_convert.flatten(nnx.state(module, nnx.Param))) == names
    assert list(vars(module)) == order  # from which the order of the tensors is taken
    graph, state = nnx.split(module)
    assert type(nnx.merge(graph, state).first) is flax_layers.Linear


def assigned_classes(source: str) -> list[int]:
    """The lines in which `__class__` is assigned to."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr == "__class__"
        and isinstance(node.ctx, ast.Store)
    ]


def test_no_layer_is_swapped_by_assigning_to_its_class() -> None:
    for file in (Path(__file__).parents[2] / "backends").rglob("*.py"):
        assert assigned_classes(file.read_text(encoding="utf-8")) == [], file
    assert assigned_classes("x = a.__class__\na.__class__ = B\n") == [2]  # control
