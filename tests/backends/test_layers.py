"""Norms whose sums are more exact than the libraries'."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from torch import nn

from lockstep.backends.torch_backend import layers as torch_layers


@pytest.fixture(autouse=True)
def float64() -> None:
    jax.config.update("jax_enable_x64", True)


def drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


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
