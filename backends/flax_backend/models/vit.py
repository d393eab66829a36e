"""A small vision transformer for images of 32 x 32 pixels, as a `flax.nnx.Module`.

Source: Dosovitskiy et al., 'An Image is Worth 16x16 Words' (arXiv:2010.11929), with patches of 4
pixels and narrower.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from lockstep.backends.flax_backend.layers import Dropout, LayerNorm, convolution, in_float32

DROPOUT = 0.1  # after embedding, attention and each dense layer of a block


class ViT(nnx.Module):
    """Images (n, 32, 32, 3) to logits (n, classes)."""

    def __init__(self, classes: int, device: str, rngs: nnx.Rngs) -> None:
        convolve = convolution(device)
        self.patches = nnx.Conv(
            3,
            64,
            kernel_size=(4, 4),
            strides=4,
            padding="VALID",
            conv_general_dilated=convolve,
            rngs=rngs,
        )
        self.token = nnx.Param(jnp.zeros((1, 1, 64)))
        self.position = nnx.Param(jnp.zeros((1, 1 + 8 * 8, 64)))
        self.dropout = Dropout(DROPOUT, (1 + 8 * 8, 64))
        self.blocks = nnx.List(
            [Block(tokens=1 + 8 * 8, width=64, heads=4, rngs=rngs) for _ in range(4)]
        )
        self.norm = LayerNorm(64, epsilon=1e-6, rngs=rngs)
        self.fc = nnx.Linear(64, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.patches(x)
        x = x.reshape(len(x), 8 * 8, 64)  # row by row
        x = jnp.concatenate([self.token.repeat(len(x), axis=0), x], axis=1) + self.position
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.fc(x[:, 0])  # the class token


class Block(nnx.Module):
    """Tokens (n, tokens, width) to the same shape."""

    def __init__(self, tokens: int, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.norm1 = LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.attention = Attention(width, heads, rngs)
        self.dropout1 = Dropout(DROPOUT, (tokens, width))
        self.norm2 = LayerNorm(width, epsilon=1e-6, rngs=rngs)
        self.fc1 = nnx.Linear(width, 4 * width, rngs=rngs)
        self.dropout2 = Dropout(DROPOUT, (tokens, 4 * width))
        self.fc2 = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout3 = Dropout(DROPOUT, (tokens, width))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.dropout1(self.attention(self.norm1(x)))
        y = self.dropout2(in_float32(nnx.gelu, self.fc1(self.norm2(x)), approximate=False))
        return x + self.dropout3(self.fc2(y))


class Attention(nnx.Module):
    """Tokens (n, tokens, width) to the same shape: softmax(query key^T / sqrt(width / heads))
    value, head by head.

    Source: Vaswani et al., 'Attention Is All You Need' (arXiv:1706.03762), section 3.2.
    """

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.query = nnx.Linear(width, width, rngs=rngs)
        # Without a bias: it would add the same to all scores of a query and change no weight, and
        # its gradient would be rounding error.
        self.key = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        n, tokens, width = x.shape
        split = (n, tokens, self.heads, width // self.heads)
        query, key, value = (
            self.query(x).reshape(split),
            self.key(x).reshape(split),
            self.value(x).reshape(split),
        )
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / (width // self.heads) ** 0.5
        weights = in_float32(nnx.softmax, scores, axis=-1)
        x = jnp.einsum("nhqk,nkhd->nqhd", weights, value)
        return self.out(x.reshape(n, tokens, width))
