"""A run in charts: losses and their gap, learning rate and gradient norm, accuracy per class,
confusions.

Each `draw_` function fills one panel; `losses`, `course`, `classes` and `confusion` are whole
figures. What they draw is computed by functions of its own, for the tables and the words that go
with a chart.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lockstep.common.config import BACKENDS
from lockstep.common.data import Dataset
from lockstep.common.report.figures import (
    BAND,
    BOUND,
    COLOURS,
    GREY,
    INK,
    LINES,
    WRONG,
    label,
    new_figure,
    plain,
)
from lockstep.common.report.terminal import percent
from lockstep.common.runs.record import Record

MAX_CLASSES = 40  # of more, the weakest and the strongest are drawn
MAX_WRITTEN = 12  # classes, up to which a confusion matrix has its numbers written in
MAX_POINTS = 1000  # of a series: twice what a panel has pixels for
CEILING = 1e30  # values beyond it are drawn there, for axes have limits
DECADES = 1e3  # what spans more has a logarithmic axis
SHADE = 0.6  # opacity of a full cell: what is written in it can be read on light and on dark pages

Runs = dict[str, Record]  # by backend, one lens
Records = dict[str, Runs]  # by lens
Twins = dict[str, dict[str, list[Record]]]  # by lens, by backend


# --- What is drawn


def running_mean(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each `window` steps in a row, and the step at which each of them ends."""
    window = max(1, min(window, len(values)))
    limited = np.clip(np.asarray(values, np.float64), -CEILING, CEILING)  # leaves NaN as it is
    return np.arange(window - 1, len(limited)), np.convolve(
        limited, np.full(window, 1 / window), "valid"
    )


