"""Lockstep's command line: train the same network in PyTorch and in Flax, and say whether the two
runs are the same.

    python compare.py                        both backends, the quick recipe
    python compare.py --backend torch        one backend; compared with the other's record, if there
    is one python compare.py --recipe tutorial      the whole run of PyTorch's tutorial
    python compare.py --resume RUN           go on with a run that was stopped
    python compare.py --weights FILE         both start from weights of your own
    python compare.py export RUN --to torch  a trained model, for use elsewhere
    python compare.py pair FILE.py:PAIR      a network of your own, in both frameworks: are the two
    the same? python compare.py locate                 where two runs part, from their records if
    they are there python compare.py grid                   every combination of the optimizer's
    options, 200 float64 steps each python compare.py handover               runs that one backend
    begins and the other ends python compare.py faults                 known faults: which are
    found, by which lens, and where python compare.py alarms                 clean pairs of runs:
    how many are said to differ python compare.py sensitivity            from which error of the
    learning rate on, and when, it is seen python compare.py bench                  speed: both
    backends beside the tutorial's own loop, in turns python compare.py read                   two
    pages to learn from: both sources side by side, and a walk-through

Exit status: 0 the runs agree, or a single one finished with nothing to compare it with; 1 they do
not agree; 2 the request cannot be carried out; 130 or 143 it was stopped, by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import itertools
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lockstep import backends
from lockstep.common.config import (
    AUGMENTATIONS,
    BACKENDS,
    DTYPES,
    FORMATS,
    MODELS,
    RECIPES,
    SCHEDULES,
    Config,
    Recipe,
    Schedule,
)
from lockstep.common.errors import ConfigError, DataError, LockstepError, RecordError, printable
from lockstep.common.model import pair as pairs
from lockstep.common.system import environment as machine
from lockstep.common.system import interrupt

if TYPE_CHECKING:
    from lockstep.common.runs.parallel import Other
    from lockstep.common.runs.trainer import Family, Trainer

CHECKPOINT_EVERY, LONG_RUN = 1_000, 5_000  # steps between checkpoints, in runs of so many or more
SHARED = (
    "data",
    "data_dir",
    "device",
    "compile",
    "out",
    "quiet",
    "json",
)  # options of nearly all commands
MAX_WORKERS = 8  # processes of `alarms`; each holds two gigabytes
Runs = dict[str, dict[str, Any]]  # by dtype, then by backend


def main(argv: list[str] | None = None) -> int:
    """Carry out one command line and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    with interrupt.listening():
        try:
            options = parse(arguments)
            return COMMANDS[options.command](options, arguments)
        except LockstepError as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as interruption:
            print(
                f"interrupted: {interruption}" if str(interruption) else "interrupted",
                file=sys.stderr,
            )
            return interrupt.status()


# --- Parse


