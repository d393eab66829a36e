"""A rectifier written as a maximum, whose derivative at 0 is one half; biases start at zero, as Flax's do (jax#37821)."""

import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

from lockstep import Pair


class Original(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2, 3, padding=1)
        self.conv2 = nn.Conv2d(2, 8, 1)
        self.fc = nn.Linear(8, classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, x):
        return self.fc(torch.relu(self.conv2(torch.relu(self.conv1(x)))).mean((2, 3)))


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.conv1 = nnx.Conv(3, 2, (3, 3), padding=1, rngs=rngs)
        self.conv2 = nnx.Conv(2, 8, (1, 1), rngs=rngs)
        self.fc = nnx.Linear(8, classes, rngs=rngs)

    def __call__(self, x):
        return self.fc(jnp.maximum(self.conv2(jnp.maximum(self.conv1(x), 0)), 0).mean((1, 2)))


PAIR = Pair(torch=Original, flax=Port)
