"""The tables of a run's page: what was compared, how it came out, and the numbers behind each
chart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lockstep.common.data import Dataset
from lockstep.common.report.chart_data import (
    LossBound,
    Runs,
    loss_bounds,
    loss_gap,
    loss_unit,
    running_mean,
    subsample,
    twin_spread,
)
from lockstep.common.report.json import (
    CheckJson,
    ComparedJson,
    ComparisonJson,
    ReportJson,
    WindowJson,
)
from lockstep.common.report.summary import (
    DIFFERING,
    difference_cells,
    entry_cells,
    merge_equal,
    tensor_text,
    trained,
    worst_per_stage,
)
from lockstep.common.report.text import four_digits, loss, number, ok, percent, steps_text
from lockstep.common.runs.record import Record

ROWS = 60  # of a table of steps
N_FAILURES = 8  # rows


class Table(NamedTuple):
    """Cells as text; a column whose name ends in `>` holds numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


# --- Over the steps


def steps_of(count: int) -> list[int]:
    """The first steps, then steps at growing distances."""
    return subsample(count, logarithmic=True, limit=ROWS).tolist()


def series(caption: str, runs: Runs, quantity: str) -> Table:
    """A quantity at some steps, of each backend."""
    values = [getattr(record, quantity) for record in runs.values()]
    rows = [
        [f"{step:,}", *(four_digits(each[step]) for each in values)]
        for step in steps_of(min(map(len, values)))
    ]
    return Table(caption, ["step>", *(f"{name}>" for name in runs)], rows)


def losses(dtype: str, runs: Runs, window: int) -> Table:
    """The training losses and their running means."""
    table = series(f"Training loss{loss_unit(runs)}, {dtype}", runs, "loss")
    if window == 1:
        return table
    means = [running_mean(record.loss, window)[1] for record in runs.values()]
    ends = [step - window + 1 for step in steps_of(min(record.steps for record in runs.values()))]
    added = [["-" if end < 0 else four_digits(mean[end]) for mean in means] for end in ends]
    columns = [*table.columns, *(f"{name}, mean of {window:,}>" for name in runs)]
    return Table(
        table.caption, columns, [[*row, *more] for row, more in zip(table.rows, added, strict=True)]
    )


def gap(comparison: ComparisonJson, runs: Runs, twins: dict[str, list[Record]]) -> Table:
    """The gap between the two losses, that between twins, and the bound."""
    between, spread = loss_gap(*runs.values()), twin_spread(runs, twins)
    caption = f"Gap between the losses{loss_unit(runs)}, {comparison['dtype']}"
    return gap_table(caption, between, spread, loss_bounds(comparison))


def gap_table(
    caption: str, between: np.ndarray, spread: np.ndarray | None, bounds: Sequence[LossBound]
) -> Table:
    """The same of any series.

    Args:
        between: the gap of each step; NaN where it is not finite.
        spread: the largest one so far between twins; None without twins.
    """
    largest = np.fmax.accumulate(np.fmax(between, 0))
    rows = []
    for step in steps_of(len(between)):
        now = float(between[step])
        cells = [number(now if np.isfinite(now) else None), number(float(largest[step]))]
        if spread is not None:
            cells.append(number(float(spread[step])) if step < len(spread) else "-")
        bound = next((row.bound for row in bounds if row.start <= step < row.stop), None)
        rows.append([f"{step:,}", *cells, number(bound, "none")])
    twin_column = ["between twins, largest so far>"] if spread is not None else []
    columns = ["step>", "gap>", "largest so far>", *twin_column, "bound>"]
    return Table(caption, columns, rows)


# --- What was compared


def worst_checks(comparison: ComparedJson) -> Table:
    """The worst check of each stage."""
    spread = _has_spread(comparison["ladder"])
    rows = [
        [when, *_check_cells(row, spread), ok(agrees, row.get("power", True))]
        for when, row, agrees in worst_per_stage(comparison["ladder"])
    ]
    worst = "Per stage, the tensor that is nearest to its bound or furthest beyond it"
    columns = ["when", *_check_columns(spread), "all ok"]
    return Table(f"{worst}, {comparison['dtype']}", columns, rows)


def checks(comparison: ComparedJson) -> Table:
    """All comparisons of single steps."""
    spread = _has_spread(comparison["ladder"])
    rows = [
        [*_check_cells(row, spread), ok(row["agrees"], row.get("power", True))]
        for row in comparison["ladder"]
    ]
    caption = f"Every comparison of a single step, {comparison['dtype']}"
    return Table(caption, [*_check_columns(spread), "ok"], rows)


def first_failures(comparison: ComparedJson) -> Table | None:
    """The first comparisons of single steps that fail, in the order of computation; None if none
    does."""
    failed = [row for row in comparison["ladder"] if not row["agrees"]]
    if not failed:
        return None
    spread = _has_spread(comparison["ladder"])
    rows = [_check_cells(row, spread) for row in failed[:N_FAILURES]]
    of = f", {N_FAILURES} of {len(failed):,}" if len(failed) > N_FAILURES else ""
    caption = f"What fails first, in the order of computation, {comparison['dtype']}{of}"
    return Table(caption, _check_columns(spread), rows)


