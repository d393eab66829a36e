"""`faults`: insert known mistakes into the Flax side and see which are found, and where."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lockstep.common.cli import parser as options_of
from lockstep.common.cli.evidence import EvidenceCommand
from lockstep.common.cli.parser import Invocation, Parser
from lockstep.common.errors import ConfigError

if TYPE_CHECKING:
    from lockstep.common.evidence.faults import Row

MAX_SHOWN = 4  # faults of `--only` that are described without `--verbose`


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--list", action="store_true", help="print the names of all faults")
    parser.add_argument("--only", nargs="+", metavar="FAULT", help="these faults only")
    parser.add_argument("--quick", action="store_true", help="one fault of each stage")
    options_of.add_processes(parser)
    parser.add_argument(
        "--clean",
        type=int,
        metavar="K",
        default=0,
        help="with --processes: so many correct runs as well, with seeds of their own",
    )
    options_of.add_dtype(parser, "in one precision only")
    options_of.add_twins(parser)
    options_of.add_shared(parser, "faults")
    options_of.add_cluster(parser)


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    if options.processes is not None:
        from lockstep.common.cli import process_faults

        return process_faults.execute(options, invocation)
    if options.clean:
        raise ConfigError("--clean is for faults of several processes: add --processes N")
    catalogue = invocation.backends.module("faults")
    if options.list:
        for fault in catalogue.FAULTS:
            print(f"{fault.name:<36} {fault.stage}")
        return 0
    chosen = [catalogue.named(name) for name in options.only or ()] or list(catalogue.FAULTS)
    if options.quick:
        chosen = [fault for fault in chosen if fault.name in catalogue.QUICK]

    from lockstep.common.evidence import fault_summary, plots
    from lockstep.common.evidence import faults as matrix

    study = EvidenceCommand(options, invocation, folder="faults")
    dataset = study.load(options.data).first_test_images(matrix.TEST_IMAGES)
    if (dataset.train_images == dataset.train_images[..., :1]).all():
        left_out = [fault.name for fault in chosen if fault.needs_color_images]
        chosen = [fault for fault in chosen if not fault.needs_color_images]
        if left_out:
            study.terminal.line(
                f"Skipped, since {dataset.name} has no colours: {', '.join(left_out)}"
            )
        if not chosen:
            raise ConfigError(
                "no fault is left to run: choose others, or data in colour (--data cifar10)"
            )
    names, rows = [fault.name for fault in chosen], []
    with study.terminal.progress("faults", len(chosen)) as advance:
        for row in study.rows(measured, names, together=8):
            rows.append(row)
            advance(1, math.nan)
    summary = fault_summary.summary(rows)
    if options.only and (options.verbose or len(rows) <= MAX_SHOWN):
        for line in (line for row in rows for line in fault_summary.summary_lines(row)):
            study.terminal.line(line)
    study.report(
        {"summary": summary},
        rows,
        fault_summary.sentence(summary),
        fault_summary.table(rows),
        draw=functools.partial(plots.draw_faults, rows),
    )
    return 0 if not summary["missed"] else 1


def measured(study: EvidenceCommand, names: Sequence[str]) -> Iterator[Row]:
    """The rows of some faults."""
    from lockstep.common.evidence import faults as matrix

    options, catalogue = study.options, study.invocation.backends.module("faults")
    dataset = study.load(options.data).first_test_images(matrix.TEST_IMAGES)
    measure = functools.partial(
        matrix.measure,
        cache=matrix.Cache(),
        precisions=matrix.PRECISIONS if options.dtype is None else (options.dtype,),
        twins=2 if options.twins is None else options.twins,
    )
    for name in names:
        yield measure(catalogue.named(name), dataset, study.build, catalogue.inject)
        study.free_programs()
