"""Between PyTorch's layout and the canonical one: names, axes, and the order that a flatten leaves behind.

A parameter, its gradient and its momentum buffer share a shape, so the same two functions carry all three.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from common.protocol import Arrays


def to_canonical(model: nn.Module, tensors: Mapping[str, Tensor]) -> Arrays:
    """PyTorch tensors by PyTorch's names (`conv1.weight`) as canonical arrays by canonical names (`conv1.kernel`)."""
    arrays = {}
    for name, tensor in tensors.items():
        layer, _, role = name.rpartition(".")
        array = to_numpy(tensor)
        if role == "weight":
            role, array = "kernel", kernel_to_canonical(model, layer, array)
        arrays[f"{layer}.{role}"] = np.ascontiguousarray(array)
    return arrays


def from_canonical(model: nn.Module, arrays: Arrays) -> dict[str, Tensor]:
    """The inverse of `to_canonical`."""
    tensors = {}
    for name, array in arrays.items():
        layer, _, role = name.rpartition(".")
        if role == "kernel":
            role, array = "weight", kernel_from_canonical(model, layer, array)
        tensors[f"{layer}.{role}"] = to_tensor(array)
    return tensors


def kernel_to_canonical(model: nn.Module, layer: str, weight: np.ndarray) -> np.ndarray:
    """OIHW to HWIO for a convolution; (out, in) to (in, out) for a dense layer.

    PyTorch flattens (channels, height, width), Flax (height, width, channels): the rows of the first dense kernel after
    a flatten are put in the other order here, so that no network has to transpose its activations.
    """
    if isinstance(model.get_submodule(layer), nn.Conv2d):
        return weight.transpose(2, 3, 1, 0)
    kernel = weight.transpose(1, 0)
    if layer in flattened(model):
        channels, height, width = flattened(model)[layer]
        kernel = kernel.reshape(channels, height, width, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)
    return kernel


def kernel_from_canonical(model: nn.Module, layer: str, kernel: np.ndarray) -> np.ndarray:
    """HWIO to OIHW for a convolution; (in, out) to (out, in) for a dense layer."""
    if isinstance(model.get_submodule(layer), nn.Conv2d):
        return kernel.transpose(3, 2, 0, 1)
    if layer in flattened(model):
        channels, height, width = flattened(model)[layer]
        kernel = kernel.reshape(height, width, channels, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
    return kernel.transpose(1, 0)


def activation_to_canonical(model: nn.Module, name: str, activation: Tensor) -> np.ndarray:
    """NCHW to NHWC, and what a flatten made of it likewise; `name` is `<layer>` or `input of <layer>`."""
    array = to_numpy(activation)
    layer = name.removeprefix("input of ")
    if layer != name and layer in flattened(model):
        shape = array.shape
        array = array.reshape(len(array), *flattened(model)[layer]).transpose(0, 2, 3, 1).reshape(shape)
    elif array.ndim == 4:
        array = array.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(array)


def flattened(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """The dense layers that follow a flatten, and the (channels, height, width) that it unrolls."""
    return getattr(model, "flattened", {})


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy on the host; bfloat16 as ml_dtypes.bfloat16, which PyTorch does not know."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


def to_tensor(array: np.ndarray) -> Tensor:
    """A copy as a tensor of the same dtype."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.tensor(np.ascontiguousarray(array.astype(np.float32))).bfloat16()
    return torch.tensor(np.ascontiguousarray(array))
