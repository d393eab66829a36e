"""Options of the commands over training scripts of the user's own: `check`, `record` and `diff`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import NotRequired, TypedDict

from lockstep.common.cli.parser import Parser, add_choice, add_steps
from lockstep.common.errors import ConfigError
from lockstep.common.system import program


def add_precision(parser: Parser, default: str) -> None:
    add_choice(
        parser,
        "--precision",
        ("both", "float64", "own"),
        "float64, in which rounding stays small; own: the script's own; both: one after the other "
        f"(default: {default})",
        default,
    )


class ScriptOptions(TypedDict):
    """Keyword arguments of `common.scripts.record` and `check`."""

    arguments: list[str]
    steps: int | None
    timeout: float | None
    twins: int | None
    seed: int
    processes: int | None
    record_limit: NotRequired[int]


def add_script_twins(parser: Parser) -> None:
    parser.add_argument(
        "--twins",
        type=int,
        metavar="M",
        help="twins per script: the same run again, its weights and batches moved by rounding "
        "(default: 2 in its own precision, none in float64)",
    )


def add_script_run(parser: Parser) -> None:
    """The options of each run of a script."""
    group = parser.add_argument_group("each run of a script")
    add_steps(group, "end the script after N steps")
    group.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="run the script in N processes, with the variables that torchrun sets; all of them must "
        "call lockstep.Run (default: one, without these)",
    )
    group.add_argument(
        "--timeout", type=float, metavar="S", help="end a run after S seconds (default: never)"
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the twins and of run.random"
    )
    group.add_argument(
        "--record-limit",
        type=count_of_bytes,
        metavar="BYTES",
        help="of one recording, as 500M or 2G; larger tensors are kept as fingerprints "
        "(default: 1G)",
    )


def script_options(options: argparse.Namespace) -> ScriptOptions:
    """Those of `add_script_run` and `add_script_twins`, as the functions of `common.scripts` take
    them."""
    found: ScriptOptions = {
        "arguments": options.of_scripts,
        "steps": options.steps,
        "timeout": options.timeout,
        "twins": options.twins,
        "seed": options.seed,
        "processes": options.processes,
    }
    if options.record_limit is not None:
        found["record_limit"] = options.record_limit
    return found


def take_from_torchrun(options: argparse.Namespace) -> bool:
    """Under torchrun, take the number of processes from it: rank 0's command starts as many itself,
    and False tells the others that they have nothing to do.

    Raises:
        ConfigError: if they are on several machines, or another number was asked for.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    from lockstep.common.runs.launched import Launched

    launched = Launched.read()
    if launched is None:
        return True
    if launched.here != launched.count:
        raise ConfigError(
            f"{options.command} runs scripts on one machine: give --processes N without torchrun"
        )
    if options.processes not in (None, launched.count):
        raise ConfigError(
            f"torchrun started {launched.count} processes: leave out --processes, or torchrun"
        )
    options.processes = launched.count
    return launched.number == 0


def given(options: argparse.Namespace, *names: str) -> list[str]:
    """The positional arguments of these names.

    Raises:
        ConfigError: if one of them was not given.
    """
    values = [getattr(options, name) for name in names]
    if None in values:
        usage = " ".join(name.upper() for name in names)
        raise ConfigError(
            f"{options.command} needs more: {program.command(options.command)} {usage}"
        )
    return values


def count_of_bytes(text: str) -> int:
    """1000000, 500M or 2G as a number of bytes."""
    found = re.fullmatch(r"(\d+)([kKMGT]?)B?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, such as 500M or 2G")
    return int(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ")


def add_names(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="which tensor of A is which of B, where Lockstep does not find it: lines of two "
        "names; * stands for any characters",
    )
