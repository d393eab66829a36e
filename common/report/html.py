"""`report.html`: one run on one page, from its verdict to the command that makes it again."""

from __future__ import annotations

import base64
import functools
import io
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from lockstep.common.config import BACKENDS
from lockstep.common.data import Dataset
from lockstep.common.report import alt_text, charts, tables
from lockstep.common.report.charts import Records, Runs, Twins
from lockstep.common.report.figures import COLOURS, drawing, new_figure, to_inline
from lockstep.common.report.images import first_images, guessed
from lockstep.common.report.tables import Table
from lockstep.common.report.template import write_page
from lockstep.common.report.terminal import counted, safe, sentence
from lockstep.common.runs.record import Record
from lockstep.common.verdict.statistics import CONFIDENCE

WIDTH = 4.4  # of a chart, in inches: its writing can be read on a phone
TESTED = 16  # test images that are shown
DIFFERENT = 24  # test images on which the runs differ that are shown


class Chart(NamedTuple):
    """A picture for those who see it and one for those who do not; and its numbers."""

    caption: str
    svg: Markup
    table: Table | None


class Tile(NamedTuple):
    """One image of the data set and what is said of it: pairs of a text and "good", "bad" or ""."""

    source: str
    text: str
    lines: Sequence[tuple[str, str]]


def typed_command(command: list[str]) -> list[str]:
    """The command line of a report; older ones leave out "python"."""
    return ["python", *command] if command[:1] == ["compare.py"] else command


def write_report_page(
    folder: Path,
    report: dict[str, Any],
    records: Records,
    dataset: Dataset,
    twins: Twins | None = None,
    sample: np.ndarray | None = None,
) -> Path:
    """Write `report.html`: one file that needs no network; equal runs give equal bytes.

    Args:
        report: what `report.json` holds.
        records: by lens and backend, the runs.
        dataset: what they were trained on.
        twins: by lens and backend, the runs' twins.
        sample: indices of training images, in the order in which the run sees them; the first
            images if None.

    Raises:
        RecordError: if the file cannot be written.
    """
    lenses = report["lenses"]
    with drawing():
        sections = [
            _lens(lens, records[lens["dtype"]], dataset, (twins or {}).get(lens["dtype"], {}))
            for lens in lenses
        ]
    values = {
        "verdict": "" if report.get("cut_short") else report["verdict"],
        "sentence": sentence(report),
        "name": f"{report['data']['name']}, {report.get('recipe', 'a run')}",
        "lenses": sections,
        "ordered": sample is not None,
        "training": [
            _tile(
                dataset.train_images[index],
                "training image",
                dataset.classes[dataset.train_labels[index]],
            )
            for index in first_images(dataset, sample)
        ],
        "tested": _tested(lenses[0], records[lenses[0]["dtype"]], dataset),
        "command": shlex.join(typed_command(report["command"])),
        "facts": tables.facts(report),
    }
    return write_page(Path(folder, "report.html"), "report.html.jinja", **_readable(values))


def _readable(value: Any) -> Any:
    """Every text within `value` that is no markup, with what cannot be printed escaped."""
    if isinstance(value, str):
        return value if isinstance(value, Markup) else safe(value)
    if isinstance(value, dict):
        return {key: _readable(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_readable, value))
    return [_readable(item) for item in value] if isinstance(value, (list, tuple)) else value


# --- One lens


def _lens(
    lens: dict[str, Any], runs: Runs, dataset: Dataset, twins: dict[str, list[Record]]
) -> dict[str, Any]:
    dtype, both = lens["dtype"], len(runs) == 2
    verdict = {
        "agree": "the runs agree",
        "disagree": "the runs disagree",
        "diverged": "both runs diverge",
    }.get(lens["verdict"], "one run")
    names = charts.ranked(lens, dataset.classes)
    window = charts.smoothing(runs)
    return {
        "dtype": dtype,
        "heading": f"{dtype}, {counted(lens['steps'], 'step')}: {verdict}",
        "sure": alt_text.how_sure(lens),
        "located": lens.get("located"),
        "offenders": tables.offenders(lens),
        "losses": [_training(dtype, runs, window), *([_gap(lens, runs, twins)] if both else [])],
        "ladder": [tables.condensed(lens), tables.ladder(lens)] if lens["ladder"] else [],
        "stretches": tables.stretches(lens) if lens["stretches"] else None,
        "classes": tables.classes(lens, dataset, names),
        "class_charts": _class_charts(lens, names),
        "confusion": _confusions(lens, runs, dataset),
        "course": _course(dtype, runs, window),
        "speed": tables.speed(lens),
        "differing": _differing(runs, dataset) if both else [],
        "count": int(np.sum(_apart(runs))) if both else 0,
        "total": lens["predictions_total"],
        "both": both,
    }


def _panel(
    key: str,
    caption: str,
    text: str,
    height: float,
    draw: Callable[[Any], None],
    table: Table | None,
    legend: int = 0,
) -> Chart:
    """A chart of one panel, with `legend` columns of names below it."""
    figure = new_figure(WIDTH, height)
    draw(figure.subplots())
    if legend:
        figure.legend(loc="outside lower center", ncols=legend, frameon=False, fontsize=8)
    return Chart(caption, Markup(to_inline(figure, f"x-{key}", safe(text))), table)


def _training(dtype: str, runs: Runs, window: int) -> Chart:
    caption = "Training loss" + (
        f": thin, each step; thick, the mean of {window:,} steps" if window > 1 else ""
    )
    return _panel(
        f"loss-{dtype}",
        f"{caption}.",
        alt_text.course(f"Training loss, {dtype}, in nats", runs, "loss", window),
        3.4,
        lambda axes: charts.draw_series(axes, runs, "loss", "cross entropy, nats", window),
        tables.losses(dtype, runs, window),
    )


