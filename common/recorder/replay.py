"""Where two float64 runs drift apart late, single steps are taken again, on both sides from one
state.

Training amplifies rounding, so that a late gap alone says little. From one state, a step agrees
within 1e-12 however chaotic the run is. So the step at which the losses left that bound, the one
before it, and the last two are replayed: both scripts run up to there once more, and the second one
goes on from the state of the first. Both scripts must call `Run.sync`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lockstep.common.errors import ScriptError
from lockstep.common.protocol import split_slot
from lockstep.common.recorder import transfer
from lockstep.common.recorder.align import A, B, Side
from lockstep.common.recorder.matched import Matching
from lockstep.common.recorder.recording import Recording
from lockstep.common.runs.record import FIRST_STEPS
from lockstep.common.verdict.distances import abs_differences
from lockstep.common.verdict.script_comparison import STEPS, ScriptComparison, ScriptPlace
from lockstep.common.verdict.scripts import ScriptRuns, judge_scripts
from lockstep.common.verdict.statistics import PROOF_BOUND

STAGES = ("loss", "backward", "update")  # of a late gap that a replay may explain

Recordings = tuple[Recording, Recording]


class Replayed(NamedTuple):
    """What the replays say."""

    place: ScriptPlace | None  # where a step differs; None: those that were replayed agree
    note: str


class Replayer(NamedTuple):
    """How steps are replayed.

    Args:
        run: records this side (A or B) from this step on: the run (None), or a twin; from its own
            state (None), or that of a file.
        state_file: where the state of this step is written for B.
    """

    sides: tuple[str, str]
    matching: Matching
    run: Callable[[Side, int, Sequence[int | None], Path | None], list[Recording]]
    state_file: Callable[[int], Path]

    def replay(self, main: Recordings) -> Replayed:
        """Replay the steps of two float64 runs that drift apart late."""
        done: list[int] = []
        for step in windows(main):
            try:
                found = self._from(step, main)
            except ScriptError as error:
                return Replayed(None, f"no step was replayed: {error}")
            if isinstance(found, str):
                return Replayed(None, f"no step was replayed: {found}")
            done += range(step, step + FIRST_STEPS)
            if found.place is not None:
                at = found.place.check.step + step
                place = replace(found.place, check=replace(found.place.check, step=at))
                return Replayed(
                    place, f"step {at} was replayed on both sides from the state of {self.sides[A]}"
                )
        text = ", ".join(f"{step:,}" for step in done)
        return Replayed(
            None,
            f"steps {text} were replayed on both sides from the states of {self.sides[A]}, and "
            "agree",
        )

    def _from(self, step: int, main: Recordings) -> ScriptComparison | str:
        """The comparison of `FIRST_STEPS` steps from this one on, or why there is none."""
        [ours] = self.run(A, step, [None], None)
        name = main[A].losses[0]
        if ours.series[name][0] != main[A].series[name][step]:
            return f"run again, {self.sides[A]} has another loss at step {step}"
        pieces = transfer.pieces(self.matching.matches)
        state = transfer.transfer(ours, main[B], pieces)
        state |= transfer.transfer_optimizer(ours, main[B], pieces)
        path = self.state_file(step)
        transfer.write(state, path)
        [theirs] = self.run(B, step, [None], path)
        for side, recording in zip(self.sides, (ours, theirs), strict=True):
            if missing := _not_synced(recording):
                return (
                    f"{side} gives run.sync no {missing}: give it, and run.begin, all of the state"
                )

        def run_twins(
            twins: list[int], steps: int | None
        ) -> tuple[list[Recording], list[Recording]]:
            return self.run(A, step, twins, None), self.run(B, step, twins, path)

        runs = ScriptRuns.of([ours]), ScriptRuns.of([theirs])
        found, *_ = judge_scripts(*runs, self.matching, run_twins, self.sides)
        if found.place is not None and found.place.check.stage in ("data", "weights"):
            return f"at step {step} the two differ in {found.place.name}"
        return found


def is_late(comparison: ScriptComparison, main: Recordings) -> bool:
    """Whether a gap that shows after the first steps can be replayed."""
    if comparison.place is None or not all(run.synced and run.losses for run in main):
        return False
    check = comparison.place.check
    return check.step >= FIRST_STEPS and check.stage in STAGES and check.tensor not in (STEPS, "lr")


def windows(main: Recordings) -> tuple[int, ...]:
    """The first of the steps to replay, `FIRST_STEPS` each: from the step before the one at which
    a loss leaves 1e-12 of its magnitude, and at the end."""
    steps = min(run.steps for run in main)
    outside = np.zeros(steps, bool)
    for name in set(main[A].losses) & set(main[B].losses):
        a, b = (run.series[name][:steps] for run in main)
        largest = np.maximum.accumulate(np.maximum(np.abs(a), np.abs(b)))
        outside |= ~(abs_differences(a, b) <= PROOF_BOUND * np.maximum(1.0, largest))
    left = int(np.argmax(outside)) if outside.any() else steps - 1
    last = steps - FIRST_STEPS
    return tuple(dict.fromkeys((max(1, min(left - 1, last)), max(1, last))))


def _not_synced(recording: Recording) -> str:
    """What the optimizer changed and `Run.sync` was not given; "" if nothing."""
    prefix = "0/update/"
    for key in recording.first_steps:
        slot, name = split_slot(key.removeprefix(prefix))
        if key.startswith(prefix) and slot and f"{slot} of {name}" not in recording.optimizer:
            return slot
    return ""
