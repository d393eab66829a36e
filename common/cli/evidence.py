"""Shared by the evidence commands: data, device, backends, and a report of rows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.common.cli.output import print_json
from lockstep.common.cli.parser import Invocation
from lockstep.common.config import BACKENDS, Config
from lockstep.common.session import RUNS
from lockstep.common.system import environment, program

if TYPE_CHECKING:
    from lockstep.common.data import Dataset
    from lockstep.common.protocol import Backend

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
        self.datasets: list[Dataset] = []
        self.device: str | None = None
        check_writable(self.folder)

    def load(self, name: str) -> Dataset:
        from lockstep.common import data

        terminal = self.terminal
        self.datasets.append(
            data.load(name, self.options.data_dir, terminal.line, progress=not terminal.quiet)
        )
        return self.datasets[-1]

    def build(self, name: str, config: Config, dtype: str) -> Backend:
        from lockstep.common.runs import prepare

        dataset, compile = self.datasets[-1], self.options.compile
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
            config, len(dataset.classes), self.device, compile, name, dtype, self.processes
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
            print_json(report)
