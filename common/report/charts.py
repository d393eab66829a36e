"""The charts of a run: losses and their gap, learning rate and gradient norm, accuracy per class,
confusion matrices.

Each `draw_` function fills one panel. `chart_data` computes the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lockstep.common.config import BACKENDS
from lockstep.common.report.chart_data import (
    CEILING,
    MAX_POINTS,
    LossBound,
    Runs,
    loss_bounds,
    loss_gap,
    loss_unit,
    running_mean,
    shares,
    subsample,
    twin_spread,
)
from lockstep.common.report.figures import (
    BAND,
    BOUND,
    COLOURS,
    GREY,
    INK,
    LINES,
    WRONG,
    label,
    like_backends,
    style_axes,
)
from lockstep.common.report.json import ComparisonJson, PlaceJson
from lockstep.common.report.text import percent
from lockstep.common.runs.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LABEL = 40  # letters in a legend
MAX_WRITTEN = 12  # classes of a confusion matrix whose numbers are written into it
DECADES = 1e3  # a series that spans more has a logarithmic axis
LineStyle = str | tuple[float, tuple[float, ...]]
GAP_LINES: tuple[LineStyle, ...] = ("-", (0, (1.5, 1)), (0, (1, 2)))  # of up to three precisions
BAND_LABEL = "between twins, largest so far"
SHADE = 0.6  # opacity of a full cell: its number can be read on light and on dark pages


def draw_series(axes: Axes, runs: Runs, quantity: str, unit: str, window: int = 1) -> None:
    """A quantity at each step, of each backend: its running mean over `window` steps as a thick
    line, single steps as a thin one."""
    values = {name: getattr(run, quantity) for name, run in runs.items()}
    draw_lines(axes, values, unit, window, from_zero=quantity != "loss")


def draw_lines(
    axes: Axes,
    series: Mapping[str, np.ndarray],
    unit: str,
    window: int = 1,
    from_zero: bool = False,
) -> None:
    """One or two series, by step, as of `draw_series`.

    Args:
        series: by name; what is not a backend's has the colours of the two in their order.
        from_zero: whether a linear axis begins there.
    """
    drawn, looks = [], like_backends(series)
    for name, values in series.items():
        like = looks[name]
        x, y = running_mean(values, window)
        kept, style = subsample(len(x)), LINES[like] if len(series) == 2 else "-"
        mark = "o" if len(x) == 1 else None  # one point is no line
        axes.plot(
            x[kept],
            y[kept],
            linestyle=style,
            marker=mark,
            color=COLOURS[like],
            linewidth=1.8,
            label=label(name, MAX_LABEL),
            zorder=3,
        )
        drawn.append(y[np.isfinite(y)])
        if window > 1:
            kept = subsample(len(values))
            raw = np.clip(values[kept], -CEILING, CEILING)
            axes.plot(kept, raw, color=COLOURS[like], linewidth=0.5, alpha=0.35, zorder=2)
    seen = np.concatenate(drawn)
    if len(seen) and seen.min() > 0 and seen.max() / seen.min() > DECADES:
        _decades(axes)
    elif from_zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel(unit + (f"\n(thick: mean of {window:,} steps)" if window > 1 else ""))
    _step_ticks(axes)
    axes.legend(frameon=False)
    style_axes(axes)


class Gap(NamedTuple):
    """The gap between two series of one precision, by step."""

    name: str
    gap: np.ndarray  # float64 (steps,); NaN where it is not finite
    spread: np.ndarray | None  # the largest one so far between twins of one side
    bounds: Sequence[LossBound]


def draw_gap(
    axes: Axes, comparison: ComparisonJson, runs: Runs, twins: dict[str, list[Record]]
) -> None:
    """The gap between the two training losses, the band of the twins, the bound, and the step at
    which the runs diverge."""
    gap, spread = loss_gap(*runs.values()), twin_spread(runs, twins)
    found = Gap(comparison["dtype"], gap, spread, loss_bounds(comparison))
    draw_gaps(axes, [found], comparison["first_divergence"])
    axes.set_ylabel(f"|{' - '.join(runs)}|{loss_unit(runs)}")


def draw_gaps(axes: Axes, gaps: Sequence[Gap], first: PlaceJson | None) -> None:
    """The gaps of one or more precisions, on one logarithmic axis.

    Args:
        first: where the two diverge, if they do.
    """
    values = [
        np.concatenate([each.gap, [] if each.spread is None else each.spread, _heights(each)])
        for each in gaps
    ]
    seen = np.concatenate(values)
    seen = seen[np.isfinite(seen) & (seen > 0)]
    # Where a logarithmic axis puts zero: a decade below all else.
    floor = 10.0 ** (math.floor(math.log10(seen.min())) - 1) if len(seen) else 1e-17
    top = 10 * max(float(seen.max(initial=0.0)), 10 * floor)
    for place, each in enumerate(gaps):
        _draw_gap(axes, each, floor, GAP_LINES[place % len(GAP_LINES)], alone=len(gaps) == 1)
    bands = [band for band in axes.collections if band.get_label() == BAND_LABEL]
    for band in bands[1:]:  # one entry of the legend is enough
        band.set_label("_")
    _decades(axes)
    axes.set_ylim(floor / 2, top)
    _step_axis(axes, max(len(each.gap) for each in gaps))
    if any(bool((each.gap == 0).any()) for each in gaps):
        axes.axhline(floor, color=GREY, linewidth=0.8, linestyle=":")
        axes.annotate(
            "equal",
            (1, floor),
            xytext=(-2, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=GREY,
        )
    _divergence(axes, first)
    axes.set_xlabel("step")
    style_axes(axes)


def _heights(of: Gap) -> list[float]:
    return [row.bound for row in of.bounds]


def _draw_gap(axes: Axes, of: Gap, floor: float, line: LineStyle, alone: bool) -> None:
    """One precision: the twins' band, the gap, and its bound.

    Args:
        floor: where zero is drawn.
        alone: whether no other precision is drawn: then single steps are shown, too.
    """
    gap, spread, name = of.gap, of.spread, "" if alone else f"{of.name}: "
    if spread is not None:
        kept, spread = subsample(len(spread), logarithmic=True), np.fmax(spread, floor)
        axes.fill_between(kept, floor, spread[kept], color=BAND, linewidth=0, label=BAND_LABEL)
    known = np.flatnonzero(np.isfinite(gap))
    if alone:
        dots = known[subsample(len(known), logarithmic=True, limit=MAX_POINTS // 2)]
        axes.plot(dots, np.fmax(gap[dots], floor), ".", markersize=2.5, color=GREY, label="gap")
    steps, largest = _largest(of)
    axes.plot(
        steps,
        np.fmax(largest, floor),
        color=INK,
        linewidth=1.5,
        linestyle=line,
        label=f"{name}largest gap",
    )
    for place, row in enumerate(of.bounds):
        bound = max(row.bound, floor)
        axes.plot(
            _ends(row),
            [bound, bound],
            color=BOUND,
            linewidth=2,
            linestyle=line if line != "-" else (0, (4, 1)),
            label=None if place else f"{name}allowed",
        )


def _ends(row: LossBound) -> list[float]:
    """From where to where a step range is drawn: one of a single step is a short line, too."""
    return [row.start, max(row.stop - 1, row.start + 0.5)]


def _largest(of: Gap) -> tuple[np.ndarray, np.ndarray]:
    """The largest gap in each step range that has a bound; without bounds, the largest so far."""
    if not of.bounds:
        known = np.flatnonzero(np.isfinite(of.gap))
        points = known[subsample(len(known), logarithmic=True)]
        return points, np.fmax.accumulate(np.fmax(of.gap, 0.0))[points]
    steps = np.array([_ends(row) for row in of.bounds]).ravel()
    largest = [np.fmax.reduce(of.gap[row.start : row.stop], initial=np.nan) for row in of.bounds]
    return steps, np.repeat(largest, 2)


def _step_axis(axes: Axes, steps: int) -> None:
    """The steps of a run; of a longer one in decades, as gaps grow, with step 0."""
    from matplotlib.ticker import NullLocator

    _step_ticks(axes)
    if steps > 30:
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.set_xticks([0, *(10**power for power in range(math.ceil(math.log10(steps))))])
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(-0.15, steps * 1.15)


def _step_ticks(axes: Axes) -> None:
    """Few ticks, at whole steps: their numbers are long."""
    axes.locator_params(axis="x", nbins=5, integer=True, min_n_ticks=1)
    axes.xaxis.set_major_formatter("{x:,g}")


def _decades(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers as labels."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_major_formatter(
        lambda value, _: f"{value:g}" if 1e-3 <= value < 1e4 else f"{value:.0e}"
    )
    axes.yaxis.set_minor_locator(NullLocator())


def _divergence(axes: Axes, first: PlaceJson | None) -> None:
    """Mark the step at which the two runs diverge, and name it above the panel."""
    if first is None:
        return
    step, stage, tensor = first["step"], first["stage"], first["tensor"]
    axes.axvline(step, color=WRONG, linewidth=1.4, linestyle="-.")
    where = axes.transAxes.inverted().transform(axes.transData.transform((step, 1.0)))[0]
    axes.annotate(
        label(f"first difference: step {step:,}, {', '.join(dict.fromkeys([stage, tensor]))}", 60),
        (step, 1),
        xytext=(0, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="left" if where < 0.35 else "right" if where > 0.65 else "center",
        fontsize=8.5,
        color=WRONG,
    )


def draw_classes(axes: Axes, comparison: ComparisonJson, names: list[str]) -> None:
    """A bar per class and backend, and a line for the accuracy over all classes."""
    table = comparison["per_class_accuracy"]
    backends, looks = list(comparison["accuracy"]), like_backends(comparison["accuracy"])
    rows, height = np.arange(len(names)), 0.78 / len(backends)
    for place, backend in enumerate(backends):
        values = [table[backend].get(name) for name in names]
        where = rows + (place - (len(backends) - 1) / 2) * height
        axes.barh(
            where,
            [100 * (value or 0) for value in values],
            height * 0.92,
            color=COLOURS[looks[backend]],
            label=backend,
        )
        for y, value in zip(where, values, strict=True):
            axes.text(102, y, percent(value), va="center_baseline", fontsize=8)
        total = comparison["accuracy"][backend]
        if total is not None:
            text = f"all classes, {backend}: {percent(total)}"
            axes.axvline(
                100 * total,
                color=COLOURS[looks[backend]],
                linestyle=LINES[looks[backend]],
                linewidth=1.3,
                label=text,
            )
    _class_rows(axes, names)
    axes.set_xlim(0, 114)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("accuracy, %")


def class_height(comparison: ComparisonJson) -> float:
    """The height of one class in `draw_classes`, in inches."""
    return 0.13 * len(comparison["accuracy"]) + 0.1


def draw_differences(axes: Axes, comparison: ComparisonJson, names: list[str]) -> None:
    """Per class, the difference of the two accuracies, how far twins are apart, and the bound."""
    axes.axvline(0, color=INK, linewidth=1)
    differences = comparison.get("class_differences", {})
    for y, name in enumerate(names):
        if found := differences.get(name):
            middle, spread = 100 * found["difference"], 100 * (found.get("spread") or 0.0)
            axes.plot([-spread, spread], [y, y], color=GREY, linewidth=4, solid_capstyle="butt")
            if (bound := found.get("bound")) is not None:
                axes.plot([-100 * bound, 100 * bound], [y, y], "|", color=GREY, markersize=7)
            colour = COLOURS[BACKENDS[middle < 0]] if middle else INK
            axes.plot([middle], [y], "o", color=colour, markersize=5)
    _class_rows(axes, names)
    reach = max(1.0, *(abs(edge) for edge in axes.get_xlim()))
    axes.set_xlim(-reach, reach)
    axes.set_xlabel(f"{' minus '.join(comparison['accuracy'])}, percentage points")


def _class_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(np.arange(len(names)), [label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    style_axes(axes, "x")


def draw_confusion(
    axes: Axes, counts: np.ndarray, shown: list[int], classes: Sequence[str], colour: str
) -> None:
    """The share of each class's test images that were predicted as each class.

    Args:
        counts: of `confusion_counts`.
        shown: the classes to draw, by label.
    """
    drawn = shares(counts)[np.ix_(shown, shown)]
    texts = [[f"{100 * value:.0f}" for value in row] for row in drawn]
    _cells(axes, _tinted(drawn, colour), texts, drawn > 0, [classes[index] for index in shown])


def draw_confusion_difference(
    axes: Axes, counts: np.ndarray, shown: list[int], classes: Sequence[str]
) -> None:
    """Per cell, how many more test images the first run (in its colour) or the second (in its own)
    puts there."""
    more = counts[np.ix_(shown, shown)]
    strength = np.abs(more) / max(1, np.abs(more).max(initial=0))
    first, second = (_tinted(strength, COLOURS[name]) for name in BACKENDS)
    texts = [[f"{value:+d}" for value in row] for row in more.tolist()]
    if not more.any():
        axes.text(0.5, 0.5, "equal", transform=axes.transAxes, ha="center", va="center")
    _cells(
        axes,
        np.where((more > 0)[..., None], first, second),
        texts,
        more != 0,
        [classes[index] for index in shown],
    )


def _tinted(strength: np.ndarray, colour: str) -> np.ndarray:
    """RGBA (..., 4): one colour, more opaque where `strength` is larger; the page shows through."""
    from matplotlib.colors import to_rgb

    return np.concatenate(
        [np.broadcast_to(to_rgb(colour), (*strength.shape, 3)), SHADE * strength[..., None]],
        axis=-1,
    )


def _cells(
    axes: Axes, colours: np.ndarray, texts: list[list[str]], written: np.ndarray, names: list[str]
) -> None:
    count = len(names)
    axes.imshow(colours, interpolation="none")
    if count <= MAX_WRITTEN:
        for row, column in np.argwhere(written).tolist():
            number = axes.text(column, row, texts[row][column], fontsize=7.5)
            number.set(ha="center", va="center_baseline")
            number.set_in_layout(False)  # it lies within its cell, which needs no more room
    drawn, size = [label(name) for name in names], 8.5 if count <= 20 else 5
    axes.set_xticks(np.arange(count), drawn, rotation=90, fontsize=size)
    axes.set_yticks(np.arange(count), drawn, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
