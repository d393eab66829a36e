"""Parsers: one for each command, with its own `--help`, and the options that commands share."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn, Protocol, TextIO, cast

from lockstep.common.backends import BackendPackage
from lockstep.common.config import BACKENDS, DTYPES, MODELS
from lockstep.common.errors import ConfigError, did_you_mean, nearest
from lockstep.common.system import program
from lockstep.common.system.interrupt import SignalHandler

COMMANDS = {
    "run": "train in both frameworks and compare the two runs (the default)",
    "check": "find out whether two training scripts of your own are the same run",
    "record": "run a training script of your own and keep what it computed",
    "diff": "compare the recordings of two training scripts, or two runs",
    "locate": "find the first tensor in which two runs differ",
    "report": "make the page of a finished run again, from its records",
    "export": "write a trained model for use elsewhere",
    "pair": "check that your own two networks compute the same, without training",
    "grid": "compare every combination of the optimizer's options",
    "handover": "compare runs that one framework starts and the other finishes",
    "faults": "insert known mistakes and see which are found",
    "alarms": "compare correct runs and count false alarms",
    "sensitivity": "find the smallest error of the learning rate that is seen",
    "bench": "measure speed next to the tutorial's own loop",
    "learn": "write pages to learn from: a lesson, both sources, one step in numbers",
}
RENAMED = {"read": "learn"}
WITH_SCRIPTS = ("check", "record")  # what follows -- are the arguments of the scripts
EXAMPLES = """\
examples:
  {program}                            the quick recipe, in both frameworks
  {program} --data digits --steps 50   a few seconds, without a download
  {program} --recipe tutorial          the whole run of PyTorch's tutorial
  {program} --resume RUN               resume a run that was stopped
  {program} locate RUN                 where the two runs of a folder differ first
  {program} pair FILE.py:PAIR          check your own pair of networks
  {program} check A.py B.py            check two training scripts of your own

Options of each command: {program} COMMAND --help. Without a command: run.
Exit status: 0 agree, 1 disagree, 2 wrong request, 130 or 143 stopped."""


class Invocation(NamedTuple):
    """The context that a command gets in addition to its options."""

    arguments: Sequence[str]  # of the command line, for the report
    backends: BackendPackage
    signals: SignalHandler
    stdout: TextIO  # for the report of `--json`; what a user's code prints goes to standard error


class Command(Protocol):
    """The functions that a command's module defines."""

    def add_arguments(self, parser: Parser) -> None: ...
    def execute(self, options: argparse.Namespace, invocation: Invocation) -> int: ...


class Parser(argparse.ArgumentParser):
    """A parser that reports an error as one ConfigError."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")

    def option_names(self) -> list[str]:
        """All options, such as "--lr" and "--no-nesterov"."""
        return re.findall(r"--[a-z][a-z-]*", self.format_usage())


def command_module(command: str) -> Command:
    return cast(Command, importlib.import_module(f"lockstep.common.cli.{command}"))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of one command line; `command` is among them.

    Raises:
        ConfigError: for a command or an option that does not exist.
        SystemExit: after `--help` and `--version`.
    """
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help", "--version"):
        top_parser().parse_args(arguments[:1])
    if first.startswith("-") or not arguments:
        command, rest = "run", list(arguments)
    else:
        command, rest = command_named(first), list(arguments[1:])
    parser = command_parser(command)
    of_scripts: list[str] = []
    if command in WITH_SCRIPTS and "--" in rest:
        place = rest.index("--")
        rest, of_scripts = rest[:place], rest[place + 1 :]
    options, unknown = parser.parse_known_intermixed_args(rest)
    if unknown:
        refuse(parser, command, unknown)
    options.command = command
    if command in WITH_SCRIPTS:
        options.of_scripts = of_scripts
    return options


def command_named(word: str) -> str:
    if word in RENAMED:
        raise ConfigError(f"{word} is called {RENAMED[word]} now: {program.command(RENAMED[word])}")
    if word not in COMMANDS:
        raise ConfigError(f"unknown command {word!r}: {did_you_mean(word, COMMANDS)}")
    return word


def refuse(parser: Parser, command: str, unknown: Sequence[str]) -> NoReturn:
    """Raise ConfigError for what the command does not take."""
    name = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
    if not name.startswith("-"):
        if name in COMMANDS:
            raise ConfigError(f"the command comes first: {program.command(name, '...')}")
        if proposal := nearest(name, COMMANDS):
            raise ConfigError(
                f"{command} takes no {name!r}: did you mean the command {proposal}, "
                "which comes first?"
            )
        raise ConfigError(f"{command} takes no {name!r}; see {parser.prog} --help")
    takers = [other for other in COMMANDS if name in command_parser(other).option_names()]
    if takers:
        raise ConfigError(
            f"{command} takes no {name} ({', '.join(takers)} {'do' if takers[1:] else 'does'}); "
            f"see {parser.prog} --help"
        )
    proposal = nearest(name, parser.option_names())
    hint = f"did you mean {proposal}?" if proposal else f"see {parser.prog} --help"
    raise ConfigError(f"unknown option {name}: {hint}")


