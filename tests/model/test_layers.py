"""What a backend knows of its layers: kinds by class, activations of a user's own norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from lockstep.backends.flax_backend.activations import record_activations as flax_activations
from lockstep.backends.torch_backend import convert
from lockstep.backends.torch_backend.activations import record_activations as torch_activations
from lockstep.common.config import BACKENDS, Config


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        ("net", {"conv1": "convolution", "fc1": "dense"}),
        ("resnet20", {"bn": "norm", "blocks.0.conv1": "convolution"}),
        ("vit", {"blocks.0.attention": "attention", "blocks.0.attention.out": "dense"}),
        ("vit", {"patches": "convolution", "blocks.0.norm1": "norm"}),
    ],
)
def test_both_backends_tell_the_same_kinds(model: str, kinds: dict, build: Callable) -> None:
    config = Config(model=model, steps=4, batch_size=4).resolve(100)
    torch_kinds, flax_kinds = (build(name, config).layer_kinds() for name in BACKENDS)
    assert torch_kinds == flax_kinds
    assert kinds.items() <= torch_kinds.items()
    assert "blocks" not in torch_kinds and "" not in torch_kinds


class TorchNorm(torch.nn.Module):
    """A user's own, over the channels in axis 1."""

    def __init__(self, width: int, axis: int = 1) -> None:
        super().__init__()
        self.scale, self.axis = torch.nn.Parameter(torch.ones(width)), axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return x / x.norm(dim=self.axis, keepdim=True) * self.scale.view(shape)


class FlaxNorm(nnx.Module):
    def __init__(self, width: int) -> None:
        self.scale = nnx.Param(jnp.ones(width))
        self.width = width

    def __call__(self, x: Any, times: float = 1.0) -> Any:
        return times * x / jnp.linalg.norm(x, axis=-1, keepdims=True) * self.scale[...]


class Mystery(TorchNorm):  # its class says nothing
    pass


def test_a_users_own_norm_is_among_the_activations_of_both() -> None:
    class Flax(nnx.Module):
        def __init__(self) -> None:
            self.norm = FlaxNorm(3)

        def __call__(self, x: Any) -> Any:
            return self.norm(x, times=2.0) / self.norm.width  # attributes are the layer's

    model, images = torch.nn.Sequential(TorchNorm(3)), np.ones((2, 5, 5, 3), np.float32)
    with torch_activations(model) as seen:
        model(torch.tensor(images).permute(0, 3, 1, 2))
    assert list(seen) == ["input of 0", "0"]
    assert convert.activation_to_canonical(model, "0", seen["0"]).shape == (2, 5, 5, 3)
    with flax_activations(Flax()) as found:
        pass
    module = Flax()
    with flax_activations(module) as found:
        output = module(jnp.asarray(images))
    assert list(found) == ["input of norm", "norm"]
    np.testing.assert_array_equal(found["norm"] / 3, output)
    assert type(module.norm) is FlaxNorm


@pytest.mark.parametrize(
    ("layer", "shape", "seen"),
    [
        (TorchNorm(3), (2, 3, 5, 4), True),
        (TorchNorm(4, axis=3), (2, 3, 5, 4), True),
        (TorchNorm(3), (2, 3, 5, 3), False),  # either axis may be the channels
        (Mystery(3), (2, 3, 5, 4), False),
    ],
)
def test_a_layer_whose_axes_are_not_known_is_left_out(
    layer: torch.nn.Module, shape: tuple[int, ...], seen: bool
) -> None:
    model = torch.nn.Sequential(layer)
    with torch_activations(model) as activations:
        model(torch.ones(shape))
    assert bool(activations) == seen
    if seen:
        array = convert.activation_to_canonical(model, "0", activations["0"])
        assert array.shape[-1] == len(layer.scale)  # pyright: ignore[reportArgumentType]
