"""The tables of a run's page: what was compared, how it came out, and the numbers behind each
chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lockstep.common.config import BACKENDS
from lockstep.common.data import Dataset
from lockstep.common.report.alt_text import digits
from lockstep.common.report.charts import (
    Runs,
    loss_bounds,
    loss_gap,
    running_mean,
    thin,
    twin_drift,
)
from lockstep.common.report.terminal import condense, merge, number, percent
from lockstep.common.runs.record import Record
from lockstep.common.verdict.comparison import format_distinct
from lockstep.common.verdict.statistics import CONFIDENCE

ROWS = 60  # of a table of steps


class Table(NamedTuple):
    """Cells as they are to be read; a column is one of numbers where its name ends in `>`."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


# --- Over the steps


def _steps(count: int) -> list[int]:
    """The first steps and, further on, ever fewer."""
    return thin(count, logarithmic=True, limit=ROWS).tolist()


def series(caption: str, runs: Runs, quantity: str) -> Table:
    """A quantity of each backend."""
    values = [getattr(record, quantity) for record in runs.values()]
    rows = [
        [f"{step:,}", *(digits(each[step]) for each in values)]
        for step in _steps(min(map(len, values)))
    ]
    return Table(caption, ["step>", *(f"{name}>" for name in runs)], rows)


def losses(dtype: str, runs: Runs, window: int) -> Table:
    """The training losses, and their running means from the step on at which there are any."""
    table = series(f"Training loss, nats, {dtype}", runs, "loss")
    if window == 1:
        return table
    means = [running_mean(record.loss, window)[1] for record in runs.values()]
    ends = [step - window + 1 for step in _steps(min(record.steps for record in runs.values()))]
    added = [["-" if end < 0 else digits(mean[end]) for mean in means] for end in ends]
    columns = [*table.columns, *(f"{name}, mean of {window:,}>" for name in runs)]
    return Table(
        table.caption, columns, [[*row, *more] for row, more in zip(table.rows, added, strict=True)]
    )


def gap(lens: dict[str, Any], runs: Runs, twins: dict[str, list[Record]]) -> Table:
    """The gap between the two losses, that between twins, and the bound."""
    between, drift, bounds = (
        loss_gap(runs["torch"], runs["flax"]),
        twin_drift(runs, twins),
        loss_bounds(lens),
    )
    largest = np.fmax.accumulate(np.fmax(between, 0))
    rows = []
    for step in _steps(len(between)):
        now = float(between[step])
        cells = [number(now if np.isfinite(now) else None), number(float(largest[step]))]
        if drift is not None:
            cells.append(number(float(drift[step])) if step < len(drift) else "-")
        bound = next((row["bound"] for row in bounds if row["start"] <= step < row["stop"]), None)
        rows.append([f"{step:,}", *cells, number(bound, "none")])
    apart = ["between twins, largest so far>"] if drift is not None else []
    columns = ["step>", "gap>", "largest so far>", *apart, "bound>"]
    return Table(f"Gap between the losses, nats, {lens['dtype']}", columns, rows)


# --- What was compared


def condensed(lens: dict[str, Any]) -> Table:
    """The worst row of each stage."""
    drift = _has_drift(lens["ladder"])
    rows = [
        [when, *_rung(row, drift), _mark(agrees)] for when, row, agrees in condense(lens["ladder"])
    ]
    caption = f"The tensor of each stage that is nearest to its bound, or furthest outside, {lens['dtype']}"
    return Table(caption, ["when", *_rung_columns(drift), "all ok"], rows)


def ladder(lens: dict[str, Any]) -> Table:
    """Everything that was compared at one moment of the run."""
    drift = _has_drift(lens["ladder"])
    rows = [[*_rung(row, drift), _mark(row["agrees"])] for row in lens["ladder"]]
    return Table(
        f"Every comparison of one moment, {lens['dtype']}", [*_rung_columns(drift), "ok"], rows
    )


def _has_drift(rows: list[dict[str, Any]]) -> bool:
    """Whether twins were asked: without any, there is no column for them."""
    return any(row.get("drift") is not None for row in rows)


def _rung_columns(drift: bool) -> list[str]:
    return ["step>", "stage", "tensor", *_gap_columns(drift)]


def _gap_columns(drift: bool) -> list[str]:
    return ["gap>", *(["twins' drift>"] if drift else []), "bound>"]


def _rung(row: dict[str, Any], drift: bool) -> list[str]:
    return [f"{row['step']:,}", row["stage"], row["tensor"], *_gap_cells(row, drift)]


def _gap_cells(row: dict[str, Any], drift: bool) -> list[str]:
    apart = [number(row.get("drift"), "-")] if drift else []
    return [number(row["gap"]), *apart, number(row["bound"], "none")]