def smoothing(runs: Runs) -> int:
    """How many steps a running mean takes: a fiftieth of the run."""
    return max(1, max(record.steps for record in runs.values()) // 50)


def loss_gap(one: Record, other: Record) -> np.ndarray:
    """|difference| of the two losses of each step that both have; NaN where one is not finite."""
    steps = min(one.steps, other.steps)
    with np.errstate(all="ignore"):
        gap = np.abs(one.loss[:steps] - other.loss[:steps])
    return np.where(np.isfinite(gap), np.minimum(gap, CEILING), np.nan)


def twin_drift(runs: Runs, twins: dict[str, list[Record]]) -> np.ndarray | None:
    """The largest gap so far, by step, between any two runs of one backend; None where no backend
    has twins."""
    sides = [[runs[name], *twins.get(name, ())] for name in BACKENDS if name in runs]
    drifts = [
        loss_gap(one, other) for side in sides for one, other in itertools.combinations(side, 2)
    ]
    if not drifts:
        return None
    shortest = min(len(drift) for drift in drifts)
    return np.fmax.accumulate(np.fmax.reduce([np.fmax(drift[:shortest], 0) for drift in drifts]))


def loss_bounds(lens: dict[str, Any]) -> list[dict[str, Any]]:
    """The stretches that bound the loss of each step."""
    return [
        row for row in lens["stretches"] if row["quantity"] == "loss" and row["bound"] is not None
    ]


def ranked(lens: dict[str, Any], classes: Sequence[str]) -> list[str]:
    """Weakest first, by the mean accuracy of the backends; classes without test images last."""
    tables = list(lens["per_class_accuracy"].values())

    def strength(name: str) -> float:
        known = [value for table in tables if (value := table.get(name)) is not None]
        return sum(known) / len(known) if known else math.inf

    return sorted(classes, key=strength)  # stable: equals stay in the order of the classes


def extremes(names: list[str]) -> tuple[list[str], str]:
    """Of many ranked classes the weakest and the strongest, and a note that says so; else all, and
    no note."""
    if len(names) <= MAX_CLASSES:
        return names, ""
    half = MAX_CLASSES // 2
    return names[:half] + names[
        -half:
    ], f"the {half} weakest and the {half} strongest of {len(names):,} classes"


def confusion_counts(predictions: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """int64 (classes, classes): how many test images of the class of the row were taken for that of
    the column."""
    shared = min(len(predictions), len(labels))
    truth, guess = labels[:shared], predictions[:shared]
    known = (guess >= 0) & (guess < classes)
    return np.bincount(truth[known] * classes + guess[known], minlength=classes**2).reshape(
        classes, classes
    )


def shown_classes(lens: dict[str, Any], classes: Sequence[str]) -> tuple[list[int], str]:
    """The classes of a confusion matrix, by label, and a note if some are left out."""
    if len(classes) <= MAX_CLASSES:
        return list(range(len(classes))), ""
    order = {name: index for index, name in enumerate(classes)}
    names, note = extremes(ranked(lens, classes))
    return [order[name] for name in names], note


def shares(counts: np.ndarray) -> np.ndarray:
    """Of each row's sum; 0 where that is 0."""
    return counts / np.maximum(1, counts.sum(axis=1, keepdims=True))


def thin(count: int, logarithmic: bool = False, limit: int = MAX_POINTS) -> np.ndarray:
    """At most `limit` of `count` indices, both ends included."""
    if count <= limit:
        return np.arange(count)
    if logarithmic:
        return np.unique(np.geomspace(1, count, limit).round().astype(np.int64)) - 1
    return np.linspace(0, count - 1, limit).round().astype(np.int64)


# --- Panels


def draw_series(axes: Any, runs: Runs, quantity: str, unit: str, window: int = 1) -> None:
    """A quantity of every step, of each backend: its running mean over `window` steps and, thinly,
    the steps alone."""
    drawn = []
    for name in BACKENDS:
        if name not in runs:
            continue
        values = getattr(runs[name], quantity)
        x, y = running_mean(values, window)
        kept, style = thin(len(x)), LINES[name] if len(runs) == 2 else "-"
        mark = "o" if len(x) == 1 else None  # one step makes no line
        axes.plot(
            x[kept],
            y[kept],
            linestyle=style,
            marker=mark,
            color=COLOURS[name],
            linewidth=1.8,
            label=name,
            zorder=3,
        )
        drawn.append(y[np.isfinite(y)])
        if window > 1:
            kept = thin(len(values))
            raw = np.clip(values[kept], -CEILING, CEILING)
            axes.plot(kept, raw, color=COLOURS[name], linewidth=0.5, alpha=0.35, zorder=2)
    seen = np.concatenate(drawn)
    if len(seen) and seen.min() > 0 and seen.max() / seen.min() > DECADES:
        _decades(axes)
    elif quantity != "loss":
        axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel(unit + (f"\n(thick: mean of {window:,} steps)" if window > 1 else ""))
    _step_ticks(axes)
    axes.legend(frameon=False)
    plain(axes)


def draw_gap(axes: Any, lens: dict[str, Any], runs: Runs, twins: dict[str, list[Record]]) -> None:
    """The gap between the two training losses over the twins' band and the bound; where the runs
    part is marked."""
    from matplotlib.ticker import NullLocator

    gap, drift, bounds = (
        loss_gap(runs["torch"], runs["flax"]),
        twin_drift(runs, twins),
        loss_bounds(lens),
    )
    steps = len(gap)
    seen = np.concatenate([gap, [] if drift is None else drift, [row["bound"] for row in bounds]])
    seen = seen[np.isfinite(seen) & (seen > 0)]
    # Where a logarithmic axis puts zero: a decade below all else.
    floor = 10.0 ** (math.floor(math.log10(seen.min())) - 1) if len(seen) else 1e-17
    top = 10 * max(float(seen.max(initial=0.0)), 10 * floor)

    if drift is not None:
        kept, drift = thin(len(drift), logarithmic=True), np.fmax(drift, floor)
        axes.fill_between(
            kept, floor, drift[kept], color=BAND, linewidth=0, label="between twins, largest so far"
        )
    known = np.flatnonzero(np.isfinite(gap))
    dots = known[thin(len(known), logarithmic=True, limit=MAX_POINTS // 2)]
    axes.plot(dots, np.fmax(gap[dots], floor), ".", markersize=2.5, color=GREY, label="gap")
    points = known[thin(len(known), logarithmic=True)]
    largest = np.fmax.accumulate(np.fmax(gap, floor))
    axes.plot(points, largest[points], color=INK, linewidth=1.5, label="largest gap so far")
    for place, row in enumerate(bounds):
        ends, bound = (
            [row["start"], max(row["stop"] - 1, row["start"] + 0.5)],
            max(row["bound"], floor),
        )
        name = None if place else "bound (on the closest pair)"
        axes.plot(ends, [bound, bound], color=BOUND, linewidth=2, linestyle=(0, (4, 1)), label=name)

    _decades(axes)
    axes.set_ylim(floor / 2, top)
    _step_ticks(axes)
    if steps > 30:  # gaps grow from step 0 on, in decades
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.set_xticks([0, *(10**power for power in range(math.ceil(math.log10(steps))))])
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(-0.15, steps * 1.15)
    if bool((gap == 0).any()):
        axes.axhline(floor, color=GREY, linewidth=0.8, linestyle=":")
        place = {
            "xycoords": ("axes fraction", "data"),
            "textcoords": "offset points",
            "ha": "right",
        }
        axes.annotate("equal", (1, floor), xytext=(-2, 2), fontsize=8, color=GREY, **place)
    _divergence(axes, lens["first_divergence"])
    axes.set_xlabel("step")
    axes.set_ylabel("|torch - flax|, nats")
    plain(axes)


def _step_ticks(axes: Any) -> None:
    """Whole steps, and few of them, for their numbers are long."""
    axes.locator_params(axis="x", nbins=5, integer=True, min_n_ticks=1)
    axes.xaxis.set_major_formatter("{x:,g}")


def _decades(axes: Any) -> None:
    """A logarithmic axis upwards, whose labels need no formulas."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_major_formatter(
        lambda value, _: f"{value:g}" if 1e-3 <= value < 1e4 else f"{value:.0e}"
    )
    axes.yaxis.set_minor_locator(NullLocator())


def _divergence(axes: Any, first: dict[str, Any] | None) -> None:
    """Mark, and name above the panel, where the two runs diverge."""
    if first is None:
        return
    axes.axvline(first["step"], color=WRONG, linewidth=1.4, linestyle="-.")
    where = axes.transAxes.inverted().transform(axes.transData.transform((first["step"], 1.0)))[0]
    side = "left" if where < 0.35 else "right" if where > 0.65 else "center"
    named = (
        first["stage"]
        if first["tensor"] == first["stage"]
        else f"{first['stage']}, {first['tensor']}"
    )
    text = label(f"they diverge at step {first['step']:,}: {named}", 60)
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": side}
    axes.annotate(text, (first["step"], 1), xytext=(0, 3), fontsize=8.5, color=WRONG, **place)


def draw_classes(axes: Any, lens: dict[str, Any], names: list[str]) -> None:
    """A bar per class and backend, and a line for all classes."""
    table = lens["per_class_accuracy"]
    backends = [backend for backend in BACKENDS if backend in lens["accuracy"]]
    rows, height = np.arange(len(names)), 0.78 / len(backends)
    for place, backend in enumerate(backends):
        values = [table[backend].get(name) for name in names]
        where = rows + (place - (len(backends) - 1) / 2) * height
        axes.barh(
            where,
            [100 * (value or 0) for value in values],
            height * 0.92,
            color=COLOURS[backend],
            label=backend,
        )
        for y, value in zip(where, values, strict=True):
            axes.text(102, y, percent(value), va="center_baseline", fontsize=8)
        total = lens["accuracy"][backend]
        if total is not None:
            text = f"all classes, {backend}: {percent(total)}"
            axes.axvline(
                100 * total,
                color=COLOURS[backend],
                linestyle=LINES[backend],
                linewidth=1.3,
                label=text,
            )
    _class_rows(axes, names)
    axes.set_xlim(0, 114)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("accuracy, %")


def draw_differences(axes: Any, lens: dict[str, Any], names: list[str]) -> None:
    """Per class the difference of the two accuracies with its interval."""
    axes.axvline(0, color=INK, linewidth=1)
    for y, name in enumerate(names):
        if found := lens["class_differences"].get(name):
            low, middle, high = (100 * found[key] for key in ("low", "difference", "high"))
            axes.plot([low, high], [y, y], color=GREY, linewidth=2, solid_capstyle="butt")
            colour = COLOURS["torch" if middle > 0 else "flax"] if middle else INK
            axes.plot([middle], [y], "o", color=colour, markersize=5)
    _class_rows(axes, names)
    reach = max(1.0, *(abs(edge) for edge in axes.get_xlim()))
    axes.set_xlim(-reach, reach)
    axes.set_xlabel("torch less flax, percentage points")


def _class_rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(np.arange(len(names)), [label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    plain(axes, "x")


def draw_confusion(
    axes: Any, counts: np.ndarray, shown: list[int], classes: Sequence[str], colour: str
) -> None:
    """The share of each class's test images that were taken for each class.

    Args:
        counts: of `confusion_counts`.
        shown: the classes to draw, by label.
    """
    part = shares(counts)[np.ix_(shown, shown)]
    texts = [[f"{100 * value:.0f}" for value in row] for row in part]
    _cells(axes, _tinted(part, colour), texts, part > 0, [classes[index] for index in shown])


def draw_confusion_difference(
    axes: Any, counts: np.ndarray, shown: list[int], classes: Sequence[str]
) -> None:
    """Cell by cell, how many test images more torch (its colour) or flax (the other) put there."""
    more = counts[np.ix_(shown, shown)]
    strength = np.abs(more) / max(1, np.abs(more).max(initial=0))
    torch, flax = (_tinted(strength, COLOURS[name]) for name in ("torch", "flax"))
    texts = [[f"{value:+d}" for value in row] for row in more.tolist()]
    if not more.any():
        axes.text(0.5, 0.5, "equal", transform=axes.transAxes, ha="center", va="center")
    _cells(
        axes,
        np.where((more > 0)[..., None], torch, flax),
        texts,
        more != 0,
        [classes[index] for index in shown],
    )


def _tinted(strength: np.ndarray, colour: str) -> np.ndarray:
    """RGBA (..., 4): one colour, the stronger the more opaque, so that the page shines through."""
    from matplotlib.colors import to_rgb

    return np.concatenate(
        [np.broadcast_to(to_rgb(colour), (*strength.shape, 3)), SHADE * strength[..., None]],
        axis=-1,
    )


def _cells(
    axes: Any, colours: np.ndarray, texts: list[list[str]], written: np.ndarray, names: list[str]
) -> None:
    count = len(names)
    axes.imshow(colours, interpolation="none")
    if count <= MAX_WRITTEN:
        for row, column in np.argwhere(written).tolist():
            # what lies within needs no room
            place = {"ha": "center", "va": "center_baseline", "in_layout": False}
            axes.text(column, row, texts[row][column], fontsize=7.5, **place)
    drawn = [label(name) for name in names]
    size = {"fontsize": 8.5 if count <= 20 else 5}
    axes.set_xticks(np.arange(count), drawn, rotation=90, **size)
    axes.set_yticks(np.arange(count), drawn, **size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")


# --- Figures


def losses(report: dict[str, Any], records: Records, twins: Twins) -> Any:
    """Per lens the training losses and, of two runs, their gap."""
    lenses = report["lenses"]
    both = any(len(records[lens["dtype"]]) == 2 for lens in lenses)
    figure = new_figure(11 if both else 6.5, 3.3 * len(lenses) + (0.5 if both else 0.2))
    grid = figure.subplots(len(lenses), 2 if both else 1, squeeze=False)
    named: dict[str, Any] = {}
    for row, lens in zip(grid, lenses, strict=True):
        dtype, runs = lens["dtype"], records[lens["dtype"]]
        draw_series(row[0], runs, "loss", "cross entropy, nats", smoothing(runs))
        row[0].set_title(f"{dtype}: training loss", fontsize=10)
        if len(runs) == 2:
            draw_gap(row[1], lens, runs, twins.get(dtype, {}))
            unknown = np.flatnonzero(np.isnan(loss_gap(runs["torch"], runs["flax"])))
            title = f"{dtype}: gap between the two training losses"
            title += f"; not finite from step {unknown[0]:,}" if len(unknown) else ""
            row[1].set_title(title, fontsize=10, pad=18 if lens["first_divergence"] else None)
            handles, names = row[1].get_legend_handles_labels()
            named |= dict(zip(names, handles, strict=True))
        elif both:
            row[1].set_axis_off()
    if named:  # below, where it hides nothing
        figure.legend(
            named.values(),
            named.keys(),
            loc="outside lower right",
            ncols=4,
            frameon=False,
            fontsize=9,
        )
    return figure


def course(report: dict[str, Any], records: Records) -> Any:
    """Per lens the learning rate and the gradient norm."""
    lenses = report["lenses"]
    figure = new_figure(11, 2.9 * len(lenses) + 0.2)
    for row, lens in zip(figure.subplots(len(lenses), 2, squeeze=False), lenses, strict=True):
        runs = records[lens["dtype"]]
        draw_series(row[0], runs, "lr", "learning rate")
        draw_series(row[1], runs, "gradient_norm", "gradient norm", smoothing(runs))
        row[0].set_title(f"{lens['dtype']}: learning rate", fontsize=10)
        row[1].set_title(f"{lens['dtype']}: Euclidean norm of the whole gradient", fontsize=10)
    return figure


def classes(report: dict[str, Any]) -> Any:
    """The accuracy per class through the last lens."""
    lens = report["lenses"][-1]
    names, note = extremes(ranked(lens, report["data"]["classes"]))
    title = f"Accuracy per class on the test images ({lens['dtype']}), weakest first" + (
        f"\n{note}" if note else ""
    )
    figure = new_figure(7.6, 1.6 + class_height(lens) * len(names))
    axes = figure.subplots()
    draw_classes(axes, lens, names)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def class_height(lens: dict[str, Any]) -> float:
    """Of one class in `draw_classes`, in inches."""
    return 0.17 * len(lens["accuracy"]) + 0.13


def confusion(report: dict[str, Any], records: Records, dataset: Dataset) -> Any:
    """What was taken for what through the last lens: each backend's matrix, and the difference of
    two."""
    lens = report["lenses"][-1]
    runs = records[lens["dtype"]]
    backends = [name for name in BACKENDS if name in runs]
    shown, note = shown_classes(lens, dataset.classes)
    size = len(dataset.classes)
    counts = [
        confusion_counts(runs[name].predictions, dataset.test_labels, size) for name in backends
    ]
    panels = 3 if len(backends) == 2 else 1
    figure = new_figure(4.3 * panels, 5.0)
    row = figure.subplots(1, panels, squeeze=False)[0]
    for axes, name, matrix in zip(row, backends, counts, strict=False):
        draw_confusion(axes, matrix, shown, dataset.classes, COLOURS[name])
        axes.set_title(f"{name}: % of each class's test images", fontsize=10)
    if panels == 3:
        draw_confusion_difference(row[2], counts[0] - counts[1], shown, dataset.classes)
        row[2].set_title("torch less flax: test images", fontsize=10)
    figure.suptitle(
        f"What is taken for what ({lens['dtype']}){'; ' if note else ''}{note}", fontsize=11
    )
    return figure
