"""The first steps of a run alone, where the runs diverge there: more twins cost little then."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.protocol import Arrays, Backend
from lockstep.common.runs.checkpoint import Checkpoint, CheckpointManager
from lockstep.common.runs.record import FIRST_STEPS, Record
from lockstep.common.runs.training import Observer, train


class StopAfterFirstSteps(CheckpointManager):
    """Stops a run after its first steps; the checkpoint stays in memory."""

    def __init__(self) -> None:
        super().__init__(Path(), every=0, stopping=self._done)
        self.calls = 0
        self.state: Checkpoint | None = None

    def _done(self) -> bool:
        self.calls += 1  # the first calls of `train_steps` are of one step each
        return self.calls >= FIRST_STEPS

    def save(self, checkpoint: Checkpoint) -> None:
        self.state = checkpoint


def first_steps(
    backend: Backend,
    config: Config,
    dataset: Dataset,
    dtype: str,
    observer: Observer,
    twin: int,
    weights: Arrays | None = None,
) -> Record:
    """A twin's record of the first steps only, for the verdict; it is never written.

    Args: as of `lockstep.common.runs.training.train`.

    Raises:
        KeyboardInterrupt: after a signal.
    """
    checkpoints = StopAfterFirstSteps()
    try:
        return train(
            backend,
            config,
            dataset,
            dtype,
            observer,
            twin,
            log_every=0,
            weights=weights,
            checkpoints=checkpoints,
        )  # a run that is no longer than that
    except KeyboardInterrupt:
        if checkpoints.state is None or checkpoints.state.step < FIRST_STEPS:  # the user's
            raise
    return record_of(checkpoints.state)


def record_of(found: Checkpoint) -> Record:
    """A record of the steps before a checkpoint, with nothing about the end of a run."""
    return Record(
        backend=found.backend,
        dtype=found.dtype,
        twin=found.twin,
        config=found.config,
        data=found.data,
        environment={},
        source=found.source,
        loss=found.loss,
        gradient_norm=found.gradient_norm,
        lr=found.lr,
        batch_digests=found.batch_digests,
        predictions=np.zeros(0, np.int64),
        test_loss=0.0,
        seconds=found.seconds,
        steps_per_second=0.0,
        weights=found.weights,
        first_steps=found.first_steps,
        layers=found.layers,
    )