class Parser(argparse.ArgumentParser):
    """One line for a wrong option, in place of argparse's usage and line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {printable(message)}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "command",
        nargs="?",
        default="run",
        choices=list(COMMANDS),
        help="what to do (default: run)",
    )
    parser.add_argument(
        "subject",
        nargs="?",
        metavar="RUN|PAIR",
        help="export: the folder of a run; pair: a pair of networks",
    )
    parser.add_argument(
        "--backend", choices=["both", *BACKENDS], help="which to train (default: both)"
    )
    lines = "; ".join(f"{name}: {recipe.summary}" for name, recipe in RECIPES.items())
    parser.add_argument(
        "--recipe",
        choices=list(RECIPES),
        metavar="NAME",
        help=f"{lines} (default: --model's, or quick)",
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        default="auto",
        metavar="{auto,cifar10,digits,PATH}",
        help="auto: CIFAR-10 if found or downloadable, else scikit-learn's digits; PATH: a folder of class folders, "
        "or an .npz with x_train, y_train, x_test, y_test",
    )
    group.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="where CIFAR-10 lies, or is downloaded to"
    )

    group = parser.add_argument_group("the run (each overrides the recipe)")
    group.add_argument(
        "--model",
        metavar="{" + ",".join(MODELS) + "," + "FILE.py:PAIR}",
        help="the network: one of Lockstep's own, or a pair of your own modules",
    )
    group.add_argument("--epochs", type=int, metavar="N", help="passes over the training images")
    group.add_argument("--steps", type=int, metavar="N", help="stop after N optimizer steps")
    group.add_argument("--batch-size", type=int, metavar="N", help="images per step")
    add_switch(group, "--drop-last", "leave out an epoch's last batch where it is smaller")
    group.add_argument("--lr", type=float, metavar="X", help="learning rate")
    group.add_argument("--momentum", type=float, metavar="X", help="factor of the momentum buffer")
    group.add_argument(
        "--dampening", type=float, metavar="X", help="share of the gradient kept out of the buffer"
    )
    group.add_argument("--weight-decay", type=float, metavar="X", help="L2 penalty")
    add_switch(group, "--nesterov", "Nesterov momentum")
    add_switch(group, "--maximize", "climb instead of descending")
    group.add_argument(
        "--clip-norm", type=float, metavar="X", help="largest norm of all gradients together"
    )
    group.add_argument(
        "--label-smoothing",
        type=float,
        metavar="X",
        help="share of each label that is spread over all classes",
    )
    group.add_argument(
        "--schedule",
        metavar="KIND[:OPTION=VALUE,...]",
        help="; ".join(
            f"{kind} ({', '.join(names)})" if names else kind for kind, names in SCHEDULES.items()
        ),
    )
    group.add_argument(
        "--augment",
        choices=AUGMENTATIONS,
        help="training images: a crop of what 4 black pixels are put round, and a flip or not, at random",
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of the weights, the order of the batches, and the twins",
    )
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="start from these: a PyTorch state dict (.pt, .pth), safetensors, or the folder of an Orbax checkpoint",
    )

    group = parser.add_argument_group("the comparison")
    group.add_argument("--dtype", choices=DTYPES, help="one lens only (default: the recipe's)")
    group.add_argument(
        "--twins", type=int, metavar="M", help="twins per backend in the production lenses"
    )

    group = parser.add_argument_group("the evidence")
    group.add_argument("--only", nargs="+", metavar="FAULT", help="faults: these only")
    group.add_argument(
        "--quick", action="store_true", help="faults: one of each stage; bench: a minute"
    )
    group.add_argument("--pairs", type=int, metavar="N", help="alarms: pairs of runs (default 300)")

    group = parser.add_argument_group("for use elsewhere")
    group.add_argument(
        "--to", choices=FORMATS, help="export: as a state dict, safetensors, or an Orbax checkpoint"
    )

    group = parser.add_argument_group("where and how")
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    group.add_argument(
        "--compile",
        default="auto",
        choices=["auto", "on", "off"],
        help="torch.compile (auto: in long runs of small batches); jax.jit always",
    )
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="default: results/runs/<recipe>-<fingerprint>"
    )
    group.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with the run in this folder; with the other --backend, from where the first one stopped",
    )
    group.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="steps between checkpoints; 0: only where a run is stopped (default: 1000 in runs of 5000 or more)",
    )
    group.add_argument(
        "--log-every", type=int, default=2000, metavar="N", help="steps between log lines; 0: none"
    )
    group.add_argument("--quiet", action="store_true", help="the verdict only")
    group.add_argument(
        "--json",
        action="store_true",
        help="the report on standard output, all else on standard error",
    )
    group.add_argument(
        "--tensorboard",
        type=Path,
        metavar="DIR",
        help="losses, gaps and images for TensorBoard, too",
    )
    options = parser.parse_intermixed_args(arguments)  # RUN may stand after options, too
    for name, given, takers in (
        ("RUN", options.subject, ("export", "pair")),
        ("--to", options.to, ("export",)),
    ):
        if given is not None and options.command not in takers:
            raise ConfigError(f"{options.command} takes no {name} ({given}), {takers[0]} does")
    return options


def add_switch(group: Any, name: str, text: str) -> None:
    group.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=text)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe, with what the options override."""
    options.recipe = options.recipe or (options.model if options.model in RECIPES else "quick")
    recipe = RECIPES[options.recipe]
    given = {f.name: getattr(options, f.name, None) for f in dataclasses.fields(Config)}
    if options.model is not None:
        given["pair"] = pairs.source(options.model)
    given = {
        name: value for name, value in given.items() if value is not None and name != "weights"
    }  # not read yet
    if options.schedule is not None:
        given["schedule"] = Schedule.parse(options.schedule)
    if options.epochs is not None and options.steps is not None:
        raise ConfigError("--epochs and --steps both say how long the run is: give one of them")
    if options.epochs is not None:
        given["steps"] = None  # --epochs alone overrides a recipe's number of steps
    twins = recipe.twins if options.twins is None else options.twins
    dtypes = recipe.dtypes if options.dtype is None else (options.dtype,)
    if twins < 0 or (twins == 0 and dtypes != ("float64",)):
        raise ConfigError(
            "--twins must be 1 or more: without twins nothing says how far rounding may take two runs"
        )
    options.backend = options.backend or "both"
    return dataclasses.replace(
        recipe, config=dataclasses.replace(recipe.config, **given), dtypes=dtypes, twins=twins
    )


