"""One comparison from start to end: `compare` trains, judges, locates and reports.

The command line and `lockstep.compare` are its callers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.common.backends import BackendPackage
from lockstep.common.config import BACKENDS, DTYPES, RECIPES, Config, Recipe
from lockstep.common.errors import ConfigError, DataError
from lockstep.common.model import pair as pairs
from lockstep.common.system import environment, interrupt, program

if TYPE_CHECKING:
    from lockstep.common.data import Dataset
    from lockstep.common.protocol import Arrays
    from lockstep.common.report import Terminal
    from lockstep.common.runs.ensemble import Ensembles
    from lockstep.common.runs.parallel import WorkerProcess
    from lockstep.common.runs.record import Record
    from lockstep.common.runs.request import Plan
    from lockstep.common.runs.trainer import Family, Trainer

CHECKPOINT_EVERY, LONG_RUN = 1_000, 5_000  # steps between checkpoints, in runs of so many or more
RUNS = Path("results/runs")  # where reports go unless the user names a folder


@dataclass(frozen=True)
class Request:
    """What to train, in which precisions, and where to write it."""

    config: Config
    dtypes: tuple[str, ...] = ("float64", "float32")
    twins: int = 2  # per backend, in every precision but float64
    backends: tuple[str, ...] = BACKENDS  # which to train
    recipe: str = "quick"  # the name in RECIPES that it started from, for the report
    data: str = "auto"  # as the option --data
    data_dir: Path | None = None
    device: str = "auto"  # auto, cpu or cuda
    compile: str = "auto"  # auto, on or off
    weights: Path | None = None  # the user's own initial weights
    out: Path | None = None  # None: a folder in results/runs
    resume: Path | None = None  # the folder of a run to resume; it is `out`, too
    plan: Plan | None = None  # of the run to resume
    keep_records: bool = False  # use every record that is in the folder, train only what is missing
    log_every: int = 0  # steps between log lines; 0: none
    checkpoint_every: int | None = None  # None: CHECKPOINT_EVERY in runs of LONG_RUN or more
    tensorboard: Path | None = None
    command: tuple[str, ...] = ()  # the arguments of the command line, for the report

    def __post_init__(self) -> None:
        if self.twins < 0 or (self.twins == 0 and self.dtypes != ("float64",)):
            raise ConfigError(
                "--twins must be 1 or more: without twins nothing says how far rounding may take "
                "two runs"
            )
        for option, value in (
            ("--log-every", self.log_every),
            ("--checkpoint-every", self.checkpoint_every),
        ):
            if (value or 0) < 0:
                raise ConfigError(f"{option} must be 0 or more")


@dataclass(frozen=True)
class Result:
    """What a comparison found. It is true if the runs agree."""

    report: dict[str, Any]  # report.json
    folder: Path  # with report.json, report.html and the records

    def __bool__(self) -> bool:
        return self.verdict == "agree"

    def __repr__(self) -> str:
        return f"{self.sentence} Report: {self.folder}"

    @property
    def verdict(self) -> str:
        """ "agree", "disagree", or "single": there was nothing to compare with."""
        return self.report["verdict"]

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        from lockstep.common.report import sentence

        return sentence(self.report)

    @property
    def interrupted_at(self) -> str | None:
        """Where the run was stopped, if it was."""
        return self.report["cut_short"]

    @property
    def place(self) -> str | None:
        """Where the runs differ first: stage, step and tensor. None if they agree."""
        located = self._located()
        return located["message"] if located else None

    @property
    def causes(self) -> tuple[str, ...]:
        """What usually causes such a difference, the likeliest first."""
        located = self._located()
        return tuple(located["causes"]) if located else ()

    def _located(self) -> dict[str, Any] | None:
        return next(
            (found["located"] for found in self.report["lenses"] if "located" in found), None
        )


def request(
    config: Config | None = None,
    *,
    recipe: str = "quick",
    model: str | None = None,
    dtypes: Sequence[str] | None = None,
    twins: int | None = None,
    **settings: Any,
) -> Request:
    """A request that starts from a recipe.

    Args:
        config: in place of the recipe's.
        model: in place of the configuration's.
        dtypes, twins: None: the recipe's.
        settings: further fields of Request.

    Raises:
        ConfigError: if they describe no run.
    """
    base = recipe_named(recipe)
    dtypes = base.dtypes if dtypes is None else tuple(dtypes)
    if not dtypes or not set(dtypes) <= set(DTYPES):
        raise ConfigError(f"dtypes must be some of {', '.join(DTYPES)}")
    config = base.config if config is None else config
    if model is not None:
        config = dataclasses.replace(config, model=model, pair=pairs.source_digest(model))
    return Request(
        config=config,
        dtypes=dtypes,
        twins=base.twins if twins is None else twins,
        recipe=recipe,
        **settings,
    )


def recipe_named(name: str) -> Recipe:
    from lockstep.common.errors import did_you_mean

    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}: {did_you_mean(name, RECIPES)}")
    return RECIPES[name]


def compare(wanted: Request, backends: BackendPackage, terminal: Terminal | None = None) -> Result:
    """Train, judge, locate and report.

    Args:
        terminal: where the run reports its progress and its verdict; None: nowhere.

    Raises:
        LockstepError: if the request cannot be carried out; the message says what to do.
        KeyboardInterrupt: if it is stopped before anything is finished; the message says how to
            resume.
    """
    from lockstep.common import report as reports
    from lockstep.common.runs import parallel
    from lockstep.common.system import storage

    if terminal is None:
        terminal = reports.Terminal(quiet=True, stdout=io.StringIO(), stderr=io.StringIO())
    if wanted.weights is not None and wanted.plan is None:
        backends.module("weight_files").check_name(wanted.weights)
    if wanted.out is not None:
        check_folder(wanted.out)
    if wanted.tensorboard is not None:
        reports.check_tensorboard()
        storage.check_writable(wanted.tensorboard, "--tensorboard")
    with parallel.WorkerProcess(
        parallel.may_use_worker(wanted.config, wanted.backends, wanted.device), backends.load
    ) as other:
        return prepare_and_train(wanted, backends, terminal, other)


def announcement(wanted: Request) -> str:
    """What will be trained, on what, for how long: the first line of a run."""
    config = wanted.config
    names = " and ".join({"torch": "PyTorch", "flax": "Flax"}[name] for name in wanted.backends)
    if config.steps is not None:
        length = f"{config.steps:,} step{'' if config.steps == 1 else 's'}"
    else:
        length = f"{config.epochs:,} epoch{'' if config.epochs == 1 else 's'}"
    twins = (
        f", each with {wanted.twins} twin{'' if wanted.twins == 1 else 's'}"
        if wanted.dtypes != ("float64",)
        else ""
    )
    data = {"auto": "CIFAR-10 or the digits", "cifar10": "CIFAR-10", "digits": "the digits"}
    verb = "Resuming" if wanted.plan is not None else "Training"
    if wanted.keep_records:
        verb = "Comparing"
    return (
        f"{verb} {config.model} in {names} on {data.get(wanted.data, wanted.data)}: {length} of "
        f"batch {config.batch_size}, in {' and '.join(wanted.dtypes)}{twins}"
        f"{time_needed(wanted, config)}"
    )


def time_needed(wanted: Request, config: Config) -> str:
    """ ", about so long", where that can be said."""
    from lockstep.common.runs import estimate

    needed = estimate.seconds(config, wanted.dtypes, wanted.twins, len(wanted.backends))
    known = wanted.device != "cuda" and wanted.plan is None and not wanted.keep_records
    if needed is None or not known:
        return ""
    return f", about {estimate.duration(needed)} on two cores"


def check_folder(folder: Path) -> None:
    """Raise RecordError if the folder cannot be written; nothing is left there."""
    from lockstep.common.system.storage import check_writable

    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    check_writable(folder)
    with contextlib.suppress(OSError):  # another run writes there now
        for place in made:
            place.rmdir()


def prepare_and_train(
    wanted: Request, backends: BackendPackage, terminal: Terminal, other: WorkerProcess
) -> Result:
    """Read the data, check the networks, and train.

    Args:
        other: a process to train in next to this one, if there is to be one.
    """
    from lockstep.common import data
    from lockstep.common.runs import request as plans
    from lockstep.common.runs.trainer import Interrupted, Trainer, find_runs, resume_hint
    from lockstep.common.system import storage

    plan, names = wanted.plan, wanted.backends
    data.check(wanted.data, wanted.data_dir)
    terminal.line(announcement(wanted))
    dataset = data.load(wanted.data, wanted.data_dir, terminal.line, progress=not terminal.quiet)
    if plan is not None and plan.digest != dataset.digest:
        raise DataError(
            f"{dataset.name} is not the data that {wanted.resume} was begun on: name it with --data"
        )
    config = wanted.config.resolve(len(dataset.train_images))
    if wanted.config.steps is None:
        terminal.line(f"{config.total_steps:,} steps{time_needed(wanted, config)}")
    device = choose_device(
        backends, config, dataset, names, terminal, device=wanted.device, other=other
    )
    initial_weights = None
    if wanted.weights is not None:
        initial_weights, config = load_initial_weights(
            wanted.weights, config, dataset, names[0], device, backends
        )
        if plan is not None and plan.config != config.to_json():
            raise DataError(
                f"{wanted.weights} holds other weights than those {wanted.resume} began with: "
                "restore it"
            )
    folder = wanted.resume or wanted.out
    folder = folder or RUNS / f"{wanted.recipe}-{config.fingerprint(dataset.digest)}"
    with storage.lock_folder(folder):
        others = [name for name in BACKENDS if name not in names or wanted.keep_records]
        found = find_runs(folder, wanted.dtypes, others, config, dataset, terminal.line)
        trainer = Trainer(
            folder,
            config,
            dataset,
            functools.partial(backends.build, config, len(dataset.classes), device, wanted.compile),
            terminal,
            initial_weights,
            wanted.log_every,
            checkpoint_every(wanted.checkpoint_every, config),
            resumed=plan is not None,
            continue_other_backend=plan is not None and len(names) == 1,
        )
        if plan is None and not wanted.keep_records:
            trainer.check_not_overwriting(names, wanted.dtypes)
            plans.write(make_plan(wanted, config, dataset), folder)
        try:
            return train_and_compare(wanted, trainer, found, device, other)
        except KeyboardInterrupt as interruption:
            raise Interrupted(
                "; ".join(filter(None, [str(interruption), resume_hint(folder)]))
            ) from None


def train_and_compare(
    wanted: Request,
    trainer: Trainer,
    found: dict[str, Family],
    device: str,
    other: WorkerProcess,
) -> Result:
    """Everything that is written to the run's folder.

    Args:
        found: by precision and backend, the records that are there already.
    """
    from lockstep.common.runs import parallel
    from lockstep.common.runs.ensemble import Ensemble
    from lockstep.common.runs.trainer import Interrupted, backend_errors
    from lockstep.common.verdict import locate
    from lockstep.common.verdict.judge import judge

    names = wanted.backends
    terminal, dataset, config = trainer.terminal, trainer.dataset, trainer.config
    comparisons = []
    ensembles: dict[str, Ensembles] = {
        dtype: {name: Ensemble.of(records) for name, records in family.items()}
        for dtype, family in found.items()
    }
    interrupted_at = None
    members = {
        dtype: [None, *range(1, 1 + (0 if dtype == "float64" else wanted.twins))]
        for dtype in ensembles
    }
    worker_backend = parallel.choose_worker_backend(
        trainer, names, device, itertools.chain(*ensembles.values())
    )
    training = parallel.ParallelTraining(trainer, other, worker_backend, members)
    try:
        with training:
            if training.name is not None:
                # This process trains all of its runs before it waits for the other one.
                for dtype, ensemble in ensembles.items():
                    ensemble |= {
                        name: Ensemble.of(training.train(name, dtype))
                        for name in names
                        if name != training.name
                    }
                with interrupt.deferred():
                    # Half a second, in which the other one may be done.
                    importlib.import_module("matplotlib.figure")
            for dtype, ensemble in ensembles.items():
                for name in names:
                    if name not in ensemble:
                        ensemble[name] = Ensemble.of(training.train(name, dtype))
                ensembles[dtype] = in_order(ensemble)
                more, begin = (
                    trainer.train_twins(dtype, names),
                    trainer.train_first_steps(dtype, names),
                )
                comparisons.append(judge(ensembles[dtype], more, dataset.test_labels, begin))
        if interrupt.requested():
            raise Interrupted("it was stopped after the last run")
    except Interrupted as interruption:  # what is finished is reported
        interrupted_at = str(interruption)
        for dtype, ensemble in ensembles.items():
            others = {
                name: Ensemble.of(records) for name, records in training.finished(dtype).items()
            }
            ensembles[dtype] = in_order(others | ensemble)
        ensembles = {dtype: ensemble for dtype, ensemble in ensembles.items() if ensemble}
        for ensemble in list(ensembles.values())[len(comparisons) :]:
            comparisons.append(judge(ensemble, lambda name, twins: [], dataset.test_labels))
        if not comparisons:
            raise

    runs = {
        dtype: {name: side.run for name, side in ensemble.items()}
        for dtype, ensemble in ensembles.items()
    }
    twins = {
        dtype: {name: list(side.twins) for name, side in ensemble.items()}
        for dtype, ensemble in ensembles.items()
    }
    # float64 comes first: a difference is sharpest there.
    disagreement = next(
        (
            place
            for place, comparison in enumerate(comparisons)
            if comparison.verdict == "disagree" and comparison.nonfinite_step is None
        ),
        None,
    )
    if disagreement is not None and interrupted_at is None:
        comparison = comparisons[disagreement]
        dtype = comparison.dtype
        terminal.line(f"Looking for where the {dtype} runs diverge")
        with backend_errors(" and ".join(runs[dtype])):
            location = locate.locate(
                comparison.first_divergence,
                runs[dtype],
                config,
                dataset,
                lambda name: trainer.build(name, dtype),
                weights=trainer.weights,
            )
        comparisons[disagreement] = dataclasses.replace(comparison, location=location)
    lenses = [comparison.to_json() for comparison in comparisons]
    report = make_report(
        wanted.recipe, config, dataset, wanted.command, runs, lenses, interrupted_at
    )
    write_reports(wanted, trainer, report, runs, twins, other)
    return Result(report, trainer.folder)


def write_reports(
    wanted: Request,
    trainer: Trainer,
    report: dict[str, Any],
    runs: dict[str, dict[str, Record]],
    twins: dict[str, Family],
    other: WorkerProcess,
) -> None:
    """report.json, report.html, the pictures, TensorBoard's files, and the terminal's lines."""
    from lockstep.common import data
    from lockstep.common import report as reports

    terminal, dataset, folder = trainer.terminal, trainer.dataset, trainer.folder
    sample = next(
        data.batch_indices(
            dataclasses.replace(trainer.config, batch_size=32, steps=1), len(dataset.train_images)
        )
    )
    reports.write_json(report, folder)
    other.tell("draw", report, sample)  # the pictures, while this process writes the page
    reports.write_report_page(folder, report, runs, dataset, twins, sample)
    if other.told()[0] != "drawn":
        reports.write_pictures(folder, report, runs, dataset, twins, sample)
    if wanted.tensorboard is not None:
        reports.write_tensorboard(wanted.tensorboard, report, runs, twins, dataset, sample)
    terminal.verdict(report, folder / "report.html")


def in_order(ensembles: Ensembles) -> Ensembles:
    """PyTorch's runs first."""
    return {name: ensembles[name] for name in BACKENDS if name in ensembles}


