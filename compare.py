"""Lockstep's command line: train the same network in PyTorch and in Flax, and say whether the two runs are the same.

    python compare.py                        both backends, the quick recipe
    python compare.py --backend torch        one backend; compared with the other's record, if there is one
    python compare.py --recipe tutorial      the whole run of PyTorch's tutorial
    python compare.py locate                 where two runs part, from their records if they are there
    python compare.py grid                   every combination of the optimizer's options, 200 float64 steps each
    python compare.py faults                 known faults: which are found, by which lens, and where
    python compare.py alarms                 clean pairs of runs: how many are said to differ
    python compare.py sensitivity            from which error of the learning rate on, and when, it is seen
    python compare.py bench                  speed: both backends beside the tutorial's own loop, in turns
    python compare.py read                   two pages to learn from: both sources side by side, and a walk-through

Exit status: 0 the runs agree, or a single one finished with nothing to compare it with; 1 they do not agree; 2 the
request cannot be carried out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import backends
from common.config import BACKENDS, DTYPES, RECIPES, SCHEDULES, Config, Recipe, Schedule
from common.errors import BackendError, ConfigError, DataError, LockstepError, RecordError

MAX_WORKERS = 8  # processes of `alarms`; each holds two gigabytes
Runs = dict[str, dict[str, Any]]  # by dtype, then by backend
Family = dict[str, list[Any]]  # by backend: a run and its twins


def main(argv: list[str] | None = None) -> int:
    """Carry out one command line and return its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options = parse(arguments)
        return COMMANDS[options.command](options, arguments)
    except LockstepError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        where = f" ({interruption})" if str(interruption) else ""
        print(f"interrupted{where}: the records that were finished are kept", file=sys.stderr)
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
    parser.add_argument("command", nargs="?", default="run", choices=list(COMMANDS), help="what to do (default: run)")
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

    group = parser.add_argument_group("the evidence")
    group.add_argument("--only", nargs="+", metavar="FAULT", help="faults: these only")
    group.add_argument("--quick", action="store_true", help="faults: one of each stage; bench: a minute")
    group.add_argument("--pairs", type=int, metavar="N", help="alarms: pairs of runs (default 300)")

    group = parser.add_argument_group("where and how")
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    group.add_argument(
        "--compile",
        default="auto",
        choices=["auto", "on", "off"],
        help="torch.compile (auto: in long runs of small batches); jax.jit always",
    )
    group.add_argument("--out", type=Path, metavar="DIR", help="default: results/runs/<recipe>-<fingerprint>")
    group.add_argument("--log-every", type=int, default=2000, metavar="N", help="steps between log lines; 0: none")
    group.add_argument("--quiet", action="store_true", help="the verdict only")
    group.add_argument("--json", action="store_true", help="the report on standard output, all else on standard error")
    group.add_argument("--tensorboard", type=Path, metavar="DIR", help="losses, gaps and images for TensorBoard, too")
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

    from common import data, locate, parity
    from common import report as reports
    from common.report import Terminal

    if options.tensorboard is not None:
        reports.check_tensorboard()
        check_writable(options.tensorboard, "--tensorboard")
    terminal = Terminal(quiet=options.quiet, aside=options.json)
    dataset = data.load(options.data, options.data_dir, terminal.line, progress=not options.quiet)
    config = recipe.config.resolve(len(dataset.train_images))
    names = BACKENDS if options.backend == "both" else (options.backend,)
    device = choose_device(options, config, dataset, names, terminal)
    folder = options.out or Path("results/runs") / f"{options.recipe}-{config.fingerprint(dataset.digest)}"
    check_writable(folder)

    families: dict[str, Family] = {dtype: {} for dtype in recipe.dtypes}
    for dtype in recipe.dtypes:  # before training: a damaged record is reported at once
        for name in BACKENDS:
            if name not in names or options.command == "locate":
                found = find_records(folder, name, dtype, config, dataset, terminal)
                if found:
                    families[dtype][name] = found

    trainer = Trainer(options, terminal, dataset, config, device, folder)
    lenses = []
    cut_short = None
    try:
        for dtype, family in families.items():
            for name in names:
                if name not in family:
                    twins = 0 if dtype == "float64" else recipe.twins
                    family[name] = trainer.train(name, dtype, [None, *range(1, 1 + twins)])
            families[dtype] = {name: family[name] for name in BACKENDS if name in family}  # torch first
            lenses.append(parity.judge(families[dtype], trainer.more(dtype, names), dataset.test_labels))
    except Interrupted as interruption:  # what is finished is reported
        cut_short = str(interruption)
        families = {dtype: family for dtype, family in families.items() if family}
        for family in list(families.values())[len(lenses) :]:
            lenses.append(parity.judge(family, lambda name, twins: [], dataset.test_labels))
        if not lenses:
            raise

    runs = {dtype: {name: members[0] for name, members in family.items()} for dtype, family in families.items()}
    twins = {dtype: {name: members[1:] for name, members in family.items()} for dtype, family in families.items()}
    apart = next((lens for lens in lenses if lens["verdict"] == "disagree"), None)
    if apart is not None and cut_short is None:  # float64 comes first: what shows there shows most sharply
        terminal.line(f"Looking for where the {apart['dtype']} runs part")
        records = runs[apart["dtype"]]
        with explained(" and ".join(records)):
            apart["located"] = locate.locate(
                apart,
                records,
                config,
                dataset,
                lambda name: backends.load(name)(config, len(dataset.classes), apart["dtype"], device, options.compile),
            )
    report = make_report(options.recipe, config, dataset, arguments, runs, lenses, cut_short)
    sample = next(data.batch_indices(dataclasses.replace(config, batch_size=32, steps=1), len(dataset.train_images)))
    reports.write_json(report, folder)
    reports.write_pictures(folder, report, runs, dataset, twins, sample)
    reports.write_report_page(folder, report, runs, dataset, twins, sample)
    if options.tensorboard is not None:
        reports.write_tensorboard(options.tensorboard, report, runs, twins, dataset, sample)
    terminal.verdict(report)
    terminal.line(f"Report, pictures and records: {folder}")
    if options.json:
        print_json(report)
    return 130 if cut_short is not None else 1 if report["verdict"] == "disagree" else 0


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


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C; says where."""


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What all training of one command shares."""

    options: argparse.Namespace
    terminal: Any
    dataset: Any
    config: Config
    device: str
    folder: Path

    def train(self, name: str, dtype: str, members: Sequence[int | None]) -> list[Any]:
        """The records of one backend through one lens: of the run itself (None) and of its twins (1, 2, ...).

        Each is written to the folder as soon as it is finished.
        """
        from common import record, train

        options, terminal, total = self.options, self.terminal, self.config.total_steps
        backend = backends.load(name)(self.config, len(self.dataset.classes), dtype, self.device, options.compile)
        made = []
        for twin in members:
            title = f"{name} {dtype}" + ("" if twin is None else f", twin {twin}")
            log_every = options.log_every if twin is None else 0
            terminal.line(f"Training {title}: {total:,} steps on {backend.device}")
            with explained(name), terminal.progress(title, total) as advance:
                observer = TerminalObserver(terminal.line, advance)
                try:
                    made.append(train.train(backend, self.config, self.dataset, dtype, observer, twin, log_every))
                except KeyboardInterrupt:
                    raise Interrupted(f"{title} was interrupted at step {observer.steps:,} of {total:,}") from None
            record.write(made[-1], self.folder)
        return made

    def more(self, dtype: str, names: Sequence[str]) -> Callable[[str, range], list[Any]]:
        """Trains the twins that `parity.judge` asks for, of the backends that may be trained."""

        def twins_of(name: str, twins: range) -> list[Any]:
            if name not in names or not twins:
                return []
            self.terminal.line(
                f"The {dtype} runs part after the first steps; twins of {name} will say whether by rounding alone"
            )
            return self.train(name, dtype, twins)

        return twins_of


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Errors of a compiler, a driver, or the memory, which all come as RuntimeError, as one line with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        remedy = "try --compile off, --device cpu or a smaller --batch-size"
        raise BackendError(f"{name} cannot train here ({type(error).__name__}: {reason}): {remedy}") from error


