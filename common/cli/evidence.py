"""Shared by the evidence commands: data, device, backends, and a report of rows."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lockstep.common.backends import BackendPackage
from lockstep.common.cli.output import print_json
from lockstep.common.cli.parser import Invocation
from lockstep.common.config import BACKENDS, Config
from lockstep.common.session import RUNS
from lockstep.common.system import environment, program
from lockstep.common.system.interrupt import SignalHandler

if TYPE_CHECKING:
    from lockstep.common.data import Dataset
    from lockstep.common.protocol import Backend
    from lockstep.common.system.executors import Cost

T = TypeVar("T")
R = TypeVar("R")
Table = tuple[Sequence[str], Iterable[Sequence[str]]]  # columns and rows


class EvidenceCommand:
    """One evidence command.

    Args:
        folder: in results/runs, unless `--out` names another one.
        quiet: even without `--quiet`.
        processes: that train at the same time; each has its share of the cores.

    Raises:
        RecordError: if the folder cannot be written.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        invocation: Invocation,
        folder: str,
        quiet: bool = False,
        processes: int = 1,
    ) -> None:
        from lockstep.common.report import Terminal
        from lockstep.common.system.storage import check_writable

        self.options, self.invocation = options, invocation
        self.processes = processes
        self.folder: Path = options.out or RUNS / folder
        self.terminal = Terminal(
            quiet=quiet or options.quiet, to_stderr=options.json, verbose=options.verbose
        )
        self.dataset: Dataset | None = None  # that backends are built for
        self.datasets: list[Dataset] = []
        self.loaded: dict[str, Dataset] = {}  # what `load` has read
        self.device: str | None = None
        self.cost: Cost | None = None  # of `rows`
        if not quiet:
            check_writable(self.folder)

    def load(self, name: str) -> Dataset:
        from lockstep.common import data

        key, terminal = f"{name} {self.options.data_dir}", self.terminal
        if key not in self.loaded:
            self.loaded[key] = data.load(
                name, self.options.data_dir, terminal.line, progress=not terminal.quiet
            )
        self.dataset = self.loaded[key]
        if not any(dataset is self.dataset for dataset in self.datasets):
            self.datasets.append(self.dataset)
        return self.dataset

    def rows(
        self,
        piece: Callable[[EvidenceCommand, Sequence[T]], Iterable[R]],
        items: Sequence[T],
        workers: int = 1,
        together: int = 1,
    ) -> Iterator[R]:
        """The rows of `piece(command, items)`, in order: made in this process, in so many others,
        or with `--cluster` by its workers.

        Args:
            piece: a function of a module.
            items: what can be pickled.
            together: items that another process gets at a time.

        Raises:
            DataError: if a worker has other data of the same name.
            LockstepError: what a piece raised.
        """
        from lockstep.common.runs.trainer import backend_errors
        from lockstep.common.system import executors

        address = self.options.cluster
        pieces = [items[place : place + together] for place in range(0, len(items), together)]
        workers = min(workers, len(pieces))
        if workers == 1 and address is None:
            start = time.process_time()
            yield from piece(self, items)
            self.cost = executors.Cost.since(start)
            return
        pool = executors.local(workers) if address is None else executors.cluster(address)
        share = workers if address is None else environment.cores()  # a worker takes one core
        digests = {dataset.name: dataset.digest for dataset in self.datasets}
        call = functools.partial(
            run_piece, self.options, self.invocation.backends, share, digests, piece
        )
        with backend_errors("a worker"), pool as executor:
            for rows, cost in executor.map(functools.partial(executors.alone, call), pieces):
                self.cost = cost if self.cost is None else self.cost.and_of(cost)
                yield from rows

    def build(self, name: str, config: Config, dtype: str) -> Backend:
        from lockstep.common.data import of_pair
        from lockstep.common.runs import prepare

        dataset = of_pair.own(config.model) or self.dataset
        compile = self.options.compile
        assert dataset is not None
        if self.device is None:
            self.device = prepare.choose_device(
                self.invocation.backends,
                config,
                dataset,
                BACKENDS,
                self.terminal.line,
                self.options.device,
            )
        return self.invocation.backends.build(
            config, dataset.task, self.device, compile, name, dtype, self.processes
        )

    def free_programs(self) -> None:
        """Forget what JAX compiled for the backends that were built; see `tuning.free_programs`."""
        self.invocation.backends.module("flax_backend.tuning").free_programs()

    def report(
        self,
        facts: Mapping[str, object],
        rows: Sequence[Mapping[str, object]],
        sentence: str,
        *tables: Table,
        draw: Callable[[Path], object] | None = None,
    ) -> None:
        """Write report.json and the plot; print the folder and, last, the result in one sentence.

        Args:
            facts: further keys of report.json.
            tables: printed with `--verbose`.
            draw: writes the plot.
        """
        from lockstep.common.report import write_json

        report = {
            "schema": 1,
            "command": program.typed(self.invocation.arguments),
            "data": [{"name": dataset.name, "digest": dataset.digest} for dataset in self.datasets],
            "environment": environment.describe(),
            **({} if self.cost is None else {"cost": self.cost._asdict()}),
            **facts,
            "rows": rows,
        }
        write_json(report, self.folder)
        if draw is not None:
            draw(self.folder / f"{self.options.command}.png")
        if self.options.verbose:
            for table in tables:
                self.terminal.table(*table)
        hint = "" if self.options.verbose else " (--verbose prints the tables)"
        self.terminal.line(f"Report: {self.folder}{hint}")
        self.terminal.print_always(sentence)
        if self.options.json:
            print_json(report, self.invocation.stdout)


LOADED: dict[str, Dataset] = {}  # what the pieces of this process have read


def run_piece(
    options: argparse.Namespace,
    backends: BackendPackage,
    processes: int,
    digests: Mapping[str, str],
    piece: Callable[[EvidenceCommand, Sequence[T]], Iterable[R]],
    items: Sequence[T],
) -> tuple[list[R], Cost]:
    """The rows of some items, in another process, one of `processes` that share its cores.

    Args:
        digests: of the caller's data sets, by name.
    """
    from lockstep.common.errors import DataError
    from lockstep.common.system.executors import Cost

    start = time.process_time()
    invocation = Invocation([], backends, SignalHandler(), sys.stdout)
    command = EvidenceCommand(options, invocation, "", quiet=True, processes=processes)
    command.loaded = LOADED
    rows = list(piece(command, items))
    command.free_programs()
    for dataset in command.datasets:
        if digests.get(dataset.name) not in (None, dataset.digest):
            raise DataError(
                f"a worker has other data called {dataset.name}: give it the same files"
            )
    return rows, Cost.since(start)
