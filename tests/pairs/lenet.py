"""LeNet, for images of 28 x 28 pixels and one channel."""

import numpy as np
from flax import nnx
from torch import nn

from lockstep import Pair


class LeNet(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.pool, self.act = nn.AvgPool2d(2), nn.Tanh()
        self.fc1, self.fc2 = nn.Linear(400, 120), nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x):
        x = self.pool(self.act(self.conv1(x)))
        x = self.pool(self.act(self.conv2(x))).flatten(1)
        return self.fc3(self.act(self.fc2(self.act(self.fc1(x)))))


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.conv1 = nnx.Conv(1, 6, (5, 5), padding="SAME", rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(400, 120, rngs=rngs), nnx.Linear(120, 84, rngs=rngs)
        self.fc3 = nnx.Linear(84, classes, rngs=rngs)

    def __call__(self, x):
        for conv in (self.conv1, self.conv2):
            x = nnx.avg_pool(nnx.tanh(conv(x)), (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        return self.fc3(nnx.tanh(self.fc2(nnx.tanh(self.fc1(x)))))


def example():
    """A bright square in one of four corners."""
    drawn = np.random.default_rng(0)
    pictures, corners = drawn.random((64, 28, 28, 1)), drawn.integers(0, 4, 64)
    for picture, corner in zip(pictures, corners, strict=True):
        row, column = divmod(int(corner), 2)
        picture[14 * row : 14 * row + 14, 14 * column : 14 * column + 14] += 1
    return pictures.astype(np.float32), corners


PAIR = Pair(LeNet, Port, flattened={"fc1": (16, 5, 5)}, example=example)
