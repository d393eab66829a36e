"""Deliberately broken ports: the Flax side with one mistake each, made where a person would make it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from backends.flax_backend import backend as flax_backend
from backends.flax_backend import convert
from backends.flax_backend import model as flax_model
from backends.flax_backend import optimizer as flax_optimizer
from backends.flax_backend.backend import FlaxBackend
from common import data
from common.data import Dataset

Break = Callable[[pytest.MonkeyPatch, Dataset], None]


def flatten_order(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """The flatten keeps PyTorch's order of axes, and the weights are those of Flax's."""

    def call(self: Any, x: jax.Array) -> jax.Array:
        x = self.pool(flax_model.nnx.relu(self.conv1(x)))
        x = self.pool(flax_model.nnx.relu(self.conv2(x)))
        x = x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
        x = flax_model.nnx.relu(self.fc1(x))
        return self.fc3(flax_model.nnx.relu(self.fc2(x)))

    patch.setattr(flax_model.Net, "__call__", call)


def same_padding(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """Flax's default padding, cut back to the size that the next layer needs."""
    valid = flax_model.convolution("cuda")  # JAX's own convolution

    def convolution(device: str) -> Any:
        def same(images: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
            return valid(images, kernel, strides, "SAME", **options)[:, :-4, :-4]

        return same

    patch.setattr(flax_model, "convolution", convolution)


def sum_for_mean(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """The loss is summed over the batch."""
    patch.setattr(
        flax_backend,
        "cross_entropy",
        lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum(),
    )


def stopped_gradient(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """The last bias never gets a gradient."""
    nest = convert.nest

    def frozen(parameters: Any) -> Any:
        if "fc3.bias" in parameters:
            parameters = dict(parameters) | {"fc3.bias": jax.lax.stop_gradient(parameters["fc3.bias"])}
        return nest(parameters)

    patch.setattr(convert, "nest", frozen)


def momentum_089(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """A slip of the pen in the momentum."""
    sgd = optax.sgd
    patch.setattr(optax, "sgd", lambda rate, momentum, nesterov, **options: sgd(rate, 0.89, nesterov, **options))


def dampening_on_the_first_step(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """Every gradient is dampened, the first one too."""
    patch.setattr(flax_optimizer, "dampen", lambda dampening: optax.scale(1.0 - dampening))


def decoupled_weight_decay(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """Weight decay as in AdamW, beside the momentum buffer."""
    make = flax_optimizer.make_optimizer

    def decoupled(config: Any, dtype: Any) -> Any:
        inner = make(dataclasses.replace(config, weight_decay=0.0), dtype)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            updates, state = inner.update(updates, state, params, **extra)
            shrink = config.lr * config.weight_decay
            return jax.tree.map(lambda u, p: u - shrink * p, updates, params), state

        return optax.GradientTransformationExtraArgs(inner.init, update)

    patch.setattr(flax_backend, "make_optimizer", decoupled)


def bgr(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """Images read with their channels the other way round."""
    patch.setattr(FlaxBackend, "_images", lambda self, images: jnp.asarray(images[..., ::-1].copy(), self.dtype))


def other_shuffle(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """The port shuffles for itself."""
    generator = np.random.default_rng(123)
    drawn: dict[bytes, np.ndarray] = {}

    def own(images: np.ndarray) -> np.ndarray:
        key = images.tobytes()  # the same batch may be asked for twice, to be looked at and to be trained on
        if key not in drawn:
            drawn[key] = generator.integers(0, len(dataset.train_images), images.shape[:-3])
        return drawn[key].reshape(images.shape[:-3])

    train_step, train_steps, probe = FlaxBackend.train_step, FlaxBackend.train_steps, FlaxBackend.probe

    def redrawn(method: Any) -> Any:
        def call(self: Any, state: Any, images: np.ndarray, labels: np.ndarray) -> Any:
            indices = own(images)
            images = data.normalise(dataset.train_images[indices], images.dtype)
            return method(self, state, images, dataset.train_labels[indices])

        return call

    for name, method in (("train_step", train_step), ("train_steps", train_steps), ("probe", probe)):
        patch.setattr(FlaxBackend, name, redrawn(method))


def wrong_labels(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """Labels count from one, modulo the number of classes."""
    patch.setattr(FlaxBackend, "_labels", lambda self, labels: jnp.asarray((labels + 1) % 10, jnp.int32))


def own_weights(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """One layer keeps weights of its own."""
    from_canonical = convert.from_canonical

    def keep(arrays: Any) -> Any:
        return {name: a * 1.01 if name == "fc2.kernel" else a for name, a in from_canonical(arrays).items()}

    patch.setattr(convert, "from_canonical", keep)


def float32_inside(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """The logits pass through float32."""
    forward = FlaxBackend._forward

    def rounded(self: Any, *arguments: Any) -> Any:
        return forward(self, *arguments).astype(jnp.float32).astype(self.dtype)

    patch.setattr(FlaxBackend, "_forward", rounded)


def schedule_off_by_one(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """The learning rate of the step after."""
    make = flax_optimizer.make_schedule
    patch.setattr(flax_optimizer, "make_schedule", lambda config: lambda count: make(config)(count + 1))


def last_batch_not_evaluated(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """Evaluation leaves out the last batch."""
    evaluate = FlaxBackend.evaluate

    def all_but_last(self: Any, state: Any, images: np.ndarray, labels: np.ndarray) -> Any:
        return evaluate(self, state, images[:-60], labels[:-60])

    patch.setattr(FlaxBackend, "evaluate", all_but_last)


def classes_moved(patch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    """Predicted classes count from one, modulo their number."""
    evaluate = FlaxBackend.evaluate

    def moved(self: Any, state: Any, images: np.ndarray, labels: np.ndarray) -> Any:
        result = evaluate(self, state, images, labels)
        return result._replace(predictions=(result.predictions + 1) % 10)

    patch.setattr(FlaxBackend, "evaluate", moved)
