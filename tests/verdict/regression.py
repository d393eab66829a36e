"""One number per image, to be trained with the mean squared error."""

import torch
from flax import nnx
from torch import nn

from lockstep import Pair


class Original(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.out = nn.Linear(8, 1)

    def forward(self, x):
        return self.out(torch.relu(self.conv(x)).mean((2, 3)))


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), 2, padding=1, rngs=rngs)
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.conv(x)).mean((1, 2)))


PAIR = Pair(torch=Original, flax=Port, loss="mean squared error")
