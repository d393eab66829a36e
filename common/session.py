"""One comparison from start to end: `compare` trains, judges, locates and reports.

The command line and `lockstep.compare` are its callers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lockstep.common.backends import BackendPackage
from lockstep.common.config import BACKENDS, FRAMEWORKS, MODELS, Config
from lockstep.common.request import Request, Result
from lockstep.common.system import environment, program
from lockstep.common.system.interrupt import SignalHandler

# What follows imports NumPy and more; a command that only checks its options does without.
if TYPE_CHECKING:
    from lockstep.common.data import Dataset
    from lockstep.common.report import Terminal
    from lockstep.common.report.json import ReportJson
    from lockstep.common.runs.ensemble import Ensembles
    from lockstep.common.runs.parallel import ParallelTraining, TrainingWorker
    from lockstep.common.runs.record import Record
    from lockstep.common.runs.trainer import Trainer
    from lockstep.common.verdict.comparison import Comparison

VERDICTS = ("disagree", "diverged", "undecided", "agree", "single")  # the first counts
RUNS = Path("results/runs")  # where reports go unless the user names a folder


def compare(
    request: Request,
    backends: BackendPackage,
    terminal: Terminal | None = None,
    signals: SignalHandler | None = None,
) -> Result:
    """Train, judge, locate and report.

    Args:
        terminal: where the run reports its progress and its verdict; None: nowhere.
        signals: stop the run where it can be resumed; None: there are none.

    Raises:
        LockstepError: if the request cannot be carried out; the message says what to do.
        KeyboardInterrupt: if it is stopped before anything is finished; the message says how to
            resume.
    """
    from lockstep.common import report as reports
    from lockstep.common.runs import parallel, prepare
    from lockstep.common.system import storage

    if terminal is None:
        terminal = reports.Terminal(quiet=True, stdout=io.StringIO(), stderr=io.StringIO())
    if request.weights is not None and request.resumed is None:
        backends.module("weight_files").check_name(request.weights)
    if request.out is not None:
        prepare.check_folder(request.out)
    if request.tensorboard is not None:
        reports.check_tensorboard()
        storage.check_writable(request.tensorboard, "--tensorboard")
    alone = request.processes == 1 and request.cluster is None
    wanted = alone and parallel.may_use_worker(request.config, request.backends, request.device)
    with parallel.TrainingWorker(wanted, backends.load, request.config.model) as worker:
        return prepare_and_train(request, backends, terminal, signals or SignalHandler(), worker)


def prepare_and_train(
    request: Request,
    backends: BackendPackage,
    terminal: Terminal,
    signals: SignalHandler,
    worker: TrainingWorker,
) -> Result:
    """Read the data, check the networks, and train."""
    from lockstep.common import data
    from lockstep.common.runs import estimate, prepare
    from lockstep.common.runs import request as requests
    from lockstep.common.runs.find import find_runs
    from lockstep.common.runs.ranks import Ranks
    from lockstep.common.runs.remote import Twins, start_twins
    from lockstep.common.runs.trainer import Interrupted, Trainer, resume_hint
    from lockstep.common.system import storage

    names = request.backends
    data.check(request.data, request.data_dir)
    terminal.line(estimate.announcement(request))
    dataset = data.load(
        request.data,
        request.data_dir,
        terminal.line,
        progress=not terminal.quiet,
        model=request.config.model,
    )
    prepare.check_same_data(request, dataset)
    config = request.config.resolve(len(dataset.train_images))
    data.check_all_shares(config, request.processes, len(dataset.train_images))
    if request.config.steps is None:
        terminal.line(f"{config.total_steps:,} steps{estimate.time_needed(request, config)}")
    device = prepare.choose_device(
        backends, config, dataset, names, terminal.line, request.device, worker
    )
    prepare.check_images(config, dataset)
    if request.weights is None:
        weights = prepare.own_start(config, dataset, device, backends)
    else:
        weights, config = prepare.load_initial_weights(
            request.weights, config, dataset, names[0], device, backends
        )
        prepare.check_same_weights(request, config)
    build = functools.partial(backends.build, config, dataset.task, device, request.compile)
    default = RUNS / f"{request.recipe}-{config.fingerprint(dataset.digest)}"
    folder = request.resume or request.out or default
    twins = Twins(build, config, request.data, request.data_dir, dataset.digest, weights)
    with (
        storage.lock_folder(folder),
        start_twins(request.cluster, twins) as start_twin,
        Ranks(build, request.processes, resume_hint(folder), request.start_ranks, signals) as ranks,
    ):
        existing = [name for name in BACKENDS if name not in names or request.keep_records]
        found = find_runs(folder, request.dtypes, existing, config, dataset, terminal.line)
        trained_by = processes_of(found)
        prepare.check_batch_norm(config, request.processes, trained_by)
        ranks.counts |= trained_by
        if request.start_ranks is not None:  # nobody has started the other framework's
            ranks.counts |= {name: 1 for name in BACKENDS if name not in names}
        trainer = Trainer(
            folder,
            config,
            dataset,
            ranks.build,
            terminal,
            weights,
            request.log_every,
            prepare.checkpoint_every(request.checkpoint_every, config),
            resumed=request.resumed is not None,
            continue_other_backend=request.resumed is not None and len(names) == 1,
            signals=signals,
            start_twin=start_twin,
        )
        if request.resumed is None and not request.keep_records:
            trainer.check_not_overwriting(names, request.dtypes)
            requests.write(requests.of(request, trainer), folder)
        try:
            return train_and_compare(request, trainer, found, device, worker, terminal)
        except KeyboardInterrupt as interruption:
            raise Interrupted(
                "; ".join(filter(None, [str(interruption), resume_hint(folder)]))
            ) from None


def processes_of(ensembles: Mapping[str, Ensembles]) -> dict[str, int]:
    """By backend, how many processes trained its runs."""
    return {
        name: ensemble.run.processes
        for by_backend in ensembles.values()
        for name, ensemble in by_backend.items()
    }


def train_and_compare(
    request: Request,
    trainer: Trainer,
    ensembles: dict[str, Ensembles],
    device: str,
    worker: TrainingWorker,
    terminal: Terminal,
) -> Result:
    """Train and judge what the folder does not hold, and write the reports.

    Args:
        ensembles: by precision and backend, what the folder holds already.
    """
    from lockstep.common import early_end
    from lockstep.common.runs import parallel
    from lockstep.common.runs.trainer import Interrupted
    from lockstep.common.runs.watch import FirstStepsDiffer

    trainer = early_end.watched(request, trainer, ensembles)
    numbers = {
        dtype: [None, *range(1, 1 + (0 if dtype == "float64" else request.twins))]
        for dtype in ensembles
    }
    found = itertools.chain(*ensembles.values())
    worker_backend = None
    if request.cluster is None and request.processes == 1:
        worker_backend = parallel.choose_worker_backend(trainer, request.backends, device, found)
    training = parallel.ParallelTraining(trainer, worker, worker_backend, numbers)
    comparisons: list[Comparison] = []
    interrupted_at = ended_early = None
    evaluated = trainer.dataset
    try:
        train_and_judge(request.backends, training, ensembles, comparisons)
        if trainer.signals.requested():
            raise Interrupted("it was stopped after the last run")
    except Interrupted as interruption:  # what is finished is reported
        interrupted_at = str(interruption)
        ensembles = judge_finished(training, ensembles, comparisons)
        if not comparisons:
            raise
    except FirstStepsDiffer:
        evaluated, sides, comparison = early_end.judge_first_steps(trainer, request.backends)
        if comparison.verdict != "disagree":  # twins explain it
            all_of_it = dataclasses.replace(request, keep_going=True)
            return train_and_compare(all_of_it, trainer, ensembles, device, worker, terminal)
        ensembles, comparisons, ended_early = {"float64": sides}, [comparison], early_end.ENDED
    if interrupted_at is None:
        confirm_float64(trainer, ensembles, comparisons)
        locate_disagreement(trainer, ensembles, comparisons)
        explain_arithmetic(trainer, ensembles, comparisons)
    runs = {
        dtype: {name: ensemble.run for name, ensemble in by_backend.items()}
        for dtype, by_backend in ensembles.items()
    }
    twins = {
        dtype: {name: list(ensemble.twins) for name, ensemble in by_backend.items()}
        for dtype, by_backend in ensembles.items()
    }
    report = make_report(
        request.recipe,
        trainer.config,
        trainer.dataset,
        request.command,
        runs,
        comparisons,
        interrupted_at,
        ended_early,
    )
    shown = dataclasses.replace(trainer, dataset=evaluated)
    write_reports(request, shown, report, runs, twins, worker)
    terminal.verdict(report, trainer.folder / "report.html")
    return Result(report, trainer.folder)


def train_and_judge(
    names: Sequence[str],
    training: ParallelTraining,
    ensembles: dict[str, Ensembles],
    comparisons: list[Comparison],
) -> None:
    """Train what is missing and judge each precision as soon as its runs are there; both results
    are added to the arguments.

    Args:
        names: of the backends to train.

    Raises:
        Interrupted: if a signal stopped a run; what was finished is in the arguments.
    """
    from lockstep.common.runs.ensemble import Ensemble
    from lockstep.common.verdict.judge import judge

    trainer = training.trainer
    with training:
        if training.name is not None:
            # This process trains all of its runs before it waits for the worker.
            for dtype, ensemble in ensembles.items():
                for name in names:
                    if name != training.name:
                        ensemble[name] = Ensemble.of(training.train(name, dtype))
            with trainer.signals.deferred():
                # Half a second, in which the worker may finish.
                importlib.import_module("matplotlib.figure")
        for dtype, ensemble in ensembles.items():
            for name in names:
                if name not in ensemble:
                    ensemble[name] = Ensemble.of(training.train(name, dtype))
            ensembles[dtype] = in_order(ensemble)
            comparisons.append(
                judge(
                    ensembles[dtype],
                    trainer.train_twins(dtype, names),
                    trainer.dataset.test_labels,
                    trainer.train_first_steps(dtype, names),
                )
            )


def judge_finished(
    training: ParallelTraining, ensembles: dict[str, Ensembles], comparisons: list[Comparison]
) -> dict[str, Ensembles]:
    """After an interruption: what was finished, by precision; its comparisons are added to those
    that are there. Where only more twins could tell, nothing is decided."""
    from lockstep.common.runs.ensemble import Ensemble
    from lockstep.common.verdict.judge import judge, without_twins

    finished = {}
    for dtype, ensemble in ensembles.items():
        records = training.finished_records(dtype)
        ensemble = {name: Ensemble.of(runs) for name, runs in records.items()} | ensemble
        if ensemble:
            finished[dtype] = in_order(ensemble)
    for ensemble in list(finished.values())[len(comparisons) :]:
        labels = training.trainer.dataset.test_labels
        comparisons.append(without_twins(judge(ensemble, lambda name, twins: [], labels)))
    return finished


def in_order(ensembles: Ensembles) -> Ensembles:
    """PyTorch's runs first."""
    return {name: ensembles[name] for name in BACKENDS if name in ensembles}


