"""Starts users' scripts, each run in a process of its own, at most two at the same time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.common.errors import RecordError, ScriptError
from lockstep.common.recorder import recording
from lockstep.common.recorder.child import OUTCOME, STEPS, Outcome
from lockstep.common.recorder.recording import Recording
from lockstep.common.recorder.script import Script
from lockstep.common.recorder.settings import FIRST, OWN, Settings
from lockstep.common.system import environment
from lockstep.common.system.storage import make_folder

AT_ONCE = 2
POLL = 0.05  # seconds
EVERY = 30.0  # seconds between two lines of progress
QUIET = 60.0  # seconds without a step, after which a line says so
SHOWN = 20  # last lines of a script's output, where it left no traceback
THREADS = ("OMP_NUM_THREADS", "NPROC")  # read by PyTorch; by XLA
# glibc gives freed memory back to the system, and gets it anew in each step. Whether it does depends
# on what else is kept: without these limits, recording made a step of 3 ms take 5.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**26), "MALLOC_TRIM_THRESHOLD_": str(2**28)}  # bytes
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
        return Path(self.settings.out).with_suffix(".log")

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
                    keep_first_steps(starts)
                    return first
                settled = None
            if running:
                time.sleep(POLL)
    return [found[number] for number in range(len(starts))]


def first_steps(starts: Sequence[Start]) -> list[Recording]:
    """Recordings of the first steps, if all runs have taken them; else none."""
    paths = [Path(f"{start.settings.out}{FIRST}") for start in starts]
    return [recording.read(path) for path in paths] if all(map(Path.exists, paths)) else []


def keep_first_steps(starts: Sequence[Start]) -> None:
    """Have the recordings of the first steps take the place of whole ones."""
    for start in starts:
        os.replace(f"{start.settings.out}{FIRST}", start.settings.out)


class Process:
    """One run of a script, as a context manager: outside the block nothing of it runs."""

    def __init__(self, start: Start, timeout: float | None, say: Say, at_once: int) -> None:
        self.start, self._timeout, self._say = start, timeout, say
        self._at_once = at_once
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Process:
        settings, out = self.start.settings, Path(self.start.settings.out)
        with contextlib.ExitStack() as undo:
            try:
                make_folder(out.parent)
                self._folder = Path(undo.enter_context(tempfile.TemporaryDirectory()))
                settings.write(self._folder / "settings.json")
                self._remove(out, *self._besides)
                log = undo.enter_context(self.start.log.open("wb"))
                self._process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.PIPE,  # it never gets anything; it closes when this one ends
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=child_environment(self._at_once),
                    start_new_session=True,
                )
            except OSError as error:
                raise RecordError(
                    f"cannot start {settings.name} ({error.strerror or error}; its recording goes "
                    f"to {out}): choose another folder with --out or free some space"
                ) from error
            undo.callback(self._remove, *self._besides)
            undo.callback(self.end)
            self._undo = undo.pop_all()
        self._began = self._moved = self._told = time.monotonic()
        self._steps = 0
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def _command(self) -> list[str]:
        module = "lockstep.common.recorder.child"
        script = self.start.script.text
        own = [str(self._folder / "settings.json"), script, *self.start.arguments]
        # -P: the folder of this process must not come before Lockstep's own.
        return [sys.executable, "-P", "-m", module, *own]

    def ended(self) -> bool:
        """Whether the script has ended; raises ScriptError if it has run too long."""
        now = time.monotonic()
        # The process is not collected here: until `end` its number belongs to its group.
        if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            self._seconds = now - self._began
            self.end()
            return True
        if self._timeout is not None and now - self._began > self._timeout:
            self.end()
            raise ScriptError(
                f"{self.start.settings.name}: {self.start.run} had not ended after "
                f"{self._timeout:g} s and {steps_text(self.steps())}: it hangs, or --timeout is "
                f"too short; what it printed: {self.start.log}"
            )
        self._report(now)
        return False

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
        """How many steps the script has taken."""
        try:
            return int((self._folder / STEPS).read_text(encoding="ascii"))
        except (OSError, ValueError):  # it has not begun
            return 0

    def recording(self) -> Recording:
        """The recording of a script that has ended.

        Raises:
            ScriptError: if it failed, or has not been recorded.
        """
        self._check_outcome()
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
        title = self.start.title(found.dtype)
        self._say(f"{title}: {self._seconds:.1f} s, {steps_text(found.steps)}")
        return found

    def _check_outcome(self) -> None:
        """Raise ScriptError, after the script's traceback, if it failed."""
        name, status = self.start.settings.name, self._process.returncode
        outcome: Outcome | None = None
        with contextlib.suppress(OSError, ValueError):
            outcome = json.loads((self._folder / OUTCOME).read_text(encoding="utf-8"))
        if outcome is not None and outcome["refusal"] is not None:
            raise ScriptError(f"{name}: {outcome['refusal']}")
        if status == 0 and outcome is not None:
            return
        text = "" if outcome is None else outcome["traceback"]
        sys.stderr.write(text or "".join(last_lines(self.start.log)))
        sys.stderr.flush()
        printed = f"what it printed: {self.start.log}"
        if status == 0:
            raise ScriptError(
                f"{name} ended {self.start.run} by os._exit, so nothing was recorded: let it end "
                f"as other programs do; {printed}"
            )
        if status < 0:
            raise ScriptError(
                f"{name}: {self.start.run} was ended by {signal.Signals(-status).name} after "
                f"{steps_text(self.steps())}: fix the script first; {printed}"
            )
        hint = ""
        if self.start.settings.dtype == "float64" and text and "dtype" in text.lower():
            hint = (
                "; if it runs by itself, give all its inputs, those of evaluation too, to run.batch"
            )
        raise ScriptError(
            f"{name} failed in {self.start.run} (exit status {status}): fix the script first{hint}"
        )

    def end(self) -> None:
        """End the script, if it runs, and all that it started."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    @property
    def _besides(self) -> list[Path]:
        """Files next to the recording that do not stay."""
        return [Path(f"{self.start.settings.out}{suffix}") for suffix in (CLAIMED, FIRST)]

    @staticmethod
    def _remove(*paths: Path) -> None:
        for path in paths:
            path.unlink(missing_ok=True)


def child_environment(at_once: int) -> dict[str, str]:
    """The environment of a script: this one, with the package that is running, its share of the
    cores, and JAX's cache: each run compiles the same programs. Two share a GPU: neither takes most
    of its memory at once."""
    found = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | MALLOC | os.environ
    found |= environment.jax_cache()
    package = Path(__import__("lockstep").__file__).absolute().parents[1]
    installed = [Path(path) for path in (*site.getsitepackages(), site.getusersitepackages())]
    if package not in installed and (package / "lockstep").is_dir():
        before = found.get("PYTHONPATH")
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), before]))
    if not any(name in found for name in THREADS):
        share = str(max(1, environment.cores() // at_once))
        found |= dict.fromkeys(THREADS, share)
    return found


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
