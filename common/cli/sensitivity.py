"""`sensitivity`: find the smallest error of the learning rate that is seen."""

from __future__ import annotations

import argparse
import functools
import math

from lockstep.common.cli import parser as options_of
from lockstep.common.cli.evidence import EvidenceCommand
from lockstep.common.cli.parser import Invocation, Parser


def add_arguments(parser: Parser) -> None:
    options_of.add_steps(parser, "steps of each run")
    options_of.add_twins(parser)
    options_of.add_shared(parser, "sensitivity")


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    from lockstep.common.evidence import plots
    from lockstep.common.evidence import sensitivity as curve

    study = EvidenceCommand(options, invocation, folder="sensitivity")
    dataset = study.load(options.data)
    steps = curve.STEPS if options.steps is None else options.steps
    twins = 2 if options.twins is None else options.twins
    rows = []
    with study.terminal.progress("errors", len(curve.ERRORS)) as advance:
        for row in curve.measure(dataset, study.build, steps, twins=twins):
            rows.append(row)
            advance(1, math.nan)
    study.report(
        {"steps": steps},
        rows,
        curve.sentence(rows),
        curve.table(rows),
        draw=functools.partial(plots.draw_sensitivity, rows),
    )
    return 0
