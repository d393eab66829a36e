"""`diff` of two folders of runs: their records are compared as they are, and nothing is trained.

The two may be of one framework, by another number of processes, on another machine, or with other
versions of the libraries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lockstep.common.config import BACKENDS, DTYPES, Config
from lockstep.common.errors import ConfigError, DataError, RecordError
from lockstep.common.request import Result
from lockstep.common.runs import request as requests
from lockstep.common.runs.request import RunRequest
from lockstep.common.system import program

# What follows imports NumPy and more; a command that only checks its options does without.
if TYPE_CHECKING:
    from lockstep.common.data import Dataset
    from lockstep.common.report import Terminal
    from lockstep.common.runs.ensemble import Ensemble, Ensembles
    from lockstep.common.verdict.comparison import Comparison


class Folder(NamedTuple):
    """A folder of runs, and which of them are finished."""

    path: Path
    request: RunRequest
    held: dict[str, list[str]]  # by backend, the precisions of its finished runs


def are_runs(a: Path, b: Path) -> bool:
    """Whether both are folders of runs.

    Raises:
        ConfigError: if one of them alone is.
    """
    found = [(folder / requests.FILE).is_file() for folder in (a, b)]
    if all(found) or not any(found):
        return all(found)
    run, other = (a, b) if found[0] else (b, a)
    what = "holds none" if other.exists() else "is not there"
    raise ConfigError(
        f"{run} holds runs and {other} {what}: give two folders of runs, as {program.name()} --out "
        "DIR writes them, or two of recordings"
    )


def diff(
    a: Path,
    b: Path,
    out: Path,
    terminal: Terminal,
    backend: str | None = None,
    data_dir: Path | None = None,
    command: Sequence[str] = (),
) -> Result:
    """Compare the runs of one framework in `a` with those in `b`, in every precision.

    Args:
        out: the folder of the report.
        backend: whose runs; None: of the one that both hold, or the only one of each.
        data_dir: where CIFAR-10 is.
        command: the command line, for the report.

    Raises:
        LockstepError: if they cannot be compared; the message says what to do.
    """
    from lockstep.common import data
    from lockstep.common import report as reports
    from lockstep.common.session import make_report
    from lockstep.common.verdict.compare import check_comparable

    if out.resolve() in (a.resolve(), b.resolve()):
        raise ConfigError(f"{out} is one of the two runs: choose another folder with --out")
    folders = [read_folder(path) for path in (a, b)]
    chosen = choose(folders, backend)
    dtypes = shared_precisions(folders, chosen)
    found = {
        dtype: [read_ensemble(f.path, n, dtype) for f, n in zip(folders, chosen, strict=True)]
        for dtype in dtypes
    }
    for one, other in found.values():
        check_comparable(one.run, other.run)
    one, other = found[dtypes[0]]
    config, started = Config.from_json(one.run.config), folders[0].request
    counts = one.run.processes, other.run.processes
    if config.batch_norm == "local" and counts[0] != counts[1]:
        raise ConfigError(
            f"--batch-norm local is another network in {counts[0]} processes than in {counts[1]}: "
            "run both with the same --processes, or with --batch-norm global"
        )
    dataset = data.load(started.data, data_dir, terminal.line, model=config.model)
    if dataset.digest != started.digest:
        raise DataError(f"{a} was trained on other data than --data {started.data} now")
    names = side_names((one, other), (a, b))
    ensembles: dict[str, Ensembles] = {
        dtype: dict(zip(names, pair, strict=True)) for dtype, pair in found.items()
    }
    comparisons = [compared(pair, config, dataset) for pair in ensembles.values()]
    runs = {dtype: {name: of.run for name, of in pair.items()} for dtype, pair in ensembles.items()}
    twins = {
        dtype: {name: list(of.twins) for name, of in pair.items()}
        for dtype, pair in ensembles.items()
    }
    report = make_report(started.recipe, config, dataset, (), runs, comparisons, None)
    report["command"] = list(command)
    sample = data.first_seen(config, len(dataset.train_images))
    reports.write_json(report, out)
    reports.write_pictures(out, report, runs, dataset, twins, sample)
    page = reports.write_report_page(out, report, runs, dataset, twins, sample)
    terminal.verdict(report, page)
    return Result(report, out)


def read_folder(path: Path) -> Folder:
    """The finished runs of a folder.

    Raises:
        RecordError: if there are none, or some of those that were started are missing.
    """
    from lockstep.common.runs import record

    request = requests.read(path)
    held = {
        name: [d for d in DTYPES if (path / f"{record.file_stem(name, d)}.safetensors").is_file()]
        for name in BACKENDS
    }
    started = BACKENDS if request.backend == "both" else (request.backend,)
    missing = [
        f"{name} {dtype}" for name in started for dtype in request.dtypes if dtype not in held[name]
    ]
    if missing:
        raise RecordError(
            f"{path} is not finished ({missing[0]} is missing): finish it with "
            f"{program.name()} --resume {path}"
        )
    return Folder(path, request, {name: dtypes for name, dtypes in held.items() if dtypes})


def choose(folders: Sequence[Folder], backend: str | None) -> list[str]:
    """The backend of either side; raises ConfigError if a folder does not hold it, or if it is not
    clear which is meant."""
    for folder in folders:
        if backend is not None and backend not in folder.held:
            raise ConfigError(
                f"{folder.path} holds no run of {backend}, but of {' and '.join(folder.held)}: "
                "choose that one with --backend"
            )
    if backend is not None:
        return [backend, backend]
    both = [name for name in BACKENDS if all(name in folder.held for folder in folders)]
    if len(both) == 1:
        return both * 2
    if both:
        raise ConfigError(
            f"{folders[0].path} and {folders[1].path} hold runs of {' and '.join(both)}: say whose "
            f"to compare with --backend {both[0]}"
        )
    return [next(iter(folder.held)) for folder in folders]


def shared_precisions(folders: Sequence[Folder], backends: Sequence[str]) -> list[str]:
    """The precisions, which both sides must have."""
    one, other = (f.held[name] for f, name in zip(folders, backends, strict=True))
    if one != other:
        alone = [dtype for dtype in DTYPES if (dtype in one) != (dtype in other)]
        without = folders[0 if alone[0] in other else 1].path
        raise RecordError(
            f"{folders[0].path} holds {' and '.join(one)}, {folders[1].path} {' and '.join(other)}: "
            f"run the one in {without} in {alone[0]}, too, with the same --out"
        )
    return one


def read_ensemble(folder: Path, name: str, dtype: str) -> Ensemble:
    """The run of a backend in one precision, and the twins of that run.

    Raises:
        RecordError: if a record is damaged, or not what its name says.
    """
    from lockstep.common.runs import record
    from lockstep.common.runs.ensemble import Ensemble

    stem = record.file_stem(name, dtype)
    paths = [folder / f"{stem}.safetensors"]
    if dtype != "float64":  # whose gaps twins explain only together with steps that are replayed
        paths += sorted(folder.glob(f"{stem}-twin*.safetensors"))
    found = [record.read(path) for path in paths]
    for path, each in zip(paths, found, strict=True):
        if each.stem != path.stem:
            raise RecordError(f"the record {path} is not what its name says: run {name} again")
    run, *twins = found
    own = [
        twin
        for twin in twins  # an earlier run may have left others
        if (twin.config, twin.data, twin.source) == (run.config, run.data, run.source)
    ]
    return Ensemble.of([run, *own])


def side_names(sides: Sequence[Ensemble], paths: Sequence[Path]) -> list[str]:
    """What the two are called: by backend and processes, and where these are alike, by folder."""
    names = [
        of.run.backend + (f" ({of.run.processes} processes)" if of.run.processes > 1 else "")
        for of in sides
    ]
    if names[0] != names[1]:
        return names
    where = [path.resolve().name for path in paths]
    where = where if where[0] != where[1] else [str(path) for path in paths]
    where = where if where[0] != where[1] else ["A", "B"]
    return [f"{name} ({place})" for name, place in zip(names, where, strict=True)]


def compared(ensembles: Ensembles, config: Config, dataset: Dataset) -> Comparison:
    """The verdict in one precision, by the twins that are there, and the place, as recorded. Nothing
    is decided where only more twins could tell."""
    from lockstep.common.verdict import locate
    from lockstep.common.verdict.judge import differs_in_first_steps, judge, twins_wanted

    found = judge(ensembles, lambda name, twins: (), dataset.test_labels)
    # In float64 what differs in the first steps is no rounding, but for gradients that cancel.
    early = found.dtype != "float64" and differs_in_first_steps(found)
    if found.verdict == "disagree" and (early or twins_wanted(found)):
        return dataclasses.replace(found, verdict="undecided")
    if found.verdict != "disagree" or found.location is not None:
        return found
    place = locate.locate(
        found.first_divergence,
        {name: of.run for name, of in ensembles.items()},
        config,
        dataset,
        None,
        checks=found.checks,
    )
    return dataclasses.replace(found, location=place)
