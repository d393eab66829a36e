"""`report.html`: one run on one page, from its verdict to the command that makes it again."""

from __future__ import annotations

import base64
import functools
import io
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lockstep.common.config import BACKENDS
from lockstep.common.data import Dataset
from lockstep.common.report import alt_text, chart_data, charts, tables
from lockstep.common.report.chart_data import Records, Runs, Twins
from lockstep.common.report.figures import COLOURS, drawing
from lockstep.common.report.images import first_images, prediction
from lockstep.common.report.json import ComparisonJson, LocationJson, ReportJson
from lockstep.common.report.panels import Chart, escaped, panel
from lockstep.common.report.summary import failing_text, heading, own_names_text, sentence
from lockstep.common.report.template import write_page
from lockstep.common.runs.record import Record

N_TEST_IMAGES = 16  # shown with their predictions
N_DIFFERING = 24  # shown of the test images with different predictions


class ImageTile(NamedTuple):
    """One image of the data set; the lines below it have the style "good", "bad" or ""."""

    source: str
    text: str
    lines: Sequence[tuple[str, str]]


def typed_command(command: list[str]) -> list[str]:
    """The command line of a report; older ones leave out "python"."""
    return ["python", *command] if command[:1] == ["compare.py"] else command


def write_report_page(
    folder: Path,
    report: ReportJson,
    records: Records,
    dataset: Dataset,
    twins: Twins | None = None,
    sample: np.ndarray | None = None,
) -> Path:
    """Write `report.html`: one file that needs no network; equal runs give equal bytes.

    Args:
        report: what `report.json` holds.
        records: the runs, by precision and backend.
        dataset: the data of the runs.
        twins: the twins of each run, by precision and backend.
        sample: int64 (images,), the training images to show, in the order in which the run sees
            them; None shows the first of the data.

    Raises:
        RecordError: if the file cannot be written.
    """
    comparisons = report["lenses"]
    with drawing():
        sections = [
            _section(
                comparison,
                records[comparison["dtype"]],
                dataset,
                (twins or {}).get(comparison["dtype"], {}),
            )
            for comparison in comparisons
        ]
    values = {
        "verdict": "" if report.get("cut_short") else report["verdict"],
        "sentence": sentence(report),
        "name": f"{report['data']['name']}, {report.get('recipe', 'a run')}",
        "comparisons": sections,
        "ordered": sample is not None,
        "training": [
            _image_tile(
                dataset.train_images[index],
                "training image",
                dataset.classes[dataset.train_labels[index]],
            )
            for index in first_images(dataset, sample)
        ],
        "tested": _tested(comparisons[0], records[comparisons[0]["dtype"]], dataset),
        "command": shlex.join(typed_command(report["command"])),
        "facts": tables.facts(report),
    }
    page = {name: escaped(value) for name, value in values.items()}
    return write_page(Path(folder, "report.html"), "report.html.jinja", **page)


# --- One precision


def _section(
    comparison: ComparisonJson, runs: Runs, dataset: Dataset, twins: dict[str, list[Record]]
) -> dict[str, object]:
    """The values of one precision's part of the page."""
    dtype, both = comparison["dtype"], len(runs) == 2
    names = chart_data.by_accuracy(comparison, dataset.classes)
    window = chart_data.smoothing(runs)
    checks = [tables.worst_checks(comparison), tables.checks(comparison)]
    return {
        "dtype": dtype,
        "heading": heading(comparison, "disagree"),
        "confidence": alt_text.confidence_summary(comparison),
        "located": (located := comparison.get("located")),
        "together": [text for text in _together(located) if text is not None],
        "worst_entries": tables.worst_entries(comparison),
        "losses": [
            _training(dtype, runs, window),
            *([_gap(comparison, runs, twins)] if both else []),
        ],
        "checks": checks if comparison["ladder"] else [],
        "windows": tables.windows(comparison) if comparison["stretches"] else None,
        "classes": tables.classes(comparison, dataset, names),
        "class_charts": _class_charts(comparison, names),
        "confusion": _confusions(comparison, runs, dataset),
        "rate_and_norm": _rate_and_norm(dtype, runs, window),
        "speed": tables.speed(comparison),
        "differing": _differing(runs, dataset) if both else [],
        "n_differing": int(np.sum(_different(runs))) if both else 0,
        "total": comparison["predictions_total"],
        "both": both,
    }


def _together(located: LocationJson | None) -> tuple[str | None, ...]:
    """Which tensors fail where the runs diverge, and what either side calls the first."""
    return () if located is None else (failing_text(located), own_names_text(located))


def _training(dtype: str, runs: Runs, window: int) -> Chart:
    lines = f": thin line, each step; thick line, the mean of {window:,} steps"
    caption = f"Training loss{lines if window > 1 else ''}"
    return panel(
        f"loss-{dtype}",
        f"{caption}.",
        alt_text.series_text(f"Training loss, {dtype}, in nats", runs, "loss", window),
        3.4,
        lambda axes: charts.draw_series(axes, runs, "loss", "cross entropy, nats", window),
        tables.losses(dtype, runs, window),
    )


