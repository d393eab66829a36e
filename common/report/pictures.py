"""The run in pictures: training images, predictions, losses and their gap, accuracy per class. All PNG."""

from __future__ import annotations

import functools
import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from common.config import BACKENDS
from common.data import Dataset
from common.record import Record, write_whole
from common.report.terminal import NAME_WIDTH, counted, percent, safe

COLOURS = {"torch": "#0072B2", "flax": "#D55E00"}  # Okabe and Ito's blue and vermillion
LINES = {"torch": "-", "flax": (0, (3, 2))}  # where the two coincide, both can be seen
RIGHT, WRONG, GREY = "#00694A", "#A3003C", "#555555"
DPI = 120
SAMPLES = (4, 8)  # rows, columns
MAX_CLASSES = 40  # of more, the weakest and the strongest are drawn
MAX_POINTS = 2000  # of a series: twice what a panel has pixels for
CEILING = 1e30  # losses beyond it are drawn there, for axes have limits

Records = dict[str, dict[str, Record]]  # by lens, by backend
Twins = dict[str, dict[str, list[Record]]]


def write_pictures(
    folder: Path,
    report: dict[str, Any],
    records: Records,
    dataset: Dataset,
    twins: Twins | None = None,
    sample: np.ndarray | None = None,
) -> list[Path]:
    """Draw `samples.png`, `predictions.png`, `losses.png` and `classes.png`; equal runs give equal bytes.

    Args:
        sample: indices of training images, in the order in which the run sees them; the first images if None.

    Returns:
        The files, each written whole; none if any cannot be drawn.

    Raises:
        RecordError: if the folder cannot be written.
    """
    import matplotlib.style

    # Neither a matplotlibrc nor what a caller has set may change the pictures.
    with matplotlib.style.context("default"), np.errstate(all="ignore"):
        pictures = {
            "samples.png": to_png(_samples(dataset, sample)),
            "predictions.png": to_png(_predictions(report, records, dataset)),
            "losses.png": to_png(_losses(report, records, twins or {})),
            "classes.png": to_png(_classes(report)),
        }
    for name, content in pictures.items():
        write_whole(Path(folder, name), content)
    return [Path(folder, name) for name in pictures]


