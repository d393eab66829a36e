"""Layers of the networks that are not the library's own: convolution and pooling that are fast on
the device, norms with accurate sums, and dropout with given masks. Equal to `torch.nn` up to
rounding. Reads next to backends/flax_backend/layers.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.backends.torch_backend.kernels import Im2colConv2d, Pool2x2


def convolution(device: str) -> type[nn.Conv2d]:
    """The class of convolutions on `device`: on the CPU, one that is a matrix product where that is
    faster."""
    return Im2colConv2d if device == "cpu" else nn.Conv2d


def max_pooling(device: str) -> nn.MaxPool2d:
    """The largest of each 2 x 2 pixels: (n, channels, height, width) to (n, channels, height / 2,
    width / 2)."""
    return (Pool2x2 if device == "cpu" else nn.MaxPool2d)(kernel_size=2, stride=2)


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`; uncompiled in float64 on the CPU, sums are taken in stages, like PyTorch's
    other sums.

    There the library adds one value after the other, and a deep network amplifies the rounding.
    Twins do not show it, since all sums of one side are off in the same way. In float32 the library
    adds in float64.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum: float

    def forward(self, input: Tensor) -> Tensor:
        inexact = (
            input.dtype == torch.float64
            and input.device.type == "cpu"
            and not torch.compiler.is_compiling()
        )
        # For others, the library's error messages.
        supported = (
            input.ndim == 4 and input.shape[1] == self.num_features and input[:, 0].numel() > 1
        )
        if not (self.training and inexact and supported):
            return super().forward(input)
        axes, pixels = (0, 2, 3), input[:, 0].numel()
        mean = input.mean(axes, keepdim=True)
        centred = input - mean
        var = centred.square().mean(axes, keepdim=True)
        with torch.no_grad():
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * (pixels / (pixels - 1)), self.momentum)
        weight, bias = self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
        return centred * (torch.rsqrt(var + self.eps) * weight) + bias


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`; bfloat16 on the CPU is computed in float32 and rounded once, as on a GPU.

    There the library sums the gradients of scale and bias in bfloat16.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.bfloat16 or input.device.type != "cpu":
            return super().forward(input)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(
            input.dtype
        )


class Dropout(nn.Module):
    """`nn.Dropout` with a given mask: before each training step, `lockstep.common.data.dropout`
    draws `mask`.

    Args:
        rate: the share that is left out, 0 <= rate < 1; what is kept is divided by 1 - rate.
        shape: of the mask of one image, as the layer sees it. Along axes of size 1, all is kept or
            left out together: `(1, 1, 1)` leaves out all of an image, as in stochastic depth.
        channels_first: the first of three axes is the channels, which is Flax's last axis.
    """

    mask: Tensor  # bool (n, *shape); not in the state dict

    def __init__(self, rate: float, shape: tuple[int, ...], channels_first: bool = False) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"a rate of {rate:g}: give 0 or more, and less than 1")
        self.rate, self.channels_first = rate, channels_first
        self.register_buffer("mask", torch.ones(1, *shape, dtype=torch.bool), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask / (1 - self.rate) if self.training else x
