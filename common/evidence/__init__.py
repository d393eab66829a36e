"""How good the verdict is, measured: known faults, false alarms, sensitivity, and the rules that
others use.

Each module makes one report from many short pairs of runs; `lockstep` has a command for each.
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


class Silent:
    """An observer for runs that nobody watches."""

    def line(self, text: str) -> None: ...

    def advance(self, steps: int, loss: float) -> None: ...


def family(
    backend: Backend, config: Config, dataset: Dataset, dtype: str, twins: int
) -> list[Record]:
    """The record of one run, followed by those of its twins (none in float64)."""
    return trained(
        backend, config, dataset, dtype, [None, *range(1, (0 if dtype == "float64" else twins) + 1)]
    )


def trained(
    backend: Backend, config: Config, dataset: Dataset, dtype: str, members: Iterable[int | None]
) -> list[Record]:
    """The records of these members of a family: None is the run itself, 1, 2, ... are its twins."""
    return [
        training.train(backend, config, dataset, dtype, Silent(), twin, log_every=0)
        for twin in members
    ]


def begun(
    backend: Backend, config: Config, dataset: Dataset, dtype: str, twins: Iterable[int]
) -> list[Record]:
    """Of these twins, the first steps."""
    return [first_steps(backend, config, dataset, dtype, Silent(), twin) for twin in twins]


def judge(
    families: dict[str, list[Record]],
    backends: Mapping[str, Backend],
    config: Config,
    dataset: Dataset,
) -> dict[str, Any]:
    """The lens as `compare.py` has it: `parity.judge`, with twins by `backends`."""

    def more(name: str, twins: range) -> list[Record]:
        return trained(backends[name], config, dataset, families[name][0].dtype, twins)

    def begin(name: str, twins: range) -> list[Record]:
        return begun(backends[name], config, dataset, families[name][0].dtype, twins)

    return parity.judge(families, more, dataset.test_labels, begin)


def shortened(dataset: Dataset, test_images: int) -> Dataset:
    """The same data with its first `test_images` test images only: evaluation is most of a short
    run's time."""
    return dataclasses.replace(
        dataset,
        test_images=dataset.test_images[:test_images],
        test_labels=dataset.test_labels[:test_images],
    )
