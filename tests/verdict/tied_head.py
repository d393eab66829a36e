"""One matrix as embedding and as head."""

import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

from lockstep import Pair


class Original(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.table = nn.Embedding(classes, 16)
        self.patches = nn.Conv2d(3, 16, 8, 8)

    def forward(self, x):
        x = self.patches(x).mean((2, 3)) + self.table(torch.zeros(len(x), dtype=torch.int64))
        return x @ self.table.weight.T


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.table = nnx.Embed(classes, 16, rngs=rngs)
        self.patches = nnx.Conv(3, 16, (8, 8), 8, padding="VALID", rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).mean((1, 2)) + self.table(jnp.zeros(len(x), jnp.int32))
        return self.table.attend(x)


PAIR = Pair(torch=Original, flax=Port)
