"""A multilayer perceptron, as a `torch.nn.Module`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Images (n, 3, 32, 32) to logits (n, classes), by three dense layers."""

    def __init__(self, classes: int, device: str = "cpu") -> None:
        super().__init__()
        del device  # it chooses a convolution; there is none here
        self.fc1 = nn.Linear(3 * 32 * 32, 256)
        self.fc2 = nn.Linear(256, 128)
        self.fc3 = nn.Linear(128, classes)
        # (channels, height, width) before the flatten: see convert.py
        self.flattened = {"fc1": (3, 32, 32)}

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(x, start_dim=1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
