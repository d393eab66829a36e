"""A training loop in plain JAX and Flax. Read it next to torch_train.py; run it as it is:

    python backends/lesson/flax_train.py

It trains on CIFAR-10 in $LOCKSTEP_DATA, or without that on scikit-learn's digits.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".package"))  # for a bare checkout
import lockstep
from lockstep.common import data

BATCH_SIZE, LEARNING_RATE, MOMENTUM, SEED = 4, 0.001, 0.9, 0


class Net(nnx.Module):
    """Images (n, 32, 32, 3) to logits (n, classes)."""

    def __init__(self, classes: int, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(3, 6, kernel_size=(5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, kernel_size=(5, 5), padding="VALID", rngs=rngs)
        self.fc1 = nnx.Linear(5 * 5 * 16, 120, rngs=rngs)
        self.fc2 = nnx.Linear(120, 84, rngs=rngs)
        self.fc3 = nnx.Linear(84, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), (2, 2))
        x = x.reshape(len(x), -1)  # height, width, channels
        x = nnx.relu(self.fc1(x))
        x = nnx.relu(self.fc2(x))
        return self.fc3(x)


@nnx.jit  # compiles the step; what it changes in the model and the optimizer is written back
def train_step(
    model: Net, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array
) -> jax.Array:
    def loss_of(model: Net) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def train(model: Net, dataset: data.Dataset, steps: int, dtype: str = "float32") -> list[float]:
    """The loss of each step, in nats."""
    optimizer = nnx.Optimizer(model, optax.sgd(LEARNING_RATE, MOMENTUM), wrt=nnx.Param)
    run = lockstep.Run()  # lets `check` record the loop; otherwise its calls do nothing
    run.begin(model, optimizer)
    losses = []
    for images, labels in itertools.islice(batches(dataset, dtype), steps):
        images, labels = run.batch(images, labels)
        x = jnp.asarray(images)  # channels last, as in NumPy
        loss = train_step(model, optimizer, x, jnp.asarray(labels))
        run.step(loss)
        losses.append(float(loss))
    return losses


def batches(dataset: data.Dataset, dtype: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images (n, 32, 32, 3) from -1 to 1 and labels (n,), epoch after epoch, without end."""
    for epoch in itertools.count():
        order = data.permutation(SEED, epoch, len(dataset.train_labels))
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            images = data.normalise(dataset.train_images[chosen], np.dtype(dtype))
            yield images, dataset.train_labels[chosen]


if __name__ == "__main__":
    rngs = nnx.Rngs(SEED)  # of the initial weights
    dataset = data.load("cifar10" if "LOCKSTEP_DATA" in os.environ else "digits")
    losses = train(Net(len(dataset.classes), rngs), dataset, steps=2000)
    for step in range(0, len(losses), 500):
        print(f"{dataset.name}, steps {step:,} on: mean loss {np.mean(losses[step:][:500]):.3f}")
