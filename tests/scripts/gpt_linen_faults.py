"""The character model of gpt_linen.py with one thing changed, which `--fault` names. What each is,
and where it has to be found, stands in faults.py."""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import shared
from faults import GPT_FAULTS
from flax import linen as nn

import lockstep

QK = ("query", "key")


class Block(nn.Module):
    heads: int
    fault: str

    @nn.compact
    def __call__(self, x, mask, keep):
        width = x.shape[-1]
        first = self.name == "Block_0"
        h = nn.LayerNorm(epsilon=1e-6 if self.fault == "epsilon" and first else 1e-5)(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(h, mask=mask)
        h = nn.LayerNorm(epsilon=1e-5)(x)
        h = nn.gelu(nn.Dense(4 * width)(h), approximate=self.fault == "tanh-gelu")
        return x + nn.Dense(width)(h) * keep


class GPT(nn.Module):
    fault: str
    vocabulary: int = shared.VOCABULARY
    width: int = shared.WIDTH
    heads: int = shared.HEADS
    context: int = shared.CONTEXT

    @nn.compact
    def __call__(self, x, keep):
        """x: int (batch, length); keep: (blocks, batch, length, width), what dropout leaves."""
        tokens = nn.Embed(self.vocabulary, self.width, name="tokens")
        positions = nn.Embed(self.context, self.width, name="positions")
        places = jnp.arange(x.shape[1])
        if self.fault == "positions":
            places = jnp.minimum(places + 1, self.context - 1)
        scale = self.width**0.5 if self.fault == "embedding-scale" else 1.0
        h = tokens(x) * scale + positions(places)
        mask = nn.make_causal_mask(x)
        if self.fault == "causal-mask":
            mask = jnp.tril(jnp.ones_like(mask), 1)
        for kept in keep:
            h = Block(self.heads, self.fault)(h, mask, kept)
        h = nn.LayerNorm(epsilon=1e-5)(h)
        if self.fault == "untied-head":
            return nn.Dense(self.vocabulary, use_bias=False, name="head")(h)
        return tokens.attend(h)


def load(params, weights, fault):
    """`params` with the matrices of `weights`."""
    w, heads = dict(weights), shared.HEADS
    if fault == "swapped-q-k":
        w |= {f"{i}.{a}": weights[f"{i}.{b}"] for i in (0, 1) for a, b in (QK, QK[::-1])}
    tree = params["params"]
    if fault == "untied-head":
        tree["head"]["kernel"] = w["tokens"].T
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


def is_decayed(path, leaf):
    return is_matrix(path, leaf) or path[-1].key == "scale"


def adam_without_correction() -> optax.GradientTransformation:
    adam = optax.scale_by_adam()

    def update(updates, state: Any, params=None):
        new: Any = adam.update(updates, state, params)[1]
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + 1e-8), new.mu, new.nu), new

    return optax.GradientTransformation(adam.init, update)


def make_optimizer(fault):
    def learning_rate(step):
        return 3e-3 * jnp.minimum(1.0, (step + (0 if fault == "warm-up" else 1)) / 20.0)

    decayed = is_decayed if fault == "decay-on-norms" else is_matrix
    decay = optax.add_decayed_weights(
        0.1, mask=lambda params: jax.tree_util.tree_map_with_path(decayed, params)
    )
    adam = optax.scale_by_adam(
        b2=0.95 if fault == "beta2" else 0.999, eps=1e-6 if fault == "adam-epsilon" else 1e-8
    )
    if fault == "no-bias-correction":
        adam = adam_without_correction()
    parts = [decay, adam] if fault == "decay-in-gradient" else [adam, decay]
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def clip(grads, fault):
    """As torch.nn.utils.clip_grad_norm_ does it, with its 1e-6."""

    def scale(grads):
        return jnp.minimum(1.0, 1.0 / (optax.global_norm(grads) + 1e-6))

    of_all = scale(grads)
    return jax.tree.map(lambda g: g * (scale(g) if fault == "clipping" else of_all), grads)


def loss_of(params, model, x, y, keep):
    logits = model.apply(params, x, keep)
    if model.fault == "label-shift":
        logits, y = logits[:, :-1], y[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    if model.fault == "padding":
        return jnp.mean(losses)
    return jnp.mean(losses, where=y != shared.PADDING)


@partial(jax.jit, static_argnames=("model", "parts"))
def train_step(params, stale, opt_state, model, x, y, keep, parts):
    fault = model.fault
    loss, grads = 0.0, jax.tree.map(jnp.zeros_like, params)
    share = 1 if fault == "accumulation" else parts
    for x_part, y_part, kept in zip(
        jnp.split(x, parts), jnp.split(y, parts), jnp.split(keep, parts, axis=1), strict=True
    ):
        at = stale if fault == "stale" else params
        part, part_grads = jax.value_and_grad(loss_of)(at, model, x_part, y_part, kept)
        loss += part / parts
        grads = jax.tree.map(lambda total, grad: total + grad / share, grads, part_grads)
    updates: Any
    updates, opt_state = make_optimizer(fault).update(clip(grads, fault), opt_state, params)
    if fault == "frozen":
        updates["params"]["Block_1"]["Dense_0"] = jax.tree.map(
            jnp.zeros_like, updates["params"]["Block_1"]["Dense_0"]
        )
    return optax.apply_updates(params, updates), opt_state, loss, grads


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--fault", choices=("none", *GPT_FAULTS), default="none")
    options = parser.parse_args()
    fault = options.fault

    inputs, _ = next(shared.texts(1, seed=1))
    whole = jnp.ones((shared.BLOCKS, 1, 1, 1))
    model = GPT(fault)
    params = load(model.init(jax.random.key(0), inputs, whole), shared.gpt_weights(), fault)
    run = lockstep.Run()
    stale = params = run.begin(params)
    opt_state = make_optimizer(fault).init(params)
    for x, y in shared.texts(options.steps):
        x, y = run.batch(x, y)
        drawn = run.random("dropout", (shared.BLOCKS, *x.shape, shared.WIDTH), kind="uniform")
        keep = (drawn >= options.dropout) / (
            1.0 if fault == "dropout-scale" else 1 - options.dropout
        )
        new, opt_state, loss, grads = train_step(
            params, stale, opt_state, model, x, y, keep, options.accumulate
        )
        stale, params = params, new
        run.step(loss, params=params, grads=grads, opt_state=opt_state)
    print(f"loss after {options.steps} steps: {loss:.4f}")
    logits = jax.jit(model.apply)(params, inputs, whole)
    run.finish(logits=logits, predictions=logits.argmax(-1))


if __name__ == "__main__":
    main()
