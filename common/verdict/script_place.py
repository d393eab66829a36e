"""Where two scripts differ first: both names of the tensor, what it looks like, what else fails,
and what usually causes that."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from lockstep.common.protocol import split_slot
from lockstep.common.recorder.align import A, Alignment, B, ScriptRecord
from lockstep.common.recorder.recording import Recording
from lockstep.common.verdict.check import MEAN, Check
from lockstep.common.verdict.comparison import Entry
from lockstep.common.verdict.distances import magnitude
from lockstep.common.verdict.failures import common
from lockstep.common.verdict.locate import Tensors
from lockstep.common.verdict.rank_checks import CAUSES as RANK_CAUSES
from lockstep.common.verdict.rank_checks import checks_of
from lockstep.common.verdict.relations import (
    EXACT,
    describe_relation,
    difference_relation,
    largest_differences,
    looks_single,
    scalar_relation,
    update_relation,
)
from lockstep.common.verdict.script_causes import (
    BY_ONE_FACTOR,
    BY_OWN_FACTORS,
    BY_SINGLE,
    STALE,
    TIMES,
    causes_of,
)
from lockstep.common.verdict.script_comparison import EVERY_STEP, ScriptPlace
from lockstep.common.verdict.traits import common_trait

Records = tuple[ScriptRecord, ScriptRecord]


def find_place(
    check: Check,
    checks: Sequence[Check],
    alignment: Alignment,
    records: Records,
    starts: Mapping[str, str],
) -> ScriptPlace:
    """The place of `check`, the first of `checks` that fails.

    Args:
        starts: how weights differ at the start, in words, by name.
    """
    sides = alignment.sides
    own = _own_names(check, alignment)
    tensors = _tensors_at(check, records)
    at_start = starts.get(check.tensor) if check.stage == "weights" else None
    pattern = at_start or _relation(check, tensors, records, sides)
    failing, passing = _siblings(check, checks)
    if pattern and re.search(TIMES, pattern) and (which := _factors(check, failing, records)):
        pattern = f"{pattern}, {which}"
    if pattern is None and check.stage == "forward" and _follows_agreeing_update(check, checks):
        pattern = STALE
    others = [name for name in failing if name != check.tensor]
    return ScriptPlace(
        check,
        sides,
        own,
        layer=records[A].holders.get(split_slot(check.tensor)[1], ""),
        pattern=pattern,
        worst_entries=_worst_entries(tensors),
        causes=causes_of(check.stage, f"{check.tensor} {own[A]} {own[B]}", pattern),
        others=len(others),
        of=len(others) + len(passing),
        trait=_trait(check, failing, passing, alignment, records[A]) if others else "",
        lines=(_line(alignment.runs[A], check, own[A]), _line(alignment.runs[B], check, own[B])),
    )


def ranks_place(check: Check, sides: tuple[str, str]) -> ScriptPlace:
    """The place of a check of the ranks of one run."""
    known = "the gap is between means, norms or extremes: the other ranks keep no more than these"
    return ScriptPlace(
        check,
        sides,
        (check.tensor, check.tensor),
        pattern=known if math.isfinite(check.gap) else None,
        causes=(RANK_CAUSES[check.stage],),
    )


def ranks_sentence(recording: Recording) -> str | None:
    """Where the ranks of one run differ first, and a likely cause; None if they do not."""
    checks = checks_of(recording.rank_differences or [], recording.name)
    if not checks:
        return None
    place = ranks_place(checks[0], (recording.name, recording.name))
    return (
        f"The ranks differ: {recording.dtype}: {place.message}. A likely cause: {place.causes[0]}."
    )


def _own_names(check: Check, alignment: Alignment) -> tuple[str, str]:
    """What either script calls the tensor of a check."""
    tensor = check.tensor.removesuffix(EVERY_STEP).removeprefix(MEAN)
    slot, parameter = split_slot(tensor)
    group = {"data": "data", "forward": "forward", "loss": "losses", "evaluate": "results"}
    known = alignment.groups.get(group.get(check.stage, ""), alignment.parameters)
    if tensor in known:
        return known[tensor]
    if parameter in known and slot:
        ours, theirs = known[parameter]
        return f"{slot} of {ours}", f"{slot} of {theirs}"
    return tensor, tensor


# --- The two tensors


def _tensors_at(check: Check, records: Records) -> Tensors:
    first, second = (_tensor_at(check, record) for record in records)
    return first, second


def _tensor_at(check: Check, record: ScriptRecord) -> np.ndarray | None:
    tensor, step = check.tensor.removesuffix(EVERY_STEP), check.step
    if check.stage == "weights":
        return record.weights.get(tensor)
    if check.stage == "evaluate":
        return record.results.get(tensor)
    recorded = record.first_steps.get(f"{step}/{check.stage}/{tensor}")
    if recorded is None and check.stage == "update":
        recorded = record.parameter_history.get(f"{step + 1}/{tensor}")
        if recorded is None and step == record.steps - 1:
            recorded = record.final.get(tensor)
    return recorded


def _worst_entries(tensors: Tensors) -> tuple[Entry, ...]:
    a, b = tensors
    return (
        largest_differences(a, b) if a is not None and b is not None and a.shape == b.shape else ()
    )


def _relation(
    check: Check, tensors: Tensors, records: Records, sides: tuple[str, str]
) -> str | None:
    """How one tensor is made of the other."""
    a, b = tensors
    if check.values is not None and (a is None or b is None or a.size == b.size == 1):
        return scalar_relation(*check.values, sides)
    if a is None or b is None:
        return None
    if a.shape != b.shape:
        return f"the shapes are {a.shape} and {b.shape}"
    scale = max(magnitude(a), magnitude(b))
    if check.stage == "update" and (found := _update_relation(check, (a, b), records, sides)):
        return found
    if check.stage == "backward" and (found := _gradient_relation(check, (a, b), records, sides)):
        return found
    if found := describe_relation(a, b, sides):
        return found
    exact = records[A].dtype == "float64"
    if exact and math.isfinite(check.gap) and looks_single(check.gap, scale):
        return f"the relative gap, {check.gap / scale:.0e}, has the size of {BY_SINGLE}"
    return None


def _gradient_relation(
    check: Check, gradients: tuple[np.ndarray, np.ndarray], records: Records, sides: tuple[str, str]
) -> str | None:
    parameter = records[A].weights.get(check.tensor)
    if parameter is None or parameter.shape != gradients[0].shape:
        return None
    return difference_relation(gradients[1] - gradients[0], parameter, None, sides)


def _update_relation(
    check: Check, after: tuple[np.ndarray, np.ndarray], records: Records, sides: tuple[str, str]
) -> str | None:
    slot, parameter = split_slot(check.tensor)
    record, step = records[A], check.step
    before = (
        record.first_steps.get(f"{step - 1}/update/{parameter}")
        if step
        else record.weights.get(parameter)
    )
    # In step 0 a moment is a multiple of the gradient.
    likes = [f"{step}/backward/", *(["0/update/first moment of "] if step == 0 else [])]
    found = (record.first_steps.get(f"{like}{parameter}") for like in likes)
    gradient = next((array for array in found if array is not None), None)
    if before is None or before.shape != after[0].shape or before.dtype.kind != "f":
        return None
    if slot:
        return difference_relation(after[1] - after[0], before, None, sides)
    return update_relation(before, after, gradient, sides)


# --- What else fails


def _siblings(check: Check, checks: Sequence[Check]) -> tuple[list[str], list[str]]:
    """The tensors of the same step, stage and slot: those that fail, and those that do not."""
    slot, _ = split_slot(check.tensor)
    failing, passing = {}, {}
    for each in checks:
        same = (each.step, each.stage) == (check.step, check.stage) and each.start is None
        if same and split_slot(each.tensor)[0] == slot and check.start is None:
            (passing if each.agrees else failing)[each.tensor] = None
    return list(failing), [name for name in passing if name not in failing]


def _follows_agreeing_update(check: Check, checks: Sequence[Check]) -> bool:
    before = [c for c in checks if (c.step, c.stage) == (check.step - 1, "update")]
    return bool(before) and all(each.agrees for each in before)


def _factors(check: Check, failing: Sequence[str], records: Records) -> str | None:
    """Whether all tensors that fail differ by one factor; None where that cannot be seen."""
    if check.stage == "update" and not split_slot(check.tensor)[0]:
        return None  # of parameters, not of their changes
    factors = []
    for name in failing:
        a, b = (record.first_steps.get(f"{check.step}/{check.stage}/{name}") for record in records)
        if a is None or b is None or a.shape != b.shape or not a.any():
            continue
        x, y = a.ravel(), b.ravel()
        factors.append(float(y @ x) / float(x @ x))
    if len(factors) < 2:
        return None
    alike = max(factors) - min(factors) <= EXACT * max(map(abs, factors))
    return BY_ONE_FACTOR if alike else f"those that fail {BY_OWN_FACTORS}"


def _trait(
    check: Check,
    failing: Sequence[str],
    passing: Sequence[str],
    alignment: Alignment,
    record: ScriptRecord,
) -> str:
    """What the tensors that fail have in common; "" where they are no choice of them."""
    if check.stage == "forward":
        return common(failing, passing, check.stage, record.layers) if passing else ""
    if check.stage not in ("weights", "backward", "update"):
        return ""
    parameters = [[split_slot(name)[1] for name in names] for names in (failing, passing)]
    axes = {name: array.ndim for name, array in record.weights.items()}
    return common_trait(parameters[0], parameters[1], alignment.names, axes)


def _line(recording: Recording, check: Check, own: str) -> str | None:
    """Where in the script the tensor is made, if that is known."""
    stage = check.stage
    keys = {"data": "data/batch", "loss": "loss/loss"}
    found = recording.lines.get(f"{stage}/{own}") or recording.lines.get(keys.get(stage, ""))
    return found
