"""The residual network of 20 layers for CIFAR-10, as a `torch.nn.Module`.

Source: He, Zhang, Ren and Sun, 'Deep Residual Learning for Image Recognition' (arXiv:1512.03385),
section 4.2, with n = 3 and the shortcuts of option A, which have no parameters.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from lockstep.backends.torch_backend.layers import BatchNorm2d, convolution


class ResNet20(nn.Module):
    """Images (n, 3, 32, 32) to logits (n, classes)."""

    def __init__(self, classes: int, device: str = "cpu") -> None:
        super().__init__()
        Conv2d = convolution(device)
        self.conv = Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn = BatchNorm2d(16, eps=1e-5, momentum=0.1)
        widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)  # before the first block, and after each
        self.blocks = nn.ModuleList(
            [Block(before, after, device) for before, after in pairwise(widths)]
        )
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        for block in self.blocks:
            x = block(x)
        x = x.mean(dim=(2, 3))
        return self.fc(x)


class Block(nn.Module):
    """Images (n, before, height, width) to (n, after, height, width), or of half the height and
    width where after is larger than before."""

    def __init__(self, before: int, after: int, device: str) -> None:
        super().__init__()
        Conv2d = convolution(device)
        self.stride = 1 if before == after else 2
        self.conv1 = Conv2d(before, after, kernel_size=3, stride=self.stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(after, eps=1e-5, momentum=0.1)
        self.conv2 = Conv2d(after, after, kernel_size=3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(after, eps=1e-5, momentum=0.1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        # zeros for the new channels
        shortcut = F.pad(shortcut, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return F.relu(y + shortcut)