def _gap(comparison: ComparisonJson, runs: Runs, twins: dict[str, list[Record]]) -> Chart:
    band = ", the gap between twins of one framework (grey)," if any(twins.values()) else ""
    return panel(
        f"gap-{comparison['dtype']}",
        f"Gap between the two training losses{band} and its bound.",
        alt_text.gap(comparison, runs, twins),
        3.4,
        lambda axes: charts.draw_gap(axes, comparison, runs, twins),
        tables.gap(comparison, runs, twins),
        legend=2,
    )


def _rate_and_norm(dtype: str, runs: Runs, window: int) -> list[Chart]:
    return [
        panel(
            f"lr-{dtype}",
            "Learning rate of each step.",
            alt_text.series_text(f"Learning rate, {dtype},", runs, "lr"),
            2.8,
            lambda axes: charts.draw_series(axes, runs, "lr", "learning rate"),
            tables.series(f"Learning rate, {dtype}", runs, "lr"),
        ),
        panel(
            f"norm-{dtype}",
            "Euclidean norm of the whole gradient.",
            alt_text.series_text(f"Gradient norm, {dtype},", runs, "gradient_norm", window),
            2.8,
            lambda axes: charts.draw_series(axes, runs, "gradient_norm", "gradient norm", window),
            tables.series(f"Gradient norm, {dtype}", runs, "gradient_norm"),
        ),
    ]


def _class_charts(comparison: ComparisonJson, names: list[str]) -> list[Chart]:
    """Accuracies and their differences, with the same classes in the same rows; `tables.classes`
    has the numbers."""
    shown, note = chart_data.extremes(names)
    height, which = charts.class_height(comparison) * len(shown), f": {note}" if note else ""
    drawn = [
        panel(
            f"classes-{comparison['dtype']}",
            f"Accuracy per class, weakest first{which}.",
            alt_text.classes(comparison, names),
            height + 1.3,
            lambda axes: charts.draw_classes(axes, comparison, shown),
            None,
            legend=2,
        )
    ]
    if comparison.get("class_differences"):
        drawn.append(
            panel(
                f"differences-{comparison['dtype']}",
                "Difference of the two accuracies; grey, how far twins of one framework are apart "
                "in that class; ticks, the bound.",
                alt_text.differences(comparison, names),
                height + 1.3,
                lambda axes: charts.draw_differences(axes, comparison, shown),
                None,
            )
        )
    return drawn


def _confusions(comparison: ComparisonJson, runs: Runs, dataset: Dataset) -> list[Chart]:
    dtype, names = comparison["dtype"], dataset.classes
    shown, note = chart_data.shown_classes(comparison, names)
    which = f" The chart shows {note}." if note else ""
    counts = {
        name: chart_data.confusion_counts(runs[name].predictions, dataset.test_labels, len(names))
        for name in BACKENDS
        if name in runs
    }
    drawn = [
        panel(
            f"confusion-{name}-{dtype}",
            f"{name}: predicted classes (columns) for the test images of each class (rows), "
            f"in per cent.{which}",
            alt_text.confusion(name, runs[name], dataset.test_labels, names, dtype),
            4.4,
            functools.partial(
                charts.draw_confusion,
                counts=each,
                shown=shown,
                classes=names,
                colour=COLOURS[name],
            ),
            tables.matrix(
                f"Test images by true class (rows) and by the class that {name} predicts "
                f"(columns), {dtype}",
                each,
                shown,
                names,
            ),
        )
        for name, each in counts.items()
    ]
    if len(counts) == 2:
        more = counts["torch"] - counts["flax"]
        drawn.append(
            panel(
                f"confusion-difference-{dtype}",
                f"Test images that torch (+) or flax (-) predicts more often as a class.{which}",
                alt_text.confusion_difference(more, names, dtype),
                4.4,
                functools.partial(
                    charts.draw_confusion_difference, counts=more, shown=shown, classes=names
                ),
                tables.matrix(f"Test images, torch minus flax, {dtype}", more, shown, names),
            )
        )
    return drawn


# --- Images


def _tested(comparison: ComparisonJson, runs: Runs, dataset: Dataset) -> dict[str, object]:
    chosen = range(min(N_TEST_IMAGES, len(dataset.test_images)))
    return {
        "dtype": comparison["dtype"],
        "tiles": [_predicted(index, runs, dataset) for index in chosen],
    }


def _different(runs: Runs) -> np.ndarray:
    """bool (test images,): whether the two runs predict different classes."""
    one, other = runs["torch"].predictions, runs["flax"].predictions
    shared = min(len(one), len(other))
    return one[:shared] != other[:shared]


def _differing(runs: Runs, dataset: Dataset) -> list[ImageTile]:
    return [
        _predicted(index, runs, dataset)
        for index in np.flatnonzero(_different(runs))[:N_DIFFERING].tolist()
    ]


def _predicted(index: int, runs: Runs, dataset: Dataset) -> ImageTile:
    lines = []
    for name in BACKENDS:
        if name in runs:
            guess, right = prediction(runs[name], index, dataset)
            text = f"{name}: {guess}, {'right' if right else 'wrong'}"
            lines.append((text, "good" if right else "bad"))
    truth = dataset.classes[dataset.test_labels[index]]
    return _image_tile(dataset.test_images[index], f"test image {index:,}", truth, lines)


def _image_tile(
    image: np.ndarray, what: str, truth: str, lines: Iterable[tuple[str, str]] = ()
) -> ImageTile:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    return ImageTile(source, f"{what}: {truth}", [(truth, ""), *lines])
