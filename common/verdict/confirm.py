"""Before float64 excuses a gap: single steps from one state, on both sides.

Twins may explain a gap beyond 1e-12: training amplifies the rounding of float64, too. But from one
state, a step agrees within 1e-12 of its tensors however chaotic the run is. So the step at which
the gap left the bound, the one before it, those at which it grew most, and two later ones are
replayed from the reference's state, and both backends evaluate its last one. The first of these
that fails is the fault and its place.

Twins may also fail to explain a gap between correct runs. If rounding changes the sign of one
ReLU's input in a run, and in no twin, the gap jumps. Then the steps up to the one at which it
exceeds the twins' bound are replayed, too, and if all agree, the runs agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.model.layers import ModuleNames
from lockstep.common.protocol import Arrays, Backend, Snapshot
from lockstep.common.runs import training
from lockstep.common.runs.record import FIRST_STEPS, Record
from lockstep.common.verdict import locate
from lockstep.common.verdict.check import OUTPUTS, Check
from lockstep.common.verdict.comparison import Comparison, Growth, divergence
from lockstep.common.verdict.distances import (
    abs_differences,
    magnitude,
    max_tensor_difference,
    scalar_gap,
)
from lockstep.common.verdict.evaluation import has_classes
from lockstep.common.verdict.statistics import PROOF_BOUND, SEPARATION

LATER_STEPS = 2  # that are replayed after the gap left the bound: half way, and the last one
# Rounding is amplified where the twins make a bound so many times what it is without them.
AMPLIFIED = 10.0
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
    """The same comparison, with how the gap grew: "agree" if all replays agree. If twins explain the
    gap and a replay fails, "disagree" and its place. A comparison that needed no twins is returned
    as it is, and nothing is built.

    Args: as of `locate.locate`.
    """
    if comparison.dtype != "float64" or not comparison.rule.get("twins"):
        return comparison
    beyond = beyond_twins_at(comparison)
    if comparison.verdict != "agree" and beyond is None:
        return comparison
    first, second = runs.values()
    names = list(runs)
    left = left_bound_at(first, second) if beyond is None else min(beyond, first.steps - 1)
    before = 1 if beyond is None else locate.REPLAY_STEPS
    jump = jumps_at(first, second)
    steps = steps_to_replay(left, first.steps, before, (jump - 1, jump))
    found = locate.replay(names, config, dataset, "float64", steps, build, weights=weights)
    found = found or evaluate_one_state(runs, dataset, build)
    if found is None:
        grown = growth(first, second, steps, beyond)
        return replace(comparison, verdict="agree", first_divergence=None, growth=grown)
    if beyond is not None:
        return comparison
    check, tensors, together = found
    place = divergence(check, names)
    modules = None if names_of is None else {name: names_of(name) for name in names}
    if check.stage == "evaluate":
        what = f"the two evaluate the last state of {names[0]} differently"
    else:
        what = f"from one state of {names[0]}, the two take step {check.step} differently"
    method = f"replayed: twins explain the gap between the two runs, but {what}"
    location = locate.describe(place, tensors, method, together, modules)
    return replace(comparison, verdict="disagree", first_divergence=place, location=location)


def beyond_twins_at(comparison: Comparison) -> int | None:
    """The step at which two runs that amplify rounding past 1e-12, and are reproducible, differ by
    more than their twins show; None if there is none, or if it may be a fault at once."""
    first = comparison.first_divergence
    if comparison.verdict != "disagree" or first is None or comparison.not_reproducible:
        return None
    if first.step < FIRST_STEPS or first.stage == "data" or first.tensor == "lr":
        return None
    place = first.step, first.stage, first.tensor
    failed = next(
        check
        for check in (*comparison.windows, *comparison.checks)
        if not check.agrees and (check.step, check.stage, check.tensor) == place
    )
    if failed.spread is None:
        values = failed.values or (0.0, 0.0)
        amplified = failed.bound > AMPLIFIED * PROOF_BOUND * max(1.0, *map(abs, values))
    else:
        exact = failed.bound - SEPARATION["float64"] * failed.spread
        amplified = failed.bound > AMPLIFIED * exact
    return first.step if amplified and math.isfinite(failed.gap) else None


def evaluate_one_state(
    runs: Mapping[str, Record], dataset: Dataset, build: Callable[[str], Backend]
) -> tuple[Check, locate.Tensors, None] | None:
    """The first check that the two backends fail where both evaluate the state that the first of
    `runs` ended in, and the predictions; None if they agree.

    Args: as of `locate.locate`.
    """
    reference = next(iter(runs.values()))
    found = []
    for name in runs:
        backend = build(name)
        state = backend.init(Snapshot.start(reference.final))
        found.append(training.evaluate(backend, state, dataset, "float64"))
    a, b = found
    if has_classes(reference):
        unequal = float(np.sum(a.predictions != b.predictions))
        predicted = Check(reference.steps, "evaluate", "predictions", unequal, 0.0)
    else:
        gap, values = max_tensor_difference(a.predictions, b.predictions)
        limit = PROOF_BOUND * max(magnitude(a.predictions), magnitude(b.predictions))
        predicted = Check(reference.steps, "evaluate", OUTPUTS, gap, limit, values=values)
    limit = PROOF_BOUND * max(1.0, abs(a.loss))
    loss = scalar_gap(a.loss, b.loss)
    for check in (
        Check(reference.steps, "evaluate", "test loss", loss, limit, values=(a.loss, b.loss)),
        predicted,
    ):
        if not check.agrees:
            return check, (a.predictions, b.predictions), None
    return None


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


def jumps_at(first: Record, second: Record) -> int:
    """The step at which the gap between the losses grew most, compared with all before."""
    return 1 + int(np.argmax(_growth_factors(first, second))) if first.steps > 1 else 0


def _growth_factors(first: Record, second: Record) -> np.ndarray:
    """How many times the largest gap so far grew in each step but the first, float64 (steps - 1,)."""
    gaps = abs_differences(first.loss, second.loss)
    so_far = np.maximum(np.maximum.accumulate(gaps), ULP)
    return so_far[1:] / so_far[:-1]


def steps_to_replay(
    left: int, total: int, before: int = 1, more: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """The step that left the bound, those `before` it, `LATER_STEPS` up to the last, and `more`."""
    later = np.linspace(left, total - 1, LATER_STEPS + 1).astype(int).tolist()
    steps = {*range(left - before, left), *later, *more}
    return tuple(sorted(step for step in steps if 0 <= step < total))


def growth(
    first: Record, second: Record, replayed: tuple[int, ...], beyond: int | None = None
) -> Growth:
    """How the gap between the losses grew up to its largest.

    Args:
        beyond: of `beyond_twins_at`.
    """
    gaps = abs_differences(first.loss, second.loss)
    start = int(np.argmax(gaps > 0))
    stop = int(np.argmax(gaps))
    factor = float(_growth_factors(first, second).max(initial=1.0))
    return Growth(start, float(gaps[start]), stop, float(gaps[stop]), factor, replayed, beyond)
