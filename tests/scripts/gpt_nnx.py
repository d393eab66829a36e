"""A character model in Flax NNX: two blocks of `nnx.MultiHeadAttention`, a tied head, AdamW with
warm-up, decay of matrices only, clipping."""

import argparse

import jax
import jax.numpy as jnp
import optax
import shared
from flax import nnx

import lockstep


def attention(query, key, value, mask, **_):
    """As `nnx.dot_product_attention`, whose softmax is float32 whatever its inputs are."""
    scores = jnp.einsum("...qhd,...khd->...hqk", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(scores, where=mask != 0)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


class Block(nnx.Module):
    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, attention_fn=attention, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x)), approximate=False))


class GPT(nnx.Module):
    def __init__(
        self, vocabulary: int, width: int, heads: int, blocks: int, context: int, *, rngs: nnx.Rngs
    ) -> None:
        self.tokens = nnx.Embed(vocabulary, width, rngs=rngs)
        self.positions = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(blocks)])
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)

    def __call__(self, x):
        """x: int (batch, length)."""
        mask = nnx.make_causal_mask(x)
        h = self.tokens(x) + self.positions(jnp.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h, mask)
        return self.tokens.attend(self.norm(h))


def load(model: GPT, weights) -> None:
    model.tokens.embedding[...] = weights["tokens"]
    model.positions.embedding[...] = weights["positions"]
    for i, block in enumerate(model.blocks):
        attention = block.attention
        for name in ("query", "key", "value", "out"):
            kernel = getattr(attention, name).kernel
            kernel[...] = weights[f"{i}.{name}"].reshape(kernel.shape)
        block.up.kernel[...] = weights[f"{i}.up"]
        block.down.kernel[...] = weights[f"{i}.down"]


def matrices(params):
    """True for each kernel and embedding: biases of the heads have two axes too."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(key in jax.tree_util.keystr(path) for key in ("kernel", "embedding")),
        params,
    )


def learning_rate(step):
    # 20.0: an integer over an integer is float32 in JAX, with 64 bits switched on too.
    return 3e-3 * jnp.minimum(1.0, (step + 1) / 20.0)


def loss_of(model: GPT, x, y):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
    return jnp.mean(losses, where=y != shared.PADDING)


@nnx.jit
def train_step(model: GPT, optimizer: nnx.Optimizer, x, y):
    loss, grads = nnx.value_and_grad(loss_of)(model, x, y)
    # As torch.nn.utils.clip_grad_norm_ does it, with its 1e-6.
    scale = jnp.minimum(1.0, 1.0 / (optax.global_norm(grads) + 1e-6))
    optimizer.update(model, jax.tree.map(lambda grad: grad * scale, grads))
    return loss, grads


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    sizes = (shared.VOCABULARY, shared.WIDTH, shared.HEADS, shared.BLOCKS, shared.CONTEXT)
    model = GPT(*sizes, rngs=nnx.Rngs(0))
    load(model, shared.gpt_weights())
    adamw = optax.adamw(learning_rate, weight_decay=0.1, mask=matrices)
    optimizer = nnx.Optimizer(model, adamw, wrt=nnx.Param)
    run = lockstep.Run()
    run.begin(model, optimizer)
    for x, y in shared.texts(options.steps):
        x, y = run.batch(x, y)
        loss, grads = train_step(model, optimizer, x, y)
        run.step(loss, grads=grads)
    print(f"loss after {options.steps} steps: {loss:.4f}")
    inputs, _ = next(shared.texts(1, seed=1))
    logits = model(inputs)
    run.finish(logits=logits, predictions=logits.argmax(-1))


if __name__ == "__main__":
    main()
