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

from lockstep.common.errors import ScriptError
from lockstep.common.protocol import split_slot
from lockstep.common.recorder import transfer
from lockstep.common.recorder.align import A, B, Side
from lockstep.common.recorder.matched import Matching
from lockstep.common.recorder.recording import Recording
from lockstep.common.runs.record import FIRST_STEPS
from lockstep.common.verdict.confirm import left_bound
from lockstep.common.verdict.script_comparison import STEPS, ScriptComparison, ScriptPlace
from lockstep.common.verdict.scripts import ScriptRuns, judge_scripts

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
        for step in starts(main):
            try:
                found = self._from(step, main)
            except ScriptError as error:
                return Replayed(None, f"step {step} could not be replayed: {error}")
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

    def _from(self, step: int, main: Recordings) -> ScriptComparison:
        """The comparison of `FIRST_STEPS` steps from this one on.

        Raises:
            ScriptError: if they cannot be replayed, with the reason.
        """
        [ours] = self.run(A, step, [None], None)
        name = main[A].losses[0]
        if ours.series[name][0] != main[A].series[name][step]:
            raise ScriptError(f"run again, {self.sides[A]} has another loss there")
        pieces = transfer.pieces(self.matching.matches)
        state = transfer.transfer(ours, main[B], pieces)
        state |= transfer.transfer_optimizer(ours, main[B], pieces)
        path = self.state_file(step)
        transfer.write(state, path)
        [theirs] = self.run(B, step, [None], path)
        for side, recording in zip(self.sides, (ours, theirs), strict=True):
            if missing := _not_synced(recording):
                raise ScriptError(
                    f"{side} gives run.sync no {missing}: give it, and run.begin, all of the state"
                )

        def run_twins(
            twins: list[int], steps: int | None
        ) -> tuple[list[Recording], list[Recording]]:
            return self.run(A, step, twins, None), self.run(B, step, twins, path)

        runs = ScriptRuns.of([ours]), ScriptRuns.of([theirs])
        found, *_ = judge_scripts(*runs, self.matching, run_twins, self.sides)
        if found.place is not None and found.place.check.stage in ("data", "weights"):
            raise ScriptError(f"the two differ in {found.place.name}")
        return found


def is_late(comparison: ScriptComparison) -> bool:
    """Whether the two differ first after the first steps, in what a step computes."""
    if comparison.place is None:
        return False
    check = comparison.place.check
    return check.step >= FIRST_STEPS and check.stage in STAGES and check.tensor not in (STEPS, "lr")


def starts(main: Recordings) -> tuple[int, ...]:
    """Where replays start, of `FIRST_STEPS` steps each: at the step before the one at which a loss
    leaves its bound, and at the end."""
    steps = min(run.steps for run in main)
    shared = set(main[A].losses) & set(main[B].losses)
    pairs = ((main[A].series[name][:steps], main[B].series[name][:steps]) for name in shared)
    left, last = left_bound(pairs, steps), steps - FIRST_STEPS
    return tuple(dict.fromkeys((max(1, min(left - 1, last)), max(1, last))))


def can_replay(main: Recordings) -> bool:
    """Whether both scripts call `Run.sync`."""
    return all(run.synced and run.losses for run in main)


def _not_synced(recording: Recording) -> str:
    """What the optimizer changed and `Run.sync` was not given; "" if nothing."""
    prefix = "0/update/"
    for key in recording.first_steps:
        slot, name = split_slot(key.removeprefix(prefix))
        if key.startswith(prefix) and slot and f"{slot} of {name}" not in recording.optimizer:
            return slot
    return ""
