"""A small ConvNeXt for images of 32 x 32 pixels, as a `torch.nn.Module`.

Source: Liu, Mao, Wu, Feichtenhofer, Darrell and Xie, 'A ConvNet for the 2020s' (arXiv:2201.03545),
with three stages instead of four, and narrower ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.backends.torch_backend.layers import Dropout, LayerNorm, convolution


class ConvNeXt(nn.Module):
    """Images (n, 3, 32, 32) to logits (n, classes)."""

    def __init__(self, classes: int, device: str = "cpu") -> None:
        super().__init__()
        Conv2d = convolution(device)
        self.stem = Conv2d(3, 32, kernel_size=4, stride=4)
        self.stem_norm = LayerNorm(32, eps=1e-6)
        self.blocks = nn.ModuleList(
            [
                Block(32, 0.0, device),
                Block(32, 0.02, device),
                Downsample(32, 64, device),
                Block(64, 0.04, device),
                Block(64, 0.06, device),
                Downsample(64, 128, device),
                Block(128, 0.08, device),
                Block(128, 0.1, device),
            ]
        )
        self.norm = LayerNorm(128, eps=1e-6)
        self.fc = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = channels_first(self.stem_norm(channels_last(x)))
        for block in self.blocks:
            x = block(x)
        x = x.mean(dim=(2, 3))
        return self.fc(self.norm(x))


class Block(nn.Module):
    """Images (n, channels, height, width) to the same shape."""

    def __init__(self, channels: int, depth_rate: float, device: str) -> None:
        super().__init__()
        Conv2d = convolution(device)
        self.conv = Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = LayerNorm(channels, eps=1e-6)
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))  # layer scale
        # leaves out an image's whole branch: stochastic depth
        self.dropout = Dropout(depth_rate, (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = self.norm(channels_last(y))
        y = F.gelu(self.fc1(y), approximate="none")
        y = self.fc2(y)
        return x + self.dropout(channels_first(self.gamma * y))


class Downsample(nn.Module):
    """Images (n, before, height, width) to (n, after, height / 2, width / 2)."""

    def __init__(self, before: int, after: int, device: str) -> None:
        super().__init__()
        Conv2d = convolution(device)
        self.norm = LayerNorm(before, eps=1e-6)
        self.conv = Conv2d(before, after, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_first(self.norm(channels_last(x)))
        return self.conv(x)


def channels_last(x: Tensor) -> Tensor:
    """(n, channels, height, width) to (n, height, width, channels), as layer norm and dense layers
    take it."""
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    """The inverse of `channels_last`."""
    return x.permute(0, 3, 1, 2)
