"""A norm of the user's own that normalises by its running statistics in training, too (equinox#659)."""

import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

from lockstep import Pair


class RunningNorm(nnx.Module):
    def __init__(self, width, rngs):
        self.scale, self.bias = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width))
        self.mean, self.var = nnx.BatchStat(jnp.zeros(width)), nnx.BatchStat(jnp.ones(width))

    def __call__(self, x):
        count = x.size // x.shape[-1]
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean((0, 1, 2))
        self.var[...] = 0.9 * self.var[...] + 0.1 * x.var((0, 1, 2)) * count / (count - 1)
        return (x - self.mean[...]) / jnp.sqrt(self.var[...] + 1e-5) * self.scale[...] + self.bias[
            ...
        ]


class Original(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        return self.fc(torch.relu(self.bn(self.conv1(x))).mean((2, 3)))


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.conv1 = nnx.Conv(3, 16, (3, 3), padding=1, use_bias=False, rngs=rngs)
        self.bn = RunningNorm(16, rngs)
        self.fc = nnx.Linear(16, classes, rngs=rngs)

    def __call__(self, x):
        return self.fc(nnx.relu(self.bn(self.conv1(x))).mean((1, 2)))


PAIR = Pair(torch=Original, flax=Port)
