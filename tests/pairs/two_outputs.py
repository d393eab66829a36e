"""A class and a size of each input, and a loss of both."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from torch import nn
from torch.nn import functional as F

from lockstep import Pair


class Two(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.kind, self.size = nn.Linear(16, 3), nn.Linear(16, 1)

    def forward(self, x):
        h = self.trunk(x)
        return self.kind(h), self.size(h)


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.dense1, self.dense2 = nnx.Linear(6, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)
        self.kind, self.size = nnx.Linear(16, 3, rngs=rngs), nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        h = jnp.tanh(self.dense2(jnp.tanh(self.dense1(x))))
        return self.kind(h), self.size(h)


def torch_loss(outputs, targets):
    kind, size = outputs
    return F.cross_entropy(kind, targets[:, 0].long()) + F.mse_loss(size[:, 0], targets[:, 1])


def flax_loss(outputs, targets):
    kind, size = outputs
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(kind), targets[:, :1].astype(jnp.int32), axis=-1
    )
    return -chosen.mean() + ((size[:, 0] - targets[:, 1]) ** 2).mean()


def example():
    x = np.random.default_rng(0).standard_normal((64, 6))
    return x, np.stack([np.argmax(x[:, :3], 1), np.sin(x[:, 3]) * x[:, 4]], 1)


PAIR = Pair(
    Two,
    Port,
    names={"trunk.0": "dense1", "trunk.2": "dense2"},
    loss=(torch_loss, flax_loss),
    example=example,
)
