"""`report.html`: one run on one page, from its verdict to the command that makes it again."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lockstep.common.data import Dataset
from lockstep.common.report import alt_text, chart_data, charts, first_screen, tables
from lockstep.common.report.chart_data import Records, Runs, Twins
from lockstep.common.report.figures import drawing
from lockstep.common.report.images import (
    first_images,
    label_of,
    prediction,
    without_one_channel,
)
from lockstep.common.report.json import ComparisonJson, ReportJson
from lockstep.common.report.panels import Chart, escaped, panel
from lockstep.common.report.summary import heading
from lockstep.common.report.tables import Table
from lockstep.common.report.template import write_page
from lockstep.common.report.topics import Precision, topics, training

N_TRAINING_IMAGES = 16
N_TEST_IMAGES = 8  # shown with their predictions
MAX_TILE = 64  # pixels of an image on the page
N_DIFFERING = 8  # shown of the test images with different predictions


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
    precisions = [
        Precision(each, records[each["dtype"]], (twins or {}).get(each["dtype"], {}))
        for each in report["lenses"]
    ]
    with drawing():
        chart, tables_of_chart = _main_chart(precisions)
        # the first steps and a few test images are worth no chart
        by_topic = [] if "ended_early" in report else topics(precisions, dataset)
    first = first_screen.card(report)
    predicted = bool(dataset.has_pictures and dataset.classes)
    values = {
        "title": f"{first_screen.title(report)}: {first.verdict.words.lower()}",
        "card": first,
        "strips": [
            (
                each.dtype,
                first_screen.stages(
                    each.comparison,
                    each.first_divergence,
                    decided=each.comparison["verdict"] != "undecided",
                ),
            )
            for each in precisions
            if each.both
        ],
        "chart": chart,
        "results": tables.results(report["lenses"]),
        "difference": _difference(report["lenses"]),
        "topics": by_topic,
        "ordered": sample is not None,
        "training": _training_images(dataset, sample),
        "tested": _tested(precisions[0], dataset) if precisions and predicted else None,
        "differing": [_differing(each, dataset) for each in precisions if each.both and predicted],
        "command": shlex.join(typed_command(report["command"])),
        "files": _files(folder, precisions),
        "statistics": [_statistics(each, dataset) for each in precisions],
        "numbers": [
            *tables_of_chart,
            *(chart.table for topic in by_topic for chart in topic.charts if chart.table),
        ],
        "facts": tables.facts(report),
    }
    page = {name: escaped(value) for name, value in values.items()}
    return write_page(Path(folder, "report.html"), "report.html.jinja", **page)


# --- The first screen, and where the runs diverge


def _main_chart(precisions: Sequence[Precision]) -> tuple[Chart | None, list[Table]]:
    """The gap between the two losses in each precision, or the loss of a run alone; and the
    tables with its numbers."""
    compared = [each for each in precisions if each.both]
    if not compared:
        return (training(precisions[0], "first-loss") if precisions else None), []
    gaps = [
        charts.Gap(
            each.dtype,
            chart_data.loss_gap(*each.runs.values()),
            chart_data.twin_spread(each.runs, each.twins),
            chart_data.loss_bounds(each.comparison),
        )
        for each in compared
    ]
    diverging = [each for each in compared if each.first_divergence is not None]
    first = diverging[0].first_divergence if diverging else None
    band = (
        ". Grey: the largest gap so far between twins, runs of one framework whose weights and "
        "images differ in the last bit"
        if any(any(each.twins.values()) for each in compared)
        else ""
    )
    nats = ", in nats" if chart_data.loss_unit(compared[0].runs) else ""
    chart = panel(
        "gap",
        f"The gap between the two training losses, |{' - '.join(compared[0].runs)}|{nats}: the largest of each "
        f"range of steps. Green: what is allowed between the closest runs of the two{band}.",
        " ".join(alt_text.gap(each.comparison, each.runs, each.twins) for each in compared),
        3.2,
        lambda axes: charts.draw_gaps(axes, gaps, first),
        None,
        legend=2,
    )
    return chart, [tables.gap(each.comparison, each.runs, each.twins) for each in compared]


def _difference(comparisons: Sequence[ComparisonJson]) -> dict[str, object] | None:
    """What differs where the runs diverge: sources, the first tensors, the worst entries; of the
    precision that the card is about."""
    found = first_screen.disagreeing(comparisons)
    if found is None:
        return None
    located = found.get("located")
    sources = located.get("sources", {}) if located else {}
    return {
        "sources": list(sources.items()),
        "tables": [
            each
            for each in (tables.first_failures(found), tables.worst_entries(found))
            if each is not None
        ],
    }


# --- The statistics, and where the rest is


def _statistics(precision: Precision, dataset: Dataset) -> dict[str, object]:
    """How sure the verdict is in one precision, and everything that was compared."""
    comparison = precision.comparison
    names = chart_data.by_accuracy(comparison, dataset.classes)
    found = [tables.worst_checks(comparison), tables.checks(comparison)]
    return {
        "heading": heading(comparison, "disagree"),
        "dtype": comparison["dtype"],
        "confidence": alt_text.confidence_summary(comparison),
        "tables": [
            *(found if comparison["ladder"] else []),
            *([tables.windows(comparison)] if comparison["stretches"] else []),
            *([tables.classes(comparison, dataset, names)] if dataset.classes else []),
            tables.speed(comparison),
        ],
    }


def _files(folder: Path, precisions: Sequence[Precision]) -> list[str]:
    """The files next to the page that hold what it shows."""
    names = [
        f"{record.stem}.safetensors"
        for each in precisions
        for name, run in each.runs.items()
        for record in (run, *each.twins.get(name, ()))
    ]
    return ["report.json", *(name for name in names if Path(folder, name).exists())]


# --- Images


def _training_images(dataset: Dataset, sample: np.ndarray | None) -> list[ImageTile]:
    if not dataset.has_pictures:
        return []
    return [
        _image_tile(dataset.train_images[index], "training image", label_of(dataset, index))
        for index in first_images(dataset, sample)[:N_TRAINING_IMAGES].tolist()
    ]


def _tested(precision: Precision, dataset: Dataset) -> dict[str, object]:
    chosen = range(min(N_TEST_IMAGES, len(dataset.test_images)))
    return {
        "dtype": precision.dtype,
        "tiles": [_predicted(index, precision.runs, dataset) for index in chosen],
    }


def _differing(precision: Precision, dataset: Dataset) -> dict[str, object]:
    """The test images for which the two runs predict different classes."""
    one, other = (run.predictions for run in precision.runs.values())
    shared = min(len(one), len(other))
    [differing] = np.nonzero(one[:shared] != other[:shared])
    shown = differing[:N_DIFFERING].tolist()
    return {
        "dtype": precision.dtype,
        "count": len(differing),
        "total": precision.comparison["predictions_total"],
        "tiles": [_predicted(index, precision.runs, dataset) for index in shown],
    }


def _predicted(index: int, runs: Runs, dataset: Dataset) -> ImageTile:
    lines = []
    for name, run in runs.items():
        guess, right = prediction(run, index, dataset)
        text = f"{name}: {guess}, {'right' if right else 'wrong'}"
        lines.append((text, "good" if right else "bad"))
    truth = dataset.classes[dataset.test_labels[index]]
    return _image_tile(dataset.test_images[index], f"test image {index:,}", truth, lines)


def _image_tile(
    image: np.ndarray, what: str, truth: str, lines: Iterable[tuple[str, str]] = ()
) -> ImageTile:
    from PIL import Image

    content = io.BytesIO()
    picture = Image.fromarray(without_one_channel(image))
    if max(picture.size) > MAX_TILE:
        picture.thumbnail((MAX_TILE, MAX_TILE))
    picture.save(content, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    labelled = [(truth, "")] if truth else []
    return ImageTile(source, ": ".join(filter(None, [what, truth])), [*labelled, *lines])
