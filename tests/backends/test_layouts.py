"""Layers whose tensors lie otherwise in Flax by more than the order of axes: they compute the same
there, and come back bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn.modules.conv import _ConvTransposeNd

from lockstep.backends.flax_backend import convert as flax_convert
from lockstep.backends.flax_backend.backend import configure_determinism
from lockstep.backends.flax_backend.layers import attention
from lockstep.backends.torch_backend import convert
from lockstep.common.errors import ConfigError


@pytest.fixture(scope="module", autouse=True)
def float64_in_jax() -> None:
    configure_determinism("cpu")


class Attention(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(6, 2, bias=bias, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)[0]


class Cell(nnx.Module):
    """An LSTM with both of PyTorch's biases."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.input, self.hidden = nnx.Linear(3, 16, rngs=rngs), nnx.Linear(4, 16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = memory = jnp.zeros((len(x), 4))
        outputs = []
        for step in range(x.shape[1]):
            i, f, g, o = jnp.split(self.input(x[:, step]) + self.hidden(hidden), 4, -1)
            memory = nnx.sigmoid(f) * memory + nnx.sigmoid(i) * jnp.tanh(g)
            hidden = nnx.sigmoid(o) * jnp.tanh(memory)
            outputs.append(hidden)
        return jnp.stack(outputs, 1)


class Within(nnx.Module):
    """A layer under the name that it has in PyTorch."""

    def __init__(self, inner: nnx.Module) -> None:
        self.inner = inner

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.inner(x)  # pyright: ignore[reportCallIssue]


def lstm(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "input.kernel": tensors["weight_ih_l0"].T,
        "input.bias": tensors["bias_ih_l0"],
        "hidden.kernel": tensors["weight_hh_l0"].T,
        "hidden.bias": tensors["bias_hh_l0"],
    }


def heads_first(layer: nn.MultiheadAttention, tensors: Any) -> Any:
    """The mistake of taking the heads for the last axis."""
    found = convert.attention(layer, tensors)
    return found | {"key.kernel": found["key.kernel"].reshape(6, 3, 2).transpose(0, 2, 1)}


def unflipped(layer: nn.Module, tensors: Any) -> Any:
    axes = tuple(range(2, tensors["weight"].ndim))
    return {"kernel": tensors["weight"].transpose(*axes, 0, 1), "bias": tensors["bias"]}


def up(axes: int, rngs: nnx.Rngs) -> nnx.Module:
    return nnx.ConvTranspose(2, 3, (4,) * axes, 2, padding=[(2, 2)] * axes, rngs=rngs)


def inner(layer: nn.Module) -> nn.Module:
    module = nn.Module()
    module.inner, module.forward = layer, layer.forward
    return module


# Both modules, the shape of an input in PyTorch, whether its channels come first, and a mistake.
Made = tuple[Callable[[], nn.Module], Callable[[nnx.Rngs], nnx.Module], tuple[int, ...], bool, Any]
LAYERS: dict[str, Made] = {
    "attention": (
        Attention,
        lambda rngs: nnx.MultiHeadAttention(2, 6, decode=False, attention_fn=attention, rngs=rngs),
        (2, 5, 6),
        False,
        heads_first,
    ),
    "attention without biases": (
        lambda: Attention(bias=False),
        lambda rngs: nnx.MultiHeadAttention(
            2, 6, decode=False, attention_fn=attention, use_bias=False, rngs=rngs
        ),
        (2, 5, 6),
        False,
        heads_first,
    ),
    "transposed, 1-d": (
        lambda: inner(nn.ConvTranspose1d(2, 3, 4, 2, 1)),
        lambda rngs: up(1, rngs),
        (2, 2, 5),
        True,
        unflipped,
    ),
    "transposed, 2-d": (
        lambda: inner(nn.ConvTranspose2d(2, 3, 4, 2, 1)),
        lambda rngs: up(2, rngs),
        (2, 2, 5, 4),
        True,
        unflipped,
    ),
    "transposed, 3-d": (
        lambda: inner(nn.ConvTranspose3d(2, 3, 4, 2, 1)),
        lambda rngs: up(3, rngs),
        (2, 2, 3, 4, 2),
        True,
        unflipped,
    ),
    "1-d": (
        lambda: inner(nn.Conv1d(2, 3, 3, padding=1)),
        lambda rngs: nnx.Conv(2, 3, (3,), padding=1, rngs=rngs),
        (2, 2, 7),
        True,
        None,
    ),
    "3-d": (
        lambda: inner(nn.Conv3d(2, 3, (1, 2, 3))),
        lambda rngs: nnx.Conv(2, 3, (1, 2, 3), padding="VALID", rngs=rngs),
        (2, 2, 2, 4, 5),
        True,
        None,
    ),
    "an LSTM": (Recurrent, Cell, (2, 3, 3), False, None),
}


