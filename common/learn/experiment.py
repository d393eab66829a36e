"""The short runs of the walk-through: a data set, configurations, and both backends step by
step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from lockstep.common import data
from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.dtypes import numpy_dtype
from lockstep.common.evidence import Build
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.protocol import Arrays, Backend, Evaluation, Snapshot

# two steps: momentum and dampening first act in the second
SGD = Config(batch_size=16, lr=0.01, steps=2)
MOMENTUM = dataclasses.replace(SGD, momentum=0.9)
TEST_IMAGES = 200  # evaluated: more would take longer than the training


class Experiment:
    """A data set, and the backends that train on it, each built once."""

    def __init__(self, build: Build, dataset: Dataset) -> None:
        self.dataset = dataset.first_test_images(TEST_IMAGES)
        self._build = build
        self._built: dict[tuple[str, Config, str], Backend] = {}

    def resolve(self, config: Config) -> Config:
        return config.resolve(len(self.dataset.train_images))

    def backend(self, name: str, config: Config, dtype: str = "float64") -> Backend:
        key = name, config, dtype
        if key not in self._built:
            self._built[key] = self._build(name, self.resolve(config), dtype)
        return self._built[key]

    def weights(self, config: Config) -> Arrays:
        return initial_weights(self.backend(BACKENDS[0], SGD).shapes(), config.seed, "float64")

    def batches(self, config: Config, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `steps` batches in float64: images (steps, batch, 32, 32, 3) and labels (steps,
        batch)."""
        resolved = self.resolve(dataclasses.replace(config, steps=steps))
        indices = np.stack(list(data.batch_indices(resolved, len(self.dataset.train_images))))
        images = data.normalise(self.dataset.train_images[indices], numpy_dtype("float64"))
        return images, self.dataset.train_labels[indices]

    def probe(
        self, name: str, parameters: Arrays, images: np.ndarray, labels: np.ndarray
    ) -> Arrays:
        """The tensors of one step from `parameters` on one batch, in float64: `Backend.probe`."""
        reader = self.backend(name, SGD)
        return reader.probe(reader.init(Snapshot.start(parameters)), images, labels)

    def evaluate(self, name: str, parameters: Arrays) -> Evaluation:
        """Loss and predictions on the test images with `parameters`, in float64."""
        reader = self.backend(name, SGD)
        images = data.normalise(self.dataset.test_images, numpy_dtype("float64"))
        return reader.evaluate(
            reader.init(Snapshot.start(parameters)), images, self.dataset.test_labels
        )


@dataclass(frozen=True)
class StepTrace:
    """One step of one backend."""

    before: Arrays  # parameters
    probe: Arrays  # as `Backend.probe`
    after: Snapshot


def trace_steps(experiment: Experiment, name: str, config: Config) -> list[StepTrace]:
    """The first two steps of one backend, in float64."""
    backend = experiment.backend(name, config)
    state = backend.init(Snapshot.start(experiment.weights(config)))
    traces = []
    for images, labels in zip(*experiment.batches(config, 2), strict=True):
        before = backend.export(state).parameters
        probe = experiment.probe(name, before, images, labels)
        state, _ = backend.train_step(state, images, labels)
        traces.append(StepTrace(before, probe, backend.export(state)))
    return traces


def largest_gap(one: np.ndarray, other: np.ndarray) -> float:
    return float(
        np.max(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)), initial=0.0)
    )


def max_gap(one: Arrays, other: Arrays) -> float:
    """The largest gap over all tensors."""
    return max(largest_gap(one[name], other[name]) for name in one)
