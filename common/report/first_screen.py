"""The first screen of a run's page: a card with the verdict, the place where two runs diverge, and
a strip with the state of each stage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import PurePath
from typing import Literal, NamedTuple, cast

from lockstep.common.protocol import STAGES
from lockstep.common.report.alt_text import usage_text
from lockstep.common.report.json import (
    ComparedJson,
    ComparisonJson,
    DivergenceJson,
    LocationJson,
    PlaceJson,
    ReportJson,
)
from lockstep.common.report.summary import (
    agreement_text,
    divergence_text,
    failing_text,
    outputs_gap,
    own_names_text,
    trained,
    undecided_text,
)
from lockstep.common.report.text import listed, number, plural
from lockstep.common.verdict.comparison import format_distinct

LARGE_GAP = 1e-6  # nats: a loss must be large for such a gap to agree in float64
Tone = Literal["good", "bad", "warn", "plain"]
# The pass of a step that a stage is, in a sentence.
STAGE_NAMES = {
    "data": "data",
    "weights": "initial weights",
    "forward": "forward pass",
    "loss": "loss",
    "backward": "backward pass",
    "update": "update of the parameters",
    "evaluate": "evaluation",
}
QUANTITY_STAGES = {"loss": "loss", "mean loss": "loss", "gradient_norm": "backward", "lr": "update"}


class Verdict(NamedTuple):
    """A verdict in a few words, a sign that needs no colour, and the tone of its colour."""

    words: str
    icon: str
    tone: Tone


VERDICTS = {
    "agree": Verdict("The two runs agree", "\N{CHECK MARK}", "good"),
    "disagree": Verdict("The two runs disagree", "\N{BALLOT X}", "bad"),
    "diverged": Verdict("Both runs blow up", "\N{INFINITY}", "warn"),
    "undecided": Verdict("Not decided", "?", "warn"),
    "single": Verdict("One run alone", "\N{WHITE CIRCLE}", "plain"),
    "cut short": Verdict("The run was cut short", "\N{DOUBLE VERTICAL LINE}", "plain"),
}


class Place(NamedTuple):
    """Where two runs diverge, in the order in which a reader asks."""

    where: str
    names: str  # that either module has for the tensor; empty if both have one
    how: Sequence[str]
    causes: Sequence[str]
    fixes: Sequence[str]  # code to try


class Card(NamedTuple):
    """What ran, whether it agrees, and how sure that is."""

    verdict: Verdict
    ran: str
    versions: str
    lines: Sequence[tuple[str, str]]  # a precision, and how it came out there
    place: Place | None
    option: str | None  # of the command line, to try


class Stage(NamedTuple):
    """One stage of a step in one precision."""

    name: str
    state: str
    icon: str
    tone: Tone


# --- The card


def card(report: ReportJson) -> Card:
    """The verdict of a run."""
    verdict = VERDICTS["cut short" if report.get("cut_short") else report["verdict"]]
    placed = any(each.get("located") for each in report["lenses"])
    lines = [(each["dtype"], " ".join(_outcome(each, placed))) for each in report["lenses"]]
    if reason := report.get("cut_short"):
        lines.insert(0, ("stopped", f"{reason.rstrip('.')}."))
    if reason := report.get("ended_early"):
        lines.append(("ended early", f"{reason}."))
    found = disagreeing(report["lenses"])
    return Card(
        verdict,
        ran(report),
        versions(report),
        lines,
        None if found is None else place(found),
        _smaller_rate(report),
    )


def _smaller_rate(report: ReportJson) -> str | None:
    """The option to try where both runs blow up."""
    rate = report["config"].get("lr")
    if report["verdict"] != "diverged" or not isinstance(rate, (int, float)):
        return None
    return f"--lr {rate / 10:g}  # a tenth of this run's {rate:g}"


def disagreeing(comparisons: Sequence[ComparisonJson]) -> ComparisonJson | None:
    """The precision that shows best where the runs diverge; None if they do in none."""
    found = [each for each in comparisons if each["verdict"] == "disagree"]
    return next((each for each in found if each.get("located")), found[0] if found else None)


def title(report: ReportJson) -> str:
    """As `net on cifar10, quick recipe`."""
    model = model_name(str(report["config"].get("model", "net")))
    recipe = report.get("recipe")
    return f"{model} on {report['data']['name']}" + (f", {recipe} recipe" if recipe else "")


def model_name(model: str) -> str:
    """The option --model; of a user's pair, without the folder."""
    file, colon, pair = model.rpartition(":")
    return f"{PurePath(file).name}:{pair}" if colon else model