def confirm_float64(
    trainer: Trainer, ensembles: dict[str, Ensembles], comparisons: list[Comparison]
) -> None:
    """Replay steps where float64 agrees because of twins alone."""
    from lockstep.common.model.layers import module_names
    from lockstep.common.runs.trainer import backend_errors
    from lockstep.common.verdict.confirm import confirm

    for place, comparison in enumerate(comparisons):
        build = functools.partial(trainer.backend, dtype=comparison.dtype)
        runs = {name: of.run for name, of in ensembles[comparison.dtype].items()}
        with backend_errors(" and ".join(runs)):
            comparisons[place] = confirm(
                comparison,
                runs,
                trainer.config,
                trainer.dataset,
                build,
                trainer.weights,
                lambda name, build=build: module_names(build(name)),
            )


def locate_disagreement(
    trainer: Trainer, ensembles: dict[str, Ensembles], comparisons: list[Comparison]
) -> None:
    """Add to one comparison where its runs diverge.

    Only one is searched, the first that disagrees: float64, which comes first, shows a difference
    most sharply.
    """
    from lockstep.common.model.layers import module_names
    from lockstep.common.runs.trainer import backend_errors
    from lockstep.common.verdict import locate

    place = next(
        (place for place, comparison in enumerate(comparisons) if comparison.verdict == "disagree"),
        None,
    )
    if place is None or comparisons[place].location is not None:
        return
    comparison = comparisons[place]
    dtype = comparison.dtype
    runs = {name: ensemble.run for name, ensemble in ensembles[dtype].items()}
    trainer.terminal.line(f"Looking for where the {dtype} runs diverge")
    with backend_errors(" and ".join(runs)):
        location = locate.locate(
            comparison.first_divergence,
            runs,
            trainer.config,
            trainer.dataset,
            lambda name: trainer.backend(name, dtype),
            weights=trainer.weights,
            checks=comparison.checks,
            names_of=lambda name: module_names(trainer.backend(name, dtype)),
        )
    comparisons[place] = dataclasses.replace(comparison, location=location)


