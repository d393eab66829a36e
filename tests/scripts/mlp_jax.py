"""`mlp_torch.py` in plain JAX: kernels are (in, out), the parameters a dictionary."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lockstep

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--fault-from", type=int, default=10**6)  # from this step on, momentum is lost
options = parser.parse_args()

draws = np.random.default_rng(0)


def layer(inputs, outputs):
    kernel = 0.3 * draws.standard_normal((outputs, inputs))
    return {
        "kernel": jnp.asarray(kernel.T),
        "bias": jnp.asarray(0.3 * draws.standard_normal(outputs)),
    }


def forward(params, inputs):
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["head"]["kernel"] + params["head"]["bias"]


def mean_loss(params, inputs, labels):
    logits = forward(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def update(params, opt_state, inputs, labels):
    loss, grads = jax.value_and_grad(mean_loss)(params, inputs, labels)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss, grads


optimizer = optax.sgd(options.lr, momentum=0.9)
params = {"hidden": layer(5, 16), "head": layer(16, 3)}

run = lockstep.Run()
params, opt_state = run.begin(params, optimizer.init(params))
for step in range(options.steps):
    params, opt_state = run.sync(params, opt_state)
    inputs, labels = draws.standard_normal((8, 5)).astype(np.float32), draws.integers(0, 3, 8)
    inputs, labels = run.batch(jnp.asarray(inputs), jnp.asarray(labels))
    if step >= options.fault_from:
        opt_state = jax.tree.map(lambda trace: trace * (1 - 1e-9), opt_state)
    params, opt_state, loss, grads = update(params, opt_state, inputs, labels)
    run.step(loss, params=params, grads=grads, opt_state=opt_state)
print("final loss", loss)
run.finish(logits=forward(params, inputs))
