"""An MLP of Equinox's own."""

import equinox as eqx
import jax
from torch import nn

from lockstep import Pair


class Original(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(3072, 32), nn.GELU("tanh"), nn.Linear(32, 32), nn.GELU("tanh")
        )
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        return self.head(self.mlp(x.flatten(1)))


class Port(eqx.Module):
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, classes, *, key):
        one, two = jax.random.split(key)
        self.mlp = eqx.nn.MLP(
            3072, 32, 32, 1, activation=jax.nn.gelu, final_activation=jax.nn.gelu, key=one
        )
        self.head = eqx.nn.Linear(32, classes, key=two)

    def __call__(self, x):
        return self.head(self.mlp(x.ravel()))


PAIR = Pair(Original, Port)