def _mark(agrees: bool) -> str:
    return "ok" if agrees else "NO"


def stretches(lens: dict[str, Any]) -> Table:
    """What was compared over stretches of steps; neighbours that read alike are one row."""
    drift, rows = _has_drift(lens["stretches"]), []
    for row in merge(lens["stretches"]):
        last = max(row["start"], row["stop"] - 1)
        steps = f"{row['start']:,}" + (f" to {last:,}" if last > row["start"] else "")
        rows.append(
            [
                row["quantity"].replace("_", " "),
                steps,
                *_gap_cells(row, drift),
                _mark(row["agrees"]),
            ]
        )
    caption = f"Largest gaps by step range, {lens['dtype']}"
    return Table(caption, ["quantity", "steps>", *_gap_columns(drift), "ok"], rows)


def classes(lens: dict[str, Any], dataset: Dataset, names: list[str]) -> Table:
    """Accuracy per class, in the order of `names`, and of two runs the difference with its
    interval."""
    backends, table = list(lens["accuracy"]), lens["per_class_accuracy"]
    differences = lens.get("class_differences") or {}
    images = np.bincount(dataset.test_labels, minlength=len(dataset.classes))
    sizes = dict(zip(dataset.classes, images.tolist(), strict=True))
    columns = ["class", "test images>", *(f"{name}>" for name in backends)]
    rows = [
        [
            "all classes",
            f"{len(dataset.test_labels):,}",
            *(percent(lens["accuracy"][name]) for name in backends),
        ]
    ]
    rows += [
        [name, f"{sizes[name]:,}", *(percent(table[backend].get(name)) for backend in backends)]
        for name in names
    ]
    if differences:
        columns += ["difference, points>", f"{100 * CONFIDENCE:g} % interval>"]
        rows = [
            [*row, *_interval(differences.get(row[0]) if place else None)]
            for place, row in enumerate(rows)
        ]
    return Table(
        f"Accuracy on the test images, weakest class first, {lens['dtype']}", columns, rows
    )


def _interval(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["-", "-"]
    low, middle, high = (f"{100 * found[key]:+.1f}" for key in ("low", "difference", "high"))
    return [middle, f"{low} to {high}"]


def speed(lens: dict[str, Any]) -> Table:
    """Of each backend."""

    def shown(value: float | None, digits: int) -> str:
        return "not measured" if value is None else f"{value:,.{digits}f}"

    rows = [
        [
            name,
            shown(lens["steps_per_second"].get(name), 1),
            shown(lens.get("seconds", {}).get(name), 1),
        ]
        for name in lens["accuracy"]
    ]
    return Table(
        f"Speed, {lens['dtype']}",
        ["backend", "steps per second, after compilation>", "seconds in all>"],
        rows,
    )


def offenders(lens: dict[str, Any]) -> Table | None:
    """The entries that differ most where the runs part, if that was looked for and found."""
    found = lens.get("located")
    if not found or not found["offenders"]:
        return None
    names = [name for name in BACKENDS if name in found["offenders"][0]]
    rows = []
    for entry in found["offenders"]:
        values = [entry[name] for name in names]
        shown = ["not finite" if value is None else f"{value:.9g}" for value in values]
        if None not in values and len(values) == 2 and shown[0] == shown[1]:
            shown = list(format_distinct(*values))
        rows.append([f"[{', '.join(map(str, entry['index']))}]", *shown])
    caption = f"Largest differences in {found['tensor']}, {lens['dtype']}"
    return Table(caption, ["entry", *(f"{name}>" for name in names)], rows)


def matrix(caption: str, counts: np.ndarray, shown: list[int], names: Sequence[str]) -> Table:
    """A confusion matrix, or the difference of two: the true classes downwards, the predicted ones
    across."""
    rows = [[names[row], *(f"{value:,}" for value in counts[row, shown].tolist())] for row in shown]
    return Table(caption, ["true class", *(f"{names[column]}>" for column in shown)], rows)


# --- Where it comes from


def facts(report: dict[str, Any]) -> list[Table]:
    """Configuration, data, and what it ran on."""
    data = {key: value for key, value in report["data"].items() if key != "classes"}
    data["classes"] = len(report["data"]["classes"])
    origins = {"Configuration": report["config"], "Data": data}
    origins |= {
        f"Environment: {name}": described for name, described in report["environment"].items()
    }
    return [
        Table(caption, ["what", "value"], list(_flat(described)))
        for caption, described in origins.items()
    ]


def _flat(described: dict[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """Nested options as rows of a dotted name and a value."""
    for key, value in described.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield [f"{prefix}{key}", _said(value)]


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_said, value)) if isinstance(value, (list, tuple)) else str(value)