class TerminalObserver:
    """Passes what the training loop tells on to the terminal, and knows how far it has come."""

    def __init__(self, line: Any, advance: Any) -> None:
        self.line, self._advance = line, advance
        self.steps = 0  # done so far

    def advance(self, steps: int, loss: float) -> None:
        self.steps += steps
        self._advance(steps, loss)


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
        if found.twin is not None and found.source != machine.source(name):
            continue  # likewise
        if found.source != machine.source(name):
            raise RecordError(f"the record {path} is stale, the code has changed since: run --backend {name} again")
        family.append(found)
    return family


def grid(options: argparse.Namespace, arguments: list[str]) -> int:
    """Both backends through every legal combination of the optimizer's options."""
    refuse(options, "it goes through all combinations itself", "steps")

    from common import grid as options_grid

    configs = list(options_grid.combinations(options_grid.STEPS if options.steps is None else options.steps))
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


def faults(options: argparse.Namespace, arguments: list[str]) -> int:
    """Every known fault, or those asked for, put into the Flax side: is it found, and where?"""
    refuse(options, "each fault has the run in which it shows", "only", "twins", "dtype", "quick")

    from backends import faults as catalogue
    from common.evidence import faults as matrix
    from common.evidence import pictures, shortened

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
            raise ConfigError("there is no fault left to run: choose other ones, or data in colour (--data cifar10)")
    lenses = matrix.LENSES if options.dtype is None else (options.dtype,)
    twins = 2 if options.twins is None else options.twins
    cache: dict[Any, Any] = {}
    rows = []
    with study.terminal.progress("faults", len(chosen)) as advance:
        for fault in chosen:
            rows.append(matrix.measure(fault, dataset, study.build, catalogue.injected, cache, lenses, twins))
            advance(1, math.nan)
    summary = matrix.summary(rows)
    study.report({"summary": summary}, rows, matrix.table(rows), draw=functools.partial(pictures.draw_faults, rows))
    if options.only:
        for line in (line for row in rows for line in matrix.described(row)):
            study.terminal.line(line)
    study.terminal.line(matrix.sentence(summary))
    return 0 if not summary["missed"] else 1