def outputs(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Of both modules, with PyTorch's weights, in Flax's layout."""
    build, build_port, shape, channels_first, _ = LAYERS[name]
    torch.manual_seed(0)
    model = build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))  # PyTorch's attention starts with zeros
    declared = {"inner": lstm} if name == "an LSTM" else {}
    convert.attach_names(model, {}, {}, declared)
    arrays = convert.to_canonical(model, dict(model.named_parameters()))
    back = convert.from_canonical(model, arrays)
    assert all(torch.equal(back[own], tensor) for own, tensor in model.named_parameters())
    port = Within(build_port(nnx.Rngs(0)))
    graph, parameters, rest = nnx.split(port, nnx.Param, ...)
    shapes = {own: leaf.shape for own, leaf in flax_convert.flatten(parameters).items()}
    assert {own: array.shape for own, array in arrays.items()} == shapes
    nested = flax_convert.nest(flax_convert.from_canonical(arrays))
    port = nnx.merge(graph, nested, rest)
    x = torch.randn(shape, dtype=torch.float64)
    theirs = model(x)
    if channels_first:
        x, theirs = x.movedim(1, -1), theirs.movedim(1, -1)
    return theirs.detach().numpy(), np.asarray(port(jnp.asarray(x.numpy())))  # pyright: ignore


FAST = ("attention", "transposed, 2-d")
slow_layers = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS
]


@pytest.mark.parametrize("name", slow_layers)
def test_a_layer_computes_the_same_with_its_tensors_in_flaxs_layout(name: str) -> None:
    theirs, ours = outputs(name)
    assert np.abs(theirs - ours).max() < 1e-12  # measured 1.8e-15


@pytest.mark.parametrize("name", FAST)
def test_another_layout_of_the_same_shapes_is_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    wrong = LAYERS[name][-1]
    known = [
        (kind, wrong if kind in (nn.MultiheadAttention, _ConvTransposeNd) else function)
        for kind, function in convert.CONVERTS
    ]
    monkeypatch.setattr(convert, "CONVERTS", known)
    theirs, ours = outputs(name)
    assert np.abs(theirs - ours).max() > 1e-2  # measured 0.3


def test_what_does_more_than_move_numbers_is_refused() -> None:
    for function, expected in (
        (lambda tensors: {"kernel": tensors["weight"] * 2, "bias": tensors["bias"]}, "each number"),
        (lambda tensors: {"kernel": tensors["weight"]}, "each number of weight, bias once"),
        (lambda tensors: {"kernel": tensors["nothing"]}, r"cannot be converted \(KeyError"),
    ):
        model = inner(nn.Linear(2, 3))
        convert.attach_names(model, {}, {}, {"inner": function})
        with pytest.raises(ConfigError, match=expected):
            convert.canonical_names(model)
    with pytest.raises(ConfigError, match="convert names outer, which PyTorch's module does not"):
        convert.attach_names(inner(nn.Linear(2, 3)), {}, {}, {"outer": dict})
    with pytest.raises(ConfigError, match=r"inner's tensors, .* cannot be converted"):
        convert.canonical_names(inner(nn.MultiheadAttention(6, 2, kdim=4)))


def test_what_a_pair_says_of_a_block_holds_for_all_in_it_and_stars_are_positions() -> None:
    """A packed projection of the user's own, as in many vision transformers."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

    def packed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        kernels, biases = np.split(tensors["qkv.weight"], 3), np.split(tensors["qkv.bias"], 3)
        found = {"out.kernel": tensors["proj.weight"].T.reshape(2, 2, 4)}
        found["out.bias"] = tensors["proj.bias"]
        for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            found |= {f"{part}.kernel": kernel.T.reshape(4, 2, 2), f"{part}.bias": bias}
        return found

    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"attn": Block()}) for _ in range(2)])
    names = {"blocks.*.attn": "layers.*.attention"}
    convert.attach_names(model, names, {}, {"blocks.*.attn": packed})
    arrays = convert.to_canonical(model, dict(model.named_parameters()))
    assert arrays["layers.1.attention.value.kernel"].shape == (4, 2, 2)
    weight = model.get_parameter("blocks.1.attn.qkv.weight").detach().numpy()
    assert np.array_equal(arrays["layers.1.attention.key.kernel"].reshape(4, 4), weight[4:8].T)
    assert convert.layer_kinds(model) == {}
