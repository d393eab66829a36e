"""The same network with other initial weights: He's normal and a scale of zero there, defaults and a head of 1000 here."""

import torch
from flax import nnx
from torch import nn

from lockstep import Pair
from lockstep.backends.flax_backend.layers import BatchNorm


class Original(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, classes)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.bn.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        x = torch.relu(self.conv1(x))
        return self.fc(torch.relu(x + self.bn(self.conv2(x))).mean((2, 3)))


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.conv1 = nnx.Conv(3, 16, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(16, 16, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn = BatchNorm(16, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.fc = nnx.Linear(16, classes, kernel_init=nnx.initializers.constant(1000.0), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv1(x))
        return self.fc(nnx.relu(x + self.bn(self.conv2(x))).mean((1, 2)))


PAIR = Pair(torch=Original, flax=Port)
