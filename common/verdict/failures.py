"""The tensors that fail together, at one step and stage, and what they have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lockstep.common.errors import shorten
from lockstep.common.model.layers import plain_name
from lockstep.common.protocol import split_slot
from lockstep.common.verdict.check import Check

STAGES = ("weights", "forward", "backward", "update")  # with a tensor or more of each layer
PLURALS = {
    "bias": "biases",
    "var": "variances",
}  # of the roles of tensors; of others, with an s


@dataclass(frozen=True)
class Failures:
    """How many tensors of one step and stage fail, and which."""

    failing: int
    tensors: int  # that were compared there
    common: str  # such as "all biases, no kernel"


def failures(
    checks: Iterable[Check], step: int, stage: str, layers: Sequence[str] = ()
) -> Failures | None:
    """The tensors that fail at one step and stage; None where there is no choice of them.

    Args:
        checks: of the first steps, or of one step that was replayed.
        layers: the tensors of the forward pass, in the order in which they are computed.
    """
    found = [
        check
        for check in checks
        if (check.step, check.stage) == (step, stage) and check.start is None
    ]
    if stage not in STAGES or len(found) < 2 or all(check.agrees for check in found):
        return None
    failed = [check.tensor for check in found if not check.agrees]
    passed = [check.tensor for check in found if check.agrees]
    return Failures(len(failed), len(found), common(failed, passed, stage, layers))


def common(failed: Sequence[str], passed: Sequence[str], stage: str, layers: Sequence[str]) -> str:
    """What the tensors that fail have in common, and those that do not fail have not."""
    if not passed:
        return "every tensor"
    if len(failed) == 1:
        return f"only {failed[0]}"
    if stage == "forward":
        order = [*failed, *passed]
        order.sort(key=lambda tensor: _place(tensor, layers))
        if {*order[-len(failed) :]} == {*failed}:
            return f"everything from {order[-len(failed)]} on"
        return shorten(failed)
    slots = _slots(failed, passed)
    bad, good = _names(failed), [name for name in _names(passed) if name not in _names(failed)]
    if not good:
        return f"every parameter; {slots}" if slots else "every parameter"
    text = _roles(bad, good) or _layers(bad, good, layers) or shorten(bad)
    return f"{text}; {slots}" if slots else text


def _names(tensors: Iterable[str]) -> list[str]:
    """Each parameter once, whether it or what an optimizer keeps of it is meant."""
    return list(dict.fromkeys(map(plain_name, tensors)))


def _slots(failed: Sequence[str], passed: Sequence[str]) -> str:
    """Of an update: whether only what the optimizer keeps, or none of it, fails."""
    kept = list(dict.fromkeys(split_slot(tensor)[0] for tensor in (*passed, *failed)))
    failing = list(dict.fromkeys(split_slot(tensor)[0] for tensor in failed))
    if kept == [""]:
        return ""
    if failing == [""]:
        return f"no {' or '.join(_buffer(slot) for slot in kept if slot)}"
    if "" in failing:
        return ""
    return f"{' and '.join(f'{_buffer(slot)}s' for slot in failing)} alone"


def _buffer(slot: str) -> str:
    return f"{slot} buffer" if slot == "momentum" else slot


def _roles(bad: Sequence[str], good: Sequence[str]) -> str:
    """As `all biases, no kernel`; empty where a role both fails and does not."""
    failing = list(dict.fromkeys(name.rpartition(".")[2] for name in bad))
    others = list(dict.fromkeys(name.rpartition(".")[2] for name in good))
    if {*failing} & {*others}:
        return ""
    plurals = [PLURALS.get(role, f"{role}s") for role in failing]
    return f"all {' and '.join(plurals)}, no {' or '.join(others)}"


def _layers(bad: Sequence[str], good: Sequence[str], layers: Sequence[str]) -> str:
    """As `all of fc1`; empty where a layer both fails and does not."""
    failing, others = ({name.rpartition(".")[0] for name in names} for names in (bad, good))
    if failing & others:
        return ""
    order = sorted(failing | others, key=lambda layer: _place(layer, layers))
    known = all(layer in layers for layer in order)
    if len(failing) == 1:
        [layer] = failing
        return (
            f"all of the last layer, {layer}" if known and layer == order[-1] else f"all of {layer}"
        )
    if known and {*order[-len(failing) :]} == failing:
        return f"all of the layers from {order[-len(failing)]} on"
    if known and {*order[: len(failing)]} == failing:
        return f"all of the layers up to {order[len(failing) - 1]}"
    return ""


def _place(tensor: str, layers: Sequence[str]) -> int:
    """Its place in the order of computation; what is not known comes last."""
    return layers.index(tensor) if tensor in layers else len(layers)