def top_parser() -> Parser:
    """The parser of `--help` and `--version`, which lists the commands."""
    parser = Parser(
        allow_abbrev=False,
        prog=program.name(),
        usage=f"{program.name()} [COMMAND] [OPTIONS]",
        description="Train one network in PyTorch and in JAX/Flax, and say whether the two runs "
        "are the same run; if not, where they differ first.",
        epilog="commands:\n"
        + "".join(f"  {name:<12} {text}\n" for name, text in COMMANDS.items())
        + "\n"
        + EXAMPLES.format(program=program.name()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lockstep {version()}")
    return parser


def version() -> str:
    import lockstep

    return lockstep.__version__


def command_parser(command: str) -> Parser:
    module = command_module(command)
    parser = Parser(
        allow_abbrev=False,
        prog=f"{program.name()} {command}",
        description=COMMANDS[command][0].upper() + COMMANDS[command][1:] + ".",
        conflict_handler="resolve",
    )
    module.add_arguments(parser)
    return parser


# --- Options that several commands take


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """An option's type: one of `names`; for another word, the nearest of them is proposed."""
    known = list(names)

    def check(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(f"{word!r} is unknown: {did_you_mean(word, known)}")
        return word

    return check


def choices(names: Iterable[str]) -> str:
    """The metavar of an option with these values."""
    return "{" + ",".join(names) + "}"


def add_choice(
    group: argparse._ActionsContainer,
    option: str,
    names: Iterable[str],
    text: str,
    default: str | None = None,
) -> None:
    names = list(names)
    group.add_argument(
        option, type=one_of(names), metavar=choices(names), default=default, help=text
    )


def add_switch(group: argparse._ActionsContainer, option: str, text: str) -> None:
    group.add_argument(option, action=argparse.BooleanOptionalAction, default=None, help=text)


AUTO_DATA = "CIFAR-10 if it is there or can be downloaded, else scikit-learn's digits"


def add_data(parser: Parser, auto: str = AUTO_DATA) -> None:
    """The options that name the data; `auto` says what is read where the user names none."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        default="auto",
        metavar="{auto,cifar10,digits,PATH}",
        help=f"auto: {auto}; "
        "PATH: a folder of class folders, or an .npz with x_train, y_train, x_test, y_test",
    )
    group.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where CIFAR-10 is, or is downloaded to"
    )


def add_processes(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="train each run by N processes together, each on its share of every batch "
        "(default: 1)",
    )


def add_device(parser: Parser) -> argparse._ActionsContainer:
    group = parser.add_argument_group("device")
    add_choice(group, "--device", ("auto", "cpu", "cuda"), "(default: auto)", "auto")
    add_choice(
        group,
        "--compile",
        ("auto", "on", "off"),
        "torch.compile (auto: in long runs of small batches); jax.jit always",
        "auto",
    )
    return group


def add_output(parser: Parser, out: str) -> None:
    """`--out`, `--quiet`, `--verbose` and `--json`.

    Args:
        out: help of `--out`.
    """
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR", help=out)
    group.add_argument("--quiet", action="store_true", help="print the verdict only")
    group.add_argument("--verbose", action="store_true", help="print every table")
    group.add_argument(
        "--json",
        action="store_true",
        help="print the report on standard output, all else on standard error",
    )


def add_shared(parser: Parser, name: str) -> None:
    """The options of every evidence command.

    Args:
        name: of the folder in results/runs.
    """
    add_data(parser)
    add_device(parser)
    add_output(parser, f"folder of the report (default: results/runs/{name})")


def add_cluster(parser: Parser) -> None:
    group = parser.add_argument_group("where to compute")
    group.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="by the workers of this Dask scheduler, such as tcp://10.0.0.1:8786; of a run, its "
        "twins (default: this machine)",
    )


def add_model(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--model",
        metavar="{" + ",".join(MODELS) + ",FILE.py:PAIR}",
        help="the network: one of Lockstep's own, or a pair of your own modules",
    )


def add_dtype(group: argparse._ActionsContainer, text: str) -> None:
    add_choice(group, "--dtype", DTYPES, text)


def add_backend(group: argparse._ActionsContainer, text: str) -> None:
    add_choice(group, "--backend", ("both", *BACKENDS), text)


def add_steps(group: argparse._ActionsContainer, text: str) -> None:
    group.add_argument("--steps", type=int, metavar="N", help=text)


def add_seed(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--seed", type=int, metavar="N", help="of the weights, the order of the batches, the twins"
    )


def add_twins(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--twins",
        type=int,
        metavar="M",
        help="twins per framework: the same run again, its weights moved by rounding; "
        "none in float64",
    )


def add_batch_size(group: argparse._ActionsContainer) -> None:
    group.add_argument("--batch-size", type=int, metavar="N", help="images per step")
