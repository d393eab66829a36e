"""Lockstep's command line: train the same network in PyTorch and in Flax, and say whether the two runs are the same.

    python compare.py                        both backends, the quick recipe
    python compare.py --backend torch        one backend; compared with the other's record, if there is one
    python compare.py --recipe tutorial      the whole run of PyTorch's tutorial
    python compare.py grid                   every combination of the optimizer's options, 200 float64 steps each

Exit status: 0 the runs agree, or a single one finished with nothing to compare it with; 1 they do not agree; 2 the
request cannot be carried out.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, NoReturn

import backends
from common.config import BACKENDS, DTYPES, RECIPES, SCHEDULES, Config, Recipe, Schedule
from common.errors import LockstepError, RecordError

Runs = dict[str, dict[str, Any]]  # by dtype, then by backend


def main(argv: list[str] | None = None) -> int:
    """Carry out one command line and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options = parse(arguments)
        return {"run": run, "grid": grid}[options.command](options, arguments)
    except LockstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the records that were finished are kept", file=sys.stderr)
        return 130


# --- Parse


class Parser(argparse.ArgumentParser):
    """One line for a wrong option, in place of argparse's usage and line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="run", choices=["run", "grid"], help="what to do (default: run)")
    parser.add_argument("--backend", default="both", choices=["both", *BACKENDS], help="which to train")
    lines = "; ".join(f"{name}: {recipe.summary}" for name, recipe in RECIPES.items())
    parser.add_argument("--recipe", default="quick", choices=list(RECIPES), metavar="NAME", help=lines)

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        default="auto",
        metavar="{auto,cifar10,digits,PATH}",
        help="auto: CIFAR-10 if found or downloadable, else scikit-learn's digits; PATH: a folder of class folders, "
        "or an .npz with x_train, y_train, x_test, y_test",
    )
    group.add_argument("--data-dir", type=Path, metavar="DIR", help="where CIFAR-10 lies, or is downloaded to")

    group = parser.add_argument_group("the run (each overrides the recipe)")
    group.add_argument("--epochs", type=int, metavar="N", help="passes over the training images")
    group.add_argument("--steps", type=int, metavar="N", help="stop after N optimizer steps")
    group.add_argument("--batch-size", type=int, metavar="N", help="images per step")
    add_switch(group, "--drop-last", "leave out an epoch's last batch where it is smaller")
    group.add_argument("--lr", type=float, metavar="X", help="learning rate")
    group.add_argument("--momentum", type=float, metavar="X", help="factor of the momentum buffer")
    group.add_argument("--dampening", type=float, metavar="X", help="share of the gradient kept out of the buffer")
    group.add_argument("--weight-decay", type=float, metavar="X", help="L2 penalty")
    add_switch(group, "--nesterov", "Nesterov momentum")
    add_switch(group, "--maximize", "climb instead of descending")
    group.add_argument(
        "--schedule",
        metavar="KIND[:OPTION=VALUE,...]",
        help="; ".join(f"{kind} ({', '.join(names)})" if names else kind for kind, names in SCHEDULES.items()),
    )
    group.add_argument("--seed", type=int, metavar="N", help="of the weights, the order of the batches, and the twins")

    group = parser.add_argument_group("the comparison")
    group.add_argument("--dtype", choices=DTYPES, help="one lens only (default: the recipe's)")
    group.add_argument("--twins", type=int, metavar="M", help="twins per backend in the production lenses")

    group = parser.add_argument_group("where and how")
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    group.add_argument(
        "--compile",
        default="auto",
        choices=["auto", "on", "off"],
        help="torch.compile (auto: on a GPU); jax.jit always",
    )
    group.add_argument("--out", type=Path, metavar="DIR", help="default: results/runs/<recipe>-<fingerprint>")
    group.add_argument("--log-every", type=int, default=2000, metavar="N", help="steps between log lines; 0: none")
    group.add_argument("--quiet", action="store_true", help="the verdict only")
    return parser.parse_args(arguments)


def add_switch(group: Any, name: str, text: str) -> None:
    group.add_argument(name, action=argparse.BooleanOptionalAction, default=None, help=text)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe, with what the options override."""
    recipe = RECIPES[options.recipe]
    given = {f.name: getattr(options, f.name, None) for f in dataclasses.fields(Config)}
    given = {name: value for name, value in given.items() if value is not None}
    if options.schedule is not None:
        given["schedule"] = Schedule.parse(options.schedule)
    if options.epochs is not None and options.steps is None:
        given["steps"] = None  # --epochs alone overrides a recipe's number of steps
    twins = recipe.twins if options.twins is None else options.twins
    dtypes = recipe.dtypes if options.dtype is None else (options.dtype,)
    if twins < 0 or (twins == 0 and dtypes != ("float64",)):
        raise LockstepError("--twins must be 1 or more: without twins nothing says how far rounding may take two runs")
    if options.log_every < 0:
        raise LockstepError("--log-every must be 0 or more")
    return dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, **given), dtypes=dtypes, twins=twins)