def make_plan(wanted: Request, config: Config, dataset: Dataset) -> Plan:
    """What `--resume` needs to know of a run that begins."""
    from lockstep.common.runs.request import Plan

    return Plan(
        recipe=wanted.recipe,
        config=config.to_json(),
        dtypes=wanted.dtypes,
        twins=wanted.twins,
        backend="both" if wanted.backends == BACKENDS else wanted.backends[0],
        data=wanted.data,
        digest=dataset.digest,
        device=wanted.device,
        compile=wanted.compile,
        checkpoint_every=checkpoint_every(wanted.checkpoint_every, config),
        weights=None if wanted.weights is None else str(wanted.weights.absolute()),
    )


def checkpoint_every(steps: int | None, config: Config) -> int:
    """Steps between two checkpoints; 0: only where a run is stopped."""
    if steps is not None:
        return steps
    return CHECKPOINT_EVERY if config.total_steps >= LONG_RUN else 0


def choose_device(
    backends: BackendPackage,
    config: Config,
    dataset: Dataset,
    names: Sequence[str],
    terminal: Terminal,
    device: str,
    other: WorkerProcess | None = None,
) -> str:
    """The device for all of `names`: "auto" means the GPU only if each of them finds it.

    Raises:
        ConfigError: if the two networks do not have the same tensors.
    """
    from lockstep.common.runs import parallel

    build = functools.partial(backends.build, config, len(dataset.classes), device, "off")
    here = {name: functools.partial(parallel.view, build, name) for name in names}
    there = {
        name: other.view(build, name) for name in names if other and name == parallel.WORKER_BACKEND
    }  # at the same time
    views = {name: look() for name, look in (here | there).items()}
    if len(views) == 2:
        own = {name: view.native_names for name, view in views.items()}
        pairs.check_same(views["torch"].shapes, views["flax"].shapes, own)
        pairs.check_dropout(views["torch"].dropout_layers, views["flax"].dropout_layers)
    found = {name: view.device for name, view in views.items()}
    if len(set(found.values())) > 1:
        devices = ", ".join(f"{name}: {device}" for name, device in found.items())
        terminal.line(f"Not all find a GPU ({devices}): both use the CPU")
        return "cpu"
    return next(iter(found.values()))


