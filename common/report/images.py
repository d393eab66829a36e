"""The pictures in a run's folder: training images and predictions as PNG, charts as PNG and SVG."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.common.data import Dataset
from lockstep.common.report import chart_data, charts
from lockstep.common.report.chart_data import Records, Twins
from lockstep.common.report.figures import (
    COLOURS,
    INK,
    RIGHT,
    WRONG,
    drawing,
    label,
    like_backends,
    new_figure,
    to_png,
    to_svg,
)
from lockstep.common.report.json import ReportJson
from lockstep.common.report.text import plural
from lockstep.common.runs.record import Record
from lockstep.common.system.storage import write_atomic

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

CHARTS = ("losses", "classes", "confusion", "course")  # as PNG and as SVG
SAMPLES = (4, 8)  # rows, columns
# The last three are of pictures with one channel.
DRAWN: dict[str, Any] = {"interpolation": "nearest", "cmap": "gray", "vmin": 0, "vmax": 255}
ACROSS, DOWN = 34.5, 41.0  # from one sample, of 32 by 32 pixels, to the next


def write_pictures(
    folder: Path,
    report: ReportJson,
    records: Records,
    dataset: Dataset,
    twins: Twins | None = None,
    sample: np.ndarray | None = None,
) -> list[Path]:
    """Draw `samples.png`, `predictions.png`, and `losses`, `classes`, `confusion` and `course`,
    each .png and .svg; no pictures of inputs that are none, and none of classes where there are none.

    Equal runs give equal bytes.

    Args:
        sample: int64 (images,), the training images to show, in the order in which the run sees
            them; None shows the first of the data.

    Returns:
        The files. No file is written if one of them cannot be drawn.

    Raises:
        RecordError: if the folder cannot be written.
    """
    with drawing():
        pictures: dict[str, bytes] = {}
        if dataset.has_pictures:
            pictures["samples.png"] = to_png(_samples(dataset, sample))
        if dataset.has_pictures and dataset.classes:
            pictures["predictions.png"] = to_png(_predictions(report, records, dataset))
        figures = {"losses": _losses(report, records, twins or {})}
        if dataset.classes:
            figures["classes"] = _classes(report)
            figures["confusion"] = _confusion(report, records, dataset)
        figures["course"] = _rate_and_norm(report, records)
        for name, figure in figures.items():
            pictures |= {f"{name}.png": to_png(figure), f"{name}.svg": to_svg(figure).encode()}
    for name, content in pictures.items():
        write_atomic(Path(folder, name), content)
    return [Path(folder, name) for name in pictures]


def remove_pictures(folder: Path) -> None:
    """Remove the pictures of an earlier run, where this one has none."""
    for stem in ("samples", "predictions", *CHARTS):
        for kind in ("png", "svg"):
            Path(folder, f"{stem}.{kind}").unlink(missing_ok=True)


def first_images(dataset: Dataset, sample: np.ndarray | None) -> np.ndarray:
    """The training images to show: the first of `sample`, or else of the data set."""
    rows, columns = SAMPLES
    return (np.arange(len(dataset.train_images)) if sample is None else np.asarray(sample))[
        : rows * columns
    ]


def prediction(record: Record, index: int, dataset: Dataset) -> tuple[str, bool]:
    """The class that a run predicts for a test image, and whether it is right; a number if there is
    no such class."""
    if index >= len(record.predictions):
        return "nothing", False
    guess = int(record.predictions[index])
    name = dataset.classes[guess] if 0 <= guess < len(dataset.classes) else str(guess)
    return name, guess == int(dataset.test_labels[index])


def label_of(dataset: Dataset, index: int) -> str:
    """The class of a training image; empty if it has none."""
    return dataset.classes[dataset.train_labels[index]] if dataset.classes else ""


def without_one_channel(image: np.ndarray) -> np.ndarray:
    """(height, width, 1) as (height, width), as pictures of grey are drawn."""
    return image[..., 0] if image.shape[2:] == (1,) else image


def _samples(dataset: Dataset, sample: np.ndarray | None) -> Figure:
    from matplotlib.patches import Rectangle

    chosen, columns = first_images(dataset, sample), SAMPLES[1]
    rows = max(1, math.ceil(len(chosen) / columns))
    figure = new_figure(1.15 * columns, 1.34 * rows + 0.35)
    figure.suptitle(
        f"Training images{'' if sample is None else ', the first of the run'}", fontsize=11
    )
    axes = figure.subplots()  # one for all images, in pixels: one for each is four times as slow
    axes.set_axis_off()
    for place, index in enumerate(chosen):
        x, y = ACROSS * (place % columns), DOWN * (place // columns)
        image = without_one_channel(dataset.train_images[index])
        axes.imshow(image, extent=(x, x + 32, y + 32, y), **DRAWN)
        axes.add_patch(Rectangle((x, y), 32, 32, fill=False, edgecolor=INK, linewidth=0.8))
        name = label(label_of(dataset, int(index)))
        axes.text(x + 16, y - 1, name, ha="center", va="baseline", fontsize=8, in_layout=False)
    axes.set_xlim(-0.3, ACROSS * (columns - 1) + 32.3)
    axes.set_ylim(DOWN * (rows - 1) + 32.3, -4)
    return figure


def _predictions(report: ReportJson, records: Records, dataset: Dataset) -> Figure:
    comparison = report["lenses"][0]
    runs = records[comparison["dtype"]]
    names = list(runs)
    count = min(4, len(dataset.test_images))
    figure = new_figure(2.3 * max(3, count), 3.0 + 0.45 * len(names))
    figure.suptitle(
        f"The first test images, after {plural(comparison['steps'], 'step')} in "
        f"{comparison['dtype']}",
        fontsize=11,
    )
    grid = figure.subplots(
        1 + len(names), count, squeeze=False, height_ratios=[2.3, *[0.36] * len(names)]
    )
    for index, (axes, *below) in enumerate(grid.T):
        truth = dataset.classes[dataset.test_labels[index]]
        image = without_one_channel(dataset.test_images[index])
        axes.imshow(image, **DRAWN)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"true: {label(truth)}", fontsize=10)
        for name, space in zip(names, below, strict=True):
            guess, right = prediction(runs[name], index, dataset)
            text = f"{name}: {label(guess)}\n{'right' if right else 'WRONG'}"
            colour = RIGHT if right else WRONG
            space.text(0.5, 0.5, text, ha="center", va="center", fontsize=9.5, color=colour)
            space.set_axis_off()
    return figure


# --- Charts


def _losses(report: ReportJson, records: Records, twins: Twins) -> Figure:
    """For each precision, the training losses and, of two runs, their gap."""
    comparisons = report["lenses"]
    both = any(len(records[comparison["dtype"]]) == 2 for comparison in comparisons)
    figure = new_figure(11 if both else 6.5, 3.3 * len(comparisons) + (0.5 if both else 0.2))
    grid = figure.subplots(len(comparisons), 2 if both else 1, squeeze=False)
    named: dict[str, Artist] = {}
    for row, comparison in zip(grid, comparisons, strict=True):
        dtype, runs = comparison["dtype"], records[comparison["dtype"]]
        name = chart_data.loss_name(runs)
        charts.draw_series(row[0], runs, "loss", name, chart_data.smoothing(runs))
        row[0].set_title(f"{dtype}: training loss", fontsize=10)
        if len(runs) == 2:
            charts.draw_gap(row[1], comparison, runs, twins.get(dtype, {}))
            unknown = np.flatnonzero(np.isnan(chart_data.loss_gap(*runs.values())))
            title = f"{dtype}: gap between the two training losses"
            title += f"; not finite from step {unknown[0]:,}" if len(unknown) else ""
            row[1].set_title(title, fontsize=10, pad=18 if comparison["first_divergence"] else None)
            handles, names = row[1].get_legend_handles_labels()
            named |= dict(zip(names, handles, strict=True))
        elif both:
            row[1].set_axis_off()
    if named:  # below the panels, where it hides nothing
        figure.legend(
            named.values(),
            named.keys(),
            loc="outside lower right",
            ncols=4,
            frameon=False,
            fontsize=9,
        )
    return figure


def _rate_and_norm(report: ReportJson, records: Records) -> Figure:
    """For each precision, the learning rate and the gradient norm."""
    comparisons = report["lenses"]
    figure = new_figure(11, 2.9 * len(comparisons) + 0.2)
    for row, comparison in zip(
        figure.subplots(len(comparisons), 2, squeeze=False), comparisons, strict=True
    ):
        runs = records[comparison["dtype"]]
        charts.draw_series(row[0], runs, "lr", "learning rate")
        charts.draw_series(
            row[1], runs, "gradient_norm", "gradient norm", chart_data.smoothing(runs)
        )
        row[0].set_title(f"{comparison['dtype']}: learning rate", fontsize=10)
        row[1].set_title(
            f"{comparison['dtype']}: Euclidean norm of the whole gradient", fontsize=10
        )
    return figure


def _classes(report: ReportJson) -> Figure:
    """The accuracy per class in the last precision."""
    comparison = report["lenses"][-1]
    names, note = chart_data.extremes(chart_data.by_accuracy(comparison, report["data"]["classes"]))
    title = f"Accuracy per class on the test images ({comparison['dtype']}), weakest first" + (
        f"\n{note}" if note else ""
    )
    figure = new_figure(7.6, 1.6 + charts.class_height(comparison) * len(names))
    axes = figure.subplots()
    charts.draw_classes(axes, comparison, names)
    axes.set_title(title, fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _confusion(report: ReportJson, records: Records, dataset: Dataset) -> Figure:
    """Confusion matrices of the last precision: one per backend, and the difference of two."""
    comparison = report["lenses"][-1]
    runs = records[comparison["dtype"]]
    backends, like = list(runs), like_backends(runs)
    shown, note = chart_data.shown_classes(comparison, dataset.classes)
    size = len(dataset.classes)
    counts = [
        chart_data.confusion_counts(runs[name].predictions, dataset.test_labels, size)
        for name in backends
    ]
    panels = 3 if len(backends) == 2 else 1
    figure = new_figure(4.3 * panels, 5.0)
    row = figure.subplots(1, panels, squeeze=False)[0]
    for axes, name, matrix in zip(row, backends, counts, strict=False):
        charts.draw_confusion(axes, matrix, shown, dataset.classes, COLOURS[like[name]])
        axes.set_title(f"{name}: % of each class's test images", fontsize=10)
    if panels == 3:
        charts.draw_confusion_difference(row[2], counts[0] - counts[1], shown, dataset.classes)
        row[2].set_title(f"{' minus '.join(backends)}: test images", fontsize=10)
    figure.suptitle(
        f"Confusion matrices ({comparison['dtype']}){'; ' if note else ''}{note}", fontsize=11
    )
    return figure
