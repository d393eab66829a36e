"""Dense blocks as in DenseNet: each layer sees what all before it have computed."""

import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

from lockstep import Pair
from lockstep.backends.flax_backend.layers import BatchNorm

START, GROWTH, LAYERS, BLOCKS = 12, 6, 3, 2


class DenseLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, GROWTH, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1)


class Transition(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.pool = nn.BatchNorm2d(width), nn.AvgPool2d(2)
        self.conv = nn.Conv2d(width, width // 2, 1, bias=False)

    def forward(self, x):
        return self.pool(self.conv(torch.relu(self.norm(x))))


class DenseNet(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, START, 3, stride=2, padding=1, bias=False)
        self.blocks, self.transitions, width = nn.ModuleList(), nn.ModuleList(), START
        for _ in range(BLOCKS):
            self.blocks.append(
                nn.Sequential(*[DenseLayer(width + GROWTH * i) for i in range(LAYERS)])
            )
            width += GROWTH * LAYERS
            self.transitions.append(Transition(width))
            width //= 2
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            x = transition(block(x))
        return self.head(torch.relu(self.norm(x)).mean((2, 3)))


def norm(width, rngs):
    return BatchNorm(width, momentum=0.9, epsilon=1e-5, rngs=rngs)


class FlaxLayer(nnx.Module):
    def __init__(self, width, rngs):
        self.norm = norm(width, rngs)
        self.conv = nnx.Conv(width, GROWTH, (3, 3), padding=1, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return jnp.concatenate([x, self.conv(nnx.relu(self.norm(x)))], -1)


class FlaxTransition(nnx.Module):
    def __init__(self, width, rngs):
        self.norm = norm(width, rngs)
        self.conv = nnx.Conv(width, width // 2, (1, 1), use_bias=False, rngs=rngs)

    def __call__(self, x):
        return nnx.avg_pool(self.conv(nnx.relu(self.norm(x))), (2, 2), strides=(2, 2))


class FlaxDenseNet(nnx.Module):
    def __init__(self, classes, rngs):
        self.stem = nnx.Conv(3, START, (3, 3), strides=2, padding=1, use_bias=False, rngs=rngs)
        blocks, transitions, width = [], [], START
        for _ in range(BLOCKS):
            blocks.append(
                nnx.Sequential(*[FlaxLayer(width + GROWTH * i, rngs) for i in range(LAYERS)])
            )
            width += GROWTH * LAYERS
            transitions.append(FlaxTransition(width, rngs))
            width //= 2
        self.blocks, self.transitions = nnx.List(blocks), nnx.List(transitions)
        self.norm, self.head = norm(width, rngs), nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            x = transition(block(x))
        return self.head(nnx.relu(self.norm(x)).mean((1, 2)))


PAIR = Pair(DenseNet, FlaxDenseNet)
