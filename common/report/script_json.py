"""report.json of two scripts: the keys of its schema, and what they hold.

Its checks have the keys of a run's report (`lockstep.common.report.json`); pairs of numbers and of
names are those of A and B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NotRequired, Protocol, TypedDict, cast

from lockstep.common.recorder.matched import Match, Matching
from lockstep.common.recorder.recording import Recording
from lockstep.common.report.json import ComparedJson, PlaceJson, jsonable
from lockstep.common.report.text import number, plural
from lockstep.common.verdict.script_comparison import ScriptComparison, ScriptVerdict
from lockstep.common.verdict.scripts import ScriptRuns

SCHEMA, KIND = 1, "script check"


class ScriptEntryJson(TypedDict):
    """One entry of a tensor in both runs."""

    index: list[int]
    values: list[float | None]


class ScriptPlaceJson(PlaceJson):
    """Where two scripts differ first, and what usually causes that."""

    names: list[str]  # of the tensor, in either script
    layer: str
    gap: float | None
    bound: float | None
    values: list[float | None]
    message: str
    pattern: str | None
    extent: str  # which other tensors fail
    offenders: list[ScriptEntryJson]
    causes: list[str]
    lines: list[str | None]  # "file:line" of the source


class ScriptComparisonJson(ComparedJson):
    """Two scripts compared in one precision."""

    verdict: ScriptVerdict
    max_abs_loss_gap: float | None
    score: float | None  # the largest share of a bound that was used
    first_divergence: ScriptPlaceJson | None
    losses: list[str]
    final_losses: dict[str, list[float | None]]
    twins: list[int]  # of either side
    beginners: list[int]  # of these only the first steps were run
    not_seen: list[str]
    left_out: list[str]
    notes: list[str]
    not_reproducible: list[str]
    diverged_at: int | None


class ScriptJson(TypedDict):
    """One of the scripts."""

    name: str  # of the side
    script: str
    arguments: list[str]
    source: str  # SHA-256 of the file
    framework: str
    environment: dict[str, object]
    seconds: float
    processes: int  # that ran it together


class TensorJson(TypedDict):
    """A tensor of A and the one of B that it was compared with."""

    name: str
    names: list[str]
    shape: list[int]  # in A's layout
    layout: str
    how: str  # it was found


class ScriptReportJson(TypedDict):
    """The report of a comparison of two scripts."""

    schema: int
    kind: str
    verdict: ScriptVerdict
    sentence: str
    command: list[str]
    scripts: list[ScriptJson]
    same_start: bool
    differing: list[str]  # how the weights differ at the start, where they do
    precisions: list[ScriptComparisonJson]
    tensors: list[TensorJson]
    unmatched: list[list[str]]  # tensors of either side without a counterpart
    proposals: dict[str, str]  # the nearest one of B to each of these of A
    cut_short: NotRequired[str | None]


class Checked(Protocol):
    """What was compared: `lockstep.common.recorder.checking.Checked`."""

    @property
    def sides(self) -> tuple[str, str]: ...
    @property
    def matching(self) -> Matching: ...
    @property
    def comparisons(self) -> Sequence[ScriptComparison]: ...
    @property
    def runs(self) -> Sequence[tuple[ScriptRuns, ScriptRuns]]: ...


def make_report(checked: Checked, command: Sequence[str] = ()) -> ScriptReportJson:
    """The report of a comparison."""
    first, matching = [side.run for side in checked.runs[0]], checked.matching
    precisions = [
        cast(ScriptComparisonJson, jsonable(found.to_json())) for found in checked.comparisons
    ]
    verdict: ScriptVerdict = "agree"
    for found in checked.comparisons:
        verdict = verdict if found.verdict == "agree" or verdict == "disagree" else found.verdict
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "verdict": verdict,
        "sentence": sentence(precisions, verdict),
        "command": list(command),
        "scripts": [_script(n, run) for n, run in zip(checked.sides, first, strict=True)],
        "same_start": matching.same_start,
        "differing": [f"{each.name}: {each.text}" for each in matching.differing],
        "precisions": precisions,
        "tensors": [_tensor(match, first[0]) for match in matching.matches],
        "unmatched": [list(matching.unmatched_a), list(matching.unmatched_b)],
        "proposals": dict(matching.proposals),
    }


def _script(name: str, run: Recording) -> ScriptJson:
    environment = cast(dict[str, object], jsonable(run.environment))
    return {
        "name": name,
        "script": run.script,
        "arguments": run.arguments,
        "source": run.source,
        "framework": run.framework,
        "environment": environment,
        "seconds": round(run.seconds, 2),
        "processes": run.processes,
    }


def _tensor(match: Match, a: Recording) -> TensorJson:
    array = a.weights.get(match.a)
    whole = array is not None and f"weights/{match.a}" not in a.fingerprints
    return {
        "name": match.name,
        "names": [match.a, match.b],
        "shape": list(match.of_a(array).shape) if whole and array is not None else [],
        "layout": match.layout,
        "how": match.how,
    }


# --- Sentences


def sentence(precisions: Sequence[ScriptComparisonJson], verdict: ScriptVerdict) -> str:
    """The result in plain words."""
    if verdict == "agree":
        return f"The two scripts agree: {'; '.join(map(agreement, precisions))}."
    agreeing = [agreement(each) + "." for each in precisions if each["verdict"] == "agree"]
    if verdict == "diverged":
        steps = ", ".join(
            f"{each['dtype']}: step {each['diverged_at']:,}"
            for each in precisions
            if each["diverged_at"] is not None
        )
        start = f"Both scripts reach a loss that is not finite at the same step ({steps})"
        return " ".join([f"{start}; up to there they agree.", *agreeing])
    found = [
        f"{each['dtype']}: {place['message']}."
        for each in precisions
        if (place := each["first_divergence"]) is not None
    ]
    return " ".join(["The two scripts disagree.", *found, *agreeing])


def agreement(found: ScriptComparisonJson) -> str:
    """How well two scripts agree in one precision."""
    dtype, gap = found["dtype"], found["max_abs_loss_gap"]
    over = f"over {plural(found['steps'], 'step')}"
    if dtype != "float64":
        return f"{dtype} within what rounding explains {over}"
    if gap is None:
        return f"{dtype} {over}, without a loss in common"
    if found["bound"].get("twins"):
        return f"{dtype} within what rounding explains, which these runs amplify to {number(gap)}"
    bounds = [row["bound"] for row in found["stretches"] if row["quantity"] in found["losses"]]
    known = [bound for bound in bounds if bound is not None]
    bound = f" (bound {number(max(known))})" if known else ""
    return f"{dtype} within {number(gap)} {over}{bound}"


def start_sentence(report: ScriptReportJson) -> str | None:
    """That the two start from other weights, and what to do; None if they start alike."""
    if report["same_start"] and not report["differing"]:
        return None
    differing = report["differing"]
    if report["same_start"]:  # the place has the first of them
        return (
            f"{plural(len(differing), 'tensor')} differ{'s' * (len(differing) == 1)} at the start."
        )
    shown = "; ".join(differing[:2]) + ("; ..." if len(differing) > 2 else "")
    how = f" ({shown})" if shown else ""
    return (
        f"The two start from other weights{how}. --start-from A gives B the weights of A, and "
        "--start-from B the other way round."
    )


def remarks(report: ScriptReportJson) -> list[str]:
    """What was not seen, left out, or noted in any precision, each once."""
    found: dict[str, None] = {}
    for each in report["precisions"]:
        for group in (each["not_reproducible"], each["notes"], each["not_seen"], each["left_out"]):
            found |= dict.fromkeys(group)
    return [text[:1].upper() + text[1:] if text.startswith("not ") else text for text in found]


def names_lines(report: ScriptReportJson) -> list[str]:
    """Lines for a names file: for each tensor of A without a counterpart, one with the nearest of
    B, if there is any."""
    proposals: Mapping[str, str] = report["proposals"]
    return [f"{name} {proposals.get(name, '?')}" for name in report["unmatched"][0]]


def shape_text(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"