def _gap(lens: dict[str, Any], runs: Runs, twins: dict[str, list[Record]]) -> Chart:
    over = "over the gap between twins of one framework, and " if any(twins.values()) else ""
    return _panel(
        f"gap-{lens['dtype']}",
        f"Gap between the two training losses, {over}under its bound.",
        alt_text.gap(lens, runs, twins),
        3.4,
        lambda axes: charts.draw_gap(axes, lens, runs, twins),
        tables.gap(lens, runs, twins),
        legend=2,
    )


def _course(dtype: str, runs: Runs, window: int) -> list[Chart]:
    return [
        _panel(
            f"lr-{dtype}",
            "Learning rate of each step.",
            alt_text.course(f"Learning rate, {dtype},", runs, "lr"),
            2.8,
            lambda axes: charts.draw_series(axes, runs, "lr", "learning rate"),
            tables.series(f"Learning rate, {dtype}", runs, "lr"),
        ),
        _panel(
            f"norm-{dtype}",
            "Euclidean norm of the whole gradient.",
            alt_text.course(f"Gradient norm, {dtype},", runs, "gradient_norm", window),
            2.8,
            lambda axes: charts.draw_series(axes, runs, "gradient_norm", "gradient norm", window),
            tables.series(f"Gradient norm, {dtype}", runs, "gradient_norm"),
        ),
    ]


def _class_charts(lens: dict[str, Any], names: list[str]) -> list[Chart]:
    """Both show the same classes in the same rows; their numbers are those of `tables.classes`."""
    shown, note = charts.extremes(names)
    height, which = charts.class_height(lens) * len(shown), f": {note}" if note else ""
    drawn = [
        _panel(
            f"classes-{lens['dtype']}",
            f"Accuracy per class, weakest first{which}.",
            alt_text.classes(lens, names),
            height + 1.3,
            lambda axes: charts.draw_classes(axes, lens, shown),
            None,
            legend=2,
        )
    ]
    if differences := lens.get("class_differences"):
        drawn.append(
            _panel(
                f"differences-{lens['dtype']}",
                f"Difference of the two accuracies, with {100 * CONFIDENCE:g} % intervals that hold for all "
                f"{len(differences):,} classes together.",
                alt_text.differences(lens, names),
                height + 1.3,
                lambda axes: charts.draw_differences(axes, lens, shown),
                None,
            )
        )
    return drawn


def _confusions(lens: dict[str, Any], runs: Runs, dataset: Dataset) -> list[Chart]:
    dtype, names = lens["dtype"], dataset.classes
    backends = [name for name in BACKENDS if name in runs]
    shown, note = charts.shown_classes(lens, names)
    which = f" Drawn are {note}." if note else ""
    counts = {
        name: charts.confusion_counts(runs[name].predictions, dataset.test_labels, len(names))
        for name in backends
    }
    drawn = [
        _panel(
            f"confusion-{name}-{dtype}",
            f"{name}: what the test images of each class (rows) were taken for, in per cent.{which}",
            alt_text.confusion(name, runs[name], dataset.test_labels, names, dtype),
            4.4,
            functools.partial(
                charts.draw_confusion,
                counts=counts[name],
                shown=shown,
                classes=names,
                colour=COLOURS[name],
            ),
            tables.matrix(
                f"Test images of {name}, {dtype}: the true class, and for what it was taken",
                counts[name],
                shown,
                names,
            ),
        )
        for name in backends
    ]
    if len(backends) == 2:
        more = counts["torch"] - counts["flax"]
        drawn.append(
            _panel(
                f"confusion-difference-{dtype}",
                f"Test images that torch (+) or flax (-) took more often for a class.{which}",
                alt_text.confusion_difference(more, names, dtype),
                4.4,
                functools.partial(
                    charts.draw_confusion_difference, counts=more, shown=shown, classes=names
                ),
                tables.matrix(f"Test images, torch less flax, {dtype}", more, shown, names),
            )
        )
    return drawn


# --- Images


def _tested(lens: dict[str, Any], runs: Runs, dataset: Dataset) -> dict[str, Any]:
    chosen = range(min(TESTED, len(dataset.test_images)))
    return {"dtype": lens["dtype"], "tiles": [_predicted(index, runs, dataset) for index in chosen]}


def _apart(runs: Runs) -> np.ndarray:
    """bool (test images,): of which the two runs say different classes."""
    one, other = runs["torch"].predictions, runs["flax"].predictions
    shared = min(len(one), len(other))
    return one[:shared] != other[:shared]


def _differing(runs: Runs, dataset: Dataset) -> list[Tile]:
    return [
        _predicted(index, runs, dataset)
        for index in np.flatnonzero(_apart(runs))[:DIFFERENT].tolist()
    ]


def _predicted(index: int, runs: Runs, dataset: Dataset) -> Tile:
    lines = []
    for name in BACKENDS:
        if name in runs:
            said, right = guessed(runs[name], index, dataset)
            lines.append(
                (f"{name}: {said}, {'right' if right else 'wrong'}", "good" if right else "bad")
            )
    truth = dataset.classes[dataset.test_labels[index]]
    return _tile(dataset.test_images[index], f"test image {index:,}", truth, lines)


def _tile(image: np.ndarray, what: str, truth: str, lines: Iterable[tuple[str, str]] = ()) -> Tile:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG", optimize=True)
    source = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    return Tile(source, f"{what}: {truth}", [(truth, ""), *lines])
