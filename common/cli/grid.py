"""`grid`: compare every combination of the optimizer's options."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lockstep.common.cli import parser as options_of
from lockstep.common.cli.evidence import EvidenceCommand
from lockstep.common.cli.parser import Invocation, Parser
from lockstep.common.config import Config

if TYPE_CHECKING:
    from lockstep.common.evidence.optimizer_grid import Row

MAX_WORKERS = 8  # processes; each holds a gigabyte


def add_arguments(parser: Parser) -> None:
    options_of.add_steps(parser, "steps of each run (default: 200)")
    options_of.add_shared(parser, "grid")
    options_of.add_cluster(parser)


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    from lockstep.common.evidence import optimizer_grid

    steps = optimizer_grid.STEPS if options.steps is None else options.steps
    configs = list(optimizer_grid.combinations(steps))
    study = EvidenceCommand(options, invocation, folder="grid")
    dataset = study.load(options.data)
    configs = [config.resolve(len(dataset.train_images)) for config in configs]
    workers = 1 if options.device == "cuda" else min(os.cpu_count() or 1, MAX_WORKERS)
    rows = []
    with study.terminal.progress("combinations", len(configs)) as advance:
        for row in study.rows(combinations, configs, workers, together=8):
            rows.append(row)
            advance(1, row["last_loss"])
    facts = {"steps": configs[0].steps, "bound": optimizer_grid.GRID_BOUND}
    agree = all(row["agrees"] for row in rows)
    study.report(facts, rows, optimizer_grid.sentence(rows), optimizer_grid.table(rows))
    return 0 if agree else 1


def combinations(study: EvidenceCommand, configs: Sequence[Config]) -> Iterator[Row]:
    """The rows of some configurations."""
    from lockstep.common.evidence import optimizer_grid

    dataset = study.load(study.options.data)
    build = functools.partial(study.build, dtype="float64")
    for config in configs:
        yield optimizer_grid.measure(config, dataset, build)
        study.free_programs()