def ran(report: ReportJson) -> str:
    """The network, the data, how long the run is, and in which precisions."""
    config, comparisons = report["config"], report["lenses"]
    steps = max((each["steps"] for each in comparisons), default=0)
    text = f"Network {title(report)}: {plural(steps, 'step')}"
    if size := config.get("batch_size"):
        text += f" of batch {size:,}"
    return f"{text}, in {listed([each['dtype'] for each in comparisons])}"


def versions(report: ReportJson) -> str:
    """The frameworks and the device of each backend, and the machine."""
    environment = report["environment"]
    shown = []
    for name, found in environment.items():
        if name != "machine":
            known = [key for key in ("torch", "jax", "flax", "optax") if key in found]
            device = found.get("device_name") or found.get("device") or ""
            on = f" on {str(device).upper() if device == 'cpu' else device}" if device else ""
            if found.get("processes"):
                on += f", {found['processes']} processes"
            shown.append(", ".join(f"{key} {found[key]}" for key in known) + on)
    processor = environment.get("machine", {}).get("processor")
    return "; ".join(filter(None, [*shown, str(processor) if processor else ""]))


def _outcome(comparison: ComparisonJson, placed: bool) -> list[str]:
    """How the runs compare in one precision, and how much that rests on.

    Args:
        placed: whether the card says where the runs diverge.
    """
    if comparison["verdict"] == "single":
        return [f"{listed(list(comparison['accuracy']))} alone; nothing was compared."]
    if comparison["verdict"] == "disagree":
        place, found = comparison["first_divergence"], divergence_text(comparison)
        first = f"They disagree: {found.partition(': ')[2]}"
        if comparison.get("located"):
            first = ""
        elif placed and place is not None:
            stage = STAGE_NAMES.get(place["stage"], place["stage"])
            first = f"They disagree, first in step {place['step']:,}, {stage}."
            if place["stage"] == "evaluate":
                first = "They disagree in evaluation alone."
    elif comparison["verdict"] == "undecided":
        text = undecided_text(comparison).partition(": ")[2]
        first = text[0].upper() + text[1:]
    elif comparison["verdict"] == "diverged":
        first = (
            f"Both blow up at step {comparison.get('diverged_at') or 0:,}: from there on the loss is "
            "not finite, or so large that rounding decides it. Before it they agree."
        )
    else:
        first = _agreement(comparison)
    texts = [first, f"{usage_text(comparison, comparison.get('score'))}."]
    if (equal := comparison["predictions_equal"]) is not None:
        total = comparison["predictions_total"]
        texts.append(
            f"{'All' if equal == total else f'{equal:,} of'} {total:,} predictions are equal."
        )
    if (gap := outputs_gap(comparison)) is not None:
        texts.append(f"Outputs for the test data are within {number(gap)}.")
    return [text for text in texts if text]


def _agreement(comparison: ComparisonJson) -> str:
    gap, twins = comparison["max_abs_loss_gap"], comparison["twins"]
    known = [
        twin["max_abs_loss_gap"]
        for twin in itertools.chain(*twins.values())
        if twin["max_abs_loss_gap"] is not None
    ]
    if comparison["dtype"] != "float64" and known and gap is not None:
        return (
            f"As far apart as rounding explains: the losses differ by up to {number(gap)}, those "
            f"of twins by up to {number(max(known))}."
        )
    text = agreement_text(comparison).removeprefix(f"{comparison['dtype']} ")
    relative = comparison["bound"].get("relative")
    if gap is not None and relative is not None and gap > LARGE_GAP:  # of losses that are larger
        steps = plural(comparison["steps"], "step")
        text = f"within {relative:g} of their size over {steps}"
    return f"The losses agree {text}."


