"""A small network for images of 224 x 224 pixels."""

from typing import Any

import numpy as np
from flax import nnx
from torch import nn

from lockstep import Pair
from lockstep.backends.flax_backend.layers import BatchNorm

PADDING: Any = ((1, 1), (1, 1))  # Flax's own type says only texts


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 7, stride=4, padding=3), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(16, classes)

    def forward(self, x):
        x = self.pool(self.relu(self.norm(self.stem(x))))
        return self.head(self.relu(self.conv(x)).mean((2, 3)))


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.stem = nnx.Conv(3, 8, (7, 7), strides=4, padding=3, rngs=rngs)
        self.norm = BatchNorm(8, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.conv = nnx.Conv(8, 16, (3, 3), strides=2, padding=1, rngs=rngs)
        self.head = nnx.Linear(16, classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=PADDING)
        return self.head(nnx.relu(self.conv(x)).mean((1, 2)))


def example():
    """Stripes, wide or narrow, along or across."""
    drawn, (x, y) = np.random.default_rng(0), np.mgrid[:224, :224]
    kinds = drawn.integers(0, 4, 16)
    stripes = [np.sin((x, y)[kind % 2] / (4, 16)[kind // 2]) for kind in kinds]
    pictures = 0.5 * np.stack(stripes)[..., None] + drawn.random((16, 224, 224, 3))
    return pictures.astype(np.float32), kinds


PAIR = Pair(Net, Port, example=example)
