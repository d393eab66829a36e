"""`locate`: find the first tensor in which two runs differ, from their records if they exist."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from lockstep.common.cli.parser import Invocation, Parser
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


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    if options.run is None:
        request = new_request(options, invocation.arguments)
    else:
        request = resume_request(options, options.run, invocation.arguments)
    return carry_out(dataclasses.replace(request, keep_records=True), options, invocation)
