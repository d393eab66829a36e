"""The test loss, the predictions, and the accuracy of each class, compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record
from lockstep.common.verdict.check import OUTPUTS, Check, finite
from lockstep.common.verdict.distances import magnitude, max_difference, max_tensor_difference
from lockstep.common.verdict.statistics import (
    COUNT_FLOOR,
    PROOF_BOUND,
    SEPARATION_IMAGES,
    ClassDifference,
    between_and_within,
    bound,
    is_correct,
    paired_difference,
)
from lockstep.common.verdict.trajectory import check_scalar


def check_evaluation(a: Ensemble, b: Ensemble, labels: np.ndarray) -> list[Check]:
    """Test loss, predictions, and for each class the images that one side recognises and the other
    does not; where there are no classes, the outputs."""
    steps, seen = a.run.steps, training_loss_gap(a.run, b.run)
    loss = check_scalar(a, b, steps, "evaluate", "test loss", lambda r: r.test_loss, extra=seen)
    if not has_classes(a.run):
        return [loss, _check_outputs(a, b)]
    return [loss, _check_predictions(a, b, labels), *_check_classes(a, b, labels)]


def has_classes(record: Record) -> bool:
    """Whether its predictions are classes."""
    return record.predictions.ndim == 1


def _check_outputs(a: Ensemble, b: Ensemble) -> Check:
    """The outputs for the test inputs, number by number."""
    outputs = a.run.predictions, b.run.predictions
    gap, spread = between_and_within(
        a.records, b.records, lambda x, y: max_tensor_difference(x.predictions, y.predictions)[0]
    )
    _, values = max_tensor_difference(*outputs)
    scale = max(map(magnitude, outputs))
    # In float64 also as much as training is seen to move the loss, as a share of it.
    loss = max(1.0, magnitude(a.run.loss))
    limit = bound(a.run.dtype, spread, scale) + training_loss_gap(a.run, b.run) / loss * scale
    return Check(a.run.steps, "evaluate", OUTPUTS, gap, limit, spread, values)


def _check_predictions(a: Ensemble, b: Ensemble, labels: np.ndarray) -> Check:
    """How many predictions differ."""
    gap, spread = between_and_within(
        a.records, b.records, lambda x, y: float(len(labels) - equal_predictions(x, y))
    )
    whole = len(a.run.predictions) == len(b.run.predictions) == len(labels)
    return Check(
        a.run.steps,
        "evaluate",
        "predictions",
        gap if whole else math.inf,
        allowed_count(a.run.dtype, spread),
        spread,
        most=len(labels),
    )


def _check_classes(a: Ensemble, b: Ensemble, labels: np.ndarray) -> Iterator[Check]:
    """Of each class with test images, the share that one side recognises and the other does
    not."""
    recognised = {
        id(record): is_correct(record.predictions, labels)
        for side in (a, b)
        for record in side.records
    }
    for name, images in _images_by_class(a.run, labels):
        gap, spread = between_and_within(
            a.records,
            b.records,
            lambda x, y, of=images: float(np.sum((recognised[id(x)] != recognised[id(y)])[of])),
        )
        first, second = (float(np.mean(recognised[id(side.run)][images])) for side in (a, b))
        count = int(images.sum())
        yield Check(
            a.run.steps,
            "evaluate",
            f"accuracy of {name}",
            gap / count,
            allowed_count(a.run.dtype, spread) / count,
            None if spread is None else spread / count,
            (first, second),
            most=1.0,
        )


def _images_by_class(record: Record, labels: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Each class with test images, and which these are."""
    classes = [(name, labels == index) for index, name in enumerate(record.data["classes"])]
    return [(name, images) for name, images in classes if images.any()]


def allowed_count(dtype: str, spread: float | None) -> float:
    """How many of two runs' predictions may differ.

    Args:
        spread: `Distances.within`, of such counts.
    """
    floor = 0 if dtype == "float64" else COUNT_FLOOR
    return SEPARATION_IMAGES * ((spread or 0.0) + floor)


def training_loss_gap(first: Record, second: Record) -> float:
    """The largest gap of float64's training losses, up to their bound: the test loss comes from
    the same weights.

    Digits at batch 4, lr 0.01 and momentum 0.9, after 300 steps: 1.4e-12 between losses of up to
    4.6, which agree, and 1.25e-12 between test losses of 1.1, which did not.
    """
    gap, _ = max_difference(first.loss, second.loss)
    limit = PROOF_BOUND * max(1.0, magnitude(first.loss))
    return min(gap, limit) if first.dtype == "float64" and math.isfinite(gap) else 0.0


def equal_predictions(a: Record, b: Record) -> int:
    """How many predictions are the same; where one run has none, they are not."""
    shared = min(len(a.predictions), len(b.predictions))
    return int(np.sum(a.predictions[:shared] == b.predictions[:shared]))


def class_accuracy(
    record: Record, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, float | None]:
    """The share of each class's test images that was recognised; None for a class without any."""
    recognised = is_correct(record.predictions, labels)
    images = {name: labels == index for index, name in enumerate(classes)}
    return {
        name: float(np.mean(recognised[own])) if own.any() else None for name, own in images.items()
    }


def class_differences(a: Ensemble, b: Ensemble, labels: np.ndarray) -> dict[str, ClassDifference]:
    """Per class with test images, first less second, with the interval of `paired_difference`, and
    what the verdict is made of."""
    one, other = (is_correct(side.run.predictions, labels) for side in (a, b))
    classes = _images_by_class(a.run, labels)
    return {
        name: {
            **paired_difference(one[images], other[images], len(classes)),
            "gap": finite(check.gap),
            "spread": finite(check.spread),
            "bound": finite(check.bound),
        }
        for (name, images), check in zip(classes, _check_classes(a, b, labels), strict=True)
    }
