"""Twins that the workers of a Dask scheduler train, while this process trains the runs
themselves."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.errors import DataError
from lockstep.common.protocol import Arrays, Backend
from lockstep.common.runs import training
from lockstep.common.runs.record import Record
from lockstep.common.system import environment, executors

# Starts a twin of this backend, in this precision and with this number.
StartTwin = Callable[[str, str, int], "Future[Record]"]
LOADED: dict[tuple[str, Path | None], Dataset] = {}  # what this worker has read


@dataclass(frozen=True)
class Twins:
    """All that a worker needs to train twins of a run."""

    build: Callable[[str, str, int], Backend]  # name, dtype, processes that share the cores
    config: Config  # resolved
    data: str  # as the option --data
    data_dir: Path | None
    digest: str  # of the data
    weights: Arrays | None


@contextlib.contextmanager
def start_twins(cluster: str | None, twins: Twins) -> Iterator[StartTwin | None]:
    """A function that has a worker of the scheduler at `cluster` train a twin; None without a
    scheduler. Those that have not ended are given up at the end of the block.

    Raises:
        ConfigError: as `executors.cluster`.
    """
    if cluster is None:
        yield None
        return
    started: list[Future[Record]] = []
    call = functools.partial(executors.alone, train_twin, twins)
    with executors.cluster(cluster) as workers:

        def start(name: str, dtype: str, twin: int) -> Future[Record]:
            started.append(workers.submit(call, name, dtype, twin))
            return started[-1]

        try:
            yield start
        finally:
            for future in started:
                future.cancel()


def train_twin(twins: Twins, name: str, dtype: str, twin: int) -> Record:
    """Train a twin in this process.

    Raises:
        DataError: if there are no such data here.
    """
    key = twins.data, twins.data_dir
    if key not in LOADED:
        LOADED[key] = data.load(*key, _quiet, progress=False)
    dataset = LOADED[key]
    if dataset.digest != twins.digest:
        raise DataError(f"a worker has other data called {twins.data}: give it the same files")
    backend = twins.build(name, dtype, environment.cores())
    return training.train(
        backend, twins.config, dataset, dtype, _Silent(), twin, 0, weights=twins.weights
    )


class _Silent:
    """An observer that prints nothing."""

    def line(self, text: str, /) -> None: ...

    def advance(self, steps: int, loss: float, /) -> None: ...


def _quiet(text: str) -> None: ...
