"""The detection matrix: for each known fault, whether the verdict finds it and where it places it.

A fault has the attributes of `lockstep.backends.faults.Fault`. The caller passes the function that
injects it into the Flax side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any

from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.evidence import Build, baselines, train_first_steps, train_runs
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record
from lockstep.common.verdict import locate
from lockstep.common.verdict.comparison import Comparison, Location
from lockstep.common.verdict.judge import judge

# The run that a fault's options change.
BASE = Config(steps=60, batch_size=32, lr=0.01, momentum=0.9)
LENSES = ("float64", "float32")
# Few, since evaluation dominates a short run, and enough to show the faults of evaluation.
TEST_IMAGES = 1000
FAULTY_BACKEND = "flax"  # whose runs have the fault
Inject = Callable[[Any, Config, Dataset], AbstractContextManager[None]]


def config_of(fault: Any, images: int) -> Config:
    """The run in which `fault` shows, on so many training images."""
    return dataclasses.replace(BASE, **fault.options).resolve(images)


def measure(
    fault: Any,
    dataset: Dataset,
    build: Build,
    inject: Inject,
    cache: dict[Any, Any],
    lenses: Sequence[str] = LENSES,
    twins: int = 2,
) -> dict[str, Any]:
    """One row: a fault, and the result in each precision of a run that has it.

    Args:
        inject: within `inject(fault, config, dataset)` the Flax side has the fault.
        cache: empty at first; keeps the runs of the correct side, which faults share.
        twins: per backend, in float32; more, and float64's, are trained where the verdict asks for
            them.
    """
    if fault.train_images is not None:
        key = ("data", fault.train_images)
        dataset = cache.setdefault(key, _first_images(dataset, fault.train_images))
    config = config_of(fault, len(dataset.train_images))
    return {
        "name": fault.name,
        "sentence": fault.description,
        "source": fault.source,
        "stage": fault.stage,
        "tensor": fault.tensor,
        "changes_function": fault.changes_function,
        "lens": fault.lens,
        "config": config.to_json(),
        "train_images": len(dataset.train_images),
        "lenses": {
            dtype: measure_precision(
                dtype,
                fault,
                config,
                dataset,
                build,
                inject,
                cache,
                twins if dtype != "float64" else 0,
            )
            for dtype in lenses
        },
    }


def measure_precision(
    dtype: str,
    fault: Any,
    config: Config,
    dataset: Dataset,
    build: Build,
    inject: Inject,
    cache: dict[Any, Any],
    twins: int,
) -> dict[str, Any]:
    """The result in one precision, found as for a user's runs: judge, train more twins if needed,
    locate."""
    right = next(name for name in BACKENDS if name != FAULTY_BACKEND)
    key = (config, dataset.digest, dtype)
    if key not in cache:
        cache[key] = build(right, config, dtype), {}
    backend, trained = cache[key]

    def of_right(numbers: Iterable[int | None]) -> list[Record]:
        numbers = list(numbers)
        missing = [number for number in numbers if number not in trained]
        runs = train_runs(backend, config, dataset, dtype, missing)
        trained.update(zip(missing, runs, strict=True))
        return [trained[number] for number in numbers]

    def of_faulty(numbers: Iterable[int | None]) -> list[Record]:
        with inject(fault, config, dataset):
            return train_runs(faulty, config, dataset, dtype, numbers)

    with inject(fault, config, dataset):
        faulty = build(FAULTY_BACKEND, config, dtype)
    sides = {right: of_right, FAULTY_BACKEND: of_faulty}
    numbers = [None, *range(1, 1 + twins)]
    ensembles = {name: Ensemble.of(more(numbers)) for name, more in sides.items()}

    def begin(name: str, numbers: range) -> list[Record]:
        if name == right:
            return train_first_steps(backend, config, dataset, dtype, numbers)
        with inject(fault, config, dataset):
            return train_first_steps(faulty, config, dataset, dtype, numbers)

    comparison = judge(
        ensembles, lambda name, numbers: sides[name](numbers), dataset.test_labels, begin
    )
    runs = {name: ensemble.run for name, ensemble in ensembles.items()}
    with inject(fault, config, dataset):  # a late divergence is looked for again
        located = locate.locate(
            comparison.first_divergence,
            runs,
            config,
            dataset,
            {right: backend, FAULTY_BACKEND: faulty}.__getitem__,
            twins or 2,
        )
    if (
        exact := ("exact", config, dataset.digest)
    ) not in cache:  # the reference of rules that need float64
        cache[exact] = backend if dtype == "float64" else build(right, config, "float64")
    verdicts = baselines.verdicts(
        runs[right], runs[FAULTY_BACKEND], baselines.reference(runs[right], cache[exact])
    )
    return _finding(fault, comparison, located) | {
        "twins": len(ensembles[FAULTY_BACKEND].twins),
        "peers": verdicts,
    }


def _finding(fault: Any, comparison: Comparison, located: Location | None) -> dict[str, Any]:
    """What one lens says of a fault. Gaps and shares of bounds are None where they are not
    finite."""
    first: dict[str, Any] = located.to_json() if located else {}
    place = {key: first.get(key) for key in ("step", "stage", "tensor", "gap", "bound")}
    stage_right = place["stage"] == fault.stage
    return {
        "caught": comparison.verdict == "disagree",
        **place,
        "gap_over_bound": first["gap"] / first["bound"]
        if first.get("gap") and first["bound"]
        else None,
        "stage_right": stage_right,
        "tensor_right": stage_right and fnmatchcase(first["tensor"], fault.tensor)
        if fault.tensor
        else None,
        "trajectory_agrees": all(check.agrees for check in comparison.windows),
        **{key: first.get(key) for key in ("message", "pattern", "causes")},
    }


def _first_images(dataset: Dataset, count: int) -> Dataset:
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[:count],
        train_labels=dataset.train_labels[:count],
    )


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over the faults that can show in a measured precision. Stage and tensor are taken from
    the first precision that caught the fault."""
    rows = [row for row in rows if row["lens"] is None or row["lens"] in row["lenses"]]
    firsts = [next((f for f in row["lenses"].values() if f["caught"]), None) for row in rows]
    caught = [finding for finding in firsts if finding is not None]
    return {
        "faults": len(rows),
        "caught": len(caught),
        "missed": [
            row["name"] for row, finding in zip(rows, firsts, strict=True) if finding is None
        ],
        "stage_right": _share(finding["stage_right"] for finding in caught),
        "tensor_right": _share(f["tensor_right"] for f in caught if f["tensor_right"] is not None),
        "lenses": {
            dtype: _of_lens(rows, dtype)
            for dtype in {d: None for row in rows for d in row["lenses"]}
        },
    }


