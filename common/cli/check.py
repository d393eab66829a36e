"""`check`: find out whether two training scripts of the user's own are the same run."""

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
            help="a training script that uses lockstep.Run: SCRIPT.py or MODULE:FUNCTION"
            + ("; what follows -- are the arguments of both" if name == "B" else ""),
        )
    script_options.add_precision(parser, "both")
    script_options.add_script_twins(parser)
    script_options.add_script_run(parser)
    group = parser.add_argument_group("which tensor is which")
    script_options.add_names(group)
    options_of.add_choice(
        group, "--start-from", ("A", "B"), "both start from the initial weights of this one"
    )
    options_of.add_output(
        parser, "folder of the report and the recordings (default: results/runs/check-<A>-<B>)"
    )


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    a, b = script_options.given(options, "a", "b")
    if not script_options.take_from_torchrun(options):
        return 0
    from lockstep.common import scripts

    result = scripts.check(
        a,
        b,
        precision=options.precision,
        names=options.names,
        start_from=options.start_from,
        out=options.out,
        terminal=output.terminal(options),
        command=program.typed(invocation.arguments),
        **script_options.script_options(options),
    )
    return output.conclude(result, options, invocation)
