"""`sensitivity`: find the smallest error of the learning rate that is seen."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lockstep.common.cli import parser as options_of
from lockstep.common.cli.evidence import EvidenceCommand
from lockstep.common.cli.parser import Invocation, Parser

if TYPE_CHECKING:
    from lockstep.common.evidence.sensitivity import Row


def add_arguments(parser: Parser) -> None:
    options_of.add_steps(parser, "steps of each run")
    options_of.add_twins(parser)
    options_of.add_shared(parser, "sensitivity")
    options_of.add_cluster(parser)


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    from lockstep.common.evidence import plots
    from lockstep.common.evidence import sensitivity as curve

    study = EvidenceCommand(options, invocation, folder="sensitivity")
    study.load(options.data)
    rows = []
    with study.terminal.progress("errors", len(curve.ERRORS)) as advance:
        for row in study.rows(measured, curve.ERRORS, together=2):
            rows.append(row)
            advance(1, math.nan)
    study.report(
        {"steps": steps_of(options)},
        rows,
        curve.sentence(rows),
        curve.table(rows),
        draw=functools.partial(plots.draw_sensitivity, rows),
    )
    return 0


def steps_of(options: argparse.Namespace) -> int:
    from lockstep.common.evidence import sensitivity as curve

    return curve.STEPS if options.steps is None else options.steps


def measured(study: EvidenceCommand, errors: Sequence[float]) -> Iterator[Row]:
    """The rows of some errors."""
    from lockstep.common.evidence import sensitivity as curve

    options = study.options
    twins = 2 if options.twins is None else options.twins
    yield from curve.measure(
        study.load(options.data), study.build, steps_of(options), twins=twins, errors=errors
    )
