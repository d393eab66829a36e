"""Pairs that bring their own example and loss: tokens, sequences, images of other sizes, pictures as
outputs, and two outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F

from lockstep import Pair


class TorchText(nn.Module):
    """Tokens to the next one."""

    def __init__(self, classes):
        super().__init__()
        self.table, self.places = nn.Embedding(classes, 8), nn.Embedding(6, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, classes)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens):
        length = tokens.shape[1]
        x = self.table(tokens) + self.places(torch.arange(length))
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return self.head(self.norm(x))


class FlaxText(nnx.Module):
    def __init__(self, classes, rngs):
        self.table, self.places = nnx.Embed(classes, 8, rngs=rngs), nnx.Embed(6, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.head = nnx.Linear(8, classes, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.table(tokens) + self.places(jnp.arange(tokens.shape[1]))
        x = x + self.attention(x, mask=nnx.make_causal_mask(tokens))
        return self.head(self.norm(x))


TOKENS = np.random.default_rng(0).integers(0, 11, (8, 7))
TEXT = Pair(TorchText, FlaxText, example=(TOKENS[:, :-1], TOKENS[:, 1:]))


class TorchPictures(nn.Module):
    """Pictures of 28 x 28 x 1 to themselves."""

    def __init__(self, classes):
        super().__init__()
        self.down = nn.Conv2d(1, 4, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1)

    def forward(self, x):
        return self.up(torch.tanh(self.down(x)))


class FlaxPictures(nnx.Module):
    def __init__(self, classes, rngs):
        self.down = nnx.Conv(1, 4, (4, 4), strides=2, padding=1, rngs=rngs)
        self.up = nnx.ConvTranspose(4, 1, (4, 4), strides=2, padding=[(2, 2)] * 2, rngs=rngs)

    def __call__(self, x):
        return self.up(jnp.tanh(self.down(x)))


def pictures():
    drawn = np.random.default_rng(1).random((6, 28, 28, 1), np.float32)
    return drawn, drawn


PICTURES = Pair(TorchPictures, FlaxPictures, loss="mean squared error", example=pictures)
LIKELY = Pair(TorchPictures, FlaxPictures, loss="binary cross entropy", example=pictures)
ROBUST = Pair(TorchPictures, FlaxPictures, loss="huber", example="pictures.npz")
SUMMED = Pair(  # the mistake of a sum for a mean
    TorchPictures,
    FlaxPictures,
    loss=(F.mse_loss, lambda outputs, targets: ((outputs - targets) ** 2).sum(-1).mean() * 2),
    example=pictures,
)


class TorchTwo(nn.Module):
    """A sequence to a class and a number."""

    def __init__(self, classes):
        super().__init__()
        self.line, self.score = nn.Linear(3, 5), nn.Linear(5, 4)
        self.size = nn.Linear(5, 1)

    def forward(self, x):
        x = torch.relu(self.line(x)).mean(1)
        return {"score": self.score(x), "size": self.size(x)}


class FlaxTwo(nnx.Module):
    def __init__(self, classes, rngs):
        self.line, self.score = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)
        self.size = nnx.Linear(5, 1, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.line(x)).mean(1)
        return {"score": self.score(x), "size": self.size(x)}


def torch_loss(outputs, targets):
    entropy = F.cross_entropy(outputs["score"], targets[:, 0].long())
    return entropy + F.mse_loss(outputs["size"][:, 0], targets[:, 1])


def flax_loss(outputs, targets):
    scores = jax.nn.log_softmax(outputs["score"])
    chosen = jnp.take_along_axis(scores, targets[:, :1].astype(jnp.int32), 1)
    return -chosen.mean() + ((outputs["size"][:, 0] - targets[:, 1]) ** 2).mean()


def sequences():
    drawn = np.random.default_rng(2)
    targets = np.stack([np.arange(8) % 4, drawn.random(8)], 1)
    return drawn.standard_normal((8, 6, 3)), targets


TWO = Pair(TorchTwo, FlaxTwo, loss=(torch_loss, flax_loss), example=sequences)


def masked():
    """Sequences of several lengths: what is past their end has no label."""
    drawn = np.random.default_rng(3)
    tokens = drawn.integers(0, 11, (48, 7))
    targets = np.where(np.arange(6) < drawn.integers(1, 7, (48, 1)), tokens[:, 1:], -100)
    return tokens[:32, :-1], targets[:32], tokens[32:, :-1], targets[32:]


def entropy(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def entropy_of_all(outputs, targets):
    """The mistake: a mean over what is left out as well."""
    scores = jax.nn.log_softmax(outputs)
    chosen = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return -jnp.where(targets == -100, 0, chosen).mean()


MASKED = Pair(TorchText, FlaxText, data=masked)
UNMASKED = Pair(TorchText, FlaxText, data=masked, loss=(entropy, entropy_of_all))


class TorchLists(nn.Module):
    """Parameters in lists and in a dictionary, in no layer of their own."""

    def __init__(self, classes):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 1)
        self.scales = nn.ParameterList(torch.rand(4) for _ in range(11))
        self.blocks = nn.ModuleList(nn.ParameterList([torch.rand(4, 4)]) for _ in range(2))
        self.named = nn.ParameterDict({"shift": torch.rand(4)})

    def forward(self, x):
        x = self.first(x)
        for scale in self.scales:
            x = torch.tanh(x * scale) + 1
        for matrix in self.blocks.parameters():
            x = x @ matrix
        return self.last(x + self.named["shift"])


class FlaxLists(nnx.Module):
    def __init__(self, classes, rngs, backwards=False):
        def drawn(*shape):
            return nnx.Param(rngs.params.uniform(shape))

        self.first, self.last = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
        self.scales = nnx.List([drawn(4) for _ in range(11)])
        self.blocks = nnx.List([nnx.List([drawn(4, 4)]) for _ in range(2)])
        self.named = nnx.Dict(shift=drawn(4))
        self.backwards = backwards

    def __call__(self, x):
        x = self.first(x)
        for scale in reversed(self.scales) if self.backwards else self.scales:
            x = jnp.tanh(x * scale[...]) + 1
        for block in self.blocks:
            x = x @ block[0][...]
        return self.last(x + self.named["shift"][...])


def rows():
    drawn = np.random.default_rng(4)
    return drawn.standard_normal((8, 5)), drawn.standard_normal((8, 1))


LISTS = Pair(TorchLists, FlaxLists, loss="mean squared error", example=rows)
BACKWARDS = Pair(  # the mistake of a list read from its end
    TorchLists,
    lambda classes, rngs: FlaxLists(classes, rngs, backwards=True),
    loss="mean squared error",
    example=rows,
)


class TorchLine(nn.Module):
    """Five numbers to one."""

    def __init__(self, classes):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class FlaxLine(nnx.Module):
    def __init__(self, classes, rngs, scale=1.0):
        self.first, self.last = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
        self.scale = scale

    def __call__(self, x):
        return self.last(self.scale * jnp.tanh(self.first(x)))


REGRESSION = Pair(TorchLine, FlaxLine, loss="mean squared error")
STEEPER = Pair(
    TorchLine, lambda classes, rngs: FlaxLine(classes, rngs, 1.01), loss="mean squared error"
)
WEIGHED = Pair(  # the mistake of one part of a loss counted otherwise
    TorchTwo,
    FlaxTwo,
    loss=(torch_loss, lambda outputs, targets: 1.01 * flax_loss(outputs, targets)),
    example=sequences,
)
