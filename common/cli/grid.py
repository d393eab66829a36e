"""`grid`: compare every combination of the optimizer's options."""

from __future__ import annotations

import argparse
import functools

from lockstep.common.cli import parser as options_of
from lockstep.common.cli.evidence import EvidenceCommand
from lockstep.common.cli.parser import Invocation, Parser


def add_arguments(parser: Parser) -> None:
    options_of.add_steps(parser, "steps of each run (default: 200)")
    options_of.add_shared(parser, "grid")


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    from lockstep.common.evidence import optimizer_grid

    steps = optimizer_grid.STEPS if options.steps is None else options.steps
    configs = list(optimizer_grid.combinations(steps))
    study = EvidenceCommand(options, invocation, folder="grid")
    dataset = study.load(options.data)
    configs = [config.resolve(len(dataset.train_images)) for config in configs]
    build = functools.partial(study.build, dtype="float64")
    rows = []
    with study.terminal.progress("combinations", len(configs)) as advance:
        for config in configs:
            rows.append(optimizer_grid.measure(config, dataset, build))
            study.free_programs()
            advance(1, rows[-1]["last_loss"])
    facts = {"steps": configs[0].steps, "bound": optimizer_grid.GRID_BOUND}
    agree = all(row["agrees"] for row in rows)
    study.report(facts, rows, optimizer_grid.sentence(rows), optimizer_grid.table(rows))
    return 0 if agree else 1
