"""Sequences sorted into four classes in Equinox: `eqx.nn.GRUCell`, RMSprop, clipping by value."""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import shared

import lockstep

HIDDEN = 24


class ResetBefore(eqx.nn.GRUCell):
    """The other GRU of the literature: the reset gate acts before the product with the weights."""

    def __call__(self, input, hidden, *, key=None):
        for_input, for_hidden = jnp.split(self.weight_ih, 3), jnp.split(self.weight_hh, 3)
        reset = jax.nn.sigmoid(for_input[0] @ input + for_hidden[0] @ hidden)
        keep = jax.nn.sigmoid(for_input[1] @ input + for_hidden[1] @ hidden)
        new = jnp.tanh(for_input[2] @ input + for_hidden[2] @ (reset * hidden))
        return new + keep * (hidden - new)


class Classifier(eqx.Module):
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self, cell, *, key) -> None:
        for_cell, for_head = jax.random.split(key)
        self.cell = cell(2, HIDDEN, use_bias=False, key=for_cell)
        self.head = eqx.nn.Linear(HIDDEN, 4, key=for_head)

    def states(self, x):
        """(length, HIDDEN) for one sequence (length, 2)."""

        def step(hidden, x):
            hidden = self.cell(x, hidden)
            return hidden, hidden

        return jax.lax.scan(step, jnp.zeros(HIDDEN, x.dtype), x)[1]


def load(model: Classifier) -> Classifier:
    (inputs,), (states,) = shared.dense(10, 2, 3 * HIDDEN), shared.dense(11, HIDDEN, 3 * HIDDEN)
    (head,) = shared.dense(12, HIDDEN, 4)
    return eqx.tree_at(
        lambda m: (m.cell.weight_ih, m.cell.weight_hh, m.head.weight, m.head.bias),
        model,
        (jnp.asarray(inputs.T), jnp.asarray(states.T), jnp.asarray(head.T), jnp.zeros(4)),
    )


optimizer = optax.chain(
    optax.clip(0.05), optax.rmsprop(2e-3, decay=0.95, eps=1e-6, eps_in_sqrt=False)
)
run = lockstep.Run()


def loss_of(model, x, y):
    states = run.tap("gru", jax.vmap(model.states)(x))
    logits = jax.vmap(model.head)(states[:, -1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits


@eqx.filter_jit
def train_step(model, opt_state, x, y):
    (loss, logits), grads = eqx.filter_value_and_grad(loss_of, has_aux=True)(model, x, y)
    updates, opt_state = optimizer.update(grads, opt_state)
    return eqx.apply_updates(model, updates), opt_state, loss, grads, logits


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fault", choices=("none", "reset-before"), default="none")
    options = parser.parse_args()
    cell = ResetBefore if options.fault == "reset-before" else eqx.nn.GRUCell

    model = run.begin(load(Classifier(cell, key=jax.random.key(0))))
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    hits = 0
    for x, y in shared.waves(options.steps):
        x, y = run.batch(x, y)
        model, opt_state, loss, grads, logits = train_step(model, opt_state, x, y)
        run.step(loss, params=model, grads=grads, opt_state=opt_state)
        hits += int((logits.argmax(-1) == y).sum())
    print(f"loss after {options.steps} steps: {loss:.4f}")
    run.finish(accuracy=hits / (16 * options.steps))


if __name__ == "__main__":
    main()