# --- Run


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Train, compare, report."""
    recipe = recipe_of(options)  # before anything slow: a wrong option is answered at once

    from common import data
    from common.report import Terminal, write_json, write_pictures

    terminal = Terminal(quiet=options.quiet)
    dataset = data.load(options.data, options.data_dir, terminal.line, progress=not options.quiet)
    config = recipe.config.resolve(len(dataset.train_images))
    folder = options.out or Path("results/runs") / f"{options.recipe}-{config.fingerprint(dataset.digest)}"
    check_writable(folder)

    names = BACKENDS if options.backend == "both" else (options.backend,)
    runs: Runs = {dtype: {} for dtype in recipe.dtypes}
    twins: Runs = {dtype: {} for dtype in recipe.dtypes}
    if options.backend != "both":
        other = next(name for name in BACKENDS if name != options.backend)
        for dtype in recipe.dtypes:  # before training: a damaged record is reported at once
            find_record(folder, other, dtype, config, dataset, terminal, runs, twins)
    for dtype in recipe.dtypes:
        for name in names:
            train_one(name, dtype, recipe.twins, config, dataset, options, folder, terminal, runs, twins)

    report = make_report(options.recipe, config, dataset, arguments, runs, twins)
    sample = next(data.batch_indices(dataclasses.replace(config, batch_size=32, steps=1), len(dataset.train_images)))
    write_json(report, folder)
    write_pictures(folder, report, runs, dataset, twins, sample)
    terminal.verdict(report)
    terminal.line(f"Report, pictures and records: {folder}")
    return 1 if report["verdict"] == "disagree" else 0


def grid(options: argparse.Namespace, arguments: list[str]) -> int:
    """Both backends through every legal combination of the optimizer's options."""
    from common import data, machine
    from common import grid as options_grid
    from common.report import Terminal, write_json

    terminal = Terminal(quiet=options.quiet)
    dataset = data.load(options.data, options.data_dir, terminal.line, progress=not options.quiet)
    folder = options.out or Path("results/grid")
    check_writable(folder)

    def build(name: str, config: Config) -> Any:
        return backends.load(name)(config, len(dataset.classes), "float64", options.device, options.compile)

    configs = list(options_grid.combinations(options.steps or options_grid.STEPS))
    rows = []
    with terminal.progress("combinations", len(configs)) as advance:
        for config in configs:
            rows.append(options_grid.measure(config, dataset, build))
            advance(1, rows[-1]["last_loss"])
    report = {
        "schema": 1,
        "command": ["compare.py", *arguments],
        "data": {"name": dataset.name, "digest": dataset.digest},
        "environment": machine.describe(),
        "steps": configs[0].steps,
        "bound": options_grid.GRID_BOUND,
        "rows": rows,
    }
    write_json(report, folder)
    columns, lines = options_grid.table(rows)
    terminal.table(columns, lines)
    agree = all(row["agrees"] for row in rows)
    terminal.line(
        f"{len(rows)} combinations: {'all agree' if agree else 'NOT all agree'}. Report: {folder}/report.json"
    )
    return 0 if agree else 1


def train_one(
    name: str,
    dtype: str,
    number_of_twins: int,
    config: Config,
    dataset: Any,
    options: argparse.Namespace,
    folder: Path,
    terminal: Any,
    runs: Runs,
    twins: Runs,
) -> None:
    """One backend through one lens, and its twins in a production lens; records are kept as they are made."""
    from common import record, train

    backend = backends.load(name)(config, len(dataset.classes), dtype, options.device, options.compile)
    members = [None] if dtype == "float64" else [None, *range(1, number_of_twins + 1)]
    made = []
    for twin in members:
        title = f"{name} {dtype}" + ("" if twin is None else f", twin {twin}")
        log_every = options.log_every if twin is None else 0
        terminal.line(f"Training {title}: {config.total_steps:,} steps on {backend.device}")
        with terminal.progress(title, config.total_steps) as advance:
            observer = Observer(terminal.line, advance)
            made.append(train.train(backend, config, dataset, dtype, observer, twin, log_every))
        record.write(made[-1], folder)
    runs[dtype][name], twins[dtype][name] = made[0], made[1:]
    runs[dtype] = {known: runs[dtype][known] for known in BACKENDS if known in runs[dtype]}  # torch first


class Observer:
    """Passes what the training loop tells on to the terminal."""

    def __init__(self, line: Any, advance: Any) -> None:
        self.line, self.advance = line, advance


def find_record(
    folder: Path, name: str, dtype: str, config: Config, dataset: Any, terminal: Any, runs: Runs, twins: Runs
) -> None:
    """Put the other backend's record beside this run, if there is one of the same run."""
    from common import record, train

    path = folder / f"{record.file_stem(name, dtype)}.safetensors"
    if not path.exists():
        return
    found = record.read(path)
    if found.config != config.to_json() or found.data != train.describe(config, dataset):
        terminal.line(f"Not compared: {path} is of a run with another configuration or other data")
        return
    runs[dtype][name], twins[dtype][name] = found, []
    for twin_path in sorted(folder.glob(f"{record.file_stem(name, dtype)}-twin*.safetensors")):
        twin = record.read(twin_path)
        if twin.config == found.config and twin.data == found.data:
            twins[dtype][name].append(twin)


def make_report(
    recipe: str, config: Config, dataset: Any, arguments: list[str], runs: Runs, twins: Runs
) -> dict[str, Any]:
    """report.json, as a dictionary."""
    from common import machine, parity, train

    lenses = [parity.compare(runs[dtype], twins[dtype], dataset.test_labels) for dtype in runs]
    verdicts = {lens["verdict"] for lens in lenses}
    environment = {name: r.environment for by_backend in runs.values() for name, r in by_backend.items()}
    return {
        "schema": 1,
        "verdict": next(v for v in ("disagree", "single", "agree") if v in verdicts),
        "command": ["compare.py", *arguments],
        "recipe": recipe,
        "config": config.to_json(),
        "environment": environment | {"machine": machine.describe()},
        "data": train.describe(config, dataset),
        "lenses": lenses,
    }


def check_writable(folder: Path) -> None:
    """Raise RecordError, before hours of training, if nothing can be written to `folder`."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecordError(f"cannot write to {folder} ({error.strerror}): choose another folder with --out") from error


if __name__ == "__main__":
    sys.exit(main())
