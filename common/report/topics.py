"""The charts of a run's page by topic, of all precisions next to each other; what is equal is said
in a line and not drawn."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lockstep.common.data import Dataset
from lockstep.common.report import alt_text, chart_data, charts, tables
from lockstep.common.report.chart_data import Runs
from lockstep.common.report.figures import COLOURS, like_backends
from lockstep.common.report.json import ComparisonJson, PlaceJson
from lockstep.common.report.panels import Chart, panel
from lockstep.common.runs.record import Record


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


def topics(precisions: Sequence[Precision], dataset: Dataset) -> list[Topic]:
    if not precisions:
        return []
    found = [Topic("losses", "Training loss", [], [training(each) for each in precisions])]
    if dataset.classes:
        found += [_accuracy(precisions, dataset), _confusion(precisions, dataset)]
    return [*found, _rate_and_norm(precisions)]


def training(precision: Precision, key: str = "loss") -> Chart:
    dtype, runs = precision.dtype, precision.runs
    window = chart_data.smoothing(runs)
    name, nats = chart_data.loss_name(runs), ", in nats" if chart_data.loss_unit(runs) else ""
    lines = f": thin line, each step; thick line, the mean of {window:,} steps"
    return panel(
        f"{key}-{dtype}",
        f"Training loss, {dtype}{lines if window > 1 else ''}.",
        alt_text.series_text(f"Training loss, {dtype}{nats}", runs, "loss", window),
        3.2,
        lambda axes: charts.draw_series(axes, runs, "loss", name, window),
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
        for name in precision.runs
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
                colour=COLOURS[like_backends(precision.runs)[name]],
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
        one, other = counts
        more = counts[one] - counts[other]
        drawn.append(
            panel(
                f"confusion-difference-{dtype}",
                f"{dtype}: test images that {one} (+) or {other} (-) predicts more often as a class."
                f"{which}",
                alt_text.confusion_difference(more, names, dtype, list(counts)),
                4.4,
                functools.partial(
                    charts.draw_confusion_difference, counts=more, shown=shown, classes=names
                ),
                tables.matrix(f"Test images, {one} minus {other}, {dtype}", more, shown, names),
            )
        )
    return drawn