# --- Run


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Train, compare, report."""
    for name in ("log_every", "checkpoint_every"):
        if (getattr(options, name) or 0) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be 0 or more")
    plan = resumed(options) if options.resume is not None else None
    recipe = (
        recipe_of(options) if plan is None else plan.restored()
    )  # before anything slow: what is wrong is said now

    from lockstep.common import report as reports
    from lockstep.common.runs import parallel
    from lockstep.common.system import storage

    if options.tensorboard is not None:
        reports.check_tensorboard()
        storage.check_writable(options.tensorboard, "--tensorboard")
    names = BACKENDS if options.backend == "both" else (options.backend,)
    with parallel.Other(
        parallel.likely(recipe.config, names, options.device), backends.load
    ) as other:
        return train_and_report(options, recipe, plan, names, other, arguments)


def train_and_report(
    options: argparse.Namespace,
    recipe: Recipe,
    plan: Any,
    names: Sequence[str],
    other: Other,
    arguments: list[str],
) -> int:
    """Everything slow.

    Args:
        plan: of the run to go on with, or None.
        other: a process to train in beside this one, if there is to be one.
    """
    from lockstep.common import data
    from lockstep.common.report import Terminal
    from lockstep.common.runs import request as plans
    from lockstep.common.runs.trainer import Interrupted, Trainer, how_to_go_on, other_runs
    from lockstep.common.system import storage

    terminal = Terminal(quiet=options.quiet, aside=options.json)
    dataset = data.load(options.data, options.data_dir, terminal.line, progress=not options.quiet)
    if plan is not None and plan.digest != dataset.digest:
        raise DataError(
            f"{dataset.name} is not the data that {options.resume} was begun on: name it with --data"
        )
    config = recipe.config.resolve(len(dataset.train_images))
    device = choose_device(options, config, dataset, names, terminal, other)
    initial_weights = None
    if options.weights is not None:
        initial_weights, config = start_from(options.weights, config, dataset, names[0], device)
        if plan is not None and plan.config != config.to_json():
            raise DataError(
                f"{options.weights} holds other weights than those {options.resume} began with: restore it"
            )
    folder = options.resume or options.out
    folder = (
        folder or Path("results/runs") / f"{options.recipe}-{config.fingerprint(dataset.digest)}"
    )
    with storage.claimed(folder):
        others = [name for name in BACKENDS if name not in names or options.command == "locate"]
        families = other_runs(folder, recipe.dtypes, others, config, dataset, terminal.line)
        trainer = Trainer(
            folder,
            config,
            dataset,
            functools.partial(
                backends.build, config, len(dataset.classes), device, options.compile
            ),
            terminal,
            initial_weights,
            options.log_every,
            checkpoint_every(options, config),
            resumed=plan is not None,
            takes_over=plan is not None and options.backend != "both",
        )
        if plan is None and options.command == "run":
            trainer.refuse_to_lose(names, recipe.dtypes)
            plans.write(make_plan(options, recipe, config, dataset), folder)
        try:
            return train_and_compare(
                trainer, options, recipe, names, families, device, other, arguments
            )
        except KeyboardInterrupt as interruption:
            raise Interrupted(
                "; ".join(filter(None, [str(interruption), how_to_go_on(folder)]))
            ) from None


def train_and_compare(
    trainer: Trainer,
    options: argparse.Namespace,
    recipe: Recipe,
    names: Sequence[str],
    families: dict[str, Family],
    device: str,
    other: Other,
    arguments: list[str],
) -> int:
    """Everything that is written to the run's folder."""
    from lockstep.common import data
    from lockstep.common import report as reports
    from lockstep.common.runs import parallel
    from lockstep.common.runs.trainer import Interrupted, explained, how_to_go_on, runs_and_twins
    from lockstep.common.verdict import compare as parity
    from lockstep.common.verdict import locate

    terminal, dataset, config, folder = (
        trainer.terminal,
        trainer.dataset,
        trainer.config,
        trainer.folder,
    )
    lenses = []
    cut_short = None
    members = {
        dtype: [None, *range(1, 1 + (0 if dtype == "float64" else recipe.twins))]
        for dtype in families
    }
    elsewhere = parallel.choose(trainer, names, device, itertools.chain(*families.values()))
    training = parallel.Beside(trainer, other, elsewhere, members)
    try:
        with training:
            if (
                training.name is not None
            ):  # this process trains all of its runs before it waits for the other one
                for dtype, family in families.items():
                    family |= {
                        name: training.train(name, dtype) for name in names if name != training.name
                    }
                with interrupt.patient():
                    importlib.import_module(
                        "matplotlib.figure"
                    )  # half a second, in which the other one may be done
            for dtype, family in families.items():
                for name in names:
                    if name not in family:
                        family[name] = training.train(name, dtype)
                families[dtype] = {
                    name: family[name] for name in BACKENDS if name in family
                }  # torch first
                more, begin = trainer.more(dtype, names), trainer.begin(dtype, names)
                lenses.append(parity.judge(families[dtype], more, dataset.test_labels, begin))
        if interrupt.requested():
            raise Interrupted("it was stopped after the last run")
    except Interrupted as interruption:  # what is finished is reported
        cut_short = str(interruption)
        families = {dtype: training.finished(dtype) | family for dtype, family in families.items()}
        families = {
            dtype: {n: family[n] for n in BACKENDS if n in family}
            for dtype, family in families.items()
        }
        families = {dtype: family for dtype, family in families.items() if family}
        for family in list(families.values())[len(lenses) :]:
            lenses.append(parity.judge(family, lambda name, twins: [], dataset.test_labels))
        if not lenses:
            raise

    runs, twins = runs_and_twins(families)
    apart = next(
        (
            lens
            for lens in lenses
            if lens["verdict"] == "disagree" and parity.broken_off(lens) is None
        ),
        None,
    )
    if (
        apart is not None and cut_short is None
    ):  # float64 comes first: what shows there shows most sharply
        terminal.line(f"Looking for where the {apart['dtype']} runs part")
        records = runs[apart["dtype"]]
        with explained(" and ".join(records)):
            apart["located"] = locate.locate(
                apart,
                records,
                config,
                dataset,
                lambda name: trainer.build(name, apart["dtype"]),
                weights=trainer.weights,
            )
    report = make_report(options.recipe, config, dataset, arguments, runs, lenses, cut_short)
    sample = next(
        data.batch_indices(
            dataclasses.replace(config, batch_size=32, steps=1), len(dataset.train_images)
        )
    )
    reports.write_json(report, folder)
    other.tell("draw", report, sample)  # the pictures, beside the page
    reports.write_report_page(folder, report, runs, dataset, twins, sample)
    if other.told()[0] != "drawn":
        reports.write_pictures(folder, report, runs, dataset, twins, sample)
    if options.tensorboard is not None:
        reports.write_tensorboard(options.tensorboard, report, runs, twins, dataset, sample)
    terminal.verdict(report)
    terminal.line(f"Report, pictures and records: {folder}")
    if options.json:
        print_json(report)
    if cut_short is not None:
        print(f"interrupted: {how_to_go_on(folder)}", file=sys.stderr)
        return interrupt.status()
    return 1 if report["verdict"] == "disagree" else 0


