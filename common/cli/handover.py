"""`handover`: compare runs that one backend starts and the other finishes with uninterrupted
runs."""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
from pathlib import Path

from lockstep.common.cli import parser as options_of
from lockstep.common.cli.evidence import EvidenceCommand
from lockstep.common.cli.parser import Invocation, Parser
from lockstep.common.errors import ConfigError


def add_arguments(parser: Parser) -> None:
    options_of.add_steps(parser, "steps of each run")
    options_of.add_shared(parser, "handover")


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    from lockstep.common.evidence import handover
    from lockstep.common.verdict.check import finite

    steps = handover.STEPS if options.steps is None else options.steps
    if steps < handover.MIN_STEPS:
        raise ConfigError(
            f"--steps must be {handover.MIN_STEPS} or more: a shorter run is one chunk, "
            "which cannot be handed over"
        )
    configs = list(handover.configurations(steps))
    study = EvidenceCommand(options, invocation, folder="handover")
    dataset = study.load(options.data).first_test_images(handover.TEST_IMAGES)
    configs = [config.resolve(len(dataset.train_images)) for config in configs]
    build = functools.partial(study.build, dtype="float64")
    every = max(1, steps // 4)
    rows = []
    with (
        study.terminal.progress("configurations", len(configs)) as advance,
        tempfile.TemporaryDirectory() as folder,
    ):
        for config in configs:
            rows.append(handover.measure(config, dataset, build, Path(folder), every=every))
            study.free_programs()
            advance(1, math.nan)
    handovers = 2 * sum(len(row.places) for row in rows)
    worst = handover.largest_gap(rows, *handover.DIRECTIONS)
    agree = all(row.agrees for row in rows)
    facts = {
        "steps": steps,
        "handovers": handovers,
        "largest_gap": finite(worst),
        "bound": handover.GRID_BOUND,
    }
    verdict = "equal" if agree else "do NOT all equal"
    study.report(
        facts,
        [row.to_json() for row in rows],
        f"{handovers} runs that changed hands {verdict} those that were not interrupted, within "
        f"{worst:.1e} (bound {handover.GRID_BOUND:g}).",
        handover.table(rows),
    )
    return 0 if agree else 1
