"""Faults of evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lockstep.backends.faults.data import imagenet
from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.protocol import Evaluation

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import FlaxBackend, State

    Evaluate = Callable[[State, np.ndarray, np.ndarray], Evaluation]


def change_evaluation(
    patch: SetAttr, change: Callable[[Evaluate, State, np.ndarray, np.ndarray], Evaluation]
) -> None:
    """Evaluate by `change(evaluate, state, images, labels)`, where `evaluate` is correct."""
    from lockstep.backends.faults.frameworks import FlaxBackend

    evaluate = FlaxBackend.evaluate

    def changed(
        self: FlaxBackend, state: State, images: np.ndarray, labels: np.ndarray
    ) -> Evaluation:
        return change(partial(evaluate, self), state, images, labels)

    patch(FlaxBackend, "evaluate", changed)


@fault("evaluate", None, "PyTorch docs, DataLoader: drop_last")
def last_batch_not_evaluated(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Evaluation leaves out the last batch of 64, which is smaller."""

    def whole_batches(
        evaluate: Evaluate, state: State, images: np.ndarray, labels: np.ndarray
    ) -> Evaluation:
        count = len(images) // 64 * 64 or len(images)
        return evaluate(state, images[:count], labels[:count])

    change_evaluation(patch, whole_batches)


@fault("evaluate", "test loss", "algorithmic-efficiency#318, #227: averaged per batch")
def mean_of_batch_means(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The test loss is a mean of batch means, in which the smaller last batch weighs too much."""

    def by_batch(
        evaluate: Evaluate, state: State, images: np.ndarray, labels: np.ndarray
    ) -> Evaluation:
        starts = range(0, len(images), 300)
        parts = [
            evaluate(state, images[start : start + 300], labels[start : start + 300])
            for start in starts
        ]
        return Evaluation(
            np.concatenate([part.predictions for part in parts]),
            float(np.mean([p.loss for p in parts])),
        )

    change_evaluation(patch, by_batch)


@fault(
    "evaluate",
    "test loss",
    "torchvision docs: training and evaluation have transforms of their own",
)
def other_test_normalisation(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Test images are normalised by ImageNet's mean and deviation, training images by 0.5 and
    0.5."""
    change_evaluation(
        patch, lambda evaluate, state, images, labels: evaluate(state, imagenet(images), labels)
    )


@fault("evaluate", "test loss", "torchvision docs, CIFAR10: train defaults to True")
def training_images_evaluated(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Evaluation reads the training images."""

    def on_training(
        evaluate: Evaluate, state: State, images: np.ndarray, labels: np.ndarray
    ) -> Evaluation:
        own = data.normalise(dataset.train_images[: len(images)], images.dtype)
        return evaluate(state, own, dataset.train_labels[: len(images)])

    change_evaluation(patch, on_training)


@fault(
    "evaluate",
    "test loss",
    "optax docs, Getting started: apply_updates returns new parameters",
    momentum=0.9,
)
def weights_of_the_step_before(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Evaluation uses the weights before the last step."""

    def one_step_back(
        evaluate: Evaluate, state: State, images: np.ndarray, labels: np.ndarray
    ) -> Evaluation:
        last = state.optimizer_state["sgd"][0].trace
        parameters = {name: p + config.lr * last[name] for name, p in state.parameters.items()}
        return evaluate(state._replace(parameters=parameters), images, labels)

    change_evaluation(patch, one_step_back)


@fault("evaluate", "test loss", "PyTorch docs, Module.eval; flax docs, nnx.Dropout: deterministic")
def dropout_left_on(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Half of the units before the last layer are dropped in evaluation, others each time."""
    from lockstep.backends.faults.frameworks import jnp

    generator = np.random.default_rng(0)

    def dropped(
        evaluate: Evaluate, state: State, images: np.ndarray, labels: np.ndarray
    ) -> Evaluation:
        kernel = state.parameters["fc3.kernel"]
        kept = jnp.asarray(2.0 * generator.integers(0, 2, (len(kernel), 1)), kernel.dtype)
        return evaluate(
            state._replace(parameters=state.parameters | {"fc3.kernel": kernel * kept}),
            images,
            labels,
        )

    change_evaluation(patch, dropped)


@fault(
    "evaluate",
    "test loss",
    "PyTorch docs, Module.bfloat16 and half: for inference",
    changes_function=False,
)
def evaluated_in_bfloat16(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Weights are rounded to bfloat16 for evaluation."""
    from lockstep.backends.faults.frameworks import jax, jnp

    def rounded(
        evaluate: Evaluate, state: State, images: np.ndarray, labels: np.ndarray
    ) -> Evaluation:
        parameters = jax.tree.map(
            lambda p: p.astype(jnp.bfloat16).astype(p.dtype), state.parameters
        )
        return evaluate(state._replace(parameters=parameters), images, labels)

    change_evaluation(patch, rounded)


@fault("evaluate", "predictions", "torchvision docs, ImageFolder: classes are sorted by name")
def classes_moved(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Predicted classes count from one, modulo their number."""

    def moved(
        evaluate: Evaluate, state: State, images: np.ndarray, labels: np.ndarray
    ) -> Evaluation:
        right = evaluate(state, images, labels)
        return right._replace(predictions=(right.predictions + 1) % len(dataset.classes))

    change_evaluation(patch, moved)
