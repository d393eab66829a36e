"""A worker: an object in a process of its own, whose methods are called from this one."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn, Self

from lockstep.common.errors import LockstepError, reason

Report = Callable[[object], None]  # sends progress to whoever waits for the answer
Command = tuple[int, str, tuple[object, ...]]  # its number, the method, and the arguments
# Not by `multiprocessing`: that would run the caller's own script again, and it waits forever for
# a process that dies while it starts.
SOURCE = (
    "import ast, sys; sys.path[:] = ast.literal_eval(sys.argv.pop(1)); sys.argv = sys.argv[1:]; "
    "from lockstep.common.system.process import worker_main; worker_main()"
)
EXIT_TIMEOUT = 10.0  # seconds that a process has to exit after it closed its output


class WorkerFailed(Exception):
    """A call raised an unexpected error, or the worker died; the message is one line."""


class WorkerProcess:
    """An object in a process of its own, as a context manager. The process starts at once.

    It runs in its own session, so a terminal's Ctrl-C does not reach it, and it ends when this
    process does. It carries out one call after the other. All that is sent is pickled: keep to
    plain values, since a string of a class of PyTorch's would have the worker import PyTorch.

    Args:
        make: a function of a module; called there with a Report and `arguments`, it gives the
            object. Its answer has the number 0.

    Raises:
        WorkerFailed: if the system cannot start a process.
    """

    def __init__(self, make: Callable[..., object], *arguments: object) -> None:
        command = [sys.executable, "-c", SOURCE, repr(sys.path), sys.argv[0]]  # the last: for hints
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise WorkerFailed(f"no process can be started: {error.strerror or error}") from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._commands, self._answers = self._process.stdin, self._process.stdout
        self.pid = self._process.pid
        self._calls = 0
        self._write((0, "", (make, *arguments)))

    def send(self, method: str, *arguments: object) -> int:
        """Start a call of the object's method, and return its number for `receive`."""
        self._calls += 1
        self._write((self._calls, method, arguments))
        return self._calls

    def receive(self, number: int, progress: Report | None = None) -> Any:
        """Wait for the answer of a call; the answers of earlier calls are dropped.

        Args:
            progress: called with what the method reports until then.

        Raises:
            LockstepError, KeyboardInterrupt: what the method raised.
            WorkerFailed: if it raised another error, or the process died.
        """
        while True:
            try:
                found, kind, value = pickle.load(self._answers)
            except (EOFError, OSError, ValueError, pickle.UnpicklingError):
                raise WorkerFailed(self._cause_of_death()) from None
            if found < number:
                continue
            if kind == "progress":
                if progress is not None:
                    progress(value)
            elif kind == "done":
                return value
            else:
                raise value if isinstance(value, BaseException) else WorkerFailed(value)

    def call(self, method: str, *arguments: object) -> Any:
        """Call the object's method and wait for its answer; raises as `receive` does."""
        return self.receive(self.send(method, *arguments))

    def alive(self) -> bool:
        return self._process.poll() is None

    def terminate(self) -> None:
        """Send SIGTERM to the process, which may save its work."""
        self._process.terminate()

    def stop(self) -> None:
        """End the process, and all that it started, at once."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._commands, self._answers):
            with contextlib.suppress(BrokenPipeError):  # what is not sent yet
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _write(self, command: Command) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has died, and `receive` says so
            # the highest protocol copies no arrays
            pickle.dump(command, self._commands, pickle.HIGHEST_PROTOCOL)
            self._commands.flush()

    def _cause_of_death(self) -> str:
        try:
            code = self._process.wait(EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            return "its process does not answer"
        return "its process " + (
            f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        )


# --- In the worker


class _Answers:
    """The original standard output, and the number of the present call."""

    def __init__(self, pipe: BinaryIO) -> None:
        self.pipe, self.number = pipe, 0

    def send(self, kind: str, value: object) -> None:
        message = pickle.dumps((self.number, kind, value))  # an error here is an answer, too
        with contextlib.suppress(OSError):  # nobody reads any more: this process ends as well
            self.pipe.write(message)
            self.pipe.flush()

    def report(self, value: object) -> None:
        self.send("progress", value)


def worker_main() -> NoReturn:
    """Carry out the commands of standard input, one after the other."""
    answers = _Answers(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # for what else is printed: the caller's standard output may be a report
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=_read_commands, args=(commands,), daemon=True).start()
    target: object = None
    while True:
        try:
            answers.number, method, arguments = commands.get()
            if answers.number == 0:
                target = _make(answers.report, arguments)
                answers.send("done", None)
            else:
                answers.send("done", getattr(target, method)(*arguments))
        except LockstepError as error:
            answers.send("failed", error)
        except KeyboardInterrupt as error:  # it was terminated
            answers.send("failed", error if str(error) else "its process was stopped")
            sys.stderr.flush()
            os._exit(128 + signal.SIGTERM)
        except Exception as error:  # the caller reports any error in one line
            answers.send("failed", reason(error))


def _make(report: Report, arguments: tuple[object, ...]) -> object:
    make, *rest = arguments
    assert callable(make)
    return make(report, *rest)


def _read_commands(commands: queue.SimpleQueue[Command]) -> None:
    """Read until the caller is gone: another run may write to its folder from then on."""
    try:
        with open(0, "rb", closefd=False) as pipe:
            while True:
                commands.put(pickle.load(pipe))
    except EOFError:
        os.killpg(0, signal.SIGKILL)  # with all that this process started
    finally:
        os._exit(1)
