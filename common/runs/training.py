"""The one training loop: the same batches, in the same order, for whichever backend it is given."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.data import Dataset, augment
from lockstep.common.dtypes import compute_dtype, numpy_dtype
from lockstep.common.errors import DataError, RankFailed, RecordError
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.model.pair import has_classes
from lockstep.common.model.perturb import (
    REPLICATE,
    image_perturbation_rng,
    perturb_one_ulp,
    twin_weights,
    ulp_of_weights,
)
from lockstep.common.protocol import (
    Arrays,
    Backend,
    Evaluation,
    Metrics,
    RankDifference,
    Snapshot,
)
from lockstep.common.runs.checkpoint import HINT, Checkpoint, CheckpointManager, check, is_finite
from lockstep.common.runs.chunks import chunks
from lockstep.common.runs.log import Observer, TrainingLog
from lockstep.common.runs.record import FIRST_STEPS, Record, windows
from lockstep.common.system import environment

FIRST_STEPS_IMAGES = 8  # of a batch, whose activations are recorded
FEW_TEST_IMAGES = 50  # that are evaluated during the run
TEST_CHUNK = 1000  # test images at a time, to save memory
OUTPUT_BYTES = 2**25  # of a network's outputs in a record
SNAPSHOT_SECONDS = 1.0  # at most so much work is lost if a chunk is interrupted


def train(
    backend: Backend,
    config: Config,
    dataset: Dataset,
    dtype: str,
    observer: Observer,
    twin: int | None = None,
    log_every: int = 2000,
    *,
    weights: Arrays | None = None,
    start: Checkpoint | None = None,
    checkpoints: CheckpointManager | None = None,
    after_first_steps: Callable[[Record], object] | None = None,
) -> Record:
    """Train once and evaluate on the test images.

    A loss that is not finite ends the training: the record then has the last finite state,
    evaluated, and NaN for the steps that were not taken.

    Args:
        config: the run, resolved for this data set.
        twin: None for the run itself; 1, 2, ... for runs whose weights and images are perturbed by
            at most one ulp; 0 for the same run again.
        log_every: steps between two log lines, counted within an epoch; 0: none.
        weights: canonical, of any floating-point dtype; None: drawn from the seed.
        start: the checkpoint to resume from; None: the first step.
        checkpoints: writes checkpoints between two chunks, and, if the run is stopped or
            interrupted, one of the last state in memory.
        after_first_steps: called with the record of the first steps, if others follow; few test
            images are evaluated for it.

    Raises:
        KeyboardInterrupt: if `checkpoints` stops the run.
        RankFailed: if one of several processes failed; `checkpoints` has the last state in memory.
        RecordError: if `start` is of another run, or a checkpoint cannot be written.
    """
    if dataset.classes and not has_classes(config.model, dataset.train_labels):
        raise DataError(
            f"the loss of {config.model} is not that of one class per image: load its data with "
            f"load_data(..., model={config.model!r})"
        )
    if start is None:
        start = initial_checkpoint(backend, config, dataset, dtype, twin, weights)
    else:
        source = environment.source_digest(start.backend)
        check(start, config.to_json(), describe(config, dataset), backend.shapes(), source)
    run = TrainingLoop(
        backend,
        config,
        dataset,
        dtype,
        start,
        TrainingLog(config, len(dataset.train_images), log_every, observer),
    )
    try:
        run.train(checkpoints, after_first_steps)
        evaluation = evaluate(backend, run.state, dataset, dtype)
    except (KeyboardInterrupt, RuntimeError, RankFailed) as error:
        # A terminal's Ctrl-C also ends a compiler's own processes: that is not an error.
        stopping = checkpoints is not None and checkpoints.stopping()
        if isinstance(error, RuntimeError) and not stopping:
            raise
        if checkpoints is not None and is_finite(run.latest.snapshot):
            checkpoints.save(run.latest)
        if isinstance(error, RankFailed) and not stopping:
            raise
        raise KeyboardInterrupt from error
    if run.nonfinite_step is not None and checkpoints is not None:
        checkpoints.save(run.latest)
    return run.record(run.latest, evaluation)


def initial_checkpoint(
    backend: Backend,
    config: Config,
    dataset: Dataset,
    dtype: str,
    twin: int | None,
    weights: Arrays | None,
) -> Checkpoint:
    """The run before its first step."""
    if weights is None:
        weights = initial_weights(backend.shapes(), config.seed, dtype)
    weights = {name: array.astype(numpy_dtype(dtype)) for name, array in weights.items()}
    perturbation_rng_state = None
    if twin is not None and twin != REPLICATE:
        ulp = ulp_of_weights(dtype, dataset.train_images)
        weights = twin_weights(weights, config.seed, twin, ulp)
        generator = image_perturbation_rng(config.seed, twin)
        perturbation_rng_state = dict(generator.bit_generator.state)
    snapshot = backend.export(backend.init(Snapshot.start(weights)))
    none = np.zeros(0)
    return Checkpoint(
        backend=backend.name,
        dtype=dtype,
        twin=twin,
        config=config.to_json(),
        data=describe(config, dataset),
        source=environment.source_digest(backend.name),
        segments=[],
        layers=[],
        perturbation_rng_state=perturbation_rng_state,
        seconds=0.0,
        loss=none,
        gradient_norm=none,
        lr=none,
        batch_digests=np.zeros(0, np.int64),
        weights=snapshot.tensors,
        first_steps={},
        parameter_history={},
        snapshot=snapshot,
        rank_differences=list(snapshot.differences),
    )


class TrainingLoop:
    """The training of one run, from a checkpoint to the end."""

    def __init__(
        self,
        backend: Backend,
        config: Config,
        dataset: Dataset,
        dtype: str,
        start: Checkpoint,
        log: TrainingLog,
    ) -> None:
        self.backend, self.config, self.dataset = backend, config, dataset
        self.dtype, self.log = dtype, log
        self.start = self.latest = start  # `latest`: the last finite state in memory
        self.history = [Metrics(start.loss, start.gradient_norm, start.lr)]
        self.nonfinite_step: int | None = None  # the step whose loss was not finite
        self.batch_digests = np.zeros(config.total_steps, np.int64)
        self.batch_digests[: len(start.batch_digests)] = start.batch_digests
        self.rank_differences: list[RankDifference] = list(start.rank_differences)
        self._restore(start)
        self.uploaded: Any = None
        if config.augment is None:
            self.uploaded = backend.upload(dataset.train_images, dataset.train_labels)
        self.log.resume(start.loss)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.state: Any = self.backend.init(checkpoint.snapshot)
        self.step = checkpoint.step
        self.first_steps = dict(checkpoint.first_steps)
        self.parameter_history = dict(checkpoint.parameter_history)
        self.perturbation_rng: np.random.Generator | None = None
        if checkpoint.twin is not None and checkpoint.perturbation_rng_state is not None:
            self.perturbation_rng = image_perturbation_rng(self.config.seed, checkpoint.twin)
            self.perturbation_rng.bit_generator.state = checkpoint.perturbation_rng_state

    def train(
        self,
        checkpoints: CheckpointManager | None,
        after_first_steps: Callable[[Record], object] | None = None,
    ) -> None:
        """Train up to the last step, to a loss that is not finite, or until `checkpoints` stops
        it."""
        window_ends = [
            stop
            for _, stop in windows(self.config.total_steps)
            if stop > max(FIRST_STEPS, self.step)
        ]
        self.began = taken = time.perf_counter()
        self.first_chunk: tuple[int, float] | None = None  # steps done after it, and when
        for indices in self._chunks(self.step):
            before = self.step
            metrics = self._steps(indices)
            finite = np.isfinite(metrics.loss)
            if not finite.all():
                self.stop_at_nonfinite(before, int(np.argmin(finite)), metrics)
                return
            self.history.append(metrics)
            if self.step == FIRST_STEPS < self.config.total_steps:
                # Training goes on after an evaluation: one that changes it shows in the next step.
                few = self.dataset.first_test_images(FEW_TEST_IMAGES)
                evaluation = evaluate(self.backend, self.state, few, self.dtype)
                if after_first_steps is not None:
                    after_first_steps(
                        self.record(self._checkpoint(), evaluation).until(FIRST_STEPS)
                    )
            if window_ends and window_ends[0] <= self.step < self.config.total_steps:
                self.parameter_history |= with_step(self.step, self._export().tensors)
                window_ends = [end for end in window_ends if end > self.step]
            self.log.add(metrics.loss)
            now = time.perf_counter()
            if self.first_chunk is None and len(indices) > 1:
                self.first_chunk = self.step, now
            stopping = checkpoints is not None and checkpoints.stopping()
            due = checkpoints is not None and checkpoints.should_save(before, self.step)
            last = self.step == self.config.total_steps
            if stopping or due or last or now - taken > SNAPSHOT_SECONDS:
                checkpoint, taken = self._checkpoint(), time.perf_counter()
                if last or is_finite(checkpoint.snapshot):  # else the next loss ends the run
                    self.latest = checkpoint
            if stopping:
                raise KeyboardInterrupt
            if due and not last and checkpoints is not None:
                checkpoints.save(self.latest)

    def _chunks(self, start: int) -> Iterator[np.ndarray]:
        """`chunks` from step `start` on, the same ones as in a run that was never stopped, so that
        the same programs run."""
        step = 0
        for indices in chunks(
            self.config,
            len(self.dataset.train_images),
            bytes_per_image=data.bytes_per_input(
                self.dataset.train_images, compute_dtype(self.dtype)
            ),
        ):
            if step >= start:
                yield indices
            step += len(indices)
            if step > start > step - len(indices):
                raise RecordError(
                    f"the checkpoint after step {start} is not between two chunks: {HINT}"
                )

    def _batches(self, indices: np.ndarray) -> tuple[Any, Any]:
        """The batches as the backend holds them; a twin's are moved by at most one ulp, and their
        digests are taken before that."""
        if self.uploaded is not None:
            images, labels = self.backend.batches(self.uploaded, indices)
        else:
            images = augment.batches(
                self.config,
                self.dataset.train_images,
                indices,
                self.step,
                compute_dtype(self.dtype),
            )
            labels = self.dataset.train_labels[indices]
        if self.perturbation_rng is not None:
            masks = self.backend.masks(self.state, labels.shape[:2])
            seen = self._record_digests(images, labels, masks)
            images = perturb_one_ulp(seen, self.perturbation_rng)
        return images, labels

    def _record_digests(self, images: Any, labels: Any, masks: Arrays) -> np.ndarray:
        """Record the digests of the batches from this step on; the images, as NumPy has them."""
        seen = self.backend.download(images, labels)
        found = data.batch_digests(*seen, masks)
        self.batch_digests[self.step : self.step + len(labels)] = found
        return seen[0]

    def _steps(self, indices: np.ndarray) -> Metrics:
        """Train one chunk; the first steps are recorded tensor by tensor."""
        images, labels = self._batches(indices)
        is_first_step = self.step < FIRST_STEPS
        if is_first_step:
            self.first_steps |= with_step(
                self.step, truncate_batch(self.backend.probe(self.state, images[0], labels[0]))
            )
        masks = self.backend.masks(self.state, labels.shape[:2])
        self.state, metrics = self.backend.train_steps(self.state, images, labels)
        if self.perturbation_rng is None:  # after training: a device gathers while it computes
            self._record_digests(images, labels, masks)
        if is_first_step:
            self.first_steps |= with_step(self.step, update_tensors(self._export()))
        self.step += len(indices)
        return metrics

    def series(self) -> Metrics:
        """The metrics of all steps so far."""
        self.history = [Metrics(*map(np.concatenate, zip(*self.history, strict=True)))]
        return self.history[0]

    def _checkpoint(self) -> Checkpoint:
        segments = list(self.start.segments)
        if self.step > self.start.step:
            if segments and segments[-1]["backend"] == self.backend.name:
                segments.pop()
            segments.append({"backend": self.backend.name, "stop": self.step})
        series = self.series()
        return replace(
            self.start,
            segments=segments,
            layers=self.start.layers or layers_of(self.first_steps),
            perturbation_rng_state=None
            if self.perturbation_rng is None
            else dict(self.perturbation_rng.bit_generator.state),
            seconds=self.start.seconds + time.perf_counter() - self.began,
            loss=series.loss[: self.step],
            gradient_norm=series.gradient_norm[: self.step],
            lr=series.lr[: self.step],
            batch_digests=self.batch_digests[: self.step].copy(),
            first_steps=dict(self.first_steps),
            parameter_history=dict(self.parameter_history),
            snapshot=self._export(),
            rank_differences=list(self.rank_differences),
        )

    def _export(self) -> Snapshot:
        """The state. The first difference between processes counts: later ones follow from it."""
        snapshot = self.backend.export(self.state)
        self.rank_differences = self.rank_differences or list(snapshot.differences)
        return snapshot

    def stop_at_nonfinite(self, before: int, number: int, metrics: Metrics) -> None:
        """Restore the state before the step whose loss is not finite, or an earlier one, if that
        state is not finite.

        Args:
            before: steps done before the chunk.
            number: of the step within it.
        """
        self.history.append(Metrics(*(series[: number + 1] for series in metrics)))
        self.nonfinite_step = before + number
        first_steps, history = self.first_steps, self.parameter_history
        for stop in (self.nonfinite_step, self.nonfinite_step - 1):
            self.replay_to(max(stop, self.latest.step))
            checkpoint = self._checkpoint()
            if is_finite(checkpoint.snapshot):
                break
        history = {
            key: array for key, array in history.items() if int(key.partition("/")[0]) <= self.step
        }
        self.latest = replace(checkpoint, first_steps=first_steps, parameter_history=history)

    def replay_to(self, stop: int) -> None:
        """Restore the last snapshot and replay up to step `stop`."""
        self._restore(self.latest)
        for indices in self._chunks(self.step):
            if self.step + len(indices) <= stop:
                self._steps(indices)
                continue
            images, labels = self._batches(indices)
            for number in range(stop - self.step):
                self.state, _ = self.backend.train_step(self.state, images[number], labels[number])
            self.step = stop
            return

    def record(self, last: Checkpoint, evaluation: Evaluation) -> Record:
        """The record of the run up to its state `last`, which was evaluated."""
        series = self.series()
        unknown = np.full(self.config.total_steps - len(series.loss), np.nan)
        return Record(
            backend=self.backend.name,
            dtype=self.dtype,
            twin=last.twin,
            config=last.config,
            data=last.data,
            environment=self.backend.describe(),
            source=last.source,
            loss=np.concatenate([series.loss, unknown]),
            gradient_norm=np.concatenate([series.gradient_norm, unknown]),
            lr=np.concatenate([series.lr, unknown]),
            batch_digests=self.batch_digests,
            predictions=np.asarray(evaluation.predictions),
            test_loss=float(evaluation.loss),
            seconds=last.seconds,
            steps_per_second=self.steps_per_second(last),
            weights=last.weights,
            first_steps=last.first_steps,
            layers=last.layers,
            parameter_history=last.parameter_history,
            final=last.snapshot.tensors,
            segments=last.segments,
            nonfinite_step=self.nonfinite_step,
            rank_differences=last.rank_differences,
        )

    def steps_per_second(self, last: Checkpoint) -> float:
        """Without the first chunk, which compiles, if there are others."""
        seconds = last.seconds - self.start.seconds
        steps, end = self.first_chunk or (self.step, 0.0)
        if steps < self.step:
            return (self.step - steps) / (self.began + seconds - end)
        return (self.step - self.start.step) / seconds if seconds else math.nan


def evaluate(backend: Backend, state: object, dataset: Dataset, dtype: str) -> Evaluation:
    """Predictions for, and the mean loss over, all test images. Of a network that predicts no
    classes, outputs for the first ones are kept, as many as fit into OUTPUT_BYTES."""
    predictions, total, count, kept = [], 0.0, 0, 0
    for start in range(0, len(dataset.test_images), TEST_CHUNK):
        chunk = slice(start, start + TEST_CHUNK)
        images, labels = dataset.test_images[chunk], dataset.test_labels[chunk]
        found = backend.evaluate(state, data.normalise(images, compute_dtype(dtype)), labels)
        outputs = np.asarray(found.predictions)
        if outputs.ndim == 1:  # of classes
            outputs = outputs.astype(np.int64)
        else:
            most = max(1, OUTPUT_BYTES // outputs[:1].nbytes)
            outputs = outputs[: max(0, most - kept)]
        kept += len(outputs)
        predictions.append(outputs)
        if weight := data.label_count(labels):
            total, count = total + found.loss * weight, count + weight
    return Evaluation(np.concatenate(predictions), total / count)


def describe(config: Config, dataset: Dataset) -> dict[str, object]:
    """The data of a run, for its record; two records are comparable only if these are equal."""
    return {
        "name": dataset.name,
        "digest": dataset.digest,
        "order": data.order_digest(config, len(dataset.train_images)),
        "sizes": {"train": len(dataset.train_images), "test": len(dataset.test_images)},
        "classes": list(dataset.classes),
    }


def with_step(step: int, arrays: Arrays) -> Arrays:
    return {f"{step}/{name}": array for name, array in arrays.items()}


def layers_of(first_steps: Arrays) -> list[str]:
    """The tensors of the forward pass, in the order in which they are computed."""
    return [key.split("/", 2)[2] for key in first_steps if key.startswith("0/forward/")]


def truncate_batch(arrays: Arrays) -> Arrays:
    """Activations of a batch's first images only: a wrong layer is wrong for all of them."""
    return {
        name: array[:FIRST_STEPS_IMAGES] if name.startswith("forward/") else array
        for name, array in arrays.items()
    }


def update_tensors(snapshot: Snapshot) -> Arrays:
    """The tensors of the update stage."""
    tensors = {f"update/{name}": array for name, array in snapshot.tensors.items()}
    return tensors | {f"update/{name}": array for name, array in snapshot.optimizer_tensors.items()}