def results(comparisons: Sequence[ComparisonJson]) -> Table:
    """How well each run learned, in each precision."""
    rows = []
    known = any(value is not None for each in comparisons for value in each["accuracy"].values())
    for each in comparisons:
        for name in trained(each):
            rows.append(
                [
                    f"{each['dtype']}, {name}",
                    *([percent(each["accuracy"][name])] if known else []),
                    loss(each["test_loss"][name]),
                    loss(each["final_loss"][name]),
                ]
            )
    columns = ["run", *(["accuracy>"] if known else []), "test loss>", "last loss>"]
    caption = "On the test images; last loss: of the last batch. Losses: cross entropy, in nats"
    if not known:
        caption = "On the test data; last loss: of the last batch"
    return Table(caption, columns, rows)


def windows(comparison: ComparedJson) -> Table:
    """All comparisons of step ranges; neighbours with the same numbers are one row."""
    spread = _has_spread(comparison["stretches"])
    rows = [
        [
            row["quantity"].replace("_", " "),
            steps_text(row["start"], row["stop"]),
            *_gap_cells(row, spread),
            ok(row["agrees"], row.get("power", True)),
        ]
        for row in merge_equal(comparison["stretches"])
    ]
    caption = f"Largest gaps by step range, {comparison['dtype']}"
    return Table(caption, ["quantity", "steps>", *_gap_columns(spread), "ok"], rows)


def _has_spread(rows: Sequence[CheckJson] | Sequence[WindowJson]) -> bool:
    """Whether twins were trained: without any, there is no column for them."""
    return any(row.get("drift") is not None for row in rows)


def _check_columns(spread: bool) -> list[str]:
    return ["step>", "stage", "tensor", *_gap_columns(spread)]


def _check_cells(row: CheckJson, spread: bool) -> list[str]:
    return [f"{row['step']:,}", row["stage"], tensor_text(row), *_gap_cells(row, spread)]


def _gap_columns(spread: bool) -> list[str]:
    return ["gap>", *(["twins' spread>"] if spread else []), "bound>"]


def _gap_cells(row: CheckJson | WindowJson, spread: bool) -> list[str]:
    between_twins = [number(row.get("drift"), "-")] if spread else []
    return [number(row["gap"]), *between_twins, number(row["bound"], "none")]


def classes(comparison: ComparisonJson, dataset: Dataset, names: list[str]) -> Table:
    """Accuracy per class, in the order of `names`; of two runs, also the difference, and what the
    verdict compares: images that one side alone recognises, and how many twins differ in."""
    backends, table = list(comparison["accuracy"]), comparison["per_class_accuracy"]
    differences = comparison.get("class_differences") or {}
    images = np.bincount(dataset.test_labels, minlength=len(dataset.classes))
    sizes = dict(zip(dataset.classes, images.tolist(), strict=True))
    columns = ["class", "test images>", *(f"{name}>" for name in backends)]
    rows = [
        [
            "all classes",
            f"{len(dataset.test_labels):,}",
            *(percent(comparison["accuracy"][name]) for name in backends),
        ]
    ]
    rows += [
        [name, f"{sizes[name]:,}", *(percent(table[backend].get(name)) for backend in backends)]
        for name in names
    ]
    if differences:
        columns += ["difference, points>", *DIFFERING]
        rows = [
            [*row, *difference_cells(differences.get(row[0]) if place else None)]
            for place, row in enumerate(rows)
        ]
    return Table(
        f"Accuracy on the test images, weakest class first, {comparison['dtype']}", columns, rows
    )


def speed(comparison: ComparisonJson) -> Table:
    """Speed and time of each backend."""

    def shown(value: float | None, digits: int) -> str:
        return "not measured" if value is None else f"{value:,.{digits}f}"

    rows = [
        [
            name,
            shown(comparison["steps_per_second"].get(name), 1),
            shown(comparison.get("seconds", {}).get(name), 1),
        ]
        for name in comparison["accuracy"]
    ]
    return Table(
        f"Speed of this run, with whatever else the machine did, {comparison['dtype']}",
        ["backend", "steps per second, after compilation>", "seconds in all>"],
        rows,
    )


def worst_entries(comparison: ComparisonJson) -> Table | None:
    """The entries that differ most where the runs diverge; None if no place was found."""
    found = comparison.get("located")
    if not found or not found["offenders"]:
        return None
    caption = f"Largest differences in {found['tensor']}, {comparison['dtype']}"
    columns = ["entry", *(f"{name}>" for name in trained(comparison))]
    return Table(caption, columns, [entry_cells(entry) for entry in found["offenders"]])


def matrix(caption: str, counts: np.ndarray, shown: list[int], names: Sequence[str]) -> Table:
    """A confusion matrix, or the difference of two: true classes in rows, predicted classes in
    columns."""
    rows = [[names[row], *(f"{value:,}" for value in counts[row, shown].tolist())] for row in shown]
    return Table(caption, ["true class", *(f"{names[column]}>" for column in shown)], rows)


# --- Where it comes from


def facts(report: ReportJson) -> list[Table]:
    """Configuration, data and environment."""
    data = {key: value for key, value in report["data"].items() if key != "classes"}
    data["classes"] = len(report["data"]["classes"])
    origins: dict[str, Mapping[str, object]] = {"Configuration": report["config"], "Data": data}
    origins |= {f"Environment: {name}": found for name, found in report["environment"].items()}
    return [
        Table(caption, ["option", "value"], list(flat(found))) for caption, found in origins.items()
    ]


def flat(described: Mapping[str, object], prefix: str = "") -> Iterator[list[str]]:
    """Rows of a dotted name and a value."""
    for key, value in described.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield [f"{prefix}{key}", _value_text(value)]


def _value_text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(_value_text, value)) if isinstance(value, (list, tuple)) else str(value)
