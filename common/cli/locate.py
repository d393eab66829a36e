"""`locate`: where two runs differ first, from their records if they are there."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lockstep.common.backends import BackendPackage
from lockstep.common.cli.parser import Parser
from lockstep.common.cli.run import add_run_options, carry_out, new_request, resume_request


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "run",
        nargs="?",
        type=Path,
        metavar="RUN",
        help="the folder of a run; what is missing there is trained (default: the run that the "
        "options describe)",
    )
    add_run_options(parser)


def execute(options: argparse.Namespace, arguments: Sequence[str], backends: BackendPackage) -> int:
    if options.run is None:
        wanted = new_request(options, arguments)
    else:
        wanted = resume_request(options, options.run, arguments)
    return carry_out(dataclasses.replace(wanted, keep_records=True), options, backends)
