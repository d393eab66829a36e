"""Pictures to themselves, by convolutions and transposed ones."""

import numpy as np
import torch
from flax import nnx
from torch import nn

from lockstep import Pair


class Autoencoder(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(4, 8, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
        )

    def forward(self, x):
        return torch.sigmoid(self.decoder(self.encoder(x)))


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.encoder = nnx.Sequential(
            nnx.Conv(1, 8, (3, 3), strides=2, padding=1, rngs=rngs),
            nnx.relu,
            nnx.Conv(8, 4, (3, 3), strides=2, padding=1, rngs=rngs),
            nnx.relu,
        )
        self.decoder = nnx.Sequential(
            nnx.ConvTranspose(4, 8, (4, 4), strides=2, padding=[(2, 2)] * 2, rngs=rngs),
            nnx.relu,
            nnx.ConvTranspose(8, 1, (4, 4), strides=2, padding=[(2, 2)] * 2, rngs=rngs),
        )

    def __call__(self, x):
        return nnx.sigmoid(self.decoder(self.encoder(x)))


def example():
    """Blots of light."""
    drawn, (x, y) = np.random.default_rng(0), np.mgrid[:28, :28] / 28
    places = drawn.random((64, 2, 1, 1))
    pictures = np.exp(-20 * ((x - places[:, 0]) ** 2 + (y - places[:, 1]) ** 2))[..., None]
    return pictures, pictures


PAIR = Pair(Autoencoder, Port, loss="mean squared error", example=example)
