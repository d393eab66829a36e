"""Pairs with optimizers of their own."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from torch import nn

from lockstep import Pair


class Torch(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.head = nn.Linear(27, classes)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).flatten(1))


class Flax(nnx.Module):
    def __init__(self, classes, rngs):
        self.conv = nnx.Conv(2, 3, (3, 3), strides=2, padding=1, rngs=rngs)
        self.head = nnx.Linear(27, classes, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.conv(x)).reshape(len(x), -1))


class Warm(torch.optim.Optimizer):
    """Steps along the sign of a mean of gradients, the smaller the earlier. Its state has a
    number, and a slot with a name of its own."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("left", 1.0)
                mean = state.setdefault("mean", torch.zeros_like(p))
                mean.mul_(0.8).add_(p.grad, alpha=0.2)
                state["left"] *= 0.9
                p.sub_(group["lr"] * (1 - state["left"]) * torch.tanh(1e3 * mean))


class WarmState(NamedTuple):
    left: jax.Array
    mean: optax.Updates


def warm(learning_rate):
    def init(params):
        return WarmState(jnp.ones(()), jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        left = 0.9 * state.left
        mean = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, state.mean, updates)
        steps = jax.tree.map(lambda m: (1 - left) * jnp.tanh(1e3 * m), mean)
        return steps, WarmState(left, mean)

    rates = optax.scale_by_learning_rate(learning_rate)
    return optax.chain(optax.GradientTransformation(init, update), rates)


class RenamedState(NamedTuple):
    left: jax.Array
    average: optax.Updates


def renamed(learning_rate):
    inner = warm(learning_rate)

    def init(params: Any) -> Any:
        own, rate = cast(Any, inner.init(params))
        return RenamedState(*own), rate

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        own, rate = state
        updates, (own, rate) = cast(Any, inner.update(updates, (WarmState(*own), rate), params))
        return updates, (RenamedState(*own), rate)

    return optax.GradientTransformation(init, update)


class Closing(Warm):
    def step(self, closure):
        closure()


def pair(torch_side, flax_side):
    draws = np.random.default_rng(0)
    example = draws.random((40, 6, 6, 2), np.float32), draws.integers(0, 5, 40)
    return Pair(
        Torch, Flax, flattened={"head": (3, 3, 3)}, example=example, data=(*example, *example),
        optimizer=(torch_side, flax_side),
    )  # fmt: skip


ADAMAX = pair(torch.optim.Adamax, optax.adamax)
ADADELTA = pair(torch.optim.Adadelta, lambda lr: optax.adadelta(lr, rho=0.9))
WARM = pair(Warm, warm)
# PyTorch's has a schedule of its momentum, by a paper of 2016; optax's has none.
NADAM = pair(torch.optim.NAdam, optax.nadam)
RENAMED = pair(Warm, renamed)

# Refused
TEXT = pair("adam", "adam")
DEAF = pair(lambda params, lr: Warm(params, 0.5), warm)
NONE = pair(lambda params, lr: None, warm)
NOT_OPTAX = pair(Warm, lambda lr: None)
FAILING = pair(Warm, lambda lr: optax.adamax(lr * 0.1))
CLOSING = pair(Closing, warm)
NAMING = pair(Warm, lambda lr: optax.stateless(lambda updates, params: cast(Any, updates)["head"]))
