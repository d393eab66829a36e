"""Plots of the evidence: the detection matrix, false alarms, sensitivity and speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.common.config import DTYPES
from lockstep.common.evidence.bench import PATHS
from lockstep.common.report.figures import (
    BOUND,
    GREY,
    INK,
    drawing,
    label,
    new_figure,
    style_axes,
    to_png,
    to_svg,
)
from lockstep.common.report.figures import COLOURS as BACKEND_COLOURS
from lockstep.common.system.storage import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    from lockstep.common.evidence import bench_report, false_alarms, faults, sensitivity

COLOURS = {
    "float64": "#0072B2",
    "float32": "#D55E00",
    "bfloat16": "#009E73",
    "mixed_bfloat16": "#CC79A7",
}  # of Okabe and Ito's
MARKERS = {"float64": "o", "float32": "s", "bfloat16": "^", "mixed_bfloat16": "D"}
MISSED = "#F2F2F2"


def draw_faults(rows: Sequence[faults.Row], path: Path) -> None:
    """A PNG of `faults.measure`'s rows: per fault and precision, the step of the first
    divergence, and how far it is past its bound.

    Raises:
        RecordError: if the file cannot be written.
    """
    precisions = list({dtype: None for row in rows for dtype in row["lenses"]})
    _save(path, (8.4, 1.4 + 0.17 * len(rows)), lambda figure: _matrix(figure, rows, precisions))


def _matrix(figure: Figure, rows: Sequence[faults.Row], precisions: Sequence[str]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    axes = figure.subplots()
    norm = LogNorm(1, 1e15)
    scale = colormaps["viridis_r"]
    for line, row in enumerate(rows):
        for place, dtype in enumerate(precisions):
            finding = row["lenses"][dtype]
            over = finding["gap_over_bound"]
            if not finding["caught"]:
                meant = row["lens"] in (None, dtype)
                colour, dark, text = (
                    MISSED,
                    False,
                    "not seen" if meant else "not a fault in this precision",
                )
            else:
                shade = norm(min(1e15, max(1.0, over if over is not None else 1e15)))
                colour, dark = scale(shade), shade > 0.5
                text = f"{finding['stage']}: {finding['tensor']}, step {finding['step']}"
                text += "" if finding["stage_right"] else "  (elsewhere)"
            axes.add_patch(_rectangle(place, line, colour))
            axes.text(
                place + 0.02,
                line + 0.5,
                text,
                va="center",
                fontsize=6.5,
                color="white" if dark else "black",
                clip_on=True,
            )
    axes.set_xlim(0, len(precisions))
    axes.set_ylim(len(rows), 0)
    axes.set_xticks([place + 0.5 for place in range(len(precisions))], list(precisions))
    axes.xaxis.tick_top()
    axes.set_yticks(
        [line + 0.5 for line in range(len(rows))], [row["name"] for row in rows], fontsize=6.5
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(
        ScalarMappable(norm, scale),
        ax=axes,
        orientation="horizontal",
        shrink=0.6,
        pad=0.01,
        aspect=40,
    )
    bar.set_label("gap over its bound, where the fault was first seen", fontsize=8)


def _rectangle(
    left: float, top: float, colour: str | tuple[float, float, float, float]
) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((left, top), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.0)


def draw_alarms(summary: Sequence[false_alarms.Line], path: Path) -> None:
    """A PNG of `false_alarms.summary`: the rate of false alarms of every rule in each precision,
    with its 95 % interval.

    Raises:
        RecordError: if the file cannot be written.
    """
    rules = list({line["rule"]: None for line in summary})
    _save(path, (8.4, 1.2 + 0.42 * len(rules)), lambda figure: _rates(figure, summary, rules))


def _rates(figure: Figure, summary: Sequence[false_alarms.Line], rules: Sequence[str]) -> None:
    axes = figure.subplots()
    precisions = list({line["lens"]: None for line in summary})
    for place, dtype in enumerate(precisions):
        offset = 0.24 * (place - (len(precisions) - 1) / 2)
        heights, rates, below, above = [], [], [], []
        for line in summary:
            if line["lens"] == dtype and line["rate"] is not None:
                heights.append(rules.index(line["rule"]) + offset)
                rates.append(100 * line["rate"])
                below.append(100 * (line["rate"] - line["interval"][0]))
                above.append(100 * (line["interval"][1] - line["rate"]))
        marker = MARKERS[dtype]
        axes.errorbar(
            rates,
            heights,
            xerr=[below, above],
            fmt=marker,
            color=COLOURS[dtype],
            markersize=5,
            capsize=2,
            label=dtype,
            clip_on=False,
        )
    axes.set_yticks(range(len(rules)), rules, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("clean pairs that are said to differ, % (with 95 % intervals)")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(precisions), frameon=False, fontsize=9)


def draw_sensitivity(rows: Sequence[sensitivity.Row], path: Path) -> None:
    """A PNG of `measure`'s rows: the relative error (logarithmic) and the step at which each
    precision shows it.

    Filled marks: the first divergence; open marks: the loss alone. An error that is not seen is
    above the dotted line.

    Raises:
        RecordError: if the file cannot be written.
    """
    _save(path, (8.4, 4.6), lambda figure: _steps(figure, rows))


def _steps(figure: Figure, rows: Sequence[sensitivity.Row]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    steps = max(row["steps"] for row in rows)
    precisions = [dtype for dtype in DTYPES if any(dtype in row["lenses"] for row in rows)]
    axes = figure.subplots()
    unseen = steps * 2.2  # the height of the marks of errors that are not seen
    for place, dtype in enumerate(precisions):
        # next to each other, where both are at one step
        shift = 10 ** (0.24 * (place - (len(precisions) - 1) / 2))
        points = [
            (row["error"] * shift, row["lenses"][dtype]) for row in rows if dtype in row["lenses"]
        ]
        loss = [unseen if seen["loss_step"] is None else seen["loss_step"] for _, seen in points]
        first = [unseen if seen["step"] is None else seen["step"] for _, seen in points]
        errors = [error for error, _ in points]
        axes.plot(
            errors,
            loss,
            linestyle=":",
            linewidth=1,
            fillstyle="none",
            label=f"{dtype}: in the loss",
            color=COLOURS[dtype],
            marker=MARKERS[dtype],
            markersize=7,
        )
        axes.plot(
            errors,
            first,
            linestyle="",
            label=f"{dtype}: anywhere",
            color=COLOURS[dtype],
            marker=MARKERS[dtype],
            markersize=7,
        )
    axes.axhline(steps * 1.4, color="#555555", linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_xscale("log")
    axes.invert_xaxis()  # the smaller the error, the further to the right
    axes.xaxis.set_major_locator(LogLocator(numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("symlog", linthresh=1, linscale=0.5)
    ticks = [0, *(10**power for power in range(math.ceil(math.log10(steps)))), steps]
    axes.set_yticks([*ticks, unseen], [*(f"{tick:,}" for tick in ticks), "not seen"])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-0.35, steps * 3.4)
    axes.set_xlabel("relative error in Flax's learning rate")
    axes.set_ylabel("step at which it is seen")
    axes.set_title(f"How small an error is seen within {steps:,} steps, and when", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(precisions), frameon=False, fontsize=9)


SPEEDS = {  # by way to train: colour, line style, marker, and its fill
    "flax fused": (BACKEND_COLOURS["flax"], "-", "s", "full"),
    "torch fused": (BACKEND_COLOURS["torch"], "-", "o", "full"),
    "flax": (BACKEND_COLOURS["flax"], (0, (4, 2)), "s", "none"),
    "torch": (BACKEND_COLOURS["torch"], (0, (4, 2)), "o", "none"),
    "eager": (GREY, (0, (1, 1.5)), "D", "none"),
    "tutorial": (INK, "-", "X", "full"),
}


def draw_bench(lines: Sequence[bench_report.Line], where: str, path: Path) -> None:
    """A PNG, and an SVG with the same name, of `bench_report.summary`: images per second by batch
    size, one curve for each way to train.

    Args:
        where: the machine and the precision, for the title.

    Raises:
        RecordError: if a file cannot be written.
    """
    with drawing():
        figure = new_figure(8.4, 4.8)
        _speeds(figure, [line for line in lines if line["table"] == "speed"])
        figure.suptitle(f"Images trained on per second: {label(where, 80)}", fontsize=11)
        png, svg = to_png(figure), to_svg(figure).encode()
    write_atomic(Path(path), png)
    write_atomic(Path(path).with_suffix(".svg"), svg)


def _speeds(figure: Figure, lines: Sequence[bench_report.Line]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axes = figure.subplots()
    sizes = sorted({line["batch_size"] for line in lines})
    for name, (colour, style, marker, fill) in SPEEDS.items():
        mine = [line for line in lines if line["path"] == name]
        x = [line["batch_size"] for line in mine]
        rates = [line["images_per_second"] for line in mine]
        y = [rate["median"] for rate in rates]
        ends = [
            [rate["median"] - rate["low"] for rate in rates],
            [rate["high"] - rate["median"] for rate in rates],
        ]
        axes.errorbar(
            x, y, yerr=ends, fmt="none", ecolor=colour, elinewidth=1, capsize=2.5, zorder=3
        )
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=style,
            linewidth=1.8,
            label=PATHS[name],
            zorder=4,
            marker=marker,
            markersize=6.5,
            fillstyle=fill,
            markeredgewidth=1.3,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_locator(NullLocator())
    if limits := [
        (line["gflops"] * 1e9 / line["flops_per_image"], line["gflops"])
        for line in lines
        if line["gflops"] and line["flops_per_image"]
    ]:
        height, gflops = max(limits)
        text = f"the arithmetic at the speed of large matrix products, {gflops:,.0f} GFLOP/s"
        axes.axhline(height, color=BOUND, linewidth=1.8, linestyle=(0, (6, 2)))
        axes.annotate(
            text,
            (0, height),
            xytext=(5, 4),
            fontsize=8.5,
            color=BOUND,
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
        )
        axes.set_ylim(top=1.6 * height)
    axes.set_xlabel("images per step (batch size)")
    axes.set_ylabel("images per second\n(median and quartiles)")
    style_axes(axes)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)


def _save(path: Path, size: tuple[float, float], paint: Callable[[Figure], None]) -> None:
    import matplotlib.style

    # ignore a matplotlibrc, and the caller's settings
    with matplotlib.style.context("default"):
        figure = new_figure(*size)
        paint(figure)
        content = to_png(figure)
    write_atomic(Path(path), content)