# --- The place


def place(comparison: ComparisonJson) -> Place:
    """Where the runs diverge in one precision."""
    dtype, located = comparison["dtype"], comparison.get("located")
    found: DivergenceJson | LocationJson | None = located or comparison["first_divergence"]
    if found is None:
        return Place(f"{dtype}: gaps exceed their bounds", "", [], [], [])
    how = [_values_text(found, trained(comparison))]
    if located is None:
        return Place(where(dtype, found), "", how, [], [])
    if located["pattern"]:
        how.append(f"In that tensor, {located['pattern']}.")
    if together := failing_text(located):
        how.append(f"{together}.")
    if located["how"] != "as recorded":
        how.append(f"Found so: {located['how']}.")
    return Place(
        where(dtype, found),
        own_names_text(located) or "",
        how,
        located["causes"],
        located.get("fixes", []),
    )


def where(dtype: str, found: PlaceJson) -> str:
    """As `float64, step 3, backward pass: gradient of conv1.kernel`."""
    stage, tensor = found["stage"], found["tensor"]
    moment = "after training" if stage == "evaluate" else f"step {found['step']:,}"
    named = f"gradient of {tensor}" if stage == "backward" and "." in tensor else tensor
    text = f"{dtype}, {moment}, {STAGE_NAMES.get(stage, stage)}"
    return text if tensor in (stage, "gradient_norm") and stage == tensor else f"{text}: {named}"


def _values_text(found: DivergenceJson, names: Sequence[str]) -> str:
    """Both values, where they are known, the gap and its bound."""
    if found["tensor"] == "batch":
        return "The two runs trained on different batches."
    values = [cast("float | None", found.get(name)) for name in names]
    text = f"A gap of {number(found['gap'])}, where {number(found['bound'], 'none')} is allowed"
    known = [value for value in values if value is not None]
    if len(known) == 2:
        shown = zip(names, format_distinct(*known), strict=True)
        text = f"{', '.join(f'{name} {value}' for name, value in shown)}. {text}"
    return f"{text}."


# --- The strip


def stages(comparison: ComparedJson, first: PlaceJson | None, decided: bool = True) -> list[Stage]:
    """What was compared of each stage, in the order of computation.

    Args:
        first: where the runs diverge, if they do.
        decided: whether a gap beyond its bound is a difference of the programs.
    """
    rows: dict[str, list[tuple[float | None, bool, bool]]] = {name: [] for name in STAGES}
    for check in comparison["ladder"]:
        rows.setdefault(check["stage"], []).append(
            (check["gap"], check["agrees"], check.get("power", True))
        )
    for window in comparison["stretches"]:
        stage = QUANTITY_STAGES.get(window["quantity"], "loss")
        rows[stage].append((window["gap"], window["agrees"], window.get("power", True)))
    found = [_stage(name, of, first) for name, of in rows.items() if name in STAGES]
    if decided:
        return found
    return [
        Stage(each.name, "not decided", "?", "warn") if each.tone == "bad" else each
        for each in found
    ]


def _stage(
    name: str, rows: Sequence[tuple[float | None, bool, bool]], first: PlaceJson | None
) -> Stage:
    if first is not None and first["stage"] == name:
        return Stage(name, "differs first", "\N{BALLOT X}", "bad")
    if not rows:
        return Stage(name, "not compared", "\N{EN DASH}", "plain")
    if not all(agrees for _, agrees, _ in rows):
        return Stage(name, "differs", "\N{BALLOT X}", "bad")
    if not any(power for _, _, power in rows):
        return Stage(name, "no power", "?", "plain")
    equal = all(gap == 0 for gap, _, _ in rows)
    return Stage(name, "identical" if equal else "within bound", "\N{CHECK MARK}", "good")