def resumed(options: argparse.Namespace) -> Any:
    """The plan of the run to go on with; `options` get what it says, where the command line says
    nothing.

    Raises:
        ConfigError: for an option that a run cannot change on its way.
        RecordError: if there is no such run.
    """
    from lockstep.common.runs import request as plans

    if options.command != "run" or options.out is not None:
        raise ConfigError(
            "--resume is an option of run, which goes on in the run's own folder, without --out"
        )
    changeable = ("resume", "backend", "log_every", "tensorboard", "checkpoint_every")
    refuse(options, "a run goes on as it was begun", *changeable)
    plan = plans.read(options.resume)
    default = vars(parse([]))
    for name in ("backend", "data", "device", "compile", "checkpoint_every", "recipe"):
        if getattr(options, name) == default[name]:
            setattr(options, name, getattr(plan, name))
    options.weights = None if plan.weights is None else Path(plan.weights)
    model = plan.config["model"]
    if plan.config.get("pair") != pairs.source(model):
        raise DataError(
            f"{model} has changed since {options.resume} was begun: restore it, or start the run again"
        )
    return plan


def make_plan(options: argparse.Namespace, recipe: Recipe, config: Config, dataset: Any) -> Any:
    """What `--resume` needs to know of a run that begins."""
    from lockstep.common.runs.request import Plan

    return Plan(
        recipe=options.recipe,
        config=config.to_json(),
        dtypes=recipe.dtypes,
        twins=recipe.twins,
        backend=options.backend,
        data=options.data,
        digest=dataset.digest,
        device=options.device,
        compile=options.compile,
        checkpoint_every=checkpoint_every(options, config),
        weights=None if options.weights is None else str(options.weights.absolute()),
    )


def checkpoint_every(options: argparse.Namespace, config: Config) -> int:
    """Steps between two checkpoints; 0: none but where a run is stopped."""
    if options.checkpoint_every is not None:
        return options.checkpoint_every
    return CHECKPOINT_EVERY if config.total_steps >= LONG_RUN else 0


def choose_device(
    options: argparse.Namespace,
    config: Config,
    dataset: Any,
    names: Sequence[str],
    terminal: Any,
    other: Other | None = None,
) -> str:
    """The device for all of `names`: "auto" means the GPU only if each of them finds it."""
    from lockstep.common.runs import parallel

    build = functools.partial(backends.build, config, len(dataset.classes), options.device, "off")
    here = {name: functools.partial(parallel.view, build, name) for name in names}
    there = {
        name: other.view(build, name) for name in names if other and name == parallel.NAME
    }  # at the same time
    views = {name: look() for name, look in (here | there).items()}
    if len(views) == 2:
        own = {name: view.own_names for name, view in views.items()}
        pairs.check_same(views["torch"].shapes, views["flax"].shapes, own)
        pairs.check_dropout(views["torch"].dropouts, views["flax"].dropouts)
    found = {name: view.device for name, view in views.items()}
    if len(set(found.values())) > 1:
        terminal.line(
            f"Not all find a GPU ({', '.join(f'{n}: {d}' for n, d in found.items())}): both use the CPU"
        )
        return "cpu"
    return next(iter(found.values()))


def start_from(
    path: Path, config: Config, dataset: Any, name: str, device: str
) -> tuple[dict[str, Any], Config]:
    """The user's own weights, canonical, and the configuration of the run that starts from them.

    Raises:
        DataError: if they are not those of the network that is trained.
    """
    from lockstep.backends import weight_files
    from lockstep.common.model import initial_weights

    network = backends.load(name)(config, len(dataset.classes), "float32", device, "off")
    found = weight_files.read_weights(path, network.shapes(), config.model)
    return found, dataclasses.replace(config, weights=initial_weights.digest(found))


