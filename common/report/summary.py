"""A report in words and in few rows: the result in one sentence, and the worst check of each
stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from lockstep.common.config import FRAMEWORKS
from lockstep.common.protocol import STAGES
from lockstep.common.report.json import (
    CheckJson,
    ComparisonJson,
    EntryJson,
    LocationJson,
    ReportJson,
    WindowJson,
)
from lockstep.common.report.text import listed, loss, number, percent, plural
from lockstep.common.verdict.check import OUTPUTS
from lockstep.common.verdict.comparison import common_nonfinite_step, format_distinct
from lockstep.common.verdict.statistics import ClassDifference

# stages whose tensors are compared during the first steps only
FIRST_STEPS = "data", "weights", "forward", "backward"
# What the verdict compares of a class: the images that one side alone recognises.
DIFFERING = ("differ, %>", "twins, %>", "bound, %>")


# --- Sentences


def sentence(report: ReportJson, placed: bool = False) -> str:
    """The result in plain words. For an interrupted run: where it stopped, and what its finished
    precisions show.

    Args:
        placed: whether the place where runs diverge is said elsewhere, if it was searched.
    """
    comparisons = report["lenses"]
    if reason := report.get("cut_short"):
        return f"The run was cut short: {reason.rstrip('.')}. {interrupted_text(comparisons)}"
    text = outcome(comparisons, report["verdict"], placed)
    return f"{text} {ended}." if (ended := report.get("ended_early")) else text


def interrupted_text(comparisons: Sequence[ComparisonJson]) -> str:
    """The result of the precisions that were finished before an interruption."""
    verdicts = {comparison["verdict"] for comparison in comparisons}
    found = next((v for v in ("disagree", "diverged", "undecided", "agree") if v in verdicts), None)
    return outcome(comparisons, found) if found else "Nothing was compared."


def outcome(comparisons: Sequence[ComparisonJson], verdict: str, placed: bool = False) -> str:
    """The result of a run, of all its precisions; `placed` as of `sentence`."""
    if verdict == "single":
        names = list(dict.fromkeys(name for each in comparisons for name in each["accuracy"]))
        ends = nonfinite_steps(comparisons)
        end = f"ended where its loss is not finite ({ends})" if ends else ""
        return f"Trained {' and '.join(names)} alone; {end or 'nothing to compare it with'}."
    if verdict == "agree":
        return f"The two runs agree: {'; '.join(agreement_text(each) for each in comparisons)}."
    disagreeing = [each for each in comparisons if each["verdict"] == "disagree"]
    agreeing = [agreement_text(each) + "." for each in comparisons if each["verdict"] == "agree"]
    if undecided := [
        undecided_text(each) for each in comparisons if each["verdict"] == "undecided"
    ]:
        agreeing = [*undecided, *agreeing]
    if verdict == "undecided":
        return " ".join(agreeing)
    if not disagreeing:
        steps = ", ".join(
            f"{each['dtype']}: step {step:,}"
            for each in comparisons
            if (step := each.get("diverged_at")) is not None
        )
        end = (
            "Both runs blow up at the same step: the loss is not finite, or so large that rounding "
            f"decides it ({steps}). Up to there they agree: choose a smaller --lr."
        )
        return " ".join([end, *agreeing])
    who = "The two runs" if len(trained(disagreeing[0])) == 2 else "The processes of the run"
    if placed and any(each.get("located") for each in disagreeing):
        dtypes = listed([each["dtype"] for each in disagreeing])
        return " ".join([f"{who} disagree in {dtypes}.", *agreeing])
    return " ".join([f"{who} disagree.", *map(divergence_text, disagreeing), *agreeing])


def undecided_text(comparison: ComparisonJson) -> str:
    """Why nothing is decided in one precision."""
    first = comparison["first_divergence"]
    since = "" if first is None else f" from step {first['step']:,} on"
    return (
        f"{comparison['dtype']}: not decided. The runs differ{since}, and the twins that would tell "
        "rounding from a mistake were not trained."
    )


def in_short(comparison: ComparisonJson) -> str:
    """One precision in one line: its verdict, the accuracy, and how many predictions are equal."""
    verdict = {
        "agree": "agree",
        "disagree": "DISAGREE",
        "diverged": "blow up together",
        "undecided": "not decided",
    }.get(comparison["verdict"], "one run")
    sides, accuracy = trained(comparison), comparison["accuracy"]
    if any(accuracy[name] is not None for name in sides):
        figures = "accuracy " + ", ".join(f"{name} {percent(accuracy[name])}" for name in sides)
    else:
        losses = (f"{name} {loss(comparison['test_loss'][name])}" for name in sides)
        figures = f"test loss {', '.join(losses)}"
    steps = plural(comparison["steps"], "step")
    text = f"{comparison['dtype']}: {verdict} over {steps}; {figures}"
    if comparison["predictions_equal"] is not None:
        equal, total = comparison["predictions_equal"], comparison["predictions_total"]
        text += f"; predictions equal: {equal:,} of {total:,}"
    if (gap := outputs_gap(comparison)) is not None:
        text += f"; outputs within {number(gap)}"
    return f"{text}."


def outputs_gap(comparison: ComparisonJson) -> float | None:
    """The largest gap between the outputs for the test data, of a pair that predicts no classes."""
    rows = [row for row in comparison["ladder"] if row["stage"] == "evaluate"]
    return next((row["gap"] for row in rows if row["tensor"] == OUTPUTS), None)


def exchanged_text(layers: Mapping[str, Sequence[str]]) -> str:
    """The layers of the user's that Lockstep exchanges, in a sentence.

    Args:
        layers: by backend, their names.
    """
    named = "; ".join(
        f"{', '.join(names)} in {FRAMEWORKS[side]}" for side, names in layers.items() if names
    )
    return (
        "In place of these layers of the pair, Lockstep computes with its own, which are more "
        f"exact: {named}."
    )


def notes(comparison: ComparisonJson) -> list[str]:
    """Limits of the verdict: the step from which no check could fail, and which side is not
    reproducible."""
    found = []
    if (step := comparison.get("no_power_from")) is not None:
        found.append(
            f"{comparison['dtype']}: from step {step:,} on no check of the training could fail: "
            "rounding moves these runs as far apart as two runs can be."
        )
    for name, step in comparison.get("not_reproducible", {}).items():
        found.append(
            f"{comparison['dtype']}: {name} is not reproducible: the same run again differs from "
            f"step {step:,} on."
        )
    if exchanged := comparison.get("exchanged"):
        found.append(f"{comparison['dtype']}: {exchanged_text(exchanged)}")
    for name, slots in comparison.get("unmatched_slots", {}).items():
        found.append(
            f"{comparison['dtype']}: only the optimizer in {name} has the slots {', '.join(slots)}: "
            "they were not compared."
        )
    if (growth := comparison.get("growth")) is not None:
        replayed = ", ".join(f"{step:,}" for step in growth["replayed"])
        found.append(
            f"{comparison['dtype']}: the gap between the losses grew from "
            f"{number(growth['first'])} at step {growth['start']:,} to "
            f"{number(growth['largest'])} at step {growth['stop']:,}, by at most "
            f"{growth['factor']:.3g} times in one step. Replayed from one state on both sides, "
            f"steps {replayed} agree."
        )
        if (step := growth.get("beyond")) is not None:
            found.append(
                f"{comparison['dtype']}: from step {step:,} on the gap exceeds the twins' bound. "
                "Each step agrees from one state, and the same runs again give the same bits: "
                "rounding changed a sign, such as that of a ReLU's input."
            )
    return found


def heading(comparison: ComparisonJson, disagree: str) -> str:
    """As `float64, 40 steps: the runs agree`.

    Args:
        disagree: the word for runs that do not.
    """
    verdict = {
        "agree": "the runs agree",
        "disagree": f"the runs {disagree}",
        "diverged": "the runs blow up together",
        "undecided": "not decided",
    }.get(comparison["verdict"], "one run")
    return f"{comparison['dtype']}, {plural(comparison['steps'], 'step')}: {verdict}"


def agreement_text(comparison: ComparisonJson) -> str:
    """How well the runs agree in one precision."""
    dtype = comparison["dtype"]
    if comparison["verdict"] == "single":
        return f"{dtype} not compared, {' and '.join(comparison['accuracy'])} alone"
    if dtype != "float64":
        return f"{dtype} within what rounding explains"
    gap = number(comparison["max_abs_loss_gap"])
    if comparison["bound"].get("twins"):
        return f"{dtype} within what rounding explains, which this run amplifies to {gap}"
    over = f"over {plural(comparison['steps'], 'step')}"
    rows: list[WindowJson] | list[CheckJson]
    rows = [row for row in comparison["stretches"] if row["quantity"] == "loss"]
    rows = rows or [row for row in comparison["ladder"] if row["stage"] == "loss"]
    bounds = [row["bound"] for row in rows if row["bound"] is not None]
    bound = f" (bound {number(max(bounds))})" if bounds else ""
    return f"{dtype} within {gap} {over}{bound}"


def divergence_text(comparison: ComparisonJson) -> str:
    """Where the runs diverge in one precision."""
    dtype = comparison["dtype"]
    if first := comparison["first_divergence"]:
        alone = (
            " in evaluation alone, the training trajectories agree"
            if first["stage"] == "evaluate"
            else ""
        )
        return f"{dtype}{alone}: {first['message'].rstrip('.')}."
    for row in comparison["stretches"]:
        if not row["agrees"]:
            last = max(row["start"], row["stop"] - 1)
            gap = f"gap {number(row['gap'])} > {number(row['bound'], 'none')}"
            return f"{dtype}: {row['quantity']}: steps {row['start']:,} to {last:,}: {gap}."
    return f"{dtype}: gaps exceed their bounds."


def failing_text(found: LocationJson) -> str | None:
    """How many tensors fail at the place where two runs diverge, and what these have in common;
    None where there is no choice of them."""
    if (count := found.get("failing")) is None:
        return None
    stage = {"forward": "forward pass", "backward": "backward pass"}.get(
        found["stage"], found["stage"]
    )
    verb = "differs" if count == 1 else "differ"
    return (
        f"{count:,} of {plural(found.get('tensors', count), 'tensor')} of the {stage} of that step "
        f"{verb}: {found.get('common')}"
    )


def own_names_text(found: LocationJson) -> str | None:
    """What each module calls the tensor where two runs diverge; None if both use one name."""
    names = [f"{side} calls it {name}" for side, name in found.get("own_names", {}).items()]
    return ", ".join(names) or None


def nonfinite_steps(comparisons: Iterable[ComparisonJson]) -> str:
    """As `float64: step 7, float32: step 6`: where all runs of a precision ended early."""
    steps = {comparison["dtype"]: _nonfinite_step(comparison) for comparison in comparisons}
    return ", ".join(f"{dtype}: step {step:,}" for dtype, step in steps.items() if step is not None)


def _nonfinite_step(comparison: ComparisonJson) -> int | None:
    return common_nonfinite_step(comparison.get("broken", {}).values())


# --- Rows


def trained(comparison: ComparisonJson) -> list[str]:
    """The sides that ran: backends, or what two runs of one backend are called."""
    return list(comparison["accuracy"])


def merge_equal(windows: Iterable[WindowJson]) -> list[WindowJson]:
    """Neighbouring step ranges of one quantity whose numbers are equal, as one: a constant learning
    rate needs one row."""
    merged: list[WindowJson] = []
    for row in windows:
        last = merged[-1] if merged else None
        if last and last["stop"] == row["start"] and _without_steps(last) == _without_steps(row):
            last["stop"] = row["stop"]
        else:
            merged.append(row.copy())
    return merged


def _without_steps(row: WindowJson) -> tuple[str | float | None, ...]:
    power = row.get("power", True)
    return row["quantity"], row["gap"], row["drift"], row["bound"], row["agrees"], power


def worst_per_stage(checks: Sequence[CheckJson]) -> list[tuple[str, CheckJson, bool]]:
    """The worst check of each stage, once for the first steps and once for the whole run, and
    whether all agree.

    Worst is a check that fails, then one that is not finite, then the largest gap over its bound.
    """
    last_first = max((row["step"] for row in checks if row["stage"] in FIRST_STEPS), default=-1)
    groups: dict[tuple[bool, int, str], list[CheckJson]] = {}
    for row in checks:
        stage = row["stage"]
        late = row["step"] > last_first or stage == "evaluate"
        rank = STAGES.index(stage) if stage in STAGES else len(STAGES)
        groups.setdefault((late, rank, stage), []).append(row)
    return [
        (
            "whole run" if late else "first steps",
            max(group, key=severity),
            all(row["agrees"] for row in group),
        )
        for (late, _, _), group in sorted(groups.items(), key=lambda item: item[0])
    ]


def tensor_text(row: CheckJson) -> str:
    """The tensor of a check, as `conv1.bias (median)` if the gap is not the largest one of its
    entries."""
    measure = row.get("measure", "largest")
    return row["tensor"] if measure == "largest" else f"{row['tensor']} ({measure})"


def severity(row: CheckJson) -> tuple[bool, float]:
    """Larger for a worse check."""
    gap, bound = row["gap"], row["bound"]
    if gap is None:
        return (not row["agrees"], math.inf)
    if bound is None:
        return (not row["agrees"], 0.0)
    return (not row["agrees"], gap / bound if bound else math.inf if gap else 0.0)


def entry_names(entry: EntryJson) -> list[str]:
    """The two sides whose values an entry has."""
    return [name for name in entry if name != "index"]


def entry_cells(entry: EntryJson) -> list[str]:
    """The index of an entry and its values on both sides, in digits that show a difference."""
    one, other = (cast("float | None", entry.get(name)) for name in entry_names(entry))
    cells = ["not finite" if value is None else f"{value:.9g}" for value in (one, other)]
    if one is not None and other is not None and cells[0] == cells[1]:
        cells = list(format_distinct(one, other))
    return [f"[{', '.join(map(str, entry['index']))}]", *cells]


def difference_cells(found: ClassDifference | None) -> list[str]:
    """The difference of a class in points; then the share of its images that only one side
    recognises, that between twins, and its bound, in per cent."""
    if found is None:
        return ["-"] * (1 + len(DIFFERING))
    shares = (found.get(key) for key in ("gap", "spread", "bound"))
    cells = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
    return [f"{100 * found['difference']:+.1f}", *cells]


def extreme(accuracy: dict[str, float | None], classes: list[str], weakest: bool) -> str | None:
    """The class with the lowest or the highest accuracy, the first of equals; None if no class has
    any."""
    known = [(value, label) for label in classes if (value := accuracy.get(label)) is not None]
    if not known:
        return None
    return (min if weakest else max)(known, key=lambda pair: pair[0])[1]
