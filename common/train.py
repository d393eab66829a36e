"""The one training loop: the same batches, in the same order, for whichever backend it is given."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from common import data, machine
from common.config import Config
from common.data import Dataset
from common.protocol import Arrays, Backend, Evaluation, Metrics, Snapshot
from common.record import OPENING_STEPS, Record, stretches
from common.weights import initial_weights, moved, numpy_dtype, twin_images, twin_weights

OPENING_IMAGES = 8  # of a batch, whose activations are recorded
CHUNK_STEPS = 250  # at most so many steps in one call of train_steps ...
CHUNK_BYTES = 8 * 2**20  # ... whose images take at most so much memory


class Observer(Protocol):
    """Who is told how a run is going on."""

    def line(self, text: str) -> None: ...

    def advance(self, steps: int, loss: float) -> None: ...


def train(
    backend: Backend,
    config: Config,
    dataset: Dataset,
    dtype: str,
    observer: Observer,
    twin: int | None = None,
    log_every: int = 2000,
) -> Record:
    """Train once and evaluate on the test images.

    Args:
        config: the run, resolved for this data set.
        twin: None for the run itself; 1, 2, ... for runs whose weights and images are moved by at most one ulp.
        log_every: steps between two log lines, counted within an epoch as the tutorial does; 0: none.
    """
    weights = initial_weights(backend.shapes(), config.seed, dtype)
    if twin is not None:
        weights = twin_weights(weights, config.seed, twin)
    rounding = None if twin is None else twin_images(config.seed, twin)
    state = backend.init(Snapshot.start(weights))
    initial = backend.export(state).parameters

    opening: Arrays = {}
    along: Arrays = {}
    edges = [stop for _, stop in stretches(config.total_steps) if stop > OPENING_STEPS]
    history: list[Metrics] = []
    log = _Log(config, len(dataset.train_images), log_every, observer)
    uploaded = backend.upload(dataset.train_images, dataset.train_labels)
    start = first_chunk_end = time.perf_counter()
    steps = first_chunk_steps = 0
    for indices in chunks(config, len(dataset.train_images), bytes_per_image=3072 * numpy_dtype(dtype).itemsize):
        if rounding is None:
            images, labels = backend.gather(uploaded, indices)
        else:
            images = moved(data.normalise(dataset.train_images[indices], numpy_dtype(dtype)), rounding)
            labels = dataset.train_labels[indices]
        if steps < OPENING_STEPS:
            opening |= _named(steps, _cut(backend.probe(state, images[0], labels[0])))
        state, metrics = backend.train_steps(state, images, labels)
        if steps < OPENING_STEPS:
            opening |= _named(steps, updated(backend.export(state)))
        history.append(metrics)
        steps += len(indices)
        if edges and edges[0] <= steps < config.total_steps:
            along |= _named(steps, backend.export(state).parameters)
            edges = [edge for edge in edges if edge > steps]
        log.add(metrics.loss)
        if first_chunk_steps == 0 and len(indices) > 1:
            first_chunk_end, first_chunk_steps = time.perf_counter(), steps
    seconds = time.perf_counter() - start
    if first_chunk_steps == steps:  # there is nothing after it to measure
        first_chunk_end, first_chunk_steps = start, 0
    steady = (steps - first_chunk_steps) / (start + seconds - first_chunk_end)

    evaluation = evaluate(backend, state, dataset, dtype)
    loss, gradient_norm, lr = (np.concatenate(series) for series in zip(*history, strict=True))
    return Record(
        backend=backend.name,
        dtype=dtype,
        twin=twin,
        config=config.to_json(),
        data=describe(config, dataset),
        environment=backend.describe(),
        source=machine.source(backend.name),
        loss=loss,
        gradient_norm=gradient_norm,
        lr=lr,
        predictions=np.asarray(evaluation.predictions, np.int64),
        test_loss=float(evaluation.loss),
        seconds=seconds,
        steps_per_second=steady,
        weights=initial,
        opening=opening,
        layers=layers_of(opening),
        along=along,
        final=backend.export(state).parameters,
    )


def evaluate(backend: Backend, state: object, dataset: Dataset, dtype: str) -> Evaluation:
    """The test images as `state` sees them."""
    images = data.normalise(dataset.test_images, numpy_dtype(dtype))
    return backend.evaluate(state, images, dataset.test_labels)


def describe(config: Config, dataset: Dataset) -> dict:
    """What a record says of its data; two records are comparable only if this is equal."""
    return {
        "name": dataset.name,
        "digest": dataset.digest,
        "order": data.order_digest(config, len(dataset.train_images)),
        "sizes": {"train": len(dataset.train_images), "test": len(dataset.test_images)},
        "classes": list(dataset.classes),
    }


def chunks(config: Config, images: int, bytes_per_image: int) -> Iterator[np.ndarray]:
    """The batches of the run, several to a chunk: int64 (steps, batch size) image numbers.

    Each length of a chunk is compiled anew, so there are two only: one, for the opening and for what is left over, and
    the longest that the limits allow. No chunk crosses a smaller batch, which ends an epoch.
    """
    limit = max(1, min(CHUNK_STEPS, CHUNK_BYTES // (config.batch_size * bytes_per_image)))
    alike = config.total_steps - OPENING_STEPS  # batches of one size in a row
    if images % config.batch_size and not config.drop_last:
        alike = min(alike, images // config.batch_size)
    pieces = -(-alike // limit)
    length = max(1, alike // max(1, pieces))
    pending: list[np.ndarray] = []
    for step, indices in enumerate(data.batch_indices(config, images)):
        if pending and len(pending[0]) != len(indices):
            yield from _singles(pending)
            pending = []
        pending.append(indices)
        if step < OPENING_STEPS or len(pending) == length:
            yield np.stack(pending)
            pending = []
    yield from _singles(pending)


def _singles(batches: list[np.ndarray]) -> Iterator[np.ndarray]:
    for indices in batches:
        yield indices[np.newaxis]


def _named(step: int, arrays: Arrays) -> Arrays:
    return {f"{step}/{name}": array for name, array in arrays.items()}


def layers_of(opening: Arrays) -> list[str]:
    """The tensors of the forward pass, in the order in which they are computed."""
    return [key.split("/", 2)[2] for key in opening if key.startswith("0/forward/")]


def _cut(arrays: Arrays) -> Arrays:
    """Activations of a batch's first images only: what is wrong in a layer is wrong in all of them."""
    return {name: a[:OPENING_IMAGES] if name.startswith("forward/") else a for name, a in arrays.items()}


def updated(snapshot: Snapshot) -> Arrays:
    """The tensors of the update stage."""
    parameters = {f"update/{name}": array for name, array in snapshot.parameters.items()}
    return parameters | {f"update/momentum of {name}": array for name, array in snapshot.momentum.items()}


class _Log:
    """The tutorial's line, `[epoch, step] loss: x.xxx`: the mean loss since the last one, or the epoch's start."""

    def __init__(self, config: Config, images: int, every: int, observer: Observer) -> None:
        self.batches, self.every, self.observer = config.batches_per_epoch(images), every, observer
        self.done, self.running, self.counted = 0, 0.0, 0

    def add(self, losses: np.ndarray) -> None:
        for loss in losses:
            epoch, step = divmod(self.done, self.batches)
            if step == 0:
                self.running, self.counted = 0.0, 0
            self.done, self.running, self.counted = self.done + 1, self.running + float(loss), self.counted + 1
            if self.every and (step + 1) % self.every == 0:
                self.observer.line(f"[{epoch + 1}, {step + 1:5d}] loss: {self.running / self.counted:.3f}")
                self.running, self.counted = 0.0, 0
        self.observer.advance(len(losses), float(losses[-1]))
