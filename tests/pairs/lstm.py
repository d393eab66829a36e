"""Sequences of numbers to one of four classes, by an LSTM."""

from typing import Any

import numpy as np
from flax import nnx
from torch import nn

from lockstep import Pair
from lockstep.backends.flax_backend.layers import LSTMCell


class Classifier(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.lstm = nn.LSTM(2, 12, batch_first=True)
        self.head = nn.Linear(12, classes)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.lstm = nnx.RNN(LSTMCell(2, 12, rngs=rngs))
        self.head = nnx.Linear(12, classes, rngs=rngs)

    def __call__(self, x):
        states: Any = self.lstm(x)
        return self.head(states[:, -1])


def example():
    """Waves of four frequencies."""
    drawn = np.random.default_rng(0)
    kinds, time = drawn.integers(0, 4, 64), np.arange(10) / 10
    angles = time * (kinds + 1)[:, None] * 3 + drawn.random((64, 1))
    return np.stack([np.sin(angles), np.cos(angles)], -1), kinds


PAIR = Pair(Classifier, Port, names={"lstm": "lstm.cell"}, example=example)
