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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import backends
from common.config import BACKENDS, DTYPES, RECIPES, SCHEDULES, Config, Recipe, Schedule
from common.errors import BackendError, ConfigError, LockstepError, RecordError

Runs = dict[str, dict[str, Any]]  # by dtype, then by backend


def main(argv: list[str] | None = None) -> int:
    """Carry out one command line and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options = parse(arguments)
        return {"run": run, "grid": grid}[options.command](options, arguments)
    except LockstepError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the records that were finished are kept", file=sys.stderr)
        return 130


# --- Parse


class Parser(argparse.ArgumentParser):
    """One line for a wrong option, in place of argparse's usage and line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {printable(message)}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def printable(text: object) -> str:
    """One line that cannot command the terminal, whatever a file or an option was called."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))


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
    if options.epochs is not None and options.steps is not None:
        raise ConfigError("--epochs and --steps both say how long the run is: give one of them")
    if options.epochs is not None:
        given["steps"] = None  # --epochs alone overrides a recipe's number of steps
    twins = recipe.twins if options.twins is None else options.twins
    dtypes = recipe.dtypes if options.dtype is None else (options.dtype,)
    if twins < 0 or (twins == 0 and dtypes != ("float64",)):
        raise ConfigError("--twins must be 1 or more: without twins nothing says how far rounding may take two runs")
    if options.log_every < 0:
        raise ConfigError("--log-every must be 0 or more")
    return dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, **given), dtypes=dtypes, twins=twins)


# --- Run


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Train, compare, report."""
    recipe = recipe_of(options)  # before anything slow: a wrong option is answered at once

    from common import data, parity, record
    from common.report import Terminal, write_json, write_pictures

    terminal = Terminal(quiet=options.quiet)
    dataset = data.load(options.data, options.data_dir, terminal.line, progress=not options.quiet)
    config = recipe.config.resolve(len(dataset.train_images))
    names = BACKENDS if options.backend == "both" else (options.backend,)
    device = choose_device(options, config, dataset, names, terminal)
    folder = options.out or Path("results/runs") / f"{options.recipe}-{config.fingerprint(dataset.digest)}"
    check_writable(folder)

    runs: Runs = {dtype: {} for dtype in recipe.dtypes}
    twins: Runs = {dtype: {} for dtype in recipe.dtypes}
    for dtype in recipe.dtypes:  # before training: a damaged record is reported at once
        for name in BACKENDS:
            if name not in names:
                family = find_records(folder, name, dtype, config, dataset, terminal)
                if family:
                    runs[dtype][name], twins[dtype][name] = family[0], family[1:]
    for dtype in recipe.dtypes:
        for name in names:
            made = []
            members = [None] if dtype == "float64" else [None, *range(1, recipe.twins + 1)]
            for result in train(name, dtype, members, config, dataset, device, options, terminal):
                record.write(result, folder)
                made.append(result)
            runs[dtype][name], twins[dtype][name] = made[0], made[1:]
        runs[dtype] = {name: runs[dtype][name] for name in BACKENDS if name in runs[dtype]}  # torch first

        if parity.may_be_chaos(parity.compare(runs[dtype], twins[dtype], dataset.test_labels)):
            terminal.line(f"{dtype}: the runs part after the first steps; twins will say whether rounding explains it")
            for name in names:
                for result in train(name, dtype, [1, 2], config, dataset, device, options, terminal):
                    record.write(result, folder)
                    twins[dtype][name].append(result)

    report = make_report(options.recipe, config, dataset, arguments, runs, twins)
    sample = next(data.batch_indices(dataclasses.replace(config, batch_size=32, steps=1), len(dataset.train_images)))
    write_json(report, folder)
    write_pictures(folder, report, runs, dataset, twins, sample)
    terminal.verdict(report)
    terminal.line(f"Report, pictures and records: {folder}")
    return 1 if report["verdict"] == "disagree" else 0


def choose_device(options: argparse.Namespace, config: Config, dataset: Any, names: Any, terminal: Any) -> str:
    """The device for all of `names`: "auto" means the GPU only if each of them finds it."""
    found = {
        name: backends.load(name)(config, len(dataset.classes), "float32", options.device, "off").device
        for name in names
    }
    if len(set(found.values())) > 1:
        terminal.line(f"Not all find a GPU ({', '.join(f'{n}: {d}' for n, d in found.items())}): both use the CPU")
        return "cpu"
    return next(iter(found.values()))