def _of_lens(rows: Sequence[dict[str, Any]], dtype: str) -> dict[str, Any]:
    """In one precision: how many faults can show, and how many were caught."""
    has = [row for row in rows if dtype in row["lenses"] and row["lens"] in (None, dtype)]
    changing = [row["lenses"][dtype]["caught"] for row in has if row["changes_function"]]
    alarms = [
        row["name"] for row in rows if row not in has and row["lenses"].get(dtype, {}).get("caught")
    ]
    return {
        "caught": _share(row["lenses"][dtype]["caught"] for row in has),
        "caught_of_those_that_change_the_function": _share(changing),
        "missed": [row["name"] for row in has if not row["lenses"][dtype]["caught"]],
        "caught_without_having_it": alarms,
    }


def summary_lines(row: dict[str, Any]) -> list[str]:
    """A fault as a user would see it reported, in a few lines."""
    lines = [f"{row['name']}: {row['sentence']} ({row['source']})"]
    for dtype, finding in row["lenses"].items():
        said = "not detected" if not finding["caught"] else finding["message"]
        said += "".join(
            f"; {text}" for text in [finding["pattern"], *(finding["causes"] or ())] if text
        )
        lines.append(f"  {dtype}: {said}")
    return lines


def _share(verdicts: Any) -> dict[str, int]:
    verdicts = list(verdicts)
    return {"yes": sum(map(bool, verdicts)), "of": len(verdicts)}


def _of(share: dict[str, int]) -> str:
    return f"{share['yes']} of {share['of']}"


def sentence(summary: dict[str, Any]) -> str:
    """The result in plain words."""
    lenses = ", ".join(
        f"{dtype}: {_of(lens['caught'])}" for dtype, lens in summary["lenses"].items()
    )
    text = f"{summary['caught']} of {summary['faults']} known faults are found ({lenses}), "
    text += f"{_of(summary['stage_right'])} in the right stage, {_of(summary['tensor_right'])} in the right tensor."
    return text + (f" Missed: {', '.join(summary['missed'])}." if summary["missed"] else "")


def table(rows: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column names (`>` for numbers) and lines: per precision the step, and the gap as a multiple
    of its bound.

    A stage after the step means that the report named that stage, while the fault lies in another.
    `none` means that this precision has no such fault.
    """
    lenses = list({dtype: None for row in rows for dtype in row["lenses"]})
    columns = ("fault", "lies in", *(name for dtype in lenses for name in (dtype, "over>")))
    lines = [
        (row["name"], row["stage"], *(cell for d in lenses for cell in _cells(row, d)))
        for row in rows
    ]
    return columns, lines


def _cells(row: dict[str, Any], dtype: str) -> tuple[str, str]:
    finding = row["lenses"].get(dtype)
    if finding is None:
        return "", ""
    if not finding["caught"]:
        return ("missed" if row["lens"] in (None, dtype) else "none"), ""
    place = f"{finding['step']}" + ("" if finding["stage_right"] else f" {finding['stage']}")
    return place, _multiple(finding["gap_over_bound"])


def _multiple(over: float | None) -> str:
    """A ratio in a few letters, as `1.2` or `3e12`; `inf` where nothing may differ, or the gap is
    not finite."""
    if over is None:
        return "inf"
    if over < 10:
        return f"{over:.1f}"
    digit, exponent = f"{over:.0e}".split("e")
    return f"{digit}e{int(exponent)}"
