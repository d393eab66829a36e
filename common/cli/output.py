"""The report on standard output, and the end of a command over two scripts."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from lockstep.common.cli.parser import Invocation
    from lockstep.common.report import Terminal
    from lockstep.common.report.scripts import ScriptResult
    from lockstep.common.request import Result


def print_json(report: Mapping[str, object], stdout: TextIO) -> None:
    """Print the report as report.json has it."""
    from lockstep.common.report import to_json

    print(to_json(report), end="", flush=True, file=stdout)


def terminal(options: argparse.Namespace) -> Terminal:
    """The terminal that `--quiet`, `--verbose` and `--json` ask for."""
    from lockstep.common.report import Terminal

    return Terminal(quiet=options.quiet, to_stderr=options.json, verbose=options.verbose)


def conclude(
    result: ScriptResult | Result, options: argparse.Namespace, invocation: Invocation
) -> int:
    """Print what `--json` asks for, and return the exit status."""
    if options.json:
        print_json(result.report, invocation.stdout)
    return 0 if result else 1
