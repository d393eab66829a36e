"""Positions from an embedding of 0, 1, 2, ...: `nnx.Embed` keeps float32 whatever its parameters are."""

import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

from lockstep import Pair


class Original(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.places = nn.Embedding(16, 16)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places(torch.arange(16))
        return self.head(torch.relu(x).mean(1))


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.patches = nnx.Conv(3, 16, (8, 8), 8, padding="VALID", rngs=rngs)
        self.places = nnx.Embed(16, 16, rngs=rngs)
        self.head = nnx.Linear(16, classes, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(len(x), 16, 16) + self.places(jnp.arange(16))
        return self.head(nnx.relu(x).mean(1))


PAIR = Pair(torch=Original, flax=Port)
