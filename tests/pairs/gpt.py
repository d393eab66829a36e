"""A GPT of two blocks on tokens, in PyTorch, in nnx and in linen."""

import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from torch import nn
from torch.nn import functional as F

from lockstep import Pair

VOCABULARY, CONTEXT, WIDTH, HEADS, BLOCKS = 29, 12, 16, 2, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        h = self.ln_1(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(classes, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes, bias=False)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.ln_1 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.ln_2(x)), approximate=False))


class NnxGPT(nnx.Module):
    def __init__(self, classes, rngs):
        self.wte, self.wpe = (nnx.Embed(n, WIDTH, rngs=rngs) for n in (classes, CONTEXT))
        self.h = nnx.List([NnxBlock(rngs) for _ in range(BLOCKS)])
        self.ln_f = nnx.LayerNorm(WIDTH, epsilon=1e-5, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, classes, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x, nnx.make_causal_mask(tokens))
        return self.lm_head(self.ln_f(x))


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, mask):
        h = linen.LayerNorm(epsilon=1e-5)(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=HEADS)(h, mask=mask)
        h = linen.Dense(4 * WIDTH)(linen.LayerNorm(epsilon=1e-5)(x))
        return x + linen.Dense(WIDTH)(linen.gelu(h, approximate=False))


class LinenGPT(linen.Module):
    classes: int

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(self.classes, WIDTH, name="wte")(tokens)
        x = x + linen.Embed(CONTEXT, WIDTH, name="wpe")(jnp.arange(tokens.shape[1]))
        for _ in range(BLOCKS):
            x = LinenBlock()(x, linen.make_causal_mask(tokens))
        return linen.Dense(self.classes, use_bias=False)(linen.LayerNorm(epsilon=1e-5)(x))


def example():
    """Steps of one to three up an alphabet: a rule to learn."""
    steps = np.random.default_rng(0).integers(1, 4, (64, CONTEXT + 1))
    tokens = np.cumsum(steps, 1) % VOCABULARY
    return tokens[:, :-1], tokens[:, 1:]


NNX = Pair(GPT, NnxGPT, example=example)
LINEN = Pair(
    GPT,
    LinenGPT,
    names={
        **{
            f"h.{i}.{one}": f"LinenBlock_{i}.{other}"
            for i in range(BLOCKS)
            for one, other in {
                "ln_1": "LayerNorm_0",
                "attn": "MultiHeadDotProductAttention_0",
                "ln_2": "LayerNorm_1",
                "up": "Dense_0",
                "down": "Dense_1",
            }.items()
        },
        "ln_f": "LayerNorm_0",
        "lm_head": "Dense_0",
    },
    example=example,
)