def load_initial_weights(
    path: Path, config: Config, dataset: Dataset, name: str, device: str, backends: BackendPackage
) -> tuple[Arrays, Config]:
    """The user's own weights, canonical, and the configuration of the run that starts from them.

    Raises:
        DataError: if they are not those of the network that is trained.
    """
    from lockstep.common.model import initial_weights

    network = backends.load(name)(config, len(dataset.classes), "float32", device, "off")
    found = backends.module("weight_files").read_weights(path, network.shapes(), config.model)
    return found, dataclasses.replace(config, weights=initial_weights.digest(found))


def make_report(
    recipe: str,
    config: Config,
    dataset: Dataset,
    arguments: Sequence[str],
    runs: dict[str, dict[str, Record]],
    lenses: list[dict[str, Any]],
    interrupted_at: str | None,
) -> dict[str, Any]:
    """report.json, as a dictionary.

    Args:
        runs: by dtype and backend.
        interrupted_at: where the run was interrupted, if it was.
    """
    from lockstep.common.runs import training as train

    verdicts = {lens["verdict"] for lens in lenses}
    environments = {
        name: run.environment for by_backend in runs.values() for name, run in by_backend.items()
    }
    return {
        "schema": 1,
        "verdict": next(v for v in ("disagree", "agree", "single") if v in verdicts),
        "cut_short": interrupted_at,
        "command": program.typed(arguments),
        "recipe": recipe,
        "config": config.to_json(),
        "environment": environments | {"machine": environment.describe()},
        "data": train.describe(config, dataset),
        "lenses": lenses,
    }
