"""A character model in Equinox: two blocks of `eqx.nn.MultiheadAttention`, a tied head, AdamW with
warm-up, decay of matrices only, clipping."""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import shared

import lockstep


class Block(eqx.Module):
    norm1: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    norm2: eqx.nn.LayerNorm
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, width: int, heads: int, *, key) -> None:
        keys = jax.random.split(key, 3)
        biases = dict.fromkeys(
            ("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"), True
        )
        self.norm1 = eqx.nn.LayerNorm(width)
        self.attention = eqx.nn.MultiheadAttention(heads, width, **biases, key=keys[0])
        self.norm2 = eqx.nn.LayerNorm(width)
        self.up = eqx.nn.Linear(width, 4 * width, key=keys[1])
        self.down = eqx.nn.Linear(4 * width, width, key=keys[2])

    def __call__(self, x, mask):
        """x: (length, width), one row of the batch."""
        h = jax.vmap(self.norm1)(x)
        x = x + self.attention(h, h, h, mask=mask)
        h = jax.vmap(self.up)(jax.vmap(self.norm2)(x))
        return x + jax.vmap(self.down)(jax.nn.gelu(h, approximate=False))


class GPT(eqx.Module):
    tokens: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.LayerNorm

    def __init__(self, vocabulary, width, heads, blocks, context, *, key) -> None:
        keys = jax.random.split(key, blocks + 2)
        self.tokens = eqx.nn.Embedding(vocabulary, width, key=keys[0])
        self.positions = eqx.nn.Embedding(context, width, key=keys[1])
        self.blocks = [Block(width, heads, key=k) for k in keys[2:]]
        self.norm = eqx.nn.LayerNorm(width)

    def __call__(self, x):
        """x: int (length,), one row of the batch."""
        length = len(x)
        mask = jnp.tril(jnp.ones((length, length), bool))
        h = jax.vmap(self.tokens)(x) + jax.vmap(self.positions)(jnp.arange(length))
        for block in self.blocks:
            h = block(h, mask)
        return jax.vmap(self.norm)(h) @ self.tokens.weight.T


def load(model: GPT, weights) -> GPT:
    """`model` with `weights`, its biases 0 and its norms as they are."""

    def loaded(path, leaf):
        name = jax.tree_util.keystr(path)
        if name.endswith(".bias"):
            return jnp.zeros_like(leaf)
        if "norm" in name:
            return leaf
        if name in (".tokens.weight", ".positions.weight"):
            return jnp.asarray(weights[name.split(".")[1]])
        block, layer = path[1].idx, path[-2].name.removesuffix("_proj")
        return jnp.asarray(weights[f"{block}.{layer.replace('output', 'out')}"]).T

    arrays, rest = eqx.partition(model, eqx.is_array)
    return eqx.combine(jax.tree_util.tree_map_with_path(loaded, arrays), rest)


def learning_rate(step):
    # 20.0: an integer over an integer is float32 in JAX, with 64 bits switched on too.
    return 3e-3 * jnp.minimum(1.0, (step + 1) / 20.0)


def matrices(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)


optimizer = optax.adamw(learning_rate, weight_decay=0.1, mask=matrices)


def loss_of(model: GPT, x, y):
    losses = optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y)
    return jnp.mean(losses, where=y != shared.PADDING)


@eqx.filter_jit
def train_step(model: GPT, opt_state, x, y):
    loss, grads = eqx.filter_value_and_grad(loss_of)(model, x, y)
    # As torch.nn.utils.clip_grad_norm_ does it, with its 1e-6.
    scale = jnp.minimum(1.0, 1.0 / (optax.global_norm(grads) + 1e-6))
    clipped = jax.tree.map(lambda grad: grad * scale, grads)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = optimizer.update(clipped, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state, loss, grads


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    sizes = (shared.VOCABULARY, shared.WIDTH, shared.HEADS, shared.BLOCKS, shared.CONTEXT)
    model = load(GPT(*sizes, key=jax.random.key(0)), shared.gpt_weights())
    run = lockstep.Run()
    model = run.begin(model)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    for x, y in shared.texts(options.steps):
        x, y = run.batch(x, y)
        model, opt_state, loss, grads = train_step(model, opt_state, x, y)
        run.step(loss, params=model, grads=grads, opt_state=opt_state)
    print(f"loss after {options.steps} steps: {loss:.4f}")
    inputs, _ = next(shared.texts(1, seed=1))
    logits = jax.vmap(model)(jnp.asarray(inputs))
    run.finish(logits=logits, predictions=logits.argmax(-1))


if __name__ == "__main__":
    main()
