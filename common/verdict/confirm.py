"""Before float64 excuses a gap: single steps from one state, on both sides.

Twins may explain a gap beyond 1e-12: training amplifies the rounding of float64, too. But from one
state, a step agrees within 1e-12 of its tensors however chaotic the run is. So the step at which
the gap left the bound, the one before it, and two later ones are replayed from the reference's
state; one that fails is the fault and its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.model.layers import ModuleNames
from lockstep.common.protocol import Arrays, Backend
from lockstep.common.runs.record import Record
from lockstep.common.verdict import locate
from lockstep.common.verdict.comparison import Comparison, Growth, divergence
from lockstep.common.verdict.distances import abs_differences
from lockstep.common.verdict.statistics import PROOF_BOUND

LATER_STEPS = 2  # that are replayed after the gap left the bound: half way, and the last one
ULP = float(np.finfo(np.float64).eps)  # a gap below it is none: growth is counted from here


def confirm(
    comparison: Comparison,
    runs: Mapping[str, Record],
    config: Config,
    dataset: Dataset,
    build: Callable[[str], Backend],
    weights: Arrays | None = None,
    names_of: Callable[[str], ModuleNames] | None = None,
) -> Comparison:
    """The same comparison, with how the gap grew; where a step that is replayed fails, "disagree"
    and its place. What needed no twins is returned as it is, and nothing is built.

    Args: as of `locate.locate`.
    """
    if comparison.verdict != "agree" or comparison.dtype != "float64":
        return comparison
    if not comparison.rule.get("twins"):
        return comparison
    first, second = runs.values()
    left = left_bound_at(first, second)
    names, steps = list(runs), steps_to_replay(left, first.steps)
    found = locate.replay(names, config, dataset, "float64", steps, build, weights=weights)
    if found is None:
        return replace(comparison, growth=growth(first, second, steps))
    check, tensors, together = found
    place = divergence(check, names)
    modules = None if names_of is None else {name: names_of(name) for name in names}
    method = (
        f"replayed: twins explain the gap between the two runs, but not that both take step "
        f"{check.step} otherwise from the state that {names[0]} had before it"
    )
    location = locate.describe(place, tensors, method, together, modules)
    return replace(comparison, verdict="disagree", first_divergence=place, location=location)


def left_bound_at(first: Record, second: Record) -> int:
    """`left_bound` of the losses and the gradient norms; the last step if only parameters differ."""
    quantities = ("loss", "gradient_norm")
    pairs = ((getattr(first, name), getattr(second, name)) for name in quantities)
    return left_bound(pairs, first.steps)


def left_bound(pairs: Iterable[tuple[np.ndarray, np.ndarray]], steps: int) -> int:
    """The first step at which two series differ by more than 1e-12 of their magnitude (of 1, where
    it is smaller); the last one if there is none.

    Args:
        pairs: float64 (steps,) each, of both runs.
    """
    outside = np.zeros(steps, bool)
    for a, b in pairs:
        largest = np.maximum.accumulate(np.maximum(np.abs(a), np.abs(b)))
        outside |= abs_differences(a, b) > PROOF_BOUND * np.maximum(1.0, largest)
    return int(np.argmax(outside)) if outside.any() else steps - 1


def steps_to_replay(left: int, total: int) -> tuple[int, ...]:
    """The step that left the bound, the one before it, and `LATER_STEPS` more up to the last."""
    later = np.linspace(left, total - 1, LATER_STEPS + 1).astype(int).tolist()
    return tuple(sorted({max(0, left - 1), *later}))


def growth(first: Record, second: Record, replayed: tuple[int, ...]) -> Growth:
    """How the gap between the losses grew up to its largest."""
    gaps = abs_differences(first.loss, second.loss)
    start = int(np.argmax(gaps > 0))
    so_far = np.maximum(np.maximum.accumulate(gaps), ULP)
    factors = so_far[1:] / so_far[:-1]
    stop = int(np.argmax(gaps))
    factor = float(factors.max(initial=1.0))
    return Growth(start, float(gaps[start]), stop, float(gaps[stop]), factor, replayed)
