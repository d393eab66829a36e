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
from lockstep.common.report import alt_text, chart_data, charts, first_screen, tables
from lockstep.common.report.chart_data import Records, Runs, Twins
from lockstep.common.report.figures import COLOURS, drawing
from lockstep.common.report.images import first_images, prediction
from lockstep.common.report.json import ComparisonJson, PlaceJson, ReportJson
from lockstep.common.report.panels import Chart, escaped, panel
from lockstep.common.report.summary import heading
from lockstep.common.report.tables import Table
from lockstep.common.report.template import write_page
from lockstep.common.runs.record import Record

N_TRAINING_IMAGES = 16
N_TEST_IMAGES = 8  # shown with their predictions
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
        topics = _topics(precisions, dataset)
    first = first_screen.card(report)
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
        "topics": topics,
        "ordered": sample is not None,
        "training": [
            _image_tile(
                dataset.train_images[index],
                "training image",
                dataset.classes[dataset.train_labels[index]],
            )
            for index in first_images(dataset, sample)[:N_TRAINING_IMAGES]
        ],
        "tested": _tested(precisions[0], dataset) if precisions else None,
        "differing": [_differing(each, dataset) for each in precisions if each.both],
        "command": shlex.join(typed_command(report["command"])),
        "files": _files(folder, precisions),
        "statistics": [_statistics(each, dataset) for each in precisions],
        "numbers": [
            *tables_of_chart,
            *(chart.table for topic in topics for chart in topic.charts if chart.table),
        ],
        "facts": tables.facts(report),
    }
    page = {name: escaped(value) for name, value in values.items()}
    return write_page(Path(folder, "report.html"), "report.html.jinja", **page)


class Precision(NamedTuple):
    """What the page is made of, in one precision."""

    comparison: ComparisonJson
    runs: Runs
    twins: dict[str, list[Record]]

    @property
    def dtype(self) -> str:
        return self.comparison["dtype"]

    @property
    def both(self) -> bool:
        return len(self.runs) == 2

    @property
    def first_divergence(self) -> PlaceJson | None:
        if self.comparison["verdict"] == "undecided":
            return None
        return self.comparison.get("located") or self.comparison["first_divergence"]


class Topic(NamedTuple):
    """Charts of one kind, of all precisions next to each other."""

    key: str
    heading: str
    notes: list[str]  # what is equal, in place of a chart
    charts: list[Chart]


def _topics(precisions: Sequence[Precision], dataset: Dataset) -> list[Topic]:
    topics = [
        Topic("losses", "Training loss", [], [_training(each) for each in precisions]),
        _accuracy(precisions, dataset),
        _confusion(precisions, dataset),
        _rate_and_norm(precisions),
    ]
    return topics if precisions else []


# --- The first screen, and where the runs diverge


