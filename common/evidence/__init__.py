"""Measures how good the verdict is: known faults, false alarms, sensitivity, and the rules of other
projects.

Most modules make one report from many short pairs of runs; `lockstep` has a command for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.model.layers import module_names
from lockstep.common.protocol import Backend
from lockstep.common.runs import training
from lockstep.common.runs.ensemble import Ensemble, Ensembles
from lockstep.common.runs.first_steps import first_steps
from lockstep.common.runs.record import Record
from lockstep.common.verdict import judge as verdicts
from lockstep.common.verdict.comparison import Comparison
from lockstep.common.verdict.confirm import confirm

Build = Callable[[str, Config, str], Backend]  # backend's name, resolved config, dtype


class NullProgress:
    """Ignores the progress of a run."""

    def line(self, text: str) -> None: ...

    def advance(self, steps: int, loss: float) -> None: ...


def train_ensemble(
    backend: Backend, config: Config, dataset: Dataset, dtype: str, twins: int
) -> Ensemble:
    """One run and its twins (none in float64)."""
    numbers = [None, *range(1, (0 if dtype == "float64" else twins) + 1)]
    return Ensemble.of(train_runs(backend, config, dataset, dtype, numbers))


def train_runs(
    backend: Backend, config: Config, dataset: Dataset, dtype: str, runs: Iterable[int | None]
) -> list[Record]:
    """The records of these runs of an ensemble: None is the run itself, 1, 2, ... are its twins."""
    return [
        training.train(backend, config, dataset, dtype, NullProgress(), twin, log_every=0)
        for twin in runs
    ]


def train_first_steps(
    backend: Backend, config: Config, dataset: Dataset, dtype: str, twins: Iterable[int]
) -> list[Record]:
    """Train only the first steps of these twins."""
    return [first_steps(backend, config, dataset, dtype, NullProgress(), twin) for twin in twins]


def judge(
    ensembles: Ensembles,
    backends: Mapping[str, Backend],
    config: Config,
    dataset: Dataset,
) -> Comparison:
    """The verdict of the command line: `verdict.judge`, with twins that `backends` train, and steps
    replayed where float64 agrees because of them."""

    def train_twins(name: str, twins: range) -> list[Record]:
        return train_runs(backends[name], config, dataset, ensembles[name].run.dtype, twins)

    def train_starts(name: str, twins: range) -> list[Record]:
        return train_first_steps(backends[name], config, dataset, ensembles[name].run.dtype, twins)

    found = verdicts.judge(ensembles, train_twins, dataset.test_labels, train_starts)
    runs = {name: ensemble.run for name, ensemble in ensembles.items()}
    return confirm(
        found,
        runs,
        config,
        dataset,
        backends.__getitem__,
        names_of=lambda name: module_names(backends[name]),
    )
