"""`alarms`: compare correct runs and count false alarms."""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lockstep.common.cli import parser as options_of
from lockstep.common.cli.evidence import EvidenceCommand
from lockstep.common.cli.parser import Invocation, Parser
from lockstep.common.config import DTYPES, MODELS
from lockstep.common.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from lockstep.common.evidence.false_alarms import Row, Setting

MAX_WORKERS = 8  # processes; each holds two gigabytes


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--pairs", type=int, metavar="N", help="pairs of runs (default: 300)")
    options_of.add_model(parser)
    options_of.add_seed(parser)
    options_of.add_dtype(parser, "in one precision only")
    options_of.add_twins(parser)
    options_of.add_shared(parser, "alarms")
    options_of.add_cluster(parser)


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    if options.pairs is not None and options.pairs < 1:
        raise ConfigError("--pairs must be 1 or more")
    model = options.model or "net"
    if model not in MODELS:
        raise ConfigError(f"alarms has no configurations of {model}: {did_you_mean(model, MODELS)}")

    from lockstep.common.evidence import false_alarms as clean
    from lockstep.common.evidence import plots
    from lockstep.common.report.text import plural

    pairs = clean.PAIRS if options.pairs is None else options.pairs
    settings = every = clean.settings(model)
    folder = "alarms" if model == "net" else f"alarms-{model}"
    study = EvidenceCommand(options, invocation, folder)
    for name in dict.fromkeys(setting.data for setting in every):
        try:
            study.load(name)
        except DataError as error:
            settings = [setting for setting in settings if setting.data != name]
            if not settings:
                raise
            study.terminal.line(
                f"Without {name}, {len(every) - len(settings)} configurations are skipped: {error}"
            )
    first = clean.MEASUREMENT_SEEDS[0] if options.seed is None else options.seed
    work_items = list(clean.work_items(settings, pairs, first))
    workers = (
        1 if options.device == "cuda" else min(len(work_items), os.cpu_count() or 1, MAX_WORKERS)
    )
    rows = []
    with study.terminal.progress("pairs", pairs) as advance:
        for row in study.rows(clean_pairs, work_items, workers):
            rows.append(row)
            advance(1, math.nan)
    summary = clean.summary(rows)
    false = sum(line["alarms"] for line in summary if line["rule"] == clean.LOCKSTEP)
    study.report(
        {"summary": summary, "first_seed": first},
        rows,
        f"{plural(false, 'false alarm')} of Lockstep in {plural(len(rows), 'clean pair')}, over "
        "all precisions.",
        clean.table(rows),
        draw=functools.partial(plots.draw_alarms, summary),
    )
    return 0


def clean_pairs(
    study: EvidenceCommand, work_items: Sequence[tuple[Setting, range]]
) -> Iterator[Row]:
    """The rows of some configurations, each with its seeds."""
    from lockstep.common.evidence import false_alarms as clean

    options = study.options
    precisions = DTYPES if options.dtype is None else (options.dtype,)
    twins = 2 if options.twins is None else options.twins
    for setting, seeds in work_items:
        datasets = {setting.data: study.load(setting.data)}
        yield from clean.measure(setting, seeds, datasets, study.build, precisions, twins)
        study.free_programs()
