"""A worker: its object's methods are called from here, and whatever becomes of it is one line."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lockstep.common.errors import DataError
from lockstep.common.system import process
from lockstep.common.system.process import Report, WorkerFailed, WorkerProcess

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are others here")
REPOSITORY = Path(__file__).resolve().parents[2]


class Tally:
    """What the workers of these tests hold."""

    def __init__(self, report: Report, total: int = 0) -> None:
        self.report, self.total = report, total

    def add(self, *numbers: int) -> int:
        for number in numbers:
            self.total += number
            self.report(self.total)
        print("to standard error, since standard output is the answers")
        return self.total

    def fail(self, kind: str) -> None:
        errors = {
            "known": DataError("no data: get some"),
            "unknown": ValueError("first line\nsecond line"),
            "stopped": KeyboardInterrupt("at step 3"),
        }
        raise errors[kind]

    def unpicklable(self) -> object:
        return lambda: None

    def die(self, status: int) -> None:
        os._exit(status)

    def child(self) -> int:
        """Start a process, as a data loader does."""
        return subprocess.Popen(["sleep", "60"]).pid

    def sleep(self) -> None:
        time.sleep(60)


def there(pid: int) -> bool:
    """Whether a process still runs after a while."""
    for _ in range(100):
        try:
            if "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return False
        except OSError:
            return False
        time.sleep(0.05)
    return True


def test_calls_are_answered_one_after_the_other(capfd: pytest.CaptureFixture[str]) -> None:
    reports: list[object] = []
    with WorkerProcess(Tally, 10) as worker:
        first, second = worker.send("add", 1), worker.send("add", 2, 3)
        assert worker.receive(second, reports.append) == 16, "the first answer is dropped"
        assert reports == [13, 16], "and so are the reports of the first call"
        assert worker.call("add", 4) == 20
        assert first == 1 and second == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("to standard error") == 3


def test_an_error_in_a_worker_is_raised_here_and_the_worker_answers_again() -> None:
    with WorkerProcess(Tally) as worker:
        with pytest.raises(DataError, match=r"^no data: get some$"):
            worker.call("fail", "known")
        with pytest.raises(WorkerFailed, match=r"^ValueError: first line$"):
            worker.call("fail", "unknown")
        with pytest.raises(WorkerFailed, match=r"^AttributeError: "):
            worker.call("absent")
        with pytest.raises(WorkerFailed, match="pickle"):
            worker.call("unpicklable")
        assert worker.call("add", 1) == 1
        with pytest.raises(KeyboardInterrupt, match=r"^at step 3$"):
            worker.call("fail", "stopped")
        with pytest.raises(WorkerFailed, match=r"^its process ended with status 143$"):
            worker.call("add", 1)


def test_an_object_that_cannot_be_made_is_an_error_of_the_first_call() -> None:
    with WorkerProcess(Tally, 1, 2) as worker, pytest.raises(WorkerFailed, match=r"^TypeError: "):
        worker.receive(0)


@pytest.mark.parametrize(
    ("status", "cause"),
    [(0, "ended with status 0"), (3, "ended with status 3")],
)
def test_the_death_of_a_worker_is_one_line(status: int, cause: str) -> None:
    with WorkerProcess(Tally) as worker:
        with pytest.raises(WorkerFailed, match=f"^its process {cause}$"):
            worker.call("die", status)
        assert not worker.alive()
        with pytest.raises(WorkerFailed, match=f"^its process {cause}$"):
            worker.call("add", 1)


def test_a_signal_that_ends_a_worker_is_named() -> None:
    with WorkerProcess(Tally) as worker:
        worker.receive(0)
        worker.terminate()
        with pytest.raises(WorkerFailed, match=r"^its process was ended by signal 15$"):
            worker.call("sleep")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks for processes in /proc")
def test_a_worker_ends_with_all_that_it_started() -> None:
    with contextlib.suppress(KeyboardInterrupt), WorkerProcess(Tally) as worker:
        child = worker.call("child")
        worker.send("sleep")
        raise KeyboardInterrupt
    assert not there(worker.pid) and not there(child)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks for processes in /proc")
def test_a_worker_ends_with_the_process_that_started_it() -> None:
    source = """
import os, signal
from lockstep.common.system.process import WorkerProcess
from tests.system.test_process import Tally
worker = WorkerProcess(Tally)
print(worker.pid, worker.call("child"), flush=True)
worker.send("sleep")
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", source]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert run.returncode == -signal.SIGKILL
    worker, child = map(int, run.stdout.split())
    assert not there(worker) and not there(child)


def test_a_process_that_cannot_be_started_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(process.subprocess, "Popen", refused)
    with pytest.raises(WorkerFailed, match=r"^no process can be started: Resource temporarily"):
        WorkerProcess(Tally)
