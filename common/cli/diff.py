"""`diff`: compare the recordings of two training scripts."""

from __future__ import annotations

import argparse

from lockstep.common.cli import output, script_options
from lockstep.common.cli import parser as options_of
from lockstep.common.cli.parser import Invocation, Parser
from lockstep.common.system import program


def add_arguments(parser: Parser) -> None:
    for name in ("A", "B"):
        parser.add_argument(
            name.lower(),
            nargs="?",
            metavar=name,
            help="a folder of recordings, as record or check writes it",
        )
    script_options.add_names(parser)
    options_of.add_output(parser, "folder of the report (default: results/runs/diff-<A>-<B>)")


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    a, b = script_options.given(options, "a", "b")
    from lockstep.common import scripts

    result = scripts.diff(
        a,
        b,
        names=options.names,
        out=options.out,
        terminal=output.terminal(options),
        command=program.typed(invocation.arguments),
    )
    return output.conclude(result, options)
