"""The network of PyTorch's tutorial 'Training a Classifier', as a `torch.nn.Module`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.backends.torch_backend.layers import convolution, max_pooling


class Net(nn.Module):
    """Images (n, 3, 32, 32) to logits (n, classes)."""

    def __init__(self, classes: int, device: str = "cpu") -> None:
        super().__init__()
        Conv2d = convolution(device)
        self.conv1 = Conv2d(3, 6, kernel_size=5)
        self.pool = max_pooling(device)
        self.conv2 = Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)
        # (channels, height, width) before the flatten: see convert.py
        self.flattened = {"fc1": (16, 5, 5)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, start_dim=1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)
