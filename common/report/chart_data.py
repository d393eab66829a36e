"""The numbers behind the charts, for the charts, the tables next to them, and their texts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lockstep.common.report.json import ComparedJson, ComparisonJson
from lockstep.common.runs.record import Record

MAX_CLASSES = 40  # of more, charts show the weakest and the strongest
MAX_POINTS = 1000  # of a series: twice what a panel has pixels for
CEILING = 1e30  # larger values are drawn here, since axes have limits


class LossBound(NamedTuple):
    """A bound on the gap between two losses, at the steps from `start` to `stop` - 1."""

    start: int
    stop: int
    bound: float


Runs = dict[str, Record]  # by backend, in one precision
Records = dict[str, Runs]  # by precision
Twins = dict[str, dict[str, list[Record]]]  # by precision and backend


def running_mean(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each `window` steps in a row, and the step at which each of them ends."""
    window = max(1, min(window, len(values)))
    limited = np.clip(np.asarray(values, np.float64), -CEILING, CEILING)  # leaves NaN as it is
    return np.arange(window - 1, len(limited)), np.convolve(
        limited, np.full(window, 1 / window), "valid"
    )


def smoothing(runs: Runs) -> int:
    """The window of a running mean: a fiftieth of the run."""
    return window_of(max(record.steps for record in runs.values()))


def window_of(steps: int) -> int:
    return max(1, steps // 50)


def loss_gap(one: Record, other: Record) -> np.ndarray:
    """`series_gap` of the two losses."""
    return series_gap(one.loss, other.loss)


def loss_unit(runs: Runs) -> str:
    """The unit of a loss, after a comma; none where a pair predicts no classes: its loss is its
    own."""
    return ", nats" if next(iter(runs.values())).predictions.ndim == 1 else ""


def loss_name(runs: Runs) -> str:
    """What the loss is, with its unit."""
    return f"cross entropy{found}" if (found := loss_unit(runs)) else "loss"


def series_gap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """|difference| of each step that both have; NaN where one is not finite."""
    steps = min(len(one), len(other))
    with np.errstate(all="ignore"):
        gap = np.abs(one[:steps] - other[:steps])
    return np.where(np.isfinite(gap), np.minimum(gap, CEILING), np.nan)


def twin_spread(runs: Runs, twins: dict[str, list[Record]]) -> np.ndarray | None:
    """The largest gap so far, by step, between any two runs of one backend; None where no backend
    has twins."""
    return series_spread(
        [[record.loss for record in (runs[name], *twins.get(name, ()))] for name in runs]
    )


def series_spread(ensembles: Sequence[Sequence[np.ndarray]]) -> np.ndarray | None:
    """`twin_spread` of any series: of each side, those of its run and its twins."""
    spreads = [
        series_gap(one, other)
        for ensemble in ensembles
        for one, other in itertools.combinations(ensemble, 2)
    ]
    if not spreads:
        return None
    shortest = min(len(spread) for spread in spreads)
    return np.fmax.accumulate(np.fmax.reduce([np.fmax(spread[:shortest], 0) for spread in spreads]))


def loss_bounds(comparison: ComparedJson, loss: str = "loss") -> list[LossBound]:
    """The bounds on the gap between the losses of a step."""
    return [
        LossBound(row["start"], row["stop"], row["bound"])
        for row in comparison["stretches"]
        if row["quantity"] == loss and row["bound"] is not None
    ]


def by_accuracy(comparison: ComparisonJson, classes: Sequence[str]) -> list[str]:
    """Weakest first, by the mean accuracy of the backends; classes without test images last."""
    tables = list(comparison["per_class_accuracy"].values())

    def strength(name: str) -> float:
        known = [value for table in tables if (value := table.get(name)) is not None]
        return sum(known) / len(known) if known else math.inf

    return sorted(classes, key=strength)  # stable: equals stay in the order of the classes


def extremes(names: list[str]) -> tuple[list[str], str]:
    """The classes to draw, and a note on them: of many, the weakest and the strongest."""
    if len(names) <= MAX_CLASSES:
        return names, ""
    half = MAX_CLASSES // 2
    note = f"the {half} weakest and the {half} strongest of {len(names):,} classes"
    return names[:half] + names[-half:], note


def confusion_counts(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """int64 (classes, classes): how many test images of each true class (rows) were predicted as
    each class (columns)."""
    shared = min(len(predictions), len(labels))
    truth, guess = labels[:shared], predictions[:shared]
    known = (guess >= 0) & (guess < classes)
    return np.bincount(truth[known] * classes + guess[known], minlength=classes**2).reshape(
        classes, classes
    )


def shown_classes(comparison: ComparisonJson, classes: Sequence[str]) -> tuple[list[int], str]:
    """The classes of a confusion matrix, by label, and a note if some are left out."""
    if len(classes) <= MAX_CLASSES:
        return list(range(len(classes))), ""
    order = {name: index for index, name in enumerate(classes)}
    names, note = extremes(by_accuracy(comparison, classes))
    return [order[name] for name in names], note


def shares(counts: np.ndarray) -> np.ndarray:
    """Each count divided by the sum of its row; 0 where that sum is 0."""
    return counts / np.maximum(1, counts.sum(axis=1, keepdims=True))


def subsample(count: int, logarithmic: bool = False, limit: int = MAX_POINTS) -> np.ndarray:
    """At most `limit` of `count` indices, both ends included."""
    if count <= limit:
        return np.arange(count)
    if logarithmic:
        return np.unique(np.geomspace(1, count, limit).round().astype(np.int64)) - 1
    return np.linspace(0, count - 1, limit).round().astype(np.int64)
