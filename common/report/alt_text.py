"""What the charts of a run say, in words: for those who cannot see them, and computed from the same
numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from lockstep.common.config import BACKENDS
from lockstep.common.report.charts import (
    Runs,
    confusion_counts,
    loss_bounds,
    loss_gap,
    ranked,
    running_mean,
    twin_drift,
)
from lockstep.common.report.terminal import counted, number, percent
from lockstep.common.runs.record import Record
from lockstep.common.verdict.statistics import CONFIDENCE

STEADY = 0.005  # relative change up to which a series is said to stay where it is


def digits(value: float | None) -> str:
    """Four digits of a measured value."""
    return "not finite" if value is None or not np.isfinite(value) else f"{value:.4g}"


def how_sure(lens: dict[str, Any]) -> list[str]:
    """What a lens's verdict rests on: how much was compared, how near the bounds it came, what set
    them."""
    if lens["verdict"] == "single":
        return [
            f"Only {' and '.join(lens['accuracy'])} ran in this precision, so nothing was compared."
        ]
    rows, score = lens["ladder"] + lens["stretches"], lens.get("score")
    outside = sum(not row["agrees"] for row in rows)
    if outside:
        said = f"{outside:,} of {counted(len(rows), 'comparison')} are outside their bounds; the worst is "
        said += "not finite" if score is None else f"at {number(score)} times its bound"
    else:
        said = f"{counted(len(rows), 'comparison')}, each within its bound"
        said += (
            ""
            if score is None
            else f"; the largest share of a bound that was used is {100 * score:.2g} %"
        )
    return [f"{said}.", _twins(lens), f"Bounds: {lens['bound']['rule'].rstrip('.')}."]


def _twins(lens: dict[str, Any]) -> str:
    gaps = [twin["max_abs_loss_gap"] for twins in lens["twins"].values() for twin in twins]
    if not gaps:
        return (
            f"No twins were asked: {lens['dtype']} rounds so finely that what exceeds these bounds is taken for a "
            "difference between the programs."
        )
    counts = " and ".join(f"{len(twins)} of {name}" for name, twins in lens["twins"].items())
    known = [gap for gap in gaps if gap is not None]
    reach = f"up to {number(max(known))} nats" if known else "what is not finite"
    between = lens["max_abs_loss_gap"]
    between = "what is not finite" if between is None else f"up to {number(between)} nats"
    return (
        "Twins, runs that differ from their own run by rounding alone, say what rounding can do. The losses of "
        f"{counts} differ from those of their own runs by {reach}, those of torch and flax by {between}. Late in a run, "
        "this precision cannot show a mistake that moves it by less than twins differ."
    )


def course(title: str, runs: Runs, quantity: str, window: int = 1) -> str:
    """How a quantity goes, of each backend."""
    steps = max(record.steps for record in runs.values())
    said = [
        _course(name, getattr(runs[name], quantity), window) for name in BACKENDS if name in runs
    ]
    means = f" (means of {window:,} steps)" if window > 1 else ""
    return f"{title} over {counted(steps, 'step')}: {'; '.join(said)}{means}."


def _course(name: str, values: np.ndarray, window: int) -> str:
    broken = np.flatnonzero(~np.isfinite(values))
    usable = values[: broken[0]] if len(broken) else values
    end = f"{name} is not finite from step {broken[0]:,} on" if len(broken) else ""
    if len(usable) == 0:
        return end
    _, means = running_mean(usable, window)
    first, last = float(means[0]), float(means[-1])
    if abs(last - first) <= STEADY * max(abs(first), abs(last)):
        said = (
            f"{name} begins and ends at {digits(last)}"
            if np.ptp(means) > STEADY * abs(last)
            else ""
        )
        said = said or f"{name} stays at {digits(last)}"
    else:
        said = (
            f"{name} {'falls' if last < first else 'rises'} from {digits(first)} to {digits(last)}"
        )
    return f"{said}; {end}" if end else said


def gap(lens: dict[str, Any], runs: Runs, twins: dict[str, list[Record]]) -> str:
    """How far the two losses part, and how far they may."""
    between, drift, bounds = (
        loss_gap(runs["torch"], runs["flax"]),
        twin_drift(runs, twins),
        loss_bounds(lens),
    )
    known = between[np.isfinite(between)]
    said = f"Gap between the two training losses, {lens['dtype']}, on a logarithmic axis: "
    said += f"at most {number(float(known.max()))} nats" if len(known) else "never known"
    apart = np.flatnonzero(between > 0)
    said += (
        f", first above zero at step {apart[0]:,}"
        if len(apart)
        else ", equal at every step"
        if len(known)
        else ""
    )
    if len(known) < len(between):
        said += f", not finite from step {np.flatnonzero(np.isnan(between))[0]:,}"
    if drift is not None:
        said += f". Twins of one framework differ by up to {number(float(drift[-1]))}"
    if bounds:
        said += f". The bound begins at {number(bounds[0]['bound'])} and ends at {number(bounds[-1]['bound'])}"
    if first := lens["first_divergence"]:
        said += f". The runs diverge at step {first['step']:,}: {first['stage']}, {first['tensor']}"
    return f"{said}."


def classes(lens: dict[str, Any], names: list[str]) -> str:
    """Which classes are recognised worst and best, and how many test images in all."""
    table = lens["per_class_accuracy"]
    order = [
        name
        for name in ranked(lens, names)
        if any(part.get(name) is not None for part in table.values())
    ]
    totals = ", ".join(f"{name} {percent(value)}" for name, value in lens["accuracy"].items())
    said = f"Accuracy per class, {lens['dtype']}: "
    if order:
        ends = [
            f"{end} ({', '.join(f'{b} {percent(table[b].get(end))}' for b in table)})"
            for end in order[:: len(order) - 1 or 1]
        ]
        said += f"from {' to '.join(ends)}; "
    return f"{said}all classes: {totals}."


def differences(lens: dict[str, Any], names: list[str]) -> str:
    """How many classes one backend is measurably better at, and where they differ most."""
    found = {
        name: lens["class_differences"][name] for name in names if name in lens["class_differences"]
    }
    said = f"Difference of the two accuracies per class with {100 * CONFIDENCE:g} % intervals, {lens['dtype']}: "
    if not found:
        return f"{said}no class has test images."
    apart = sum(row["low"] > 0 or row["high"] < 0 for row in found.values())
    most, row = max(found.items(), key=lambda pair: abs(pair[1]["difference"]))
    said += f"{apart} of {counted(len(found), 'interval')} leave out zero"
    return f"{said}; the largest difference is {100 * row['difference']:+.1f} percentage points, of {most}."


def confusion(
    name: str, record: Record, labels: np.ndarray, names: tuple[str, ...], dtype: str
) -> str:
    """What is most often taken for something else."""
    counts = confusion_counts(record.predictions, labels, len(names))
    wrong = counts - np.diag(np.diag(counts))
    said = f"Confusion matrix of {name}, {dtype}: {np.trace(counts):,} of {counted(len(labels), 'test image')} right"
    if not wrong.any():
        return f"{said}, none taken for another class."
    truth, guess = np.unravel_index(int(wrong.argmax()), wrong.shape)
    often = f"{wrong[truth, guess]:,} of {counts[truth].sum():,}"
    return f"{said}; most often {names[truth]} is taken for {names[guess]}, {often}."


def confusion_difference(counts: np.ndarray, names: tuple[str, ...], dtype: str) -> str:
    """Where the two confusion matrices differ most.

    Args:
        counts: int64 (classes, classes): torch less flax.
    """
    said = f"Difference of the two confusion matrices, {dtype}: "
    if not counts.any():
        return f"{said}none, the two are equal."
    truth, guess = np.unravel_index(int(np.abs(counts).argmax()), counts.shape)
    more = "torch" if counts[truth, guess] > 0 else "flax"
    most = abs(int(counts[truth, guess]))
    return (
        f"{said}{np.count_nonzero(counts):,} of {counts.size:,} cells; the largest: {more} takes {names[truth]} for "
        f"{names[guess]} {most:,} times more often."
    )
