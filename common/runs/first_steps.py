"""The first steps of a run alone, where the runs diverge there: more twins cost little then."""

from __future__ import annotations

from pathlib import Path

from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.protocol import Arrays, Backend
from lockstep.common.runs.checkpoint import Checkpoint, CheckpointManager
from lockstep.common.runs.record import FIRST_STEPS, Record
from lockstep.common.runs.training import Observer, train


class StopAfterFirstSteps(CheckpointManager):
    """Stops a run after its first steps; no checkpoint is written."""

    def __init__(self) -> None:
        super().__init__(Path(), every=0, stopping=self._done)
        self.calls = 0

    def _done(self) -> bool:
        self.calls += 1  # the first calls of `train_steps` are of one step each
        return self.calls >= FIRST_STEPS

    def save(self, checkpoint: Checkpoint) -> None:
        del checkpoint


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
    found: list[Record] = []
    longer = config.total_steps > FIRST_STEPS
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
            checkpoints=StopAfterFirstSteps() if longer else None,
            after_first_steps=found.append,
        )
    except KeyboardInterrupt:
        if not found:  # the user's
            raise
    return found[0]
