"""A character model in Haiku: two blocks of `hk.MultiHeadAttention`, a tied head, AdamW with
warm-up, decay of matrices only, clipping."""

import argparse

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import shared

import lockstep


def norm(name):
    return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True, name=name)


class Block(hk.Module):
    def __init__(self, heads: int, name: str | None = None) -> None:
        super().__init__(name=name)
        self.heads = heads

    def __call__(self, x, mask):
        width = x.shape[-1]
        init = hk.initializers.TruncatedNormal(0.02)
        h = norm("norm1")(x)
        x = x + hk.MultiHeadAttention(self.heads, width // self.heads, w_init=init)(h, h, h, mask)
        h = hk.Linear(4 * width, name="up")(norm("norm2")(x))
        return x + hk.Linear(width, name="down")(jax.nn.gelu(h, approximate=False))


def forward(x):
    """x: int (batch, length)."""
    length = x.shape[1]
    mask = np.tril(np.ones((1, 1, length, length), bool))
    tokens = hk.Embed(shared.VOCABULARY, shared.WIDTH, name="tokens")
    positions = hk.Embed(shared.CONTEXT, shared.WIDTH, name="positions")
    h = tokens(x) + positions(jnp.arange(length))
    for i in range(shared.BLOCKS):
        h = Block(shared.HEADS, name=f"block{i}")(h, mask)
    return norm("norm")(h) @ tokens.embeddings.T


model = hk.without_apply_rng(hk.transform(forward))


def load(params, weights):
    """`params` with `weights`, each under the last two parts of its module's name."""

    def loaded(module, name, array):
        if name == "embeddings":
            return weights[module]
        if name != "w":
            return array  # biases and norms start where Haiku starts them
        block, *_, layer = module.split("/")
        layer = {"linear": "out"}.get(layer, layer)
        return weights[f"{block.removeprefix('block')}.{layer}"]

    return jax.tree.map(jnp.asarray, hk.data_structures.map(loaded, params))


def matrices(params):
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def learning_rate(step):
    # 20.0: an integer over an integer is float32 in JAX, with 64 bits switched on too.
    return 3e-3 * jnp.minimum(1.0, (step + 1) / 20.0)


optimizer = optax.adamw(learning_rate, weight_decay=0.1, mask=matrices)


def loss_of(params, x, y):
    losses = optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y)
    return jnp.mean(losses, where=y != shared.PADDING)


@jax.jit
def train_step(params, opt_state, x, y):
    loss, grads = jax.value_and_grad(loss_of)(params, x, y)
    # As torch.nn.utils.clip_grad_norm_ does it, with its 1e-6.
    scale = jnp.minimum(1.0, 1.0 / (optax.global_norm(grads) + 1e-6))
    clipped = jax.tree.map(lambda grad: grad * scale, grads)
    updates, opt_state = optimizer.update(clipped, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, grads


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()

    inputs, _ = next(shared.texts(1, seed=1))
    params = load(model.init(jax.random.key(0), inputs), shared.gpt_weights())
    run = lockstep.Run()
    params = run.begin(params)
    opt_state = optimizer.init(params)
    for x, y in shared.texts(options.steps):
        x, y = run.batch(x, y)
        params, opt_state, loss, grads = train_step(params, opt_state, x, y)
        run.step(loss, params=params, grads=grads, opt_state=opt_state)
    print(f"loss after {options.steps} steps: {loss:.4f}")
    logits = model.apply(params, inputs)
    run.finish(logits=logits, predictions=logits.argmax(-1))


if __name__ == "__main__":
    main()
