"""Are two training scripts the same training? The verdict on two recordings, and their twins, with
the checks and the bounds of `lockstep.common.verdict.compare`.

What both recorded is compared in causal order: data, weights, forward, loss, backward, update,
evaluate. What one side did not record is listed, and the next stage speaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import NamedTuple

import ml_dtypes
import numpy as np

from lockstep.common.dtypes import compute_dtype
from lockstep.common.errors import RecordError
from lockstep.common.model.perturb import REPLICATE
from lockstep.common.protocol import STAGES, Arrays
from lockstep.common.recorder.align import (
    A,
    Alignment,
    B,
    ScriptRecord,
    Side,
    in_common,
    like,
)
from lockstep.common.recorder.matched import Matching
from lockstep.common.recorder.recording import Recording
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import FIRST_STEPS
from lockstep.common.verdict.check import Check
from lockstep.common.verdict.compare import diverged_at
from lockstep.common.verdict.distances import max_difference, scalar_gap
from lockstep.common.verdict.judge import INITIAL_TWINS, MAX_TWINS
from lockstep.common.verdict.rank_checks import check_ranks, is_of_ranks
from lockstep.common.verdict.script_checks import all_checks, believed, script
from lockstep.common.verdict.script_comparison import STEPS, ScriptComparison, ScriptPlace
from lockstep.common.verdict.script_notes import (
    first_change,
    not_seen,
    notes_of,
    of_one_rank,
    unmatched,
)
from lockstep.common.verdict.script_place import find_place, ranks_place
from lockstep.common.verdict.script_rule import rule_of

# Times the bound, of float64. A gap of the first steps that is larger is no rounding: a gradient
# that cancels was seen to lose six digits. Later, training may amplify rounding to any size; six
# twins are worth their time where two might have missed it.
CANCELS, AMPLIFIED = 1e6, 1e3
EVIDENCE = ("forward", "loss", "backward", "update", "evaluate")  # stages that tell of a training


@dataclass(frozen=True)
class ScriptRuns:
    """The recordings of one script in one precision."""

    run: Recording
    twins: tuple[Recording, ...] = ()
    short_twins: tuple[Recording, ...] = ()  # of these only the first steps were taken
    again: Recording | None = None  # the same run once more, with nothing moved

    @classmethod
    def of(cls, recordings: Sequence[Recording]) -> ScriptRuns:
        """The run, which comes first, and its twins."""
        return cls(recordings[0]).add(recordings[1:])

    def add(self, recordings: Iterable[Recording]) -> ScriptRuns:
        """With these twins, too; those of fewer steps are short ones."""
        found = list(recordings)
        again = next((each for each in found if each.twin == REPLICATE), self.again)
        moved = [each for each in found if each.twin != REPLICATE]
        whole = [each for each in moved if each.steps == self.run.steps]
        short = [each for each in moved if each.steps < self.run.steps]
        return replace(
            self,
            twins=(*self.twins, *whole),
            short_twins=(*self.short_twins, *short),
            again=again,
        )


class Wanted(NamedTuple):
    """The runs that a verdict should wait for."""

    twins: int = 0  # of each side, in all
    again: bool = False  # each side once more, with nothing moved
    short: bool = False  # the first `FIRST_STEPS` steps of them are enough

    def __bool__(self) -> bool:
        return self.twins > 0 or self.again


# Runs these twins of both scripts (0: the same run again), the first so many steps or all.
RunTwins = Callable[[list[int], int | None], tuple[Sequence[Recording], Sequence[Recording]]]


def judge_scripts(
    a: ScriptRuns,
    b: ScriptRuns,
    matching: Matching,
    run_twins: RunTwins,
    sides: tuple[str, str] | None = None,
) -> tuple[ScriptComparison, ScriptRuns, ScriptRuns]:
    """`compare_scripts`, with more twins wherever the verdict should wait for them.

    Args:
        run_twins: returns nothing where it cannot run any more.

    Returns:
        The comparison, and both sides with the twins that were run.

    Raises:
        RecordError: as `compare_scripts`.
    """
    while True:
        comparison = compare_scripts(a, b, matching, sides)
        wanted = runs_wanted(comparison)
        if not wanted:
            return comparison, a, b
        have = min(len(side.short_twins if wanted.short else side.twins) for side in (a, b))
        numbers = [REPLICATE] * wanted.again + list(range(have + 1, wanted.twins + 1))
        more = run_twins(numbers, FIRST_STEPS if wanted.short else None)
        if not any(more):
            return comparison, a, b
        a, b = a.add(more[A]), b.add(more[B])


def runs_wanted(comparison: ScriptComparison) -> Wanted:
    """Which runs this verdict should wait for; none if it stands.

    As `judge.twins_wanted` has it for networks. In float64 each script is also run once more, to
    tell one that is not reproducible from one that computes something else.
    """
    if comparison.place is None or comparison.place.check.tensor == STEPS:
        return Wanted()
    check = comparison.place.check
    if is_of_ranks(check):
        return Wanted()
    exact, early = comparison.dtype == "float64", check.step < FIRST_STEPS
    again = exact and not comparison.again
    twins, short = 0, early
    if _may_be_rounding(comparison):
        fewest = min(comparison.twins)
        if early and not any(comparison.short_twins):
            twins = INITIAL_TWINS if exact else MAX_TWINS
            twins = twins if twins > fewest else 0
        elif not early or not (exact or check.step == 0):
            short = False
            twins = INITIAL_TWINS if fewest == 0 else MAX_TWINS if fewest < MAX_TWINS else 0
            if exact and fewest and _gap_at(check) > AMPLIFIED * check.bound:
                twins = 0
    return Wanted(twins, again, short)


def _may_be_rounding(comparison: ScriptComparison) -> bool:
    """Whether twins could explain the first check that fails."""
    assert comparison.place is not None
    check, exact = comparison.place.check, comparison.dtype == "float64"
    if not math.isfinite(check.gap) or check.stage == "weights" or check.tensor == "lr":
        return False
    if check.stage == "data":  # that of a policy is what its actions made of it
        return not exact and check.step >= FIRST_STEPS
    if check.step < FIRST_STEPS:
        possible = check.step > 0 or check.stage in ("backward", "update")
        return possible and not (exact and check.gap > CANCELS * check.bound)
    return not (exact and check.stage == "evaluate" and min(comparison.twins) == 0)


def _gap_at(check: Check) -> float:
    """The gap at the step of a check; `gap` is that of its whole range of steps."""
    return check.gap if check.values is None else min(check.gap, scalar_gap(*check.values))


# --- One comparison


def compare_scripts(
    a: ScriptRuns,
    b: ScriptRuns,
    matching: Matching,
    sides: tuple[str, str] | None = None,
) -> ScriptComparison:
    """Compare two scripts in one precision.

    Args:
        matching: of `matching.match`, of the two runs.
        sides: what they are called; None: `side_names`.

    Raises:
        RecordError: if nothing that tells of a training was recorded by both, or if a precision
            other than float64 comes without twins.
    """
    sides = sides or side_names(a.run, b.run)
    alignment = Alignment.of(a.run, b.run, matching, sides)
    ours, theirs, dtype = _ensembles(a, b, alignment)
    steps = min(ours.run.steps, theirs.run.steps)
    shared = ours.until(steps), theirs.until(steps)
    nonfinite_at = diverged_at(*shared)
    if nonfinite_at is not None:
        shared = ours.until(nonfinite_at), theirs.until(nonfinite_at)
    whole = nonfinite_at is None and a.run.steps == b.run.steps
    checks, contradicted = believed(all_checks(*shared, finished=whole), alignment)
    told = any(check.stage in EVIDENCE and check.tensor != "lr" for check in checks)
    if not told and nonfinite_at != 0:
        raise RecordError(
            f"{sides[A]} and {sides[B]} have nothing in common to compare: give run.step the loss "
            "and the parameters in both, and name tensors in a --names file"
        )
    if a.run.steps != b.run.steps:
        checks.append(_check_steps(a.run.steps, b.run.steps))
    checks += check_ranks(run for side in shared for run in (side.run, *side.twins))
    records = script(shared[A].run), script(shared[B].run)
    starts = {each.name: each.text for each in matching.differing}
    place = _first_place(checks, alignment, records, starts)
    changes = [
        first_change(name, each.run, each.again)
        for name, each in zip(sides, (a, b), strict=True)
        if each.again is not None
    ]
    return ScriptComparison(
        dtype=dtype,
        sides=sides,
        steps=steps,
        verdict="disagree" if place else "agree" if nonfinite_at is None else "diverged",
        checks=tuple(check for check in checks if check.start is None),
        windows=tuple(check for check in checks if check.start is not None),
        rule=rule_of(dtype, sum(len(side.twins) for side in shared)),
        names=alignment.names,
        losses=tuple(records[A].losses),
        place=place,
        max_loss_gap=max(
            (max_difference(x, records[B].losses[n])[0] for n, x in records[A].losses.items()),
            default=None,
        ),
        not_seen=not_seen(alignment),
        left_out=(*unmatched(alignment, matching), *alignment.left_out, *contradicted),
        notes=(
            *of_one_rank(alignment),
            *notes_of(alignment, (a.run.dtype, b.run.dtype)),
        ),
        twins=(len(a.twins), len(b.twins)),
        short_twins=(len(a.short_twins), len(b.short_twins)),
        again=bool(changes) or a.again is not None,
        unstable=tuple(change for change in changes if change is not None),
        diverged_at=nonfinite_at,
        final_losses={
            name: (float(values[-1]), float(records[B].losses[name][-1]))
            for name, values in records[A].losses.items()
            if len(values)
        },
    )


def side_names(a: Recording, b: Recording) -> tuple[str, str]:
    """What the two scripts are called: by their files, with as much of the path as tells them
    apart."""
    if a.name != b.name:
        return a.name, b.name
    ours, theirs = PurePath(a.script).parts, PurePath(b.script).parts
    for count in range(2, max(len(ours), len(theirs)) + 1):
        if ours[-count:] != theirs[-count:]:
            return "/".join(ours[-count:]), "/".join(theirs[-count:])
    return f"{a.name} (1)", f"{b.name} (2)"


def _first_place(
    checks: Sequence[Check],
    alignment: Alignment,
    records: tuple[ScriptRecord, ScriptRecord],
    starts: Mapping[str, str],
) -> ScriptPlace | None:
    """Where the two diverge first, in causal order; a number of steps counts last."""
    failing = [check for check in checks if not check.agrees]
    if not failing:
        return None
    failing.sort(key=_causal)
    if is_of_ranks(failing[0]):
        return ranks_place(failing[0], alignment.sides)
    return find_place(failing[0], checks, alignment, records, starts)


def _causal(check: Check) -> tuple[bool, int, bool, int, bool]:
    """Ranks that differ come first in their step: what they are compared with does not matter."""
    stage = STAGES.index(check.stage)
    return check.tensor == STEPS, check.step, not is_of_ranks(check), stage, check.tensor != "lr"


def _check_steps(ours: int, theirs: int) -> Check:
    gap = float(abs(ours - theirs))
    return Check(min(ours, theirs), "update", STEPS, gap, 0.0, values=(float(ours), float(theirs)))


# --- Recordings as the engine's records


def _ensembles(
    a: ScriptRuns, b: ScriptRuns, alignment: Alignment
) -> tuple[Ensemble, Ensemble, str]:
    """Both sides with their twins, in one layout and with the same tensors, and the precision that
    sets the bounds: the coarser one."""
    dtype = max((_bounds_of(each.run.dtype) for each in (a, b)), key=_coarseness)
    if dtype != "float64" and not (a.twins and b.twins):
        raise RecordError(
            f"nothing says how far {dtype} runs may drift apart: record them with --twins 1 or more"
        )
    runs = in_common(alignment.record(a.run, A), alignment.record(b.run, B))
    absent = _absent(*runs)
    first, second = (
        _ensemble(each, side, run, alignment, absent, dtype)
        for each, side, run in zip((a, b), (A, B), runs, strict=True)
    )
    return first, second, dtype


def _ensemble(
    of: ScriptRuns,
    side: Side,
    run: ScriptRecord,
    alignment: Alignment,
    absent: dict[str, np.ndarray],
    dtype: str,
) -> Ensemble:
    def prepared(record: ScriptRecord) -> ScriptRecord:
        if dtype != "float64":
            record = _without_counters(record)
        return replace(_with_absent(record, absent), dtype=dtype)

    def twins(recordings: Iterable[Recording]) -> tuple[ScriptRecord, ...]:
        return tuple(prepared(like(alignment.record(each, side), run)) for each in recordings)

    return Ensemble(prepared(run), twins(of.twins), twins(of.short_twins))


def _bounds_of(dtype: str) -> str:
    """The precision whose bounds hold for a script's own one."""
    return dtype if dtype in ("float64", "float32", "bfloat16") else "bfloat16"