def _main_chart(precisions: Sequence[Precision]) -> tuple[Chart | None, list[Table]]:
    """The gap between the two losses in each precision, or the loss of a run alone; and the
    tables with its numbers."""
    compared = [each for each in precisions if each.both]
    if not compared:
        return (_training(precisions[0], "first-loss") if precisions else None), []
    gaps = [
        charts.Gap(
            each.dtype,
            chart_data.loss_gap(each.runs["torch"], each.runs["flax"]),
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
    chart = panel(
        "gap",
        f"The gap between the two training losses, |torch - flax|, in nats: the largest of each "
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
        "sources": [(name, sources[name]) for name in BACKENDS if name in sources],
        "tables": [
            each
            for each in (tables.first_failures(found), tables.worst_entries(found))
            if each is not None
        ],
    }


# --- The charts of each topic


def _training(precision: Precision, key: str = "loss") -> Chart:
    dtype, runs = precision.dtype, precision.runs
    window = chart_data.smoothing(runs)
    lines = f": thin line, each step; thick line, the mean of {window:,} steps"
    return panel(
        f"{key}-{dtype}",
        f"Training loss, {dtype}{lines if window > 1 else ''}.",
        alt_text.series_text(f"Training loss, {dtype}, in nats", runs, "loss", window),
        3.2,
        lambda axes: charts.draw_series(axes, runs, "loss", "cross entropy, nats", window),
        tables.losses(dtype, runs, window),
    )


def _rate_and_norm(precisions: Sequence[Precision]) -> Topic:
    """The learning rate is drawn if it changes, and once if it is the same everywhere."""
    notes: list[str] = []
    rates = [record.lr for each in precisions for record in each.runs.values()]
    same = all(np.array_equal(rates[0], other) for other in rates[1:])
    if same and np.ptp(rates[0]) == 0:
        drawn = []
        notes.append(f"The learning rate is {rates[0][0]:g} in every step of all runs.")
    elif same:
        drawn = [_rate(precisions[0], "The learning rate of each step, equal in all runs.")]
    else:
        drawn = [_rate(each, f"{each.dtype}: learning rate.") for each in precisions]
    return Topic("norm", "Gradient norm", notes, [*map(_norm, precisions), *drawn])


def _rate(precision: Precision, caption: str) -> Chart:
    dtype, runs = precision.dtype, precision.runs
    return panel(
        f"lr-{dtype}",
        caption,
        alt_text.series_text(f"Learning rate, {dtype},", runs, "lr"),
        2.8,
        lambda axes: charts.draw_series(axes, runs, "lr", "learning rate"),
        tables.series(f"Learning rate, {dtype}", runs, "lr"),
    )


def _norm(precision: Precision) -> Chart:
    dtype, runs = precision.dtype, precision.runs
    window = chart_data.smoothing(runs)
    return panel(
        f"norm-{dtype}",
        f"{dtype}: the Euclidean norm of the whole gradient.",
        alt_text.series_text(f"Gradient norm, {dtype},", runs, "gradient_norm", window),
        2.8,
        lambda axes: charts.draw_series(axes, runs, "gradient_norm", "gradient norm", window),
        tables.series(f"Gradient norm, {dtype}", runs, "gradient_norm"),
    )


def _accuracy(precisions: Sequence[Precision], dataset: Dataset) -> Topic:
    """Accuracies; and their differences where twins show how large these may be."""
    topic = Topic("accuracy", "Accuracy per class", [], [])
    for each in precisions:
        names = chart_data.by_accuracy(each.comparison, dataset.classes)
        differs = not _all_equal(each) and (any(each.twins.values()) or len(precisions) == 1)
        topic.charts.extend(_class_charts(each.comparison, names, differs))
        if _all_equal(each):
            total = each.comparison["predictions_total"]
            topic.notes.append(
                f"{each.dtype}: all {total:,} predictions are equal, and so are all accuracies."
            )
    return topic


def _all_equal(precision: Precision) -> bool:
    """Whether both runs predict the same class for every test image."""
    found = precision.comparison
    return precision.both and found["predictions_equal"] == found["predictions_total"]


def _class_charts(comparison: ComparisonJson, names: list[str], differs: bool) -> list[Chart]:
    """Accuracies and their differences, with the same classes in the same rows; `tables.classes`
    has the numbers."""
    dtype, (shown, note) = comparison["dtype"], chart_data.extremes(names)
    height, which = charts.class_height(comparison) * len(shown), f": {note}" if note else ""
    drawn = [
        panel(
            f"classes-{dtype}",
            f"{dtype}: accuracy per class, weakest first{which}.",
            alt_text.classes(comparison, names),
            height + 1.3,
            lambda axes: charts.draw_classes(axes, comparison, shown),
            None,
            legend=2,
        )
    ]
    if comparison.get("class_differences") and differs:
        drawn.append(
            panel(
                f"differences-{dtype}",
                f"{dtype}: difference of the two accuracies. Grey: how far twins of one framework "
                "are apart in that class; ticks: the bound.",
                alt_text.differences(comparison, names),
                height + 1.3,
                lambda axes: charts.draw_differences(axes, comparison, shown),
                None,
            )
        )
    return drawn


def _confusion(precisions: Sequence[Precision], dataset: Dataset) -> Topic:
    """One matrix, and where the other one of a precision differs, their difference."""
    found = [
        chart
        for place, each in enumerate(precisions)
        for chart in _confusion_charts(each, dataset, whole=place == 0)
    ]
    notes = [
        f"{each.dtype}: both confusion matrices are equal."
        for each in precisions
        if _all_equal(each)
    ]
    return Topic("confusion", "Confusion matrices", notes, found)


def _confusion_charts(precision: Precision, dataset: Dataset, whole: bool) -> list[Chart]:
    """Of one precision.

    Args:
        whole: whether to draw the first run's matrix, too.
    """
    dtype, names = precision.dtype, dataset.classes
    shown, note = chart_data.shown_classes(precision.comparison, names)
    which = f" The chart shows {note}." if note else ""
    counts = {
        name: chart_data.confusion_counts(
            precision.runs[name].predictions, dataset.test_labels, len(names)
        )
        for name in BACKENDS
        if name in precision.runs
    }
    drawn = []
    if whole:
        name, run = next(iter(precision.runs.items()))
        matrix = panel(
            f"confusion-{name}-{dtype}",
            f"{dtype}, {name}: predicted classes (columns) for the test images of each class "
            f"(rows), in per cent.{which}",
            alt_text.confusion(name, run, dataset.test_labels, names, dtype),
            4.4,
            functools.partial(
                charts.draw_confusion,
                counts=counts[name],
                shown=shown,
                classes=names,
                colour=COLOURS[name],
            ),
            tables.matrix(
                f"Test images by true class (rows) and by the class that {name} predicts "
                f"(columns), {dtype}",
                counts[name],
                shown,
                names,
            ),
        )
        drawn.append(matrix)
    if len(counts) == 2 and not _all_equal(precision):
        more = counts["torch"] - counts["flax"]
        drawn.append(
            panel(
                f"confusion-difference-{dtype}",
                f"{dtype}: test images that torch (+) or flax (-) predicts more often as a class."
                f"{which}",
                alt_text.confusion_difference(more, names, dtype),
                4.4,
                functools.partial(
                    charts.draw_confusion_difference, counts=more, shown=shown, classes=names
                ),
                tables.matrix(f"Test images, torch minus flax, {dtype}", more, shown, names),
            )
        )
    return drawn


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
            tables.classes(comparison, dataset, names),
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


def _tested(precision: Precision, dataset: Dataset) -> dict[str, object]:
    chosen = range(min(N_TEST_IMAGES, len(dataset.test_images)))
    return {
        "dtype": precision.dtype,
        "tiles": [_predicted(index, precision.runs, dataset) for index in chosen],
    }


def _differing(precision: Precision, dataset: Dataset) -> dict[str, object]:
    """The test images for which the two runs predict different classes."""
    one, other = (precision.runs[name].predictions for name in BACKENDS)
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
