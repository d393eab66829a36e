"""MLP-Mixer: two blocks over patches of 8 x 8 pixels."""

import jax.numpy as jnp
from flax import nnx
from torch import nn

from lockstep import Pair

WIDTH, PATCHES, BLOCKS = 24, 16, 2


class MlpBlock(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.GELU()

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class MixerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens, self.channels = MlpBlock(PATCHES, 12), MlpBlock(WIDTH, 48)

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, stride=8)
        self.blocks = nn.Sequential(*[MixerBlock() for _ in range(BLOCKS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class FlaxMlp(nnx.Module):
    def __init__(self, width, hidden, rngs):
        self.dense_in = nnx.Linear(width, hidden, rngs=rngs)
        self.dense_out = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x):
        return self.dense_out(nnx.gelu(self.dense_in(x), approximate=False))


class FlaxBlock(nnx.Module):
    def __init__(self, rngs):
        self.token_norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.token_mixing = FlaxMlp(PATCHES, 12, rngs)
        self.channel_norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.channel_mixing = FlaxMlp(WIDTH, 48, rngs)

    def __call__(self, x):
        x = x + jnp.swapaxes(self.token_mixing(jnp.swapaxes(self.token_norm(x), 1, 2)), 1, 2)
        return x + self.channel_mixing(self.channel_norm(x))


class FlaxMixer(nnx.Module):
    def __init__(self, classes, rngs):
        self.stem = nnx.Conv(3, WIDTH, (8, 8), strides=8, padding="VALID", rngs=rngs)
        self.blocks = nnx.List([FlaxBlock(rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(WIDTH, classes, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        x = x.reshape(len(x), -1, WIDTH)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


PAIR = Pair(
    Mixer,
    FlaxMixer,
    names={
        "blocks.*.norm1": "blocks.*.token_norm",
        "blocks.*.norm2": "blocks.*.channel_norm",
        "blocks.*.tokens.fc1": "blocks.*.token_mixing.dense_in",
        "blocks.*.tokens.fc2": "blocks.*.token_mixing.dense_out",
        "blocks.*.channels.fc1": "blocks.*.channel_mixing.dense_in",
        "blocks.*.channels.fc2": "blocks.*.channel_mixing.dense_out",
    },
)
