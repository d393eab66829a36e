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
from typing import Any, BinaryIO, NoReturn, Self, cast

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


class WorkerDied(WorkerFailed):
    """The worker has ended, or cannot be reached any more."""


class Worker:
    """An object in another process, wherever that runs: its methods are called from here.

    It carries out one call after the other. All that is sent is pickled: keep to plain values,
    since a string of a class of PyTorch's would have the worker import PyTorch.

    Args:
        commands, answers: what that process reads and writes.
        make: a function of a module; called there with a Report and `arguments`, it gives the
            object. Its answer has the number 0.
    """

    def __init__(
        self, commands: BinaryIO, answers: BinaryIO, make: Callable[..., object], *arguments: object
    ) -> None:
        self._commands, self._answers = commands, answers
        self._calls = 0
        self._write((0, "", (make, *arguments)))

    def send(self, method: str, *arguments: object) -> int:
        """Start a call of the object's method, and return its number for `receive`.

        Raises:
            WorkerFailed: if an argument cannot be pickled.
        """
        self._calls += 1
        self._write((self._calls, method, arguments))
        return self._calls

    def receive(self, number: int, progress: Report | None = None) -> Any:
        """Wait for the answer of a call; the answers of earlier calls are dropped.

        Args:
            progress: called with what the method reports until then.

        Raises:
            LockstepError, KeyboardInterrupt: what the method raised.
            WorkerFailed: if it raised another error, or the process died (WorkerDied).
        """
        while True:
            try:
                found, kind, value = pickle.load(self._answers)
            except (EOFError, OSError, ValueError, pickle.UnpicklingError):
                raise WorkerDied(self._cause_of_death()) from None
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

    def stop(self) -> None:
        """End the process, as far as this one can, and close the pipes."""
        for pipe in (self._commands, self._answers):
            with contextlib.suppress(OSError):  # what is not sent yet
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _write(self, command: Command) -> None:
        try:
            # the highest protocol copies no arrays
            pickle.dump(command, self._commands, pickle.HIGHEST_PROTOCOL)
            self._commands.flush()
        except (OSError, ValueError):
            pass  # it has died, and `receive` says so
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise WorkerFailed(f"the arguments of {command[1]} ({reason(error)})") from error

    def death(self) -> WorkerDied | None:
        """Its death, where that is known without a call; None if it lives, or nobody knows."""
        return None

    def _cause_of_death(self) -> str:
        return "its process closed the connection"


class WorkerProcess(Worker):
    """A worker in a process that this one starts, at once, as a context manager.

    It runs in its own session, so a terminal's Ctrl-C does not reach it, and it ends when this
    process does.

    Args:
        make, arguments: as of `Worker`.

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
        self.pid = self._process.pid
        pipes = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)
        super().__init__(*pipes, make, *arguments)

    def death(self) -> WorkerDied | None:
        return None if self.alive() else WorkerDied(self._cause_of_death())

    def alive(self) -> bool:
        return self._process.poll() is None

    def terminate(self) -> None:
        """Send SIGTERM to the process, which may save its work."""
        self._process.terminate()

    def stop(self) -> None:
        """End the process, and all that it started, at once."""
        with contextlib.suppress(ProcessLookupError):  # of a dead one, what it started may be left
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        super().stop()

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
    """The stream of the answers, and the number of the present call."""

    def __init__(self, pipe: BinaryIO) -> None:
        self.pipe, self.number = pipe, 0
        self._lock = threading.Lock()  # reports may come from another thread

    def send(self, kind: str, value: object) -> None:
        message = pickle.dumps((self.number, kind, value))  # an error here is an answer, too
        with self._lock, contextlib.suppress(OSError):  # nobody reads any more: this one ends, too
            self.pipe.write(message)
            self.pipe.flush()

    def report(self, value: object) -> None:
        self.send("progress", value)


def worker_main() -> NoReturn:
    """Carry out the commands of standard input, one after the other."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # for what else is printed: the caller's standard output may be a report
    # At the end, with all that this process started.
    serve(os.fdopen(os.dup(0), "rb"), answers, lambda: os.killpg(0, signal.SIGKILL))


def serve(commands: BinaryIO, answers: BinaryIO, end: Callable[[], object]) -> NoReturn:
    """Carry out commands, one after the other, until the caller is gone.

    Args:
        end: called then; another run may write to the caller's folder from then on.
    """
    sender = _Answers(answers)
    waiting: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=_read_commands, args=(commands, waiting, end), daemon=True).start()
    target: object = None
    while True:
        try:
            sender.number, method, arguments = waiting.get()
            if sender.number == 0:
                target = _make(sender.report, arguments)
                sender.send("done", None)
            else:
                sender.send("done", getattr(target, method)(*arguments))
        except LockstepError as error:
            sender.send("failed", error)
        except KeyboardInterrupt as error:  # it was terminated
            sender.send("failed", error if str(error) else "its process was stopped")
            sys.stderr.flush()
            os._exit(128 + signal.SIGTERM)
        except Exception as error:  # the caller reports any error in one line
            sender.send("failed", reason(error))


def _make(report: Report, arguments: tuple[object, ...]) -> object:
    make, *rest = arguments
    assert callable(make)
    return make(report, *rest)


def _read_commands(
    pipe: BinaryIO, commands: queue.SimpleQueue[Command], end: Callable[[], object]
) -> None:
    try:
        while True:
            commands.put(pickle.load(pipe))
    except (EOFError, OSError):
        end()
    finally:
        os._exit(1)
