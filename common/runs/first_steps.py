"""The first steps of a run alone, for what parts there: more twins cost next to nothing then."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.protocol import Arrays, Backend
from lockstep.common.runs.checkpoint import Checkpoint, Keeper
from lockstep.common.runs.record import OPENING_STEPS, Record
from lockstep.common.runs.training import Observer, train


class _First(Keeper):
    """Stops a run after its first steps, and keeps what it has then in memory."""

    def __init__(self) -> None:
        super().__init__(Path(), every=0, stopping=self._enough)
        self.calls = 0
        self.state: Checkpoint | None = None

    def _enough(self) -> bool:
        self.calls += 1  # once for each call of `train_steps`, which are of one step each there
        return self.calls >= OPENING_STEPS

    def keep(self, checkpoint: Checkpoint) -> None:
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
    """A twin's record of the first steps, without anything later in it; for `parity.judge` only,
    never written.

    Args:
        as `lockstep.common.runs.training.train`'s.
    """
    keeper = _First()
    try:
        return train(
            backend, config, dataset, dtype, observer, twin, 0, weights=weights, keeper=keeper
        )  # a short run
    except KeyboardInterrupt:
        if keeper.state is None or keeper.state.step < OPENING_STEPS:  # it was the user's
            raise
    found = keeper.state
    return Record(
        backend=backend.name,
        dtype=dtype,
        twin=twin,
        config=found.config,
        data=found.data,
        environment={},
        source=found.source,
        loss=found.loss,
        gradient_norm=found.gradient_norm,
        lr=found.lr,
        predictions=np.zeros(0, np.int64),
        test_loss=0.0,
        seconds=found.seconds,
        steps_per_second=0.0,
        weights=found.weights,
        opening=found.opening,
        layers=found.layers,
    )