def label(text: object, width: int = NAME_WIDTH) -> str:
    """`text` for a picture: cut, what cannot be printed or is not in the font escaped, and never read as a formula."""
    letters = safe(text)
    glyphs = _glyphs()
    drawn = "".join(c if c == " " or ord(c) in glyphs else c.encode("unicode_escape").decode("ascii") for c in letters)
    if len(drawn) > width:
        drawn = drawn[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return drawn.replace("$", r"\$")


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, with a canvas of its own: pyplot and its state are left alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Any) -> bytes:
    """Equal figures give equal bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _picture(axes: Any, image: np.ndarray) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _samples(dataset: Dataset, sample: np.ndarray | None) -> Any:
    rows, columns = SAMPLES
    chosen = (np.arange(len(dataset.train_images)) if sample is None else np.asarray(sample))[: rows * columns]
    rows = max(1, math.ceil(len(chosen) / columns))
    figure = new_figure(1.15 * columns, 1.34 * rows + 0.35)
    figure.suptitle(f"Training images{'' if sample is None else ', the first that the run sees'}", fontsize=11)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    for axes, index in zip(grid.flat, chosen, strict=False):
        _picture(axes, dataset.train_images[index])
        axes.set_title(label(dataset.classes[dataset.train_labels[index]]), fontsize=8, pad=3)
    return figure


def _predictions(report: dict[str, Any], records: Records, dataset: Dataset) -> Any:
    lens = report["lenses"][0]
    runs = records[lens["dtype"]]
    names = [name for name in BACKENDS if name in runs]
    count = min(4, len(dataset.test_images))
    figure = new_figure(2.3 * max(3, count), 3.0 + 0.45 * len(names))
    figure.suptitle(f"The first test images, after {counted(lens['steps'], 'step')} in {lens['dtype']}", fontsize=11)
    grid = figure.subplots(1 + len(names), count, squeeze=False, height_ratios=[2.3, *[0.36] * len(names)])
    for index, (axes, *below) in enumerate(grid.T):
        truth = int(dataset.test_labels[index])
        _picture(axes, dataset.test_images[index])
        axes.set_title(f"true: {label(dataset.classes[truth])}", fontsize=10)
        for name, space in zip(names, below, strict=True):
            guess = int(runs[name].predictions[index])
            said = f"{name}: {label(dataset.classes[guess])}\n{'right' if guess == truth else 'WRONG'}"
            colour = RIGHT if guess == truth else WRONG
            space.text(0.5, 0.5, said, ha="center", va="center", fontsize=9.5, color=colour)
            space.set_axis_off()
    return figure


def _losses(report: dict[str, Any], records: Records, twins: Twins) -> Any:
    lenses = report["lenses"]
    both = any(len(records[lens["dtype"]]) == 2 for lens in lenses)
    figure = new_figure(11 if both else 6.5, 3.3 * len(lenses) + (0.5 if both else 0.2))
    grid = figure.subplots(len(lenses), 2 if both else 1, squeeze=False)
    named: dict[str, Any] = {}
    for row, lens in zip(grid, lenses, strict=True):
        runs = records[lens["dtype"]]
        _training(row[0], lens["dtype"], runs)
        if len(runs) == 2:
            _gap(row[1], lens, runs, twins.get(lens["dtype"], {}))
            handles, names = row[1].get_legend_handles_labels()
            named |= dict(zip(names, handles, strict=True))
        elif both:
            row[1].set_axis_off()
    if named:  # below, where it hides nothing
        figure.legend(named.values(), named.keys(), loc="outside lower right", ncols=4, frameon=False, fontsize=9)
    return figure


def _training(axes: Any, dtype: str, runs: dict[str, Record]) -> None:
    window = max(1, max(record.steps for record in runs.values()) // 50)
    for name in BACKENDS:
        if name in runs:
            x, y = running_mean(runs[name].loss, window)
            kept = _thin(len(x))
            style = LINES[name] if len(runs) == 2 else "-"
            axes.plot(x[kept], y[kept], linestyle=style, color=COLOURS[name], linewidth=1.8, label=name)
    axes.set_title(f"{dtype}: training loss", fontsize=10)
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy, nats" + (f"\n(mean of {window:,} steps)" if window > 1 else ""))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    _plain(axes)


def _gap(axes: Any, lens: dict[str, Any], runs: dict[str, Record], twins: dict[str, list[Record]]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    gap = loss_gap(runs["torch"], runs["flax"])
    steps = len(gap)
    sides = [[runs[name], *twins.get(name, ())] for name in BACKENDS]
    drifts = [loss_gap(one, other) for side in sides for one, other in itertools.combinations(side, 2)]
    stretches = [row for row in lens["stretches"] if row["quantity"] == "loss" and row["bound"] is not None]
    seen = np.concatenate([gap, *drifts, [row["bound"] for row in stretches]])
    seen = seen[np.isfinite(seen) & (seen > 0)]
    # Where a logarithmic axis puts zero: a decade below all else.
    floor = 10.0 ** (math.floor(math.log10(seen.min())) - 1) if len(seen) else 1e-17
    top = 10 * max(float(seen.max(initial=0.0)), 10 * floor)

    if drifts:
        shortest = min(len(drift) for drift in drifts)
        drift = np.fmax.accumulate(np.fmax.reduce([np.fmax(drift[:shortest], floor) for drift in drifts]))
        kept = _thin(shortest, logarithmic=True)
        axes.fill_between(kept, floor, drift[kept], color="#DDDDDD", linewidth=0, label="between twins, largest so far")
    points = np.flatnonzero(np.isfinite(gap))
    points = points[_thin(len(points), logarithmic=True)]
    axes.plot(points, np.fmax(gap[points], floor), ".", markersize=2.5, color="#777777", label="gap")
    largest = np.fmax.accumulate(np.fmax(gap, floor))
    axes.plot(points, largest[points], color="black", linewidth=1.5, label="largest gap so far")
    for place, row in enumerate(stretches):
        ends, bound = [row["start"], max(row["stop"] - 1, row["start"] + 0.5)], max(row["bound"], floor)
        name = None if place else "bound (on the closest pair)"
        axes.plot(ends, [bound, bound], color="#009E73", linewidth=2, linestyle=(0, (4, 1)), label=name)

    axes.set_yscale("log")
    axes.set_ylim(floor / 2, top)
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_minor_locator(NullLocator())
    if steps > 30:  # gaps grow from step 0 on, in decades
        axes.set_xscale("symlog", linthresh=1, linscale=0.4)
        axes.set_xticks([0, *(10**power for power in range(math.ceil(math.log10(steps))))])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(-0.15, steps * 1.15)
    axes.xaxis.set_major_formatter("{x:,g}")
    if bool((gap == 0).any()):
        axes.axhline(floor, color=GREY, linewidth=0.8, linestyle=":")
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
        axes.annotate("equal", (1, floor), xytext=(-2, 2), fontsize=8, color=GREY, **place)
    unknown = np.flatnonzero(~np.isfinite(gap))
    title = f"{lens['dtype']}: gap between the two training losses"
    title += f"; not finite from step {unknown[0]:,}" if len(unknown) else ""
    axes.set_title(title, fontsize=10, pad=18 if lens["first_divergence"] else None)
    _divergence(axes, lens["first_divergence"])
    axes.set_xlabel("step")
    axes.set_ylabel("|torch - flax|, nats")
    axes.grid(alpha=0.25)
    _plain(axes)


def _divergence(axes: Any, first: dict[str, Any] | None) -> None:
    """Mark, and name above the panel, where the two runs part."""
    if first is None:
        return
    axes.axvline(first["step"], color=WRONG, linewidth=1.4, linestyle="-.")
    where = axes.transAxes.inverted().transform(axes.transData.transform((first["step"], 1.0)))[0]
    side = "left" if where < 0.35 else "right" if where > 0.65 else "center"
    named = first["stage"] if first["tensor"] == first["stage"] else f"{first['stage']}, {first['tensor']}"
    text = label(f"they part at step {first['step']:,}: {named}", 60)
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": side}
    axes.annotate(text, (first["step"], 1), xytext=(0, 3), fontsize=8.5, color=WRONG, **place)


def _classes(report: dict[str, Any]) -> Any:
    lens = report["lenses"][-1]
    names = [name for name in BACKENDS if name in lens["accuracy"]]
    table = lens["per_class_accuracy"]

    def strength(name: str) -> float:
        values = [table[backend].get(name) for backend in names]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else math.inf

    ranked = sorted(report["data"]["classes"], key=strength)  # stable: equals stay in the order of the classes
    title = f"Accuracy per class on the test images ({lens['dtype']}), weakest first"
    if len(ranked) > MAX_CLASSES:
        half = MAX_CLASSES // 2
        title += f"\nthe {half} weakest and the {half} strongest of {len(ranked):,}"
        ranked = ranked[:half] + ranked[-half:]
    figure = new_figure(7.6, 0.2 + 1.4 + (0.17 * len(names) + 0.13) * len(ranked))
    axes = figure.subplots()
    rows, height = np.arange(len(ranked)), 0.78 / len(names)
    for place, backend in enumerate(names):
        values = [table[backend].get(name) for name in ranked]
        where = rows + (place - (len(names) - 1) / 2) * height
        axes.barh(where, [100 * (value or 0) for value in values], height * 0.92, color=COLOURS[backend], label=backend)
        for y, value in zip(where, values, strict=True):
            axes.text(102, y, percent(value), va="center_baseline", fontsize=8, color=COLOURS[backend])
        total = lens["accuracy"][backend]
        if total is not None:
            all_classes = f"all classes, {backend}: {percent(total)}"
            axes.axvline(
                100 * total, color=COLOURS[backend], linestyle=LINES[backend], linewidth=1.3, label=all_classes
            )
    axes.set_yticks(rows, [label(name) for name in ranked])
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    axes.set_xlim(0, 114)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("accuracy, %")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    _plain(axes)
    return figure


def running_mean(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each `window` steps in a row, and the step at which each of them ends."""
    window = max(1, min(window, len(values)))
    limited = np.clip(np.asarray(values, np.float64), -CEILING, CEILING)  # leaves NaN as it is
    return np.arange(window - 1, len(limited)), np.convolve(limited, np.full(window, 1 / window), "valid")


def loss_gap(one: Record, other: Record) -> np.ndarray:
    """|difference| of the two losses of each step that both have; NaN where one is not finite."""
    steps = min(one.steps, other.steps)
    with np.errstate(all="ignore"):
        gap = np.abs(one.loss[:steps] - other.loss[:steps])
    return np.where(np.isfinite(gap), np.minimum(gap, CEILING), np.nan)


def _thin(count: int, logarithmic: bool = False) -> np.ndarray:
    """At most about MAX_POINTS of `count` indices, both ends included."""
    if count <= MAX_POINTS:
        return np.arange(count)
    if logarithmic:
        return np.unique(np.geomspace(1, count, MAX_POINTS).round().astype(np.int64)) - 1
    return np.linspace(0, count - 1, MAX_POINTS).round().astype(np.int64)
