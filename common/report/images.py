"""The pictures in a run's folder: training images and predictions as PNG, charts as PNG and SVG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.common.config import BACKENDS
from lockstep.common.data import Dataset
from lockstep.common.report import charts
from lockstep.common.report.charts import Records, Twins
from lockstep.common.report.figures import (
    COLOURS,
    INK,
    RIGHT,
    WRONG,
    drawing,
    label,
    new_figure,
    to_png,
    to_svg,
)
from lockstep.common.report.terminal import counted
from lockstep.common.runs.record import Record
from lockstep.common.system.storage import write_atomic

__all__ = ["COLOURS", "first_images", "guessed", "new_figure", "to_png", "write_pictures"]

SAMPLES = (4, 8)  # rows, columns
ACROSS, DOWN = 34.5, 41.0  # from one sample to the next, in pixels, of which each has 32 by 32


def write_pictures(
    folder: Path,
    report: dict[str, Any],
    records: Records,
    dataset: Dataset,
    twins: Twins | None = None,
    sample: np.ndarray | None = None,
) -> list[Path]:
    """Draw `samples.png`, `predictions.png`, and `losses`, `classes`, `confusion` and `course`,
    each .png and .svg.

    Equal runs give equal bytes.

    Args:
        sample: indices of training images, in the order in which the run sees them; the first
            images if None.

    Returns:
        The files, each written whole; none if any cannot be drawn.

    Raises:
        RecordError: if the folder cannot be written.
    """
    with drawing():
        pictures = {
            "samples.png": to_png(_samples(dataset, sample)),
            "predictions.png": to_png(_predictions(report, records, dataset)),
        }
        figures = {
            "losses": charts.losses(report, records, twins or {}),
            "classes": charts.classes(report),
            "confusion": charts.confusion(report, records, dataset),
            "course": charts.course(report, records),
        }
        for name, figure in figures.items():
            pictures |= {f"{name}.png": to_png(figure), f"{name}.svg": to_svg(figure).encode()}
    for name, content in pictures.items():
        write_atomic(Path(folder, name), content)
    return [Path(folder, name) for name in pictures]


def first_images(dataset: Dataset, sample: np.ndarray | None) -> np.ndarray:
    """The training images to show: the first of `sample`, or else of the data set."""
    rows, columns = SAMPLES
    return (np.arange(len(dataset.train_images)) if sample is None else np.asarray(sample))[
        : rows * columns
    ]


def guessed(record: Record, index: int, dataset: Dataset) -> tuple[str, bool]:
    """What a run takes a test image for, and whether it is right; a number where there is no such
    class."""
    if index >= len(record.predictions):
        return "nothing", False
    guess = int(record.predictions[index])
    name = dataset.classes[guess] if 0 <= guess < len(dataset.classes) else str(guess)
    return name, guess == int(dataset.test_labels[index])


def _samples(dataset: Dataset, sample: np.ndarray | None) -> Any:
    from matplotlib.patches import Rectangle

    chosen, columns = first_images(dataset, sample), SAMPLES[1]
    rows = max(1, math.ceil(len(chosen) / columns))
    figure = new_figure(1.15 * columns, 1.34 * rows + 0.35)
    figure.suptitle(
        f"Training images{'' if sample is None else ', the first that the run sees'}", fontsize=11
    )
    axes = figure.subplots()  # one for all, in pixels: one for each would take four times as long
    axes.set_axis_off()
    for place, index in enumerate(chosen):
        x, y = ACROSS * (place % columns), DOWN * (place // columns)
        axes.imshow(
            dataset.train_images[index], interpolation="nearest", extent=(x, x + 32, y + 32, y)
        )
        axes.add_patch(Rectangle((x, y), 32, 32, fill=False, edgecolor=INK, linewidth=0.8))
        name = label(dataset.classes[dataset.train_labels[index]])
        axes.text(x + 16, y - 1, name, ha="center", va="baseline", fontsize=8, in_layout=False)
    axes.set_xlim(-0.3, ACROSS * (columns - 1) + 32.3)
    axes.set_ylim(DOWN * (rows - 1) + 32.3, -4)
    return figure


def _predictions(report: dict[str, Any], records: Records, dataset: Dataset) -> Any:
    lens = report["lenses"][0]
    runs = records[lens["dtype"]]
    names = [name for name in BACKENDS if name in runs]
    count = min(4, len(dataset.test_images))
    figure = new_figure(2.3 * max(3, count), 3.0 + 0.45 * len(names))
    figure.suptitle(
        f"The first test images, after {counted(lens['steps'], 'step')} in {lens['dtype']}",
        fontsize=11,
    )
    grid = figure.subplots(
        1 + len(names), count, squeeze=False, height_ratios=[2.3, *[0.36] * len(names)]
    )
    for index, (axes, *below) in enumerate(grid.T):
        truth = dataset.classes[dataset.test_labels[index]]
        axes.imshow(dataset.test_images[index], interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"true: {label(truth)}", fontsize=10)
        for name, space in zip(names, below, strict=True):
            guess, right = guessed(runs[name], index, dataset)
            said = f"{name}: {label(guess)}\n{'right' if right else 'WRONG'}"
            colour = RIGHT if right else WRONG
            space.text(0.5, 0.5, said, ha="center", va="center", fontsize=9.5, color=colour)
            space.set_axis_off()
    return figure