def _coarseness(dtype: str) -> float:
    return float(ml_dtypes.finfo(compute_dtype(dtype)).eps)


def _without_counters(record: ScriptRecord) -> ScriptRecord:
    """Without whole numbers, which would count in the distance of all parameters."""

    def floats(arrays: Arrays) -> Arrays:
        return {name: array for name, array in arrays.items() if array.dtype.kind == "f"}

    return replace(
        record, final=floats(record.final), parameter_history=floats(record.parameter_history)
    )


def _absent(first: ScriptRecord, second: ScriptRecord) -> dict[str, np.ndarray]:
    """By loss, the steps that have none in both runs, such as the generator's of a GAN that is
    updated in every fifth step. A loss that is no number any more stays so for longer."""
    found = {}
    for name, ours in first.losses.items():
        shared = min(len(ours), len(second.losses[name]))
        missing = np.isnan(ours[:shared]) & np.isnan(second.losses[name][:shared])
        known = np.flatnonzero(~missing)
        longest = int(np.diff(known, prepend=-1).max(initial=0))
        last = int(known[-1]) if len(known) else -1
        end = shared if shared - last <= longest else last
        found[name] = missing & (np.arange(shared) < end)
    return found


def _with_absent(record: ScriptRecord, absent: dict[str, np.ndarray]) -> ScriptRecord:
    """Zero at these steps, as in the other run."""
    losses = {}
    for name, values in record.losses.items():
        steps = np.flatnonzero(absent[name][: len(values)])
        losses[name] = values.copy()
        losses[name][steps] = np.where(np.isnan(values[steps]), 0.0, values[steps])
    return replace(record, losses=losses, loss=next(iter(losses.values()), record.loss))