def export(options: argparse.Namespace, arguments: list[str]) -> int:
    """The trained weights of a run, for use elsewhere."""
    refuse(
        options,
        "it writes what was trained",
        "subject",
        "to",
        "backend",
        "dtype",
        shared=("out", "quiet"),
    )
    if options.subject is None or options.to is None:
        raise ConfigError(
            "export needs a run's folder and a format: compare.py export RUN --to torch"
        )

    from lockstep.backends import weight_files
    from lockstep.common.runs import record

    taken = trained(Path(options.subject), options.backend, options.dtype)
    ending = {"torch": ".pt", "safetensors": "-weights.safetensors", "orbax": "-orbax"}[options.to]
    path = options.out or taken.with_name(taken.stem + ending)
    endings = weight_files.ENDINGS[options.to]
    if endings and path.suffix.lower() not in endings:
        raise ConfigError(
            f"--out {path} must end in {' or '.join(endings)}, by which its format is known again"
        )
    if path.exists() and path.samefile(taken):
        raise ConfigError(f"--out {path} is the record itself: choose another name")
    found = record.read(taken)
    if found.config.get("pair") != pairs.source(found.config["model"]):
        raise DataError(
            f"{found.config['model']} has changed since {taken} was trained: restore it"
        )
    weight_files.write_weights(path, found.final, options.to, found.config["model"])
    loading = weight_files.LOADING[options.to].format(
        path=str(path.absolute() if options.to == "orbax" else path)
    )
    print(printable(f"{path}: the trained weights of {taken.name}; load them with {loading}"))
    return 0


def trained(folder: Path, backend: str | None, dtype: str | None) -> Path:
    """The first record of a run, torch's before flax's, and of the more precise lens first.

    Raises:
        RecordError: if there is none.
    """
    from lockstep.common.runs import record

    names = BACKENDS if backend in (None, "both") else (backend,)
    stems = [
        record.file_stem(name, lens) for name in names for lens in ((dtype,) if dtype else DTYPES)
    ]
    found = [path for stem in stems if os.path.exists(path := folder / f"{stem}.safetensors")]
    if not found:
        raise RecordError(
            f"{folder} holds no record of a finished run ({stems[0]}.safetensors or the like): give the folder of one"
        )
    return found[0]


def pair(options: argparse.Namespace, arguments: list[str]) -> int:
    """Whether two networks are one: names, shapes, and what both compute of one batch, in
    float64."""
    refuse(options, "it trains nothing", "subject", "model", "seed", "batch_size")
    model = options.subject or options.model
    if model is None:
        raise ConfigError(f"pair needs a pair of networks: compare.py pair {pairs.FORM}")
    size = 8 if options.batch_size is None else options.batch_size
    config = Config(model=model, pair=pairs.source(model), batch_size=size, seed=options.seed or 0)

    from lockstep.common import data
    from lockstep.common.evidence import pair_check as study
    from lockstep.common.report import Terminal, write_json

    terminal = Terminal(quiet=options.quiet, aside=options.json)
    dataset = data.load(options.data, options.data_dir, terminal.line, progress=not options.quiet)
    config = config.resolve(len(dataset.train_images))
    device = choose_device(options, config, dataset, BACKENDS, terminal)
    torch, flax = (
        backends.load(name)(config, len(dataset.classes), "float64", device, "off")
        for name in BACKENDS
    )
    report = study.measure(torch, flax, config, dataset)
    report = {"schema": 1, "command": ["compare.py", *arguments], "model": model, **report}
    terminal.table(*study.table(report))
    if options.out is not None:
        write_json(report, options.out)
    if report["first_difference"] is not None:
        terminal.located(report["first_difference"])
    terminal.conclusion(study.sentence(report))
    if options.json:
        print_json(report)
    return 0 if report["first_difference"] is None else 1


def grid(options: argparse.Namespace, arguments: list[str]) -> int:
    """Both backends through every legal combination of the optimizer's options."""
    refuse(options, "it goes through all combinations itself", "steps")

    from lockstep.common.evidence import optimizer_grid as options_grid

    configs = list(
        options_grid.combinations(options_grid.STEPS if options.steps is None else options.steps)
    )
    study = Study(options, arguments, folder="grid")
    dataset = study.load(options.data)
    configs = [config.resolve(len(dataset.train_images)) for config in configs]
    build = functools.partial(study.build, dtype="float64")
    rows = []
    with study.terminal.progress("combinations", len(configs)) as advance:
        for config in configs:
            rows.append(options_grid.measure(config, dataset, build))
            advance(1, rows[-1]["last_loss"])
    facts = {"steps": configs[0].steps, "bound": options_grid.GRID_BOUND}
    agree = all(row["agrees"] for row in rows)
    study.report(facts, rows, options_grid.table(rows))
    study.terminal.line(f"{len(rows)} combinations: {'all agree' if agree else 'NOT all agree'}.")
    return 0 if agree else 1


