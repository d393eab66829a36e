"""The charts of a run in words, for readers who cannot see them, computed from the same numbers;
and how sure a verdict is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lockstep.common.errors import shorten
from lockstep.common.report.chart_data import (
    Runs,
    by_accuracy,
    confusion_counts,
    loss_bounds,
    loss_gap,
    loss_unit,
    running_mean,
    twin_spread,
)
from lockstep.common.report.json import ComparedJson, ComparisonJson
from lockstep.common.report.summary import notes
from lockstep.common.report.text import four_digits, listed, number, percent, plural, share
from lockstep.common.runs.record import Record

STEADY = 0.005  # a series that changes by less, relatively, "stays" at its value


def confidence_summary(comparison: ComparisonJson) -> list[str]:
    """How much was compared, how near to the bounds it came, and how the bounds were set."""
    if comparison["verdict"] == "single":
        names = " and ".join(comparison["accuracy"])
        return [f"Only {names} ran in this precision, so nothing was compared."]
    text = usage_text(comparison, comparison.get("score"))
    rule = comparison["bound"].get("rule", "")
    how = [f"{text}.", *notes(comparison), _twins(comparison)]
    return [*how, f"How large a gap may be: {rule.rstrip('.')}."]


def usage_text(comparison: ComparedJson, score: float | None) -> str:
    """How much was compared, and how near to the bounds it came."""
    rows = comparison["ladder"] + comparison["stretches"]
    powerless = sum(row["agrees"] and not row.get("power", True) for row in rows)
    outside = sum(not row["agrees"] for row in rows)
    counts = [f"{len(rows) - powerless - outside:,} agree"]
    if outside:
        counts.append(f"{outside:,} exceed their bounds")
    if powerless:
        counts.append(f"{powerless:,} are too loose to count")
    text = plural(len(rows), "comparison")
    text += f": {listed(counts)}" if len(counts) > 1 else ", all within their bounds"
    if outside and score is None:
        return f"{text}; {_without_score(comparison)}"
    if outside:
        return f"{text}; the largest gap is {number(score)} times its bound"
    return text if score is None else f"{text}; the largest gap is {share(score)} of its bound"


def _without_score(comparison: ComparedJson) -> str:
    """What fails by no multiple of its bound: a gap that is not finite, or a bound of zero."""
    rows = [(row["tensor"], row) for row in comparison["ladder"]]
    rows += [(row["quantity"], row) for row in comparison["stretches"]]
    if any(row["gap"] is None for _, row in rows):
        return "a gap is not finite"
    exact = [name for name, row in rows if not row["agrees"] and row["bound"] == 0]
    return f"{shorten(list(dict.fromkeys(exact)))} must be equal"


def _twins(comparison: ComparisonJson) -> str:
    twins = comparison["twins"]
    gaps = [twin["max_abs_loss_gap"] for each in twins.values() for twin in each]
    if not gaps:
        return (
            f"No twins were trained: {comparison['dtype']} rounds so finely that a difference "
            "above these bounds is a difference between the programs."
        )
    counts = " and ".join(f"{len(each)} of {name}" for name, each in twins.items())
    known = [gap for gap in gaps if gap is not None]
    nats = " nats" if any(comparison["per_class_accuracy"].values()) else ""
    reach = f"by up to {number(max(known))}{nats}" if known else "without limit (not finite)"
    gap = comparison["max_abs_loss_gap"]
    between = "without limit (not finite)" if gap is None else f"by up to {number(gap)}{nats}"
    return (
        "A twin repeats a run with a change of the size of rounding errors; twins show how far "
        f"rounding alone takes a run. The losses of the twins ({counts}) differ from those of "
        f"their own runs {reach}; the losses of {' and '.join(twins)} differ {between}. Late in a run, "
        "this precision cannot show a mistake whose effect is smaller than the gaps between twins."
    )


def series_text(title: str, runs: Runs, quantity: str, window: int = 1) -> str:
    """How a quantity changes along the run, for each backend."""
    steps = max(record.steps for record in runs.values())
    texts = [_series_text(name, getattr(runs[name], quantity), window) for name in runs]
    means = f" (means of {window:,} steps)" if window > 1 else ""
    return f"{title} over {plural(steps, 'step')}: {'; '.join(texts)}{means}."


def _series_text(name: str, values: np.ndarray, window: int) -> str:
    nonfinite = np.flatnonzero(~np.isfinite(values))
    usable = values[: nonfinite[0]] if len(nonfinite) else values
    end = f"{name} is not finite from step {nonfinite[0]:,} on" if len(nonfinite) else ""
    if len(usable) == 0:
        return end
    _, means = running_mean(usable, window)
    first, last = float(means[0]), float(means[-1])
    if abs(last - first) > STEADY * max(abs(first), abs(last)):
        verb = "falls" if last < first else "rises"
        text = f"{name} {verb} from {four_digits(first)} to {four_digits(last)}"
    elif np.ptp(means) > STEADY * abs(last):
        text = f"{name} begins and ends at {four_digits(last)}"
    else:
        text = f"{name} stays at {four_digits(last)}"
    return f"{text}; {end}" if end else text


def gap(comparison: ComparisonJson, runs: Runs, twins: dict[str, list[Record]]) -> str:
    """How far the two losses diverge, and how far they may."""
    between, spread = loss_gap(*runs.values()), twin_spread(runs, twins)
    bounds = loss_bounds(comparison)
    known, above = between[np.isfinite(between)], np.flatnonzero(between > 0)
    dtype = comparison["dtype"]
    text = f"Gap between the two training losses, {dtype}, on a logarithmic axis: "
    nats = " nats" if loss_unit(runs) else ""
    text += f"at most {number(float(known.max()))}{nats}" if len(known) else "never finite"
    if len(above):
        text += f", first above zero at step {above[0]:,}"
    elif len(known):
        text += ", equal at every step"
    if len(known) < len(between):
        text += f", not finite from step {np.flatnonzero(np.isnan(between))[0]:,}"
    if spread is not None:
        text += f". Twins of one framework differ by up to {number(float(spread[-1]))}"
    if bounds:
        first, last = number(bounds[0].bound), number(bounds[-1].bound)
        text += f". The bound begins at {first} and ends at {last}"
    if found := comparison["first_divergence"]:
        place = ", ".join(dict.fromkeys([found["stage"], found["tensor"]]))
        text += f". The runs diverge at step {found['step']:,}: {place}"
    return f"{text}."


def classes(comparison: ComparisonJson, names: list[str]) -> str:
    """The classes with the lowest and the highest accuracy, and the accuracy over all."""
    table = comparison["per_class_accuracy"]
    order = [
        name
        for name in by_accuracy(comparison, names)
        if any(by_class.get(name) is not None for by_class in table.values())
    ]
    totals = ", ".join(f"{name} {percent(value)}" for name, value in comparison["accuracy"].items())
    text = f"Accuracy per class, {comparison['dtype']}: "
    if order:
        ends = [
            f"{end} ({', '.join(f'{name} {percent(table[name].get(end))}' for name in table)})"
            for end in order[:: len(order) - 1 or 1]
        ]
        text += f"from {' to '.join(ends)}; "
    return f"{text}all classes: {totals}."


def differences(comparison: ComparisonJson, names: list[str]) -> str:
    """Where the two accuracies differ most, and in how many classes by more than the bound."""
    differences = comparison.get("class_differences", {})
    found = {name: differences[name] for name in names if name in differences}
    text = f"Difference of the two accuracies per class, {comparison['dtype']}: "
    if not found:
        return f"{text}no class has test images."
    outside = sum(_exceeds(row.get("gap"), row.get("bound")) for row in found.values())
    name, row = max(found.items(), key=lambda pair: abs(pair[1]["difference"]))
    text += f"the largest is {100 * row['difference']:+.1f} percentage points, of {name}"
    if (spread := row.get("spread")) is not None:
        text += f", where twins differ in {percent(spread)} of the images"
    return f"{text}; classes beyond the bound: {outside:,} of {len(found):,}."


def _exceeds(gap: float | None, bound: float | None) -> bool:
    return gap is not None and bound is not None and gap > bound


def confusion(
    name: str, record: Record, labels: np.ndarray, names: tuple[str, ...], dtype: str
) -> str:
    """How many predictions are right, and the most frequent mistake."""
    counts = confusion_counts(record.predictions, labels, len(names))
    wrong = counts - np.diag(np.diag(counts))
    right = f"{np.trace(counts):,} of {plural(len(labels), 'test image')} right"
    text = f"Confusion matrix of {name}, {dtype}: {right}"
    if not wrong.any():
        return f"{text}, no wrong class was predicted."
    truth, guess = np.unravel_index(int(wrong.argmax()), wrong.shape)
    often = f"{wrong[truth, guess]:,} of {counts[truth].sum():,}"
    mistake = f"{names[guess]} is predicted for {names[truth]}"
    return f"{text}; the most frequent mistake: {mistake}, {often}."


def confusion_difference(
    counts: np.ndarray, names: tuple[str, ...], dtype: str, sides: Sequence[str]
) -> str:
    """Where the two confusion matrices differ most.

    Args:
        counts: int64 (classes, classes): the first of `sides` minus the second.
    """
    text = f"Difference of the two confusion matrices, {dtype}: "
    if not counts.any():
        return f"{text}none, the two are equal."
    truth, guess = np.unravel_index(int(np.abs(counts).argmax()), counts.shape)
    more = sides[0] if counts[truth, guess] > 0 else sides[1]
    most = plural(abs(int(counts[truth, guess])), "time")
    cells = f"{np.count_nonzero(counts):,} of {counts.size:,} cells differ"
    right = f"{more} recognises {names[truth]}"
    verb = right if truth == guess else f"{more} predicts {names[guess]} for {names[truth]}"
    return f"{text}{cells}; the largest difference: {verb} {most} more often."
