"""report.json: the keys of its schema, and its writer.

The keys are older than the names in the code: `lenses` are the comparisons, one per precision;
`ladder` are the checks of single steps, `stretches` those of a range of steps; `drift` is the
largest gap between twins, `beginners` counts twins of the first steps, `broken` is the step of a
loss that is not finite, `legs` are the segments of a resumed run, `located` is where two runs
diverge, `how` the method that found the place, `offenders` the entries that differ most. Keys that only
newer reports have are `NotRequired`.

The file holds JSON types only; a number that is not finite is null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np

from lockstep.common.system.storage import write_atomic
from lockstep.common.verdict.comparison import Rule, Verdict
from lockstep.common.verdict.statistics import ClassDifference

SCHEMA = 1


class OutcomeJson(TypedDict):
    """How a comparison came out."""

    gap: float | None
    bound: float | None
    agrees: bool
    power: NotRequired[bool]  # whether some run would fail this check
    measure: NotRequired[str]  # of the differences of a tensor's entries: largest or median


class CheckJson(OutcomeJson):
    """One comparison of one step."""

    step: int
    stage: str
    tensor: str
    drift: NotRequired[float | None]


class WindowJson(OutcomeJson):
    """One comparison of the steps from `start` to `stop` - 1."""

    quantity: str
    start: int
    stop: int
    drift: float | None


class PlaceJson(TypedDict):
    """A place in a run."""

    step: int
    stage: str
    tensor: str


class DivergenceJson(PlaceJson):
    """The first check that two runs fail."""

    gap: float | None
    bound: float | None
    torch: float | None
    flax: float | None
    message: str


class EntryJson(TypedDict):
    """One entry of a tensor in both runs."""

    index: list[int]
    torch: float | None
    flax: float | None


class SourceJson(TypedDict):
    """Lines of a network's source, with their numbers."""

    file: str
    lines: list[tuple[int, str]]


class LocationJson(DivergenceJson):
    """Where two runs diverge, and what usually causes that."""

    how: str
    pattern: str | None
    offenders: list[EntryJson]
    causes: list[str]
    failing: NotRequired[int]  # tensors of that step and stage that fail, of how many, ...
    tensors: NotRequired[int]
    common: NotRequired[str]  # ... and what these have in common
    own_names: NotRequired[dict[str, str]]  # of the tensor in each module, where they differ
    fixes: NotRequired[list[str]]  # code that sets right what usually causes it
    sources: NotRequired[dict[str, SourceJson]]  # by backend, the lines about that layer


class TwinJson(TypedDict):
    """How far one twin is from its run."""

    max_abs_loss_gap: float | None
    predictions_equal: int | None


class GrowthJson(TypedDict):
    """How float64's rounding grew, where twins explain it."""

    start: int
    first: float
    stop: int
    largest: float
    factor: float
    replayed: list[int]
    beyond: NotRequired[int | None]  # the step from which on the gap exceeds the twins' bound


class ComparedJson(TypedDict):
    """What was compared in one precision."""

    dtype: str
    steps: int
    bound: Rule
    ladder: list[CheckJson]
    stretches: list[WindowJson]


class ComparisonJson(ComparedJson):
    """Two runs compared in one precision, or one run described. By backend where a dictionary."""

    broken: NotRequired[dict[str, int | None]]  # reports of earlier versions have none
    verdict: Verdict
    diverged_at: NotRequired[int | None]  # the step at which both runs diverge
    no_power_from: NotRequired[int | None]  # the step from which on no check could fail
    not_reproducible: NotRequired[dict[str, int]]  # the first step that a second run changed
    score: NotRequired[float | None]  # of two runs; the three above and the two below, too
    beginners: NotRequired[dict[str, int]]
    class_differences: NotRequired[dict[str, ClassDifference]]  # by class
    max_abs_loss_gap: float | None
    first_divergence: DivergenceJson | None
    located: NotRequired[LocationJson]
    growth: NotRequired[GrowthJson]
    exchanged: NotRequired[dict[str, list[str]]]  # layers of a pair, for Lockstep's own
    unmatched_slots: NotRequired[dict[str, list[str]]]  # of a pair's own optimizer
    arithmetic: NotRequired[dict[str, object]]  # see `Arithmetic`
    final_loss: dict[str, float | None]
    test_loss: dict[str, float | None]
    accuracy: dict[str, float | None]  # None, and no classes below: nothing was classified
    per_class_accuracy: dict[str, dict[str, float | None]]  # None: no test images
    predictions_equal: int | None
    predictions_total: int
    twins: dict[str, list[TwinJson]]
    steps_per_second: dict[str, float | None]
    seconds: NotRequired[dict[str, float | None]]


class DataJson(TypedDict):
    """The data set; its other keys depend on its source."""

    name: str
    classes: list[str]


class ReportJson(TypedDict):
    """The report of one run of the program."""

    schema: int
    verdict: Verdict
    cut_short: NotRequired[str | None]  # where the run was interrupted
    ended_early: NotRequired[str]  # why the rest was not trained
    command: list[str]
    recipe: NotRequired[str]
    config: dict[str, object]
    environment: dict[str, dict[str, object]]
    data: DataJson
    lenses: list[ComparisonJson]


def jsonable(value: object) -> object:
    """`value` in JSON types: NumPy's scalars and arrays as Python's, paths as strings, non-finite
    numbers as None."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, (float, np.generic)) and not isinstance(value, (str, bytes)):
        number = float(value)  # bfloat16, too, is a generic
        return number if math.isfinite(number) else None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def to_json(report: Mapping[str, object]) -> str:
    """`report` as the text of its file."""
    return json.dumps(jsonable(report), allow_nan=False, indent=1) + "\n"


def write_json(report: Mapping[str, object], folder: Path) -> Path:
    """Write `report` to `report.json` in `folder`, whole or not at all.

    Raises:
        RecordError: if the folder cannot be written.
    """
    path = Path(folder, "report.json")
    write_atomic(path, to_json(report).encode())
    return path
