"""`handover`: runs that one backend starts and the other finishes, compared with runs that are not
interrupted."""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lockstep.common.backends import BackendPackage
from lockstep.common.cli import parser as options_of
from lockstep.common.cli.evidence import EvidenceCommand
from lockstep.common.cli.parser import Parser
from lockstep.common.errors import ConfigError


def add_arguments(parser: Parser) -> None:
    options_of.add_steps(parser, "steps of each run")
    options_of.add_shared(parser, "handover")


def execute(options: argparse.Namespace, arguments: Sequence[str], backends: BackendPackage) -> int:
    from lockstep.common.evidence import optimizer_grid, shortened

    steps = optimizer_grid.HANDOVER_STEPS if options.steps is None else options.steps
    if steps < optimizer_grid.HANDOVER_LEAST:
        raise ConfigError(
            f"--steps must be {optimizer_grid.HANDOVER_LEAST} or more: shorter runs are one call "
            "of the program"
        )
    configs = list(optimizer_grid.handover_configs(steps))
    study = EvidenceCommand(options, arguments, backends, folder="handover")
    dataset = shortened(study.load(options.data), optimizer_grid.HANDOVER_TEST_IMAGES)
    configs = [config.resolve(len(dataset.train_images)) for config in configs]
    build = functools.partial(study.build, dtype="float64")
    every = max(1, steps // 4)
    rows = []
    with (
        study.terminal.progress("configurations", len(configs)) as advance,
        tempfile.TemporaryDirectory() as folder,
    ):
        for config in configs:
            rows.append(optimizer_grid.hand_over(config, dataset, build, Path(folder), every=every))
            advance(1, math.nan)
    handovers = 2 * sum(len(row["places"]) for row in rows)
    worst = max(row[key] for row in rows for key in ("torch to flax", "flax to torch"))
    agree = all(row["agrees"] for row in rows)
    facts = {
        "steps": steps,
        "handovers": handovers,
        "largest_gap": worst,
        "bound": optimizer_grid.GRID_BOUND,
    }
    study.report(facts, rows, optimizer_grid.handover_table(rows))
    equal = (
        f"equal those that were not interrupted, within {worst:.1e} "
        f"(bound {optimizer_grid.GRID_BOUND:g})"
    )
    study.terminal.line(
        f"{handovers} runs that changed hands {equal if agree else 'do NOT all ' + equal}."
    )
    return 0 if agree else 1
