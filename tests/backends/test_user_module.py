"""Layers of a user's module that are replaced by those with exact sums."""

from __future__ import annotations

import ast
import copy
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
from lockstep.backends.torch_backend import layers as torch_layers
from lockstep.backends.torch_backend import user_module as torch_network


@pytest.fixture(autouse=True)
def float64() -> None:
    jax.config.update("jax_enable_x64", True)


def drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


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
