"""One process of a run of a script: the only one, or one of several ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import site
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from lockstep.common.recorder.child import OUTCOME, STEPS, Outcome
from lockstep.common.recorder.script import Script
from lockstep.common.recorder.settings import Settings
from lockstep.common.runs.rank_group import HOST
from lockstep.common.system import environment

LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT  # whether a process has ended, and no more

THREADS = ("OMP_NUM_THREADS", "NPROC")  # read by PyTorch; by XLA
# glibc gives freed memory back to the system, and gets it anew in each step. Whether it does depends
# on what else is kept: without these limits, recording made a step of 3 ms take 5.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**26), "MALLOC_TRIM_THRESHOLD_": str(2**28)}  # bytes


class ScriptProcess:
    """A script in a process of its own, from its start on.

    Args:
        settings: for this process.
        folder: of what it says to this one; it is made.
        log: what the script prints.

    Raises:
        OSError: if it cannot be started.
    """

    def __init__(
        self,
        script: Script,
        arguments: list[str],
        settings: Settings,
        folder: Path,
        log: Path,
        environment: Mapping[str, str],
    ) -> None:
        self.rank, self.log = settings.rank, log
        self._folder = folder
        folder.mkdir()
        settings.write(folder / "settings.json")
        module = "lockstep.common.recorder.child"
        own = [str(folder / "settings.json"), script.text, *arguments]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                # -P: the folder of this process must not come before Lockstep's own.
                [sys.executable, "-P", "-m", module, *own],
                stdin=subprocess.PIPE,  # it never gets anything; it closes when this one ends
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._sign = 0  # when it last showed one of life, by its file system's clock
        self.silence = 0  # times that `listen` was called since

    def has_ended(self) -> bool:
        if self._process.returncode is not None:
            return True
        # The process is not collected here: until `end` its number belongs to its group.
        return os.waitid(os.P_PID, self._process.pid, LOOK) is not None

    def has_failed(self) -> bool:
        """Whether it is known, while the process may still run, that the script did not succeed."""
        outcome = self.outcome()
        if outcome is None:
            return self.has_ended()
        return outcome["status"] != 0 or outcome["refusal"] is not None

    def outcome(self) -> Outcome | None:
        """How the script ended; None if it has not, or the process was ended before it could say."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self._folder / OUTCOME).read_text(encoding="utf-8"))
        return None

    def steps(self) -> int:
        """How many steps the script has taken."""
        try:
            return int((self._folder / STEPS).read_text(encoding="ascii"))
        except (OSError, ValueError):  # it has not begun
            return 0

    def listen(self) -> None:
        """Count how often nothing was heard of it: it writes its steps again and again, whether it
        takes some or not."""
        with contextlib.suppress(OSError):
            sign = (self._folder / STEPS).stat().st_mtime_ns
            self.silence = 0 if sign != self._sign else self.silence
            self._sign = sign
        self.silence += 1

    @property
    def status(self) -> int:
        """Its exit status, after `end`; that of a signal is negative."""
        return self._process.returncode

    @property
    def has_succeeded(self) -> bool:
        return self.outcome() is not None and not self.has_failed()

    def severity(self) -> tuple[int, int]:
        """Sorts ranks that have failed, before `end`: the smaller, the likelier it is the cause of
        the others. JAX aborts a rank whose peer is gone, and gloo has it raise an error."""
        if self.outcome() is not None:
            return 2, (self._folder / OUTCOME).stat().st_mtime_ns
        found = os.waitid(os.P_PID, self._process.pid, LOOK)
        if found is None or found.si_code == os.CLD_EXITED:
            return 1, 0
        return {signal.SIGKILL: 0, signal.SIGABRT: 3}.get(signal.Signals(found.si_status), 1), 0

    def end(self) -> None:
        """End the script, if it runs, and all that it started."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()


def rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets, for processes of this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
    }


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