def handover(options: argparse.Namespace, arguments: list[str]) -> int:
    """Runs that one backend begins and the other ends, against runs that are not interrupted."""
    refuse(options, "it has its own configurations", "steps")

    import tempfile

    from lockstep.common.evidence import optimizer_grid, shortened

    steps = optimizer_grid.HANDOVER_STEPS if options.steps is None else options.steps
    if steps < optimizer_grid.HANDOVER_LEAST:
        raise ConfigError(
            f"--steps must be {optimizer_grid.HANDOVER_LEAST} or more: shorter runs are one call of the program"
        )
    configs = list(optimizer_grid.handover_configs(steps))
    study = Study(options, arguments, folder="handover")
    dataset = shortened(study.load(options.data), optimizer_grid.HANDOVER_TEST_IMAGES)
    configs = [config.resolve(len(dataset.train_images)) for config in configs]
    build = functools.partial(study.build, dtype="float64")
    rows = []
    with (
        study.terminal.progress("configurations", len(configs)) as advance,
        tempfile.TemporaryDirectory() as folder,
    ):
        for config in configs:
            rows.append(
                optimizer_grid.hand_over(
                    config, dataset, build, Path(folder), every=max(1, steps // 4)
                )
            )
            advance(1, math.nan)
    handovers = 2 * sum(len(row["places"]) for row in rows)
    worst = max(row[key] for row in rows for key in ("torch to flax", "flax to torch"))
    agree = all(row["agrees"] for row in rows)
    facts = {
        "steps": steps,
        "handovers": handovers,
        "largest_gap": worst,
        "bound": optimizer_grid.GRID_BOUND,
    }
    study.report(facts, rows, optimizer_grid.handover_table(rows))
    said = f"equal those that were not interrupted, within {worst:.1e} (bound {optimizer_grid.GRID_BOUND:g})"
    study.terminal.line(
        f"{handovers} runs that changed hands {said if agree else 'do NOT all ' + said}."
    )
    return 0 if agree else 1


def faults(options: argparse.Namespace, arguments: list[str]) -> int:
    """Every known fault, or those asked for, put into the Flax side: is it found, and where?"""
    refuse(options, "each fault has the run in which it shows", "only", "twins", "dtype", "quick")

    from lockstep.backends import faults as catalogue
    from lockstep.common.evidence import faults as matrix
    from lockstep.common.evidence import plots, shortened

    chosen = [catalogue.named(name) for name in options.only or ()] or list(catalogue.FAULTS)
    if options.quick:
        chosen = [fault for fault in chosen if fault.name in catalogue.QUICK]
    study = Study(options, arguments, folder="faults")
    dataset = shortened(study.load(options.data), matrix.TEST_IMAGES)
    if (dataset.train_images == dataset.train_images[..., :1]).all():
        left_out = [fault.name for fault in chosen if fault.needs_colour]
        chosen = [fault for fault in chosen if not fault.needs_colour]
        if left_out:
            study.terminal.line(f"Left out, for {dataset.name} is grey: {', '.join(left_out)}")
        if not chosen:
            raise ConfigError(
                "there is no fault left to run: choose other ones, or data in colour (--data cifar10)"
            )
    lenses = matrix.LENSES if options.dtype is None else (options.dtype,)
    twins = 2 if options.twins is None else options.twins
    cache: dict[Any, Any] = {}
    rows = []
    with study.terminal.progress("faults", len(chosen)) as advance:
        for fault in chosen:
            rows.append(
                matrix.measure(
                    fault, dataset, study.build, catalogue.injected, cache, lenses, twins
                )
            )
            advance(1, math.nan)
    summary = matrix.summary(rows)
    study.report(
        {"summary": summary},
        rows,
        matrix.table(rows),
        draw=functools.partial(plots.draw_faults, rows),
    )
    if options.only:
        for line in (line for row in rows for line in matrix.described(row)):
            study.terminal.line(line)
    study.terminal.line(matrix.sentence(summary))
    return 0 if not summary["missed"] else 1


def alarms(options: argparse.Namespace, arguments: list[str]) -> int:
    """Clean pairs of runs: how often are two correct programs said to differ?"""
    refuse(options, "it has its own configurations", "pairs", "seed", "dtype", "twins", "model")

    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from lockstep.common.evidence import false_alarms as clean
    from lockstep.common.evidence import plots
    from lockstep.common.report.terminal import counted
    from lockstep.common.runs.trainer import explained

    pairs = clean.PAIRS if options.pairs is None else options.pairs
    if pairs < 1:
        raise ConfigError("--pairs must be 1 or more")
    model = options.model or "net"
    cells = every = clean.cells(model)
    if not cells:
        raise ConfigError(
            f"alarms has no configurations of {model}: choose one of {', '.join(MODELS)}"
        )
    study = Study(options, arguments, folder="alarms" if model == "net" else f"alarms-{model}")
    for name in dict.fromkeys(cell.data for cell in every):
        try:
            study.load(name)
        except DataError as error:
            cells = [cell for cell in cells if cell.data != name]
            if not cells:
                raise
            study.terminal.line(
                f"Left out, for want of {name}: {len(every) - len(cells)} configurations ({error})"
            )
    first = clean.MEASUREMENT_SEEDS[0] if options.seed is None else options.seed
    shares = list(clean.shares(cells, pairs, first))
    worker = 1 if options.device == "cuda" else min(len(shares), os.cpu_count() or 1, MAX_WORKERS)
    pool = ProcessPoolExecutor(worker, multiprocessing.get_context("spawn"))
    rows = []
    with explained("a worker"), study.terminal.progress("pairs", pairs) as advance, pool:
        for found in pool.map(clean_pairs, [options] * len(shares), *zip(*shares, strict=True)):
            rows += found
            advance(len(found), math.nan)
    summary = clean.summary(rows)
    draw = functools.partial(plots.draw_alarms, summary)
    study.report({"summary": summary, "first_seed": first}, rows, clean.table(rows), draw)
    false = sum(line["alarms"] for line in summary if line["rule"] == clean.LOCKSTEP)
    clean_pairs_seen = f"{counted(len(rows), 'clean pair')}, over all lenses"
    study.terminal.line(f"{counted(false, 'false alarm')} of Lockstep in {clean_pairs_seen}.")
    return 0


def clean_pairs(
    options: argparse.Namespace, cell: Any, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """The rows of one configuration, in a process of its own."""
    from lockstep.common.evidence import false_alarms as clean

    study = Study(options, [], folder="alarms", quiet=True)
    lenses = DTYPES if options.dtype is None else (options.dtype,)
    twins = 2 if options.twins is None else options.twins
    return list(
        clean.measure(cell, seeds, {cell.data: study.load(cell.data)}, study.build, lenses, twins)
    )


def bench(options: argparse.Namespace, arguments: list[str]) -> int:
    """How fast: the tutorial's loop and both backends, single steps and fused, in turns."""
    refuse(
        options, "it measures each way to train as it is", "batch_size", "dtype", "seed", "quick"
    )
    if (options.dtype or "").startswith("mixed"):
        raise ConfigError(
            "bench takes no mixed precision: the tutorial's loop, which it measures against, has none"
        )
    if options.compile != "auto":
        raise ConfigError(
            "bench takes no --compile: it measures what is compiled beside what is not"
        )
    config = Config(
        batch_size=4 if options.batch_size is None else options.batch_size, seed=options.seed or 0
    )

    import tempfile

    from lockstep.backends.benchmark import loops, worker
    from lockstep.common.evidence import bench as speed
    from lockstep.common.evidence import plots

    busy, found = speed.load(), machine.describe()
    device, card = worker.find_device(options.device)
    where = card or f"{found['processor']}, {found['cores']} cores"
    study = Study(options, arguments, folder=f"bench/{speed.slug(where)}")
    dataset = study.load(options.data)
    images = len(dataset.train_images)
    config.resolve(images)  # a batch that is larger than the data is refused
    if busy is not None and busy > found["cores"] / 4:
        study.terminal.line(
            f"This machine is busy (load {busy:.1f}, {found['cores']} cores): what is measured is, too"
        )
    plan = speed.make_plan(images, options.batch_size, options.quick)
    dtype = options.dtype or "float32"
    with tempfile.TemporaryDirectory(
        prefix="lockstep-bench-", ignore_cleanup_errors=True
    ) as folder:
        loops.write_images(dataset.train_images, dataset.train_labels, Path(folder))

        def start(path: str, batch_size: int, images: int, cache: str | None) -> Any:
            classes = len(dataset.classes)
            job = loops.Job(
                path, batch_size, images, classes, dtype, device, config.seed, Path(folder)
            )
            return worker.start(job, cache)

        with study.terminal.progress("turns", plan.turns) as advance:
            rows = speed.measure(plan, start, lambda turns: advance(turns, math.nan))
    lines = speed.summary(rows)
    facts = {
        "dtype": dtype,
        "device": device,
        "card": card,
        "load": busy,
        "plan": dataclasses.asdict(plan),
    }
    facts["summary"] = lines
    draw = functools.partial(plots.draw_bench, lines, f"{where}, {dtype}")
    study.report(facts, rows, speed.speed_table(lines), draw)
    study.terminal.table(*speed.start_table(lines))
    if plan.growth:
        study.terminal.table(*speed.growth_table(lines))
    study.terminal.line(speed.sentence(lines))
    return 0


def read(options: argparse.Namespace, arguments: list[str]) -> int:
    """Two pages to learn from: the two backends side by side, and a walk through what SGD does."""
    refuse(options, "it reads the sources, and runs a few steps of its own")

    from lockstep.backends import faults as catalogue
    from lockstep.common.learn import read_report, walk_through, write_read_page, write_walk_page

    study = Study(options, arguments, folder="read")
    root = Path(__file__).resolve().parents[2]
    path = (
        root / "results" / "faults" / "report.json"
    )  # for what goes wrong where a difference is missed
    report = read_report(path)
    dataset = study.load("digits" if options.data == "auto" else options.data)
    write_read_page(
        study.folder / "read.html", root, report, [fault.name for fault in catalogue.FAULTS]
    )
    walked = walk_through(study.build, dataset, root, study.terminal.line)
    write_walk_page(study.folder / "walk.html", walked)
    study.terminal.line(f"Pages: {study.folder}")
    return 0


def sensitivity(options: argparse.Namespace, arguments: list[str]) -> int:
    """A learning rate that is wrong by a tenth, a hundredth, ...: when does each lens see it?"""
    refuse(options, "it has the quick recipe's configuration", "steps", "twins")

    from lockstep.common.evidence import plots
    from lockstep.common.evidence import sensitivity as curve

    study = Study(options, arguments, folder="sensitivity")
    dataset = study.load(options.data)
    steps = curve.STEPS if options.steps is None else options.steps
    twins = 2 if options.twins is None else options.twins
    rows = []
    with study.terminal.progress("errors", len(curve.ERRORS)) as advance:
        for row in curve.measure(dataset, study.build, steps, twins=twins):
            rows.append(row)
            advance(1, math.nan)
    study.report(
        {"steps": steps},
        rows,
        curve.table(rows),
        draw=functools.partial(plots.draw_sensitivity, rows),
    )
    return 0


class Study:
    """What the commands that make evidence share: data, device, backends, and a report of rows."""

    def __init__(
        self, options: argparse.Namespace, arguments: list[str], folder: str, quiet: bool = False
    ) -> None:
        from lockstep.common.report import Terminal
        from lockstep.common.system.storage import check_writable

        self.options, self.arguments = options, arguments
        self.folder = options.out or Path("results") / folder
        self.terminal = Terminal(quiet=quiet or options.quiet, aside=options.json)
        self.datasets: list[Any] = []
        self.device: str | None = None
        check_writable(self.folder)

    def load(self, name: str) -> Any:
        from lockstep.common import data

        terminal = self.terminal
        self.datasets.append(
            data.load(name, self.options.data_dir, terminal.line, progress=not terminal.quiet)
        )
        return self.datasets[-1]

    def build(self, name: str, config: Config, dtype: str) -> Any:
        classes = len(self.datasets[-1].classes)
        if self.device is None:
            self.device = choose_device(
                self.options, config, self.datasets[-1], BACKENDS, self.terminal
            )
        return backends.load(name)(config, classes, dtype, self.device, self.options.compile)

    def report(self, facts: dict[str, Any], rows: list[Any], table: Any, draw: Any = None) -> None:
        from lockstep.common.report import write_json

        report = {
            "schema": 1,
            "command": ["compare.py", *self.arguments],
            "data": [{"name": dataset.name, "digest": dataset.digest} for dataset in self.datasets],
            "environment": machine.describe(),
            **facts,
            "rows": rows,
        }
        write_json(report, self.folder)
        if draw is not None:
            draw(self.folder / f"{self.options.command}.png")
        self.terminal.table(*table)
        self.terminal.line(f"Report: {self.folder}")
        if self.options.json:
            print_json(report)


def print_json(report: dict[str, Any]) -> None:
    """The report, as its file holds it, on standard output."""
    from lockstep.common.report import to_json

    print(to_json(report), end="", flush=True)


def refuse(
    options: argparse.Namespace, why: str, *used: str, shared: Sequence[str] = SHARED
) -> None:
    """Raise ConfigError if an option was given that the command does not use."""
    used = (*used, *shared, "command")
    default = vars(parse([options.command]))
    given = [
        name for name, value in vars(options).items() if value != default[name] and name not in used
    ]
    if given:
        raise ConfigError(f"{options.command} takes no --{given[0].replace('_', '-')}: {why}")


def make_report(
    recipe: str,
    config: Config,
    dataset: Any,
    arguments: list[str],
    runs: Runs,
    lenses: list[dict[str, Any]],
    cut_short: str | None,
) -> dict[str, Any]:
    """report.json, as a dictionary.

    Args:
        cut_short: where the run was interrupted, if it was.
    """
    from lockstep.common.runs import training as train

    verdicts = {lens["verdict"] for lens in lenses}
    environment = {
        name: r.environment for by_backend in runs.values() for name, r in by_backend.items()
    }
    return {
        "schema": 1,
        "verdict": next(v for v in ("disagree", "agree", "single") if v in verdicts),
        "cut_short": cut_short,
        "command": ["compare.py", *arguments],
        "recipe": recipe,
        "config": config.to_json(),
        "environment": environment | {"machine": machine.describe()},
        "data": train.describe(config, dataset),
        "lenses": lenses,
    }


COMMANDS = {
    "run": run,
    "export": export,
    "pair": pair,
    "locate": run,
    "grid": grid,
    "handover": handover,
    "faults": faults,
    "alarms": alarms,
    "sensitivity": sensitivity,
    "bench": bench,
    "read": read,
}


def run_and_exit() -> NoReturn:
    """The whole program: carry out the command line, then end the process."""
    machine.collect_seldom()
    machine.leave(main())
