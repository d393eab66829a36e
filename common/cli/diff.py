"""`diff`: compare the recordings of two training scripts, or two runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from lockstep.common.cli import output, script_options
from lockstep.common.cli import parser as options_of
from lockstep.common.cli.parser import Invocation, Parser
from lockstep.common.config import BACKENDS
from lockstep.common.system import program


def add_arguments(parser: Parser) -> None:
    for name in ("A", "B"):
        parser.add_argument(
            name.lower(),
            nargs="?",
            metavar=name,
            help="a folder of recordings, as record or check writes it; or both: folders of runs, as "
            "--out names them",
        )
    script_options.add_names(parser)
    of_runs = parser.add_argument_group("of two runs, which may be of one framework")
    options_of.add_choice(
        of_runs, "--backend", BACKENDS, "whose runs, where both folders hold those of two", None
    )
    of_runs.add_argument("--data-dir", type=Path, metavar="DIR", help="where CIFAR-10 is")
    options_of.add_output(parser, "folder of the report (default: results/runs/diff-<A>-<B>)")


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    a, b = script_options.given(options, "a", "b")
    from lockstep.common import scripts

    result = scripts.diff(
        a,
        b,
        names=options.names,
        backend=options.backend,
        data_dir=options.data_dir,
        out=options.out,
        terminal=output.terminal(options),
        command=program.typed(invocation.arguments),
    )
    return output.conclude(result, options, invocation)
