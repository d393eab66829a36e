"""Networks with layers that Lockstep's own networks do not have. They are correct in both
frameworks; `layers.py` breaks those of Flax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from lockstep.backends.flax_backend.layers import GRUCell, LSTMCell
from lockstep.common.data.dataset import IGNORED
from lockstep.common.model.pair import Pair

WORDS, WIDTH, LENGTH, TAGS = 20, 12, 8, 4
PADDING = 0  # the word in front of sentences that are shorter than others


class Tagger(nn.Module):
    """A tag for each word of a sentence."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH, padding_idx=PADDING)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.gru(self.embed(words))[0])[0])


class FlaxTagger(nnx.Module):
    def __init__(self, classes: int, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.gru = nnx.RNN(GRUCell(WIDTH, WIDTH, rngs=rngs))
        self.lstm = nnx.RNN(LSTMCell(WIDTH, WIDTH, rngs=rngs))
        self.head = nnx.Linear(WIDTH, classes, rngs=rngs)

    def __call__(self, words: jax.Array) -> jax.Array:
        states: Any = self.gru(fixed_padding(words, self.embed(words)))
        states = self.lstm(states)
        return self.head(states)


def fixed_padding(words: jax.Array, embedded: jax.Array) -> jax.Array:
    """The padding's embedding has no gradient, as in PyTorch: it stays what it is."""
    return jnp.where(words[..., None] == PADDING, jax.lax.stop_gradient(embedded), embedded)


def sentences() -> list[np.ndarray]:
    """Words that are tagged by themselves and the word before; padding has no tag."""
    drawn = np.random.default_rng(0)
    words = drawn.integers(1, WORDS, (320, LENGTH))
    words[np.arange(LENGTH) < drawn.integers(0, LENGTH // 2, (320, 1))] = PADDING
    before = np.roll(words, 1, 1)
    tags = np.where(words == PADDING, IGNORED, (words + before) % TAGS)
    return [words[:256], tags[:256], words[256:], tags[256:]]


class Painter(nn.Module):
    """A picture from a small one."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.larger = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1)
        self.largest = nn.ConvTranspose2d(4, 1, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.largest(torch.tanh(self.larger(torch.tanh(self.conv(x)))))


class FlaxPainter(nnx.Module):
    def __init__(self, classes: int, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 6, (3, 3), padding=1, rngs=rngs)
        self.larger, self.largest = (
            nnx.ConvTranspose(*channels, (3, 3), strides=2, padding=[(1, 2)] * 2, rngs=rngs)
            for channels in ((6, 4), (4, 1))
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.largest(jnp.tanh(self.larger(jnp.tanh(self.conv(x)))))


def pictures() -> list[np.ndarray]:
    """Waves of 16 x 16 pixels, and every fourth pixel of them."""
    drawn, (y, x) = np.random.default_rng(0), np.mgrid[:16, :16] / 16
    waves = drawn.random((320, 3, 1, 1)) * 6
    large = np.sin(waves[:, 0] * x + waves[:, 1] * y + waves[:, 2])[..., None]
    small = large[:, ::4, ::4]
    return [small[:256], large[:256], small[256:], large[256:]]


TAGGER = Pair(Tagger, FlaxTagger, names={"gru": "gru.cell", "lstm": "lstm.cell"}, data=sentences)
PAINTER = Pair(Painter, FlaxPainter, loss="mean squared error", data=pictures)