def alarms(options: argparse.Namespace, arguments: list[str]) -> int:
    """Clean pairs of runs: how often are two correct programs said to differ?"""
    refuse(options, "it has its own configurations", "pairs", "seed", "dtype", "twins")

    import multiprocessing
    import os
    from concurrent.futures import ProcessPoolExecutor

    from common.evidence import alarms as clean
    from common.evidence import pictures
    from common.report.terminal import counted

    pairs = clean.PAIRS if options.pairs is None else options.pairs
    if pairs < 1:
        raise ConfigError("--pairs must be 1 or more")
    study = Study(options, arguments, folder="alarms")
    cells = list(clean.CELLS)
    for name in dict.fromkeys(cell.data for cell in clean.CELLS):
        try:
            study.load(name)
        except DataError as error:
            cells = [cell for cell in cells if cell.data != name]
            study.terminal.line(
                f"Left out, for want of {name}: {len(clean.CELLS) - len(cells)} configurations ({error})"
            )
    first = clean.MEASUREMENT_SEEDS[0] if options.seed is None else options.seed
    shares = list(clean.shares(cells, pairs, first))
    workers = 1 if options.device == "cuda" else min(len(shares), os.cpu_count() or 1, MAX_WORKERS)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    rows = []
    with explained("a worker"), study.terminal.progress("pairs", pairs) as advance, pool:
        for found in pool.map(clean_pairs, [options] * len(shares), *zip(*shares, strict=True)):
            rows += found
            advance(len(found), math.nan)
    summary = clean.summary(rows)
    draw = functools.partial(pictures.draw_alarms, summary)
    study.report({"summary": summary, "first_seed": first}, rows, clean.table(rows), draw)
    false = sum(line["alarms"] for line in summary if line["rule"] == clean.LOCKSTEP)
    clean_pairs_seen = f"{counted(len(rows), 'clean pair')}, over all lenses"
    study.terminal.line(f"{counted(false, 'false alarm')} of Lockstep in {clean_pairs_seen}.")
    return 0


