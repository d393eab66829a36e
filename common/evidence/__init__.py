"""How good the verdict is, measured: known faults, false alarms, sensitivity, and the rules that others use.

Each module makes one report from many short pairs of runs; `compare.py` has a command for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from common import parity, train
from common.config import Config
from common.data import Dataset
from common.protocol import Backend
from common.record import Record

FLOAT64_TWINS = 2  # per backend, where a float64 pair may be chaotic
Build = Callable[[str, Config, str], Backend]  # backend's name, resolved config, dtype


class Silent:
    """An observer for runs that nobody watches."""

    def line(self, text: str) -> None: ...

    def advance(self, steps: int, loss: float) -> None: ...


def family(backend: Backend, config: Config, dataset: Dataset, dtype: str, twins: int) -> list[Record]:
    """The record of one run, followed by those of its twins (none in float64)."""
    members: list[Any] = [None] if dtype == "float64" else [None, *range(1, twins + 1)]
    return [train.train(backend, config, dataset, dtype, Silent(), twin, log_every=0) for twin in members]


def judge(
    families: dict[str, list[Record]],
    backends: Mapping[str, Backend],
    config: Config,
    dataset: Dataset,
    twins: int = FLOAT64_TWINS,
) -> tuple[dict[str, Any], bool]:
    """The lens as `parity.compare` has it, and whether float64 twins had to be trained for it, as `compare.py` does.

    Args:
        families: by backend, the run and its twins; float64 twins that are asked for are added.
        twins: how many of them, per backend.
    """

    def compare() -> dict[str, Any]:
        runs = {name: members[0] for name, members in families.items()}
        return parity.compare(runs, {name: members[1:] for name, members in families.items()}, dataset.test_labels)

    lens = compare()
    if not parity.may_be_chaos(lens):
        return lens, False
    for name, members in families.items():
        for twin in range(1, max(1, twins) + 1):
            members.append(train.train(backends[name], config, dataset, "float64", Silent(), twin, log_every=0))
    return compare(), True


def shortened(dataset: Dataset, test_images: int) -> Dataset:
    """The same data with its first `test_images` test images only: evaluation is most of a short run's time."""
    return dataclasses.replace(
        dataset, test_images=dataset.test_images[:test_images], test_labels=dataset.test_labels[:test_images]
    )