def explain_arithmetic(
    trainer: Trainer, ensembles: dict[str, Ensembles], comparisons: list[Comparison]
) -> None:
    """Where a user's networks disagree in a lower precision alone, say whose arithmetic is off."""
    from lockstep.common.runs.trainer import backend_errors
    from lockstep.common.verdict import arithmetic

    for place, comparison in enumerate(comparisons):
        if comparison.verdict != "disagree" or trainer.config.model in MODELS:
            continue
        if comparison.dtype == "float64" or comparison.location is None:
            return  # the program differs
        runs = {name: ensemble.run for name, ensemble in ensembles[comparison.dtype].items()}
        with backend_errors(" and ".join(runs)):
            found = arithmetic.explain(
                runs,
                trainer.config,
                trainer.dataset,
                lambda name: trainer.backend(name, "float64"),
            )
        if found is not None:
            text = arithmetic.in_words(found, comparison.dtype, FRAMEWORKS)
            location = dataclasses.replace(comparison.location, causes=(text,), fixes=())
            comparisons[place] = dataclasses.replace(
                comparison, location=location, arithmetic=found
            )
        return


def make_report(
    recipe: str,
    config: Config,
    dataset: Dataset,
    arguments: Sequence[str],
    runs: Mapping[str, Mapping[str, Record]],
    comparisons: Sequence[Comparison],
    interrupted_at: str | None,
    ended_early: str | None = None,
) -> ReportJson:
    """report.json, as a dictionary.

    Args:
        arguments: of the command line.
        runs: by dtype and backend.
        comparisons: one per precision.
        interrupted_at: where the run was interrupted, if it was.
        ended_early: why the rest was not trained, if it was not.
    """
    from lockstep.common.runs import training

    verdicts = {comparison.verdict for comparison in comparisons}
    environments = {
        name: run.environment for by_backend in runs.values() for name, run in by_backend.items()
    }
    report = {
        "schema": 1,
        "verdict": next(verdict for verdict in VERDICTS if verdict in verdicts),
        "cut_short": interrupted_at,
        "command": program.typed(arguments),
        "recipe": recipe,
        "config": config.to_json(),
        "environment": environments | {"machine": environment.describe()},
        "data": training.describe(config, dataset),
        "lenses": [comparison.to_json() for comparison in comparisons],
    }
    report |= {} if ended_early is None else {"ended_early": ended_early}
    return cast("ReportJson", report)


def write_reports(
    request: Request,
    trainer: Trainer,
    report: ReportJson,
    runs: dict[str, dict[str, Record]],
    twins: dict[str, dict[str, list[Record]]],
    worker: TrainingWorker,
) -> None:
    """report.json, report.html, the images, and TensorBoard's files."""
    from lockstep.common import data
    from lockstep.common import report as reports

    dataset, folder = trainer.dataset, trainer.folder
    sample = data.first_seen(trainer.config, len(dataset.train_images))
    reports.write_json(report, folder)
    if "ended_early" in report:  # a few first steps are worth no picture
        images = functools.partial(reports.remove_pictures, folder)
    else:
        write_here = functools.partial(
            reports.write_pictures, folder, report, runs, dataset, twins, sample
        )
        images = worker.write_images(write_here, report, sample)
    reports.write_report_page(folder, report, runs, dataset, twins, sample)  # at the same time
    images()
    if request.tensorboard is not None:
        reports.write_tensorboard(request.tensorboard, report, runs, twins, dataset, sample)
