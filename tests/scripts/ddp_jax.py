"""`ddp_torch.py` in plain JAX: one program over a mesh of all processes."""

import argparse
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lockstep

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--global-batch", action="store_true")  # run.batch gets the arrays of the mesh
parser.add_argument("--clip", type=float, default=0.5)
options, _ = parser.parse_known_args()

rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
jax.distributed.initialize(address, count, rank)
mesh = Mesh(jax.devices(), ("rows",))
rows, whole = NamedSharding(mesh, PartitionSpec("rows")), NamedSharding(mesh, PartitionSpec())
draws = np.random.default_rng(0)


def spread(tree, sharding):
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def layer(inputs, outputs):
    kernel = 0.3 * draws.standard_normal((outputs, inputs))
    return {
        "kernel": jnp.asarray(kernel.T),
        "bias": jnp.asarray(0.3 * draws.standard_normal(outputs)),
    }


def mean_loss(params, inputs, labels):
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = run.tap("output", hidden @ params["head"]["kernel"] + params["head"]["bias"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def update(params, opt_state, inputs, labels):
    loss, grads = jax.value_and_grad(mean_loss)(params, inputs, labels)
    scale = jnp.minimum(1, options.clip / (optax.global_norm(grads) + 1e-6))  # as in PyTorch
    clipped = jax.tree.map(lambda gradient: scale * gradient, grads)
    updates, opt_state = optimizer.update(clipped, opt_state)
    return optax.apply_updates(params, updates), opt_state, loss, grads


optimizer = optax.sgd(0.1, momentum=0.9)
params = {"hidden": layer(5, 16), "head": layer(16, 3)}

run = lockstep.Run()
params, opt_state = run.begin(*spread((params, optimizer.init(params)), whole))
for _ in range(options.steps):
    params, opt_state = run.sync(params, opt_state)
    batch = draws.standard_normal((8, 5)).astype(np.float32), draws.integers(0, 3, 8)
    own = [np.split(array, count)[rank] for array in batch]
    if options.global_batch:
        inputs, labels = run.batch(*spread(own, rows))
    else:
        inputs, labels = spread(run.batch(*own), rows)
    params, opt_state, loss, grads = update(params, opt_state, inputs, labels)
    run.step(loss, params=params, grads=grads, opt_state=opt_state)
run.finish(weights=params["hidden"]["kernel"])
print("final loss", float(loss), "of rank", rank)
