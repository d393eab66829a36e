"""The same images in batches of different sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import TypedDict

import numpy as np

from lockstep.common.config import BACKENDS
from lockstep.common.learn.experiment import MOMENTUM, SGD, Experiment, largest_gap
from lockstep.common.protocol import Snapshot

SIZES = (4, 16, 64)  # batch sizes ...
SEEN = 1280  # ... and the images that each of these runs sees
# batches whose gradients are compared with their mean; at the largest size, all of the run
NOISE_BATCHES = 20


class SizeJson(TypedDict):
    """One batch size."""

    size: int
    steps: int
    loss: float  # mean over the last eighth of the images
    test_loss: float
    accuracy: float
    gap: float  # largest between the losses of the two frameworks
    equal: int  # predictions
    noise: float  # of the gradient of one batch, relative to the gradient of all images
    scaled_noise: float  # times the root of the batch size


class SizesJson(TypedDict):
    """All batch sizes."""

    seen: int
    lr: float
    momentum: float
    batches: int
    test_images: int
    rows: list[SizeJson]


def batch_sizes(experiment: Experiment) -> SizesJson:
    """Runs in float64 that see the same number of images in batches of different sizes."""
    all_images = gradients(experiment, SIZES[-1]).mean(axis=0)
    reference = float(np.linalg.norm(all_images))
    return {
        "seen": SEEN,
        "lr": MOMENTUM.lr,
        "momentum": MOMENTUM.momentum,
        "batches": NOISE_BATCHES,
        "test_images": len(experiment.dataset.test_images),
        "rows": [_size(experiment, size, reference) for size in SIZES],
    }


def _size(experiment: Experiment, size: int, reference: float) -> SizeJson:
    steps = SEEN // size
    config = dataclasses.replace(MOMENTUM, batch_size=size, steps=steps)
    images, labels = experiment.batches(config, steps)
    losses, evaluations = {}, {}
    for name in BACKENDS:
        backend = experiment.backend(name, config)
        state, metrics = backend.train_steps(
            backend.init(Snapshot.start(experiment.weights(config))), images, labels
        )
        losses[name] = np.asarray(metrics.loss)
        evaluations[name] = experiment.evaluate(name, backend.export(state).parameters)
    noise = deviation(gradients(experiment, size)) / reference
    tail = max(1, steps // 8)  # the last eighth of the images
    return {
        "size": size,
        "steps": steps,
        "loss": float(losses["torch"][-tail:].mean()),
        "test_loss": float(evaluations["torch"].loss),
        "accuracy": float(
            np.mean(evaluations["torch"].predictions == experiment.dataset.test_labels)
        ),
        "gap": largest_gap(*losses.values()),
        "equal": int(np.sum(evaluations["torch"].predictions == evaluations["flax"].predictions)),
        "noise": noise,
        "scaled_noise": noise * math.sqrt(size),
    }


def gradients(experiment: Experiment, size: int) -> np.ndarray:
    """float64 (batches, parameters): PyTorch's gradients of the first batches of this size, at the
    first weights. Flax's are the same up to the last digits."""
    weights = experiment.weights(SGD)
    images, labels = experiment.batches(
        dataclasses.replace(SGD, batch_size=size), min(NOISE_BATCHES, SEEN // size)
    )
    probes = (
        experiment.probe("torch", weights, *batch) for batch in zip(images, labels, strict=True)
    )
    return np.stack(
        [
            np.concatenate([probe[f"backward/{name}"].ravel() for name in weights])
            for probe in probes
        ]
    )


def deviation(vectors: np.ndarray) -> float:
    """The root mean square distance of vectors (n, size) from their mean, with n - 1 as for a
    variance."""
    return float(np.sqrt(np.sum((vectors - vectors.mean(axis=0)) ** 2) / (len(vectors) - 1)))
