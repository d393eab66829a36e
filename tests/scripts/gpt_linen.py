"""A character model in Flax linen: two blocks of `nn.MultiHeadDotProductAttention`, a tied head,
AdamW with warm-up, decay of matrices only, clipping; on request dropout and gradient accumulation."""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import optax
import shared
from flax import linen as nn

import lockstep


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x, mask, keep):
        width = x.shape[-1]
        h = nn.LayerNorm(epsilon=1e-5)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(h, mask=mask)
        h = nn.LayerNorm(epsilon=1e-5)(x)
        h = nn.gelu(nn.Dense(4 * width)(h), approximate=False)
        return x + nn.Dense(width)(h) * keep


class GPT(nn.Module):
    vocabulary: int = shared.VOCABULARY
    width: int = shared.WIDTH
    heads: int = shared.HEADS
    context: int = shared.CONTEXT

    @nn.compact
    def __call__(self, x, keep):
        """x: int (batch, length); keep: (blocks, batch, length, width), what dropout leaves."""
        tokens = nn.Embed(self.vocabulary, self.width, name="tokens")
        positions = nn.Embed(self.context, self.width, name="positions")
        h = tokens(x) + positions(jnp.arange(x.shape[1]))
        for kept in keep:
            h = Block(self.heads)(h, nn.make_causal_mask(x), kept)
        return tokens.attend(nn.LayerNorm(epsilon=1e-5)(h))


def load(params, weights):
    """`params` with the matrices of `weights`."""
    w, heads = weights, shared.HEADS
    tree = params["params"]
    tree["tokens"]["embedding"] = w["tokens"]
    tree["positions"]["embedding"] = w["positions"]
    for i in range(shared.BLOCKS):
        block = tree[f"Block_{i}"]
        attention = block["MultiHeadDotProductAttention_0"]
        for name in ("query", "key", "value"):
            attention[name]["kernel"] = w[f"{i}.{name}"].reshape(shared.WIDTH, heads, -1)
        attention["out"]["kernel"] = w[f"{i}.out"].reshape(heads, -1, shared.WIDTH)
        block["Dense_0"]["kernel"] = w[f"{i}.up"]
        block["Dense_1"]["kernel"] = w[f"{i}.down"]
    return jax.tree.map(jnp.asarray, params)


def is_matrix(path, _):
    return path[-1].key in ("kernel", "embedding")


def learning_rate(step):
    # 20.0: an integer over an integer is float32 in JAX, with 64 bits switched on too.
    return 3e-3 * jnp.minimum(1.0, (step + 1) / 20.0)


model = GPT()


def forward(params, x, keep) -> jax.Array:
    logits = model.apply(params, x, keep)
    assert isinstance(logits, jax.Array)  # and no pair: `mutable` was not asked for
    return logits


optimizer = optax.adamw(
    learning_rate,
    weight_decay=0.1,
    mask=lambda params: jax.tree_util.tree_map_with_path(is_matrix, params),
)


def loss_of(params, x, y, keep):
    losses = optax.softmax_cross_entropy_with_integer_labels(forward(params, x, keep), y)
    return jnp.mean(losses, where=y != shared.PADDING)


@partial(jax.jit, static_argnames="parts")
def train_step(params, opt_state, x, y, keep, parts):
    loss, grads = 0.0, jax.tree.map(jnp.zeros_like, params)
    for x_part, y_part, kept in zip(
        jnp.split(x, parts), jnp.split(y, parts), jnp.split(keep, parts, axis=1), strict=True
    ):
        part, part_grads = jax.value_and_grad(loss_of)(params, x_part, y_part, kept)
        loss += part / parts
        grads = jax.tree.map(lambda total, grad: total + grad / parts, grads, part_grads)
    # As torch.nn.utils.clip_grad_norm_ does it, with its 1e-6.
    scale = jnp.minimum(1.0, 1.0 / (optax.global_norm(grads) + 1e-6))
    clipped = jax.tree.map(lambda grad: grad * scale, grads)
    updates, opt_state = optimizer.update(clipped, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, grads


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--accumulate", type=int, default=1)
    options = parser.parse_args()

    inputs, _ = next(shared.texts(1, seed=1))
    whole = jnp.ones((shared.BLOCKS, 1, 1, 1))
    params = load(model.init(jax.random.key(0), inputs, whole), shared.gpt_weights())
    run = lockstep.Run()
    params = run.begin(params)
    opt_state = optimizer.init(params)
    for x, y in shared.texts(options.steps):
        x, y = run.batch(x, y)
        drawn = run.random("dropout", (shared.BLOCKS, *x.shape, shared.WIDTH), kind="uniform")
        keep = (drawn >= options.dropout) / (1 - options.dropout)
        params, opt_state, loss, grads = train_step(
            params, opt_state, x, y, keep, options.accumulate
        )
        run.step(loss, params=params, grads=grads, opt_state=opt_state)
    print(f"loss after {options.steps} steps: {loss:.4f}")
    logits = forward(params, inputs, whole)
    run.finish(logits=logits, predictions=logits.argmax(-1))


if __name__ == "__main__":
    main()
