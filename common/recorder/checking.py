"""Two scripts are compared, precision after precision: by `Checker`, which runs them, or from what
two folders hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lockstep.common.errors import RecordError, ScriptError
from lockstep.common.protocol import STAGES
from lockstep.common.recorder import folder as folders
from lockstep.common.recorder import transfer
from lockstep.common.recorder.launch import Say, Settled, run_scripts
from lockstep.common.recorder.matching import Matching, match
from lockstep.common.recorder.names import read_names
from lockstep.common.recorder.recording import Recording
from lockstep.common.recorder.replay import Replayer, can_replay, is_late
from lockstep.common.recorder.sides import RunOptions, Side
from lockstep.common.runs.record import FIRST_STEPS
from lockstep.common.verdict.script_comparison import ScriptComparison
from lockstep.common.verdict.scripts import ScriptRuns, compare_scripts, judge_scripts

WEIGHTS = "start-{precision}.safetensors"
STATE = "state-{step}.safetensors"  # of A, that B's replay starts from
Recordings = tuple[list[Recording], list[Recording]]  # of either side


@dataclass(frozen=True)
class Checked:
    """What was compared."""

    sides: tuple[str, str]
    matching: Matching
    comparisons: list[ScriptComparison]
    runs: list[tuple[ScriptRuns, ScriptRuns]]  # of each comparison


@dataclass
class Checker:
    """Two scripts to compare.

    Args:
        names: which tensor of A is which of B, where the user says so.
        start_from: 0 or 1: both start from the initial weights of this side.
        say: is given a line of progress now and then.
    """

    sides: tuple[Side, Side]
    options: RunOptions
    names: Path | None
    start_from: int | None
    say: Say
    _matching: Matching | None = field(init=False, default=None)
    _cut_short: bool = field(init=False, default=False)

    def run(self) -> Checked:
        """Compare in each precision, until one disagrees: float64, which comes first, shows a
        difference most sharply.

        Raises:
            LockstepError: if a script fails, or nothing can be compared.
        """
        for side in self.sides:
            for precision in folders.PRECISIONS:
                folders.remove(side.folder, precision)
        comparisons: list[ScriptComparison] = []
        runs: list[tuple[ScriptRuns, ScriptRuns]] = []
        for precision in self.options.precisions:
            if self.start_from is not None:
                self._exchange_weights(precision, self.start_from)
            main = self._run_main(precision, stop_early=precision == "float64")
            if comparisons and {run.dtype for run in main} == {"float64"}:
                self.say("The scripts' own precision is float64")
                break
            comparison, a, b = self._judge(precision, main)
            if comparison.verdict == "agree" and self._cut_short:  # twins explain the difference
                main = self._run_main(precision, stop_early=False)
                comparison, a, b = self._judge(precision, main)
            check_reproducible(comparison)
            comparisons.append(comparison)
            runs.append((a, b))
            if comparison.verdict != "agree":
                break
        assert self._matching is not None
        return Checked(self._names_of_sides, self._matching, comparisons, runs)

    @property
    def _names_of_sides(self) -> tuple[str, str]:
        return self.sides[0].name, self.sides[1].name

    def _run_main(self, precision: str, stop_early: bool) -> tuple[Recording, Recording]:
        """Both scripts, at the same time; only their first steps if these settle it."""
        self._cut_short = False
        made = self._run_both(precision, [None], settled=self._differ if stop_early else None)
        return made[0][0], made[1][0]

    def _differ(self, first_steps: list[Recording]) -> bool:
        """Whether the first steps differ, so that the scripts need not go on."""
        a, b = first_steps
        found = compare_scripts(ScriptRuns.of([a]), ScriptRuns.of([b]), self._match(a, b))
        self._cut_short = found.place is not None
        if self._cut_short:
            self.say("The first steps differ: the scripts are ended there")
        return self._cut_short

    def _judge(
        self, precision: str, main: tuple[Recording, Recording]
    ) -> tuple[ScriptComparison, ScriptRuns, ScriptRuns]:
        if self._matching is None:
            self._matching = self._match(*main)
        a, b = (ScriptRuns.of([run]) for run in main)
        replayed = None
        if precision == "float64" and can_replay(main):
            found = compare_scripts(a, b, self._matching, self._names_of_sides)
            if is_late(found):
                replayed = self._replayer(self._matching).replay(main)
                if replayed.place is not None:
                    found = replace(found, place=replayed.place)
                    return found.with_notes(replayed.note), a, b
        if count := self.options.twins_in(precision):
            more = self._run_both(precision, range(1, count + 1))
            a, b = a.add(more[0]), b.add(more[1])

        def run_twins(twins: list[int], steps: int | None) -> Recordings:
            return self._run_both(precision, twins, steps)

        found, a, b = judge_scripts(a, b, self._matching, run_twins, self._names_of_sides)
        return (found.with_notes(replayed.note) if replayed else found), a, b

    def _replayer(self, matching: Matching) -> Replayer:
        def run(
            side: int, step: int, twins: Sequence[int | None], state: Path | None
        ) -> list[Recording]:
            starts = [
                self.sides[side].start(
                    self.options, "float64", twin, FIRST_STEPS, replay=step, state=state
                )
                for twin in twins
            ]
            return run_scripts(starts, self.options.timeout, self.say)

        folder = self.sides[1].folder
        return Replayer(
            self._names_of_sides, matching, run, lambda step: folder / STATE.format(step=step)
        )

    def _run_both(
        self,
        precision: str,
        twins: Sequence[int | None],
        steps: int | None = None,
        settled: Settled | None = None,
    ) -> Recordings:
        """Runs of both scripts: their own (None), the same again (0), twins (1, 2, ...).

        Args:
            steps: at most so many.
            settled: as for `run_scripts`.
        """
        starts = [
            side.start(self.options, precision, twin, steps, early=settled is not None)
            for twin in twins
            for side in self.sides
        ]
        made = run_scripts(starts, self.options.timeout, self.say, settled=settled)
        return made[0::2], made[1::2]

    def _match(self, a: Recording, b: Recording) -> Matching:
        return match(a, b, {} if self.names is None else read_names(self.names, a, b))

    def _exchange_weights(self, precision: str, giver: int) -> None:
        """Have the other side start from the initial weights of this one, in this precision.

        The first step of both says which tensor is which.
        """
        taker = self.sides[1 - giver]
        made = self._run_both(precision, [None], 1)
        first = made[0][0], made[1][0]
        matching = self._matching or self._match(*first)
        pieces = transfer.pieces(matching.matches, from_b=giver == 1)
        weights = transfer.transfer(first[giver], first[1 - giver], pieces)
        path = taker.folder / WEIGHTS.format(precision=precision)
        transfer.write(weights, path)
        taker.start_from[precision] = path
        self.say(
            f"{taker.name} starts from the weights of {self.sides[giver].name}: "
            f"{len(weights):,} tensors"
        )


def compare_folders(a: Path, b: Path, names: Path | None) -> Checked:
    """Compare the recordings in two folders, precision after precision, until one disagrees.

    Raises:
        RecordError: if there is nothing to compare.
    """
    found = folders.read(a), folders.read(b)
    sides = folders.side_names(found, (a, b))
    shared = [precision for precision in found[0] if precision in found[1]]
    if not shared:
        held = [" and ".join(each) for each in found]
        raise RecordError(
            f"{a} holds {held[0]} and {b} holds {held[1]}: record both in one precision, "
            "by --precision"
        )
    first = found[0][shared[0]].run, found[1][shared[0]].run
    matching = match(*first, {} if names is None else read_names(names, *first))
    comparisons: list[ScriptComparison] = []
    runs: list[tuple[ScriptRuns, ScriptRuns]] = []
    for precision in shared:
        pair = found[0][precision], found[1][precision]
        comparison, *_ = judge_scripts(*pair, matching, no_more_runs, sides)
        check_reproducible(comparison)
        comparisons.append(comparison)
        runs.append(pair)
        if comparison.verdict != "agree":
            break
    return Checked(sides, matching, comparisons, runs)


def no_more_runs(twins: list[int], steps: int | None) -> Recordings:
    return [], []


def check_reproducible(comparison: ScriptComparison) -> None:
    """Raise ScriptError if a script gives other numbers each time, by the place where the two
    scripts differ: then nothing can be said."""
    if comparison.place is None:
        return
    check = comparison.place.check
    for change in comparison.unstable:
        earlier = _moment(change.step, change.stage) <= _moment(check.step, check.stage)
        if earlier and not change.by_rounding:
            raise ScriptError(change.message)


def _moment(step: int, stage: str) -> tuple[int, int]:
    return step, STAGES.index(stage)
