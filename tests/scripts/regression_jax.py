"""A regression with two inputs in plain JAX: Huber loss, SGD with Nesterov momentum, a learning
rate that decays."""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import optax
import shared

import lockstep


def layer(kernel):
    return {"w": jnp.asarray(kernel), "b": jnp.zeros(kernel.shape[1])}


def initial_params():
    (fields,), (station,) = shared.dense(1, 12, 16), shared.dense(2, 3, 8)
    hidden, out = shared.dense(3, 24, 16, 1)
    return {"fields": layer(fields), "station": layer(station), "head": [layer(hidden), layer(out)]}


def dense(p, x):
    return x @ p["w"] + p["b"]


def network(params, inputs):
    fields = jnp.tanh(dense(params["fields"], inputs["fields"]))
    station = jax.nn.relu(dense(params["station"], inputs["station"]))
    hidden, out = params["head"]
    return dense(out, jax.nn.relu(dense(hidden, jnp.concatenate([fields, station], axis=1))))


def loss_of(params, inputs, y, delta):
    found = network(params, inputs)
    return optax.huber_loss(found, y, delta=delta).mean(), found


optimizer = optax.chain(
    optax.add_decayed_weights(1e-3),
    optax.sgd(lambda step: 0.02 * 0.99**step, momentum=0.9, nesterov=True),
)


@partial(jax.jit, static_argnames="delta")
def train_step(params, opt_state, inputs, y, delta):
    (loss, found), grads = jax.value_and_grad(loss_of, has_aux=True)(params, inputs, y, delta)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, grads, found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fault", choices=("none", "delta"), default="none")
    options = parser.parse_args()
    delta = 0.9 if options.fault == "delta" else 1.0

    run = lockstep.Run()
    params = run.begin(initial_params())
    opt_state = optimizer.init(params)
    for inputs, y in shared.stations(options.steps):
        inputs, y = run.batch(inputs, y)
        params, opt_state, loss, grads, found = train_step(params, opt_state, inputs, y, delta)
        run.step(loss, params=params, grads=grads, opt_state=opt_state)
    print(f"loss after {options.steps} steps: {loss:.4f}")
    run.finish(predictions=found)


if __name__ == "__main__":
    main()