def train(
    name: str,
    dtype: str,
    members: Sequence[int | None],
    config: Config,
    dataset: Any,
    device: str,
    options: argparse.Namespace,
    terminal: Any,
) -> Iterator[Any]:
    """The records of one backend through one lens: of the run itself (None) and of its twins (1, 2, ...)."""
    from common import train

    backend = backends.load(name)(config, len(dataset.classes), dtype, device, options.compile)
    for twin in members:
        title = f"{name} {dtype}" + ("" if twin is None else f", twin {twin}")
        log_every = options.log_every if twin is None else 0
        terminal.line(f"Training {title}: {config.total_steps:,} steps on {backend.device}")
        try:
            with terminal.progress(title, config.total_steps) as advance:
                observer = TerminalObserver(terminal.line, advance)
                yield train.train(backend, config, dataset, dtype, observer, twin, log_every)
        except (RuntimeError, MemoryError) as error:  # of a compiler, a driver, or the memory: they all come as these
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            remedy = "try --compile off, --device cpu or a smaller --batch-size"
            raise BackendError(f"{name} cannot train here ({type(error).__name__}: {reason}): {remedy}") from error


class TerminalObserver:
    """Passes what the training loop tells on to the terminal."""

    def __init__(self, line: Any, advance: Any) -> None:
        self.line, self.advance = line, advance


def find_records(folder: Path, name: str, dtype: str, config: Config, dataset: Any, terminal: Any) -> list[Any]:
    """The other backend's record of this run, followed by those of its twins; empty if there is none.

    Raises:
        RecordError: if a record is damaged, stale, or not what its name says.
    """
    from common import machine, record, train

    stem = record.file_stem(name, dtype)
    main = folder / f"{stem}.safetensors"
    if not main.exists():
        return []
    family = []
    for path in [main, *sorted(folder.glob(f"{stem}-twin*.safetensors"))]:
        found = record.read(path)
        if found.stem != path.stem or (found.backend, found.dtype) != (name, dtype):
            raise RecordError(f"the record {path} is not what its name says: delete it and run {name} again")
        mine = train.describe(config, dataset) | {"name": found.data.get("name")}  # the same data may lie elsewhere
        if found.config != config.to_json() or found.data != mine:
            if found.twin is None:
                terminal.line(f"Not compared: {path} is of a run with another configuration or other data")
                return []
            continue  # a twin that an earlier run left here
        if found.source != machine.source(name):
            raise RecordError(f"the record {path} is stale, the code has changed since: run --backend {name} again")
        family.append(found)
    return family


def grid(options: argparse.Namespace, arguments: list[str]) -> int:
    """Both backends through every legal combination of the optimizer's options."""
    used = {"command", "data", "data_dir", "steps", "device", "compile", "out", "quiet"}
    given = [name for name, value in vars(options).items() if value != vars(parse(["grid"]))[name] and name not in used]
    if given:
        raise ConfigError(f"grid takes no --{given[0].replace('_', '-')}: it goes through all combinations itself")

    from common import data, machine
    from common import grid as options_grid
    from common.report import Terminal, write_json

    configs = list(options_grid.combinations(options_grid.STEPS if options.steps is None else options.steps))
    terminal = Terminal(quiet=options.quiet)
    dataset = data.load(options.data, options.data_dir, terminal.line, progress=not options.quiet)
    configs = [config.resolve(len(dataset.train_images)) for config in configs]
    device = choose_device(options, configs[0], dataset, BACKENDS, terminal)
    folder = options.out or Path("results/grid")
    check_writable(folder)

    def build(name: str, config: Config) -> Any:
        return backends.load(name)(config, len(dataset.classes), "float64", device, options.compile)

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
    terminal.table(*options_grid.table(rows))
    agree = all(row["agrees"] for row in rows)
    terminal.line(
        f"{len(rows)} combinations: {'all agree' if agree else 'NOT all agree'}. Report: {folder}/report.json"
    )
    return 0 if agree else 1


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
        "verdict": next(v for v in ("disagree", "agree", "single") if v in verdicts),
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
