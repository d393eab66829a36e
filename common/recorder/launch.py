"""Starts users' scripts, each run in a process of its own, at most two at the same time."""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lockstep.common.errors import RecordError, ScriptError
from lockstep.common.recorder import ranks, recording
from lockstep.common.recorder.recording import Recording
from lockstep.common.recorder.script import Script
from lockstep.common.recorder.script_process import (
    ScriptProcess,
    child_environment,
    rank_environment,
)
from lockstep.common.recorder.settings import FIRST, OWN, Settings
from lockstep.common.runs.rank_group import GATHERING, SILENCE, free_port
from lockstep.common.system.storage import make_folder

AT_ONCE = 2
POLL = 0.05  # seconds
EVERY = 30.0  # seconds between two lines of progress
QUIET = 60.0  # seconds without a step, after which a line says so
SHOWN = 20  # last lines of a script's output, where it left no traceback
CLAIMED = ".run"  # next to a recording: the script called lockstep.Run()
Say = Callable[[str], None]  # prints one line
Settled = Callable[[list[Recording]], bool]

BEGIN = "run.begin(model, optimizer) in PyTorch, params = run.begin(params) in JAX"


@dataclass(frozen=True)
class Start:
    """One run of a script to start; its recording goes to `settings.out`."""

    script: Script
    settings: Settings
    arguments: Sequence[str] = ()

    @property
    def log(self) -> Path:
        """What the script prints."""
        return self.log_of(0)

    def log_of(self, rank: int) -> Path:
        """What the script prints in this process."""
        return Path(self.settings.out).with_suffix(f".rank{rank}.log" if rank else ".log")

    @property
    def count(self) -> int:
        """Of processes."""
        return self.settings.processes or 1

    @property
    def files(self) -> list[Path]:
        """What its processes write: a recording, and digests if they are several."""
        out, several = self.settings.out, self.count > 1
        return [Path(out), *(ranks.path_of(out, r) for r in range(self.count) if several)]

    def with_ranks(self, found: Recording, suffix: str = "") -> Recording:
        """Rank 0's recording, compared with the digests of the others; raises as
        `ranks.compared`."""
        return ranks.compared(found, self.settings.out, suffix) if self.count > 1 else found

    def title(self, dtype: str | None = None) -> str:
        """ "train.py, float64, twin 1".

        Args:
            dtype: the script's own precision, if it is known.
        """
        return ", ".join([self.settings.name, *self._words(dtype or "own precision")])

    @property
    def run(self) -> str:
        """ "its float64 run", "its run in its own precision, twin 1"."""
        dtype, *twin = self._words("")
        name = f"its {dtype} run" if dtype else "its run in its own precision"
        return ", ".join([name, *twin])

    def _words(self, own: str) -> list[str]:
        twin = self.settings.twin
        dtype = own if self.settings.dtype == OWN else self.settings.dtype
        words = [dtype, *([] if twin is None else ["again" if twin == 0 else f"twin {twin}"])]
        replay = self.settings.replay
        return words if replay is None else [*words, f"from step {replay:,}"]


def run_script(
    script: Script,
    arguments: Sequence[str],
    settings: Settings,
    timeout: float | None = None,
    say: Say = lambda line: None,
) -> Recording:
    """Run a script to its end, or for `settings.steps`, and return its recording.

    What the script prints goes to a file next to the recording.

    Args:
        timeout: seconds, after which the script and all that it started are ended.
        say: is given a line of progress now and then.

    Raises:
        ScriptError: if the script fails, or cannot be recorded. Its own traceback is printed.
    """
    return run_scripts([Start(script, settings, arguments)], timeout, say)[0]


def run_scripts(
    starts: Sequence[Start],
    timeout: float | None = None,
    say: Say = lambda line: None,
    at_once: int = AT_ONCE,
    settled: Settled | None = None,
) -> list[Recording]:
    """As `run_script`, for several runs, `at_once` of them at the same time. If one fails, or this
    process is interrupted, the others are ended.

    Each process uses its share of the cores, unless the environment says how many threads to use.

    Args:
        settled: asked once, with recordings of the first steps of all runs, which must be no more
            than run at the same time: if it says so, the scripts are ended, and these are returned.
    """
    found: dict[int, Recording] = {}
    waiting = list(enumerate(starts))
    running: dict[int, Process] = {}
    with contextlib.ExitStack() as undo:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, start = waiting.pop(0)
                running[number] = undo.enter_context(Process(start, timeout, say, at_once))
            for number, process in list(running.items()):
                if process.ended():
                    found[number] = process.recording()
                    del running[number]
            if settled is not None and (first := first_steps(starts)):
                if running and settled(first):
                    for process in running.values():
                        process.end()
                    keep_first_steps(starts, first)
                    return first
                settled = None
            if running:
                time.sleep(POLL)
    return [found[number] for number in range(len(starts))]