def clean_pairs(options: argparse.Namespace, cell: Any, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of one configuration, in a process of its own."""
    from common.evidence import alarms as clean

    study = Study(options, [], folder="alarms", quiet=True)
    lenses = DTYPES if options.dtype is None else (options.dtype,)
    twins = 2 if options.twins is None else options.twins
    return list(clean.measure(cell, seeds, {cell.data: study.load(cell.data)}, study.build, lenses, twins))


def bench(options: argparse.Namespace, arguments: list[str]) -> int:
    """How fast: the tutorial's loop and both backends, single steps and fused, in turns."""
    refuse(options, "it measures each way to train as it is", "batch_size", "dtype", "seed", "quick")
    if options.compile != "auto":
        raise ConfigError("bench takes no --compile: it measures what is compiled beside what is not")
    config = Config(batch_size=4 if options.batch_size is None else options.batch_size, seed=options.seed or 0)

    import tempfile

    from backends import timing, workers
    from common import machine
    from common.evidence import bench as speed
    from common.evidence import pictures

    busy, found = speed.load(), machine.describe()
    device, card = workers.find_device(options.device)
    where = card or f"{found['processor']}, {found['cores']} cores"
    study = Study(options, arguments, folder=f"bench/{speed.slug(where)}")
    dataset = study.load(options.data)
    images = len(dataset.train_images)
    config.resolve(images)  # a batch that is larger than the data is refused
    if busy is not None and busy > found["cores"] / 4:
        study.terminal.line(f"This machine is busy (load {busy:.1f}, {found['cores']} cores): what is measured is, too")
    plan = speed.make_plan(images, options.batch_size, options.quick)
    dtype = options.dtype or "float32"
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-", ignore_cleanup_errors=True) as folder:
        timing.write_images(dataset.train_images, dataset.train_labels, Path(folder))

        def start(path: str, batch_size: int, images: int, cache: str | None) -> Any:
            classes = len(dataset.classes)
            job = timing.Job(path, batch_size, images, classes, dtype, device, config.seed, Path(folder))
            return workers.start(job, cache)

        with study.terminal.progress("turns", plan.turns) as advance:
            rows = speed.measure(plan, start, lambda turns: advance(turns, math.nan))
    lines = speed.summary(rows)
    facts = {"dtype": dtype, "device": device, "card": card, "load": busy, "plan": dataclasses.asdict(plan)}
    facts["summary"] = lines
    draw = functools.partial(pictures.draw_bench, lines, f"{where}, {dtype}")
    study.report(facts, rows, speed.speed_table(lines), draw)
    study.terminal.table(*speed.start_table(lines))
    if plan.growth:
        study.terminal.table(*speed.growth_table(lines))
    study.terminal.line(speed.sentence(lines))
    return 0


def read(options: argparse.Namespace, arguments: list[str]) -> int:
    """Two pages to learn from: the two backends side by side, and a walk through what SGD does."""
    refuse(options, "it reads the sources, and runs a few steps of its own")

    import json

    from backends import faults as catalogue
    from common.reading import walk_through, write_read_page, write_walk_page

    study = Study(options, arguments, folder="read")
    root = Path(__file__).resolve().parent
    path = root / "results" / "faults" / "report.json"  # for what goes wrong where a difference is missed
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        report = {name: report[name] for name in ("command", "data", "rows")}
    except (OSError, ValueError, TypeError, KeyError) as error:
        remedy = "make it with: python compare.py faults --data cifar10"
        raise RecordError(f"{path} cannot be read ({type(error).__name__}): {remedy}") from error
    dataset = study.load("digits" if options.data == "auto" else options.data)
    write_read_page(study.folder / "read.html", root, report, [fault.name for fault in catalogue.FAULTS])
    walked = walk_through(study.build, dataset, root, study.terminal.line)
    write_walk_page(study.folder / "walk.html", walked)
    study.terminal.line(f"Pages: {study.folder}")
    return 0


def sensitivity(options: argparse.Namespace, arguments: list[str]) -> int:
    """A learning rate that is wrong by a tenth, a hundredth, ...: when does each lens see it?"""
    refuse(options, "it has the quick recipe's configuration", "steps", "twins")

    from common.evidence import pictures
    from common.evidence import sensitivity as curve

    study = Study(options, arguments, folder="sensitivity")
    dataset = study.load(options.data)
    steps = curve.STEPS if options.steps is None else options.steps
    twins = 2 if options.twins is None else options.twins
    rows = []
    with study.terminal.progress("errors", len(curve.ERRORS)) as advance:
        for row in curve.measure(dataset, study.build, steps, twins=twins):
            rows.append(row)
            advance(1, math.nan)
    study.report({"steps": steps}, rows, curve.table(rows), draw=functools.partial(pictures.draw_sensitivity, rows))
    return 0


class Study:
    """What the commands that make evidence share: data, device, backends, and a report of rows."""

    def __init__(self, options: argparse.Namespace, arguments: list[str], folder: str, quiet: bool = False) -> None:
        from common.report import Terminal

        self.options, self.arguments = options, arguments
        self.folder = options.out or Path("results") / folder
        self.terminal = Terminal(quiet=quiet or options.quiet, aside=options.json)
        self.datasets: list[Any] = []
        self.device: str | None = None
        check_writable(self.folder)

    def load(self, name: str) -> Any:
        from common import data

        terminal = self.terminal
        self.datasets.append(data.load(name, self.options.data_dir, terminal.line, progress=not terminal.quiet))
        return self.datasets[-1]

    def build(self, name: str, config: Config, dtype: str) -> Any:
        classes = len(self.datasets[-1].classes)
        if self.device is None:
            self.device = choose_device(self.options, config, self.datasets[-1], BACKENDS, self.terminal)
        return backends.load(name)(config, classes, dtype, self.device, self.options.compile)

    def report(self, facts: dict[str, Any], rows: list[Any], table: Any, draw: Any = None) -> None:
        from common import machine
        from common.report import write_json

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
    from common.report import to_json

    print(to_json(report), end="", flush=True)


def refuse(options: argparse.Namespace, why: str, *used: str) -> None:
    """Raise ConfigError if an option was given that the command does not use."""
    used = (*used, "command", "data", "data_dir", "device", "compile", "out", "quiet", "json")
    default = vars(parse([options.command]))
    given = [name for name, value in vars(options).items() if value != default[name] and name not in used]
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
    from common import machine, train

    verdicts = {lens["verdict"] for lens in lenses}
    environment = {name: r.environment for by_backend in runs.values() for name, r in by_backend.items()}
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


def check_writable(folder: Path, option: str = "--out") -> None:
    """Raise RecordError, before hours of training, if nothing can be written to `folder`, which `option` names."""
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RecordError(
            f"cannot write to {folder} ({error.strerror}): choose another folder with {option}"
        ) from error


COMMANDS = {
    "run": run,
    "locate": run,
    "grid": grid,
    "faults": faults,
    "alarms": alarms,
    "sensitivity": sensitivity,
    "bench": bench,
    "read": read,
}

if __name__ == "__main__":
    sys.exit(main())
