"""`pair`: check that two networks are the same: names, shapes, and one batch in float64."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from lockstep.common.backends import BackendPackage
from lockstep.common.cli import parser as options_of
from lockstep.common.cli.output import print_json
from lockstep.common.cli.parser import Invocation, Parser
from lockstep.common.config import BACKENDS, MODELS, Config
from lockstep.common.errors import ConfigError
from lockstep.common.model import pair as pairs
from lockstep.common.system import program

if TYPE_CHECKING:
    from lockstep.common.data import Dataset
    from lockstep.common.protocol import Arrays, Backend, Task


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "pair", nargs="?", metavar="FILE.py:PAIR", help="your two networks, or PACKAGE.MODULE:NAME"
    )
    options_of.add_model(parser)
    options_of.add_seed(parser)
    options_of.add_batch_size(parser)
    options_of.add_data(parser, "the pair's example or its data, else pictures of random pixels")
    options_of.add_device(parser)
    options_of.add_output(parser, "folder of a report.json (default: none is written)")


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    model = options.pair or options.model
    if model is None:
        raise ConfigError(f"pair needs a pair of networks: {program.name()} pair {pairs.SYNTAX}")
    digest = pairs.source_digest(model)

    from lockstep.common import data
    from lockstep.common.data import of_pair, sources
    from lockstep.common.evidence import initialisation, pair_check
    from lockstep.common.report import Terminal, write_json
    from lockstep.common.report.summary import exchanged_text

    terminal = Terminal(quiet=options.quiet, to_stderr=options.json, verbose=options.verbose)
    dataset = of_pair.example(model)
    if dataset is None and options.data == "auto":
        sources.check(options.data, options.data_dir)
        dataset = of_pair.own(model) or of_pair.random_pictures(model)
    if dataset is None:
        progress = not options.quiet
        dataset = data.load(options.data, options.data_dir, terminal.line, progress, model)
    count = len(dataset.train_images)
    size = min(8, count) if options.batch_size is None else options.batch_size
    config = Config(model=model, pair=digest, batch_size=size, seed=options.seed or 0)
    config = config.resolve(count)
    backends = invocation.backends
    starts, exchanged = None, {}
    torch, flax = build(backends, config, dataset, terminal.line, options.device)
    found = pair_check.measure(torch, flax, config, dataset)
    if model not in MODELS:
        draws = own_draws(backends, model, dataset.task, str(flax.describe()["device"]))
        if found.first_difference is None:
            found = pair_check.measure(torch, flax, config, dataset, draws["torch"](config.seed))
        for side in (torch, flax):
            exchanged[side.name] = side.describe().get("exchanged", [])
        starts = initialisation.compare_starts(draws)
    terminal.line(f"One batch in float64: {size} samples of {dataset.name}")
    report = {
        "schema": 1,
        "command": program.typed(invocation.arguments),
        "model": model,
        "data": dataset.name,
        **found.to_json(),
        "exchanged": exchanged,
        "starts": None if starts is None else [dataclasses.asdict(start) for start in starts],
    }
    terminal.table(*pair_check.table(found))
    if options.out is not None:
        write_json(report, options.out)
    if not options.quiet:
        if report["first_difference"] is not None:
            terminal.located(report["first_difference"])
        if any(exchanged.values()):
            terminal.paragraph(exchanged_text(exchanged))
    if starts or (starts is not None and not options.quiet):
        terminal.print_always(initialisation.sentence(starts, len(found.tensors)))
        if starts:
            terminal.table(*initialisation.table(starts))
    terminal.print_always(pair_check.sentence(found, placed=not options.quiet))
    if options.json:
        print_json(report, invocation.stdout)
    return 0 if report["first_difference"] is None else 1


def build(
    backends: BackendPackage,
    config: Config,
    dataset: Dataset,
    log: Callable[[str], None],
    device: str,
) -> list[Backend]:
    """The backends of both frameworks in float64, on one device; see `prepare.choose_device`."""
    from lockstep.common.runs.parallel import model_info
    from lockstep.common.runs.prepare import common_device

    def built(device: str) -> dict[str, Backend]:
        task = dataset.task
        return {
            name: backends.build(config, task, device, "off", name, "float64") for name in BACKENDS
        }

    sides = built(device)
    found = {name: model_info(side) for name, side in sides.items()}
    chosen = common_device(found, log)
    if any(info.device != chosen for info in found.values()):
        sides = built(chosen)
    return list(sides.values())


def own_draws(
    backends: BackendPackage, model: str, task: Task, device: str
) -> dict[str, Callable[[int], Arrays]]:
    """By backend, a function from a seed to the initial tensors of the user's module."""
    return {
        name: functools.partial(user_module(backends, name).own_start, model, task, device)
        for name in BACKENDS
    }


def user_module(backends: BackendPackage, name: str) -> ModuleType:
    return backends.module(f"{name}_backend.user_module")