def first_steps(starts: Sequence[Start]) -> list[Recording]:
    """Recordings of the first steps, if all runs have taken them; else none."""
    if not all(Path(f"{file}{FIRST}").exists() for start in starts for file in start.files):
        return []
    return [
        start.with_ranks(recording.read(Path(f"{start.settings.out}{FIRST}")), FIRST)
        for start in starts
    ]


def keep_first_steps(starts: Sequence[Start], found: Sequence[Recording]) -> None:
    """Have the recordings of the first steps take the place of whole ones."""
    for start, first in zip(starts, found, strict=True):
        recording.write(first, Path(start.settings.out))


class Process:
    """One run of a script, in one process or several, as a context manager: outside the block
    nothing of it runs."""

    def __init__(self, start: Start, timeout: float | None, say: Say, at_once: int) -> None:
        self.start, self._timeout, self._say = start, timeout, say
        self._at_once = at_once
        self._count = start.count
        self._ranks: list[ScriptProcess] = []
        self._failed: list[ScriptProcess] = []  # of several; first the one that failed first
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Process:
        settings, out = self.start.settings, Path(self.start.settings.out)
        with contextlib.ExitStack() as undo:
            try:
                make_folder(out.parent)
                self._folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
                self._remove(out, *self._besides)
                undo.callback(self._remove, *self._besides)
                undo.callback(self.end)
                self._start_ranks()
            except OSError as error:
                raise RecordError(
                    f"cannot start {settings.name} ({error.strerror or error}; its recording goes "
                    f"to {out}): choose another folder with --out or free some space"
                ) from error
            self._undo = undo.pop_all()
        self._began = self._moved = self._told = time.monotonic()
        self._steps = 0
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _start_ranks(self) -> None:
        start, processes = self.start, self.start.settings.processes
        environment = child_environment(self._at_once * self._count)
        if processes is not None:  # those of a launcher around this command do not hold
            environment = {k: v for k, v in environment.items() if "TORCHELASTIC" not in k}
        port = 0 if processes is None else free_port()
        for rank in range(self._count):
            own = {} if processes is None else rank_environment(rank, processes, port)
            settings = replace(start.settings, rank=rank)
            folder = self._folder / str(rank)
            arguments = (start.script, list(start.arguments), settings, folder, start.log_of(rank))
            self._ranks.append(ScriptProcess(*arguments, environment | own))

    def ended(self) -> bool:
        """Whether the script has ended, in all processes or with a failure in one; raises
        ScriptError if it has run too long, or a process was stopped."""
        now = time.monotonic()
        if self._count > 1 and any(each.has_failed() for each in self._ranks):
            time.sleep(GATHERING)  # the others fail by its death
            failed = (each for each in self._ranks if each.has_failed())
            self._failed = sorted(failed, key=ScriptProcess.severity)
        if self._failed or all(each.has_ended() for each in self._ranks):
            self._seconds = now - self._began
            self.end()
            return True
        self._check_time(now)
        if self._count > 1:
            self._check_silence()
        self._report(now)
        return False

    def _check_time(self, now: float) -> None:
        if self._timeout is not None and now - self._began > self._timeout:
            steps = self._steps_text()
            self.end()
            raise ScriptError(
                f"{self.start.settings.name}: {self.start.run} had not ended after "
                f"{self._timeout:g} s and {steps}: it hangs, or --timeout is too short; what it "
                f"printed: {self.start.log}"
            )

    def _check_silence(self) -> None:
        """Raise ScriptError if a rank is stopped: the others wait for it without end. Times of
        listening are counted, not read from a clock: this process may be stopped, too."""
        for each in self._ranks:
            if not each.has_ended():
                each.listen()
            if each.silence * POLL > SILENCE:
                steps = steps_text(each.steps())
                self.end()
                raise ScriptError(
                    f"{self.start.settings.name}: {self._name_of(each)} has shown no sign of life "
                    f"for {SILENCE} s, after {steps} (is it stopped?): run it again"
                )

    def _report(self, now: float) -> None:
        """Print how far the script is, now and then."""
        steps = self.steps()
        if steps != self._steps:
            self._steps, self._moved = steps, now
            if now - self._told > EVERY:
                self._told = now
                self._say(f"{self.start.title()}: {steps_text(steps)} so far")
        elif now - self._moved > QUIET:
            self._told = self._moved = now
            hint = "" if self._timeout is not None else " (--timeout S ends a script that hangs)"
            self._say(f"{self.start.title()}: {QUIET:g} s without a step{hint}")

    def steps(self) -> int:
        """How many steps the script has taken, in all processes."""
        return min(each.steps() for each in self._ranks)

    def _steps_text(self) -> str:
        """ "5 steps", or "5 steps (rank 0) and 4 steps (rank 1)"."""
        taken = [each.steps() for each in self._ranks]
        if len(set(taken)) == 1:
            return steps_text(taken[0])
        return " and ".join(f"{steps_text(n)} (rank {i})" for i, n in enumerate(taken))

    def _name_of(self, process: ScriptProcess) -> str:
        """ "its float64 run", "rank 1 of 2 of its float64 run"."""
        rank = f"rank {process.rank} of {self._count} of " if self._count > 1 else ""
        return f"{rank}{self.start.run}"

    def recording(self) -> Recording:
        """The recording of a script that has ended.

        Raises:
            ScriptError: if it failed, or has not been recorded.
        """
        for process in self._failed or self._ranks:
            self._check_outcome(process)
        out = Path(self.start.settings.out)
        name = self.start.settings.name
        if not Path(f"{out}{CLAIMED}").exists():
            raise ScriptError(
                f"{name} did not call lockstep.Run(): add run = lockstep.Run(), run.begin(...) "
                "before the first step, and run.step(loss) at the end of each step"
            )
        if not out.exists():
            raise ScriptError(f"{name} did not call run.begin: before the first step, add {BEGIN}")
        found = recording.read(out)
        if found.steps == 0:
            raise ScriptError(
                f"{name} did not call run.step: add run.step(loss) at the end of each step"
            )
        if self._count > 1:
            found = self.start.with_ranks(found)
            recording.write(found, out)
        title = self.start.title(found.dtype)
        self._say(f"{title}: {self._seconds:.1f} s, {steps_text(found.steps)}")
        return found

    def _check_outcome(self, process: ScriptProcess) -> None:
        """Raise ScriptError, after the script's traceback, if it failed."""
        name, run, status = self.start.settings.name, self._name_of(process), process.status
        outcome = process.outcome()
        if outcome is not None and outcome["refusal"] is not None:
            raise ScriptError(f"{name}: {outcome['refusal']}")
        succeeded = outcome is not None and outcome["status"] == 0
        if succeeded and (status == 0 or self._count > 1):  # JAX may end one after the other's end
            return
        text = "" if outcome is None else outcome["traceback"]
        sys.stderr.write(text or "".join(last_lines(process.log)))
        sys.stderr.flush()
        printed = f"what it printed: {process.log}"
        if status == 0 and outcome is None:
            raise ScriptError(
                f"{name} ended {run} by os._exit, so nothing was recorded: let it end as other "
                f"programs do; {printed}"
            )
        if status < 0 and (outcome is None or succeeded):
            raise ScriptError(
                f"{name}: {run} was ended by {signal.Signals(-status).name} after "
                f"{steps_text(process.steps())}: fix the script first; {printed}"
            )
        status = outcome["status"] if outcome is not None and not succeeded else status
        how, hint = f"exit status {status}", ""
        if early := [each for each in self._ranks if each.has_succeeded]:
            how += f"; rank {early[0].rank} had ended before, after {steps_text(early[0].steps())}"
        if self.start.settings.dtype == "float64" and text and "dtype" in text.lower():
            hint = (
                "; if it runs by itself, give all its inputs, those of evaluation too, to run.batch"
            )
        if self.start.settings.processes is None and "variable RANK expected" in text:
            hint = "; --processes N runs it as torchrun does"
        raise ScriptError(f"{name} failed in {run} ({how}): fix the script first{hint}")

    def end(self) -> None:
        """End the script, if it runs, and all that it started."""
        for each in self._ranks:
            each.end()

    @property
    def _besides(self) -> list[Path]:
        """Files next to the recording that do not stay."""
        out = self.start.settings.out
        files = [f"{out}{suffix}" for suffix in (CLAIMED, FIRST)]
        if self._count > 1:
            digests = [ranks.path_of(out, rank) for rank in range(self._count)]
            files += [f"{each}{suffix}" for each in digests for suffix in ("", CLAIMED, FIRST)]
        return list(map(Path, files))

    @staticmethod
    def _remove(*paths: Path) -> None:
        for path in paths:
            path.unlink(missing_ok=True)


def steps_text(steps: int) -> str:
    return f"{steps:,} step{'' if steps == 1 else 's'}"


def last_lines(path: Path) -> list[str]:
    """The last lines that a script printed."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 100_000))
            lines = file.read().decode(errors="replace").splitlines(keepends=True)
    except OSError:
        return []
    return lines[-SHOWN:]
