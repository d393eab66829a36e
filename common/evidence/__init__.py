"""Measures how good the verdict is: known faults, false alarms, sensitivity, and the rules that
others use.

Each module makes one report from many short pairs of runs. `lockstep` has a command for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.protocol import Backend
from lockstep.common.runs import training
from lockstep.common.runs.first_steps import first_steps
from lockstep.common.runs.record import Record
from lockstep.common.verdict import compare as parity

Build = Callable[[str, Config, str], Backend]  # backend's name, resolved config, dtype


class NullProgress:
    """Ignores the progress of a run."""

    def line(self, text: str) -> None: ...

    def advance(self, steps: int, loss: float) -> None: ...


def train_ensemble(
    backend: Backend, config: Config, dataset: Dataset, dtype: str, twins: int
) -> list[Record]:
    """Train one run and its twins (no twins in float64). The run's record comes first."""
    return train_runs(
        backend, config, dataset, dtype, [None, *range(1, (0 if dtype == "float64" else twins) + 1)]
    )


def train_runs(
    backend: Backend, config: Config, dataset: Dataset, dtype: str, members: Iterable[int | None]
) -> list[Record]:
    """Train a run (None) or its twins (1, 2, ...) and return their records in the given order."""
    return [
        training.train(backend, config, dataset, dtype, NullProgress(), twin, log_every=0)
        for twin in members
    ]


def train_first_steps(
    backend: Backend, config: Config, dataset: Dataset, dtype: str, twins: Iterable[int]
) -> list[Record]:
    """Train only the first steps of these twins."""
    return [first_steps(backend, config, dataset, dtype, NullProgress(), twin) for twin in twins]


def judge(
    families: dict[str, list[Record]],
    backends: Mapping[str, Backend],
    config: Config,
    dataset: Dataset,
) -> dict[str, Any]:
    """Judge as the command line does; `backends` train the twins that the verdict asks for."""

    def more(name: str, twins: range) -> list[Record]:
        return train_runs(backends[name], config, dataset, families[name][0].dtype, twins)

    def begin(name: str, twins: range) -> list[Record]:
        return train_first_steps(backends[name], config, dataset, families[name][0].dtype, twins)

    return parity.judge(families, more, dataset.test_labels, begin)


def take_test_images(dataset: Dataset, test_images: int) -> Dataset:
    """Keep only the first `test_images` test images, since evaluation dominates a short run."""
    return dataclasses.replace(
        dataset,
        test_images=dataset.test_images[:test_images],
        test_labels=dataset.test_labels[:test_images],
    )
