"""Processes of their own, for what must share neither threads nor memory nor compiled programs with
anything else."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self

from lockstep import backends
from lockstep.backends.benchmark.loops import Job, Stopwatch, smallest_backend
from lockstep.common.config import BACKENDS
from lockstep.common.errors import BackendError, LockstepError

PATIENCE = 10.0  # seconds that a worker has to end, before it is killed
OWN = ("torch", "torch fused", "flax", "flax fused")
Settings = Mapping[str, str | None]  # environment variables; None removes one


class Worker:
    """A process in which an object lives. It waits, idle, to be asked.

    Built, and closed by `with`, in the process that asks.

    Args:
        title: for messages.
        settings: made before the object's framework is imported.
        make: of a module that imports no framework; called with `arguments` it gives the object.

    Raises:
        BackendError: if `make` fails, or the process ends.
    """

    def __init__(
        self, title: str, settings: Settings, make: Callable[..., Any], *arguments: Any
    ) -> None:
        self.title = title
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Not a daemon: these may have no processes of their own, such as a loader's.
        self._process = context.Process(
            target=_serve, args=(theirs, dict(settings), make, arguments)
        )
        start = time.perf_counter()
        try:
            self._process.start()
            theirs.close()
            self._answer()
        except BaseException:
            self.close()
            raise
        # until the object was made, the start of the process included
        self.seconds = time.perf_counter() - start

    def ask(self, method: str, *arguments: Any) -> Any:
        """What the object's method answers.

        Raises:
            LockstepError: what the method raised; BackendError if it was something else, or if the
                process has ended.
        """
        with contextlib.suppress(OSError):  # it has ended, and `_answer` says so
            self._connection.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        remedy = "free some memory, or try a smaller --batch-size or --device cpu"
        try:
            fine, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(PATIENCE)
            code = self._process.exitcode
            how = (
                f"was ended by signal {-code}"
                if code is not None and code < 0
                else f"ended with status {code}"
            )
            raise BackendError(
                f"{self.title} cannot be measured here (its process {how}): {remedy}"
            ) from None
        if fine:
            return answer
        if isinstance(answer, LockstepError):
            raise answer
        raise BackendError(f"{self.title} cannot be measured here ({answer}): {remedy}")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process.pid is not None:
            self._process.terminate()
            self._process.join(PATIENCE)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
        self._process.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _serve(
    connection: Any, settings: Settings, make: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """The worker's side: answer (True, answer) or (False, what went wrong) until nobody asks any
    more."""
    # Ctrl-C reaches the whole group; who asks ends the worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    os.dup2(2, 1)  # standard output may be a report in JSON
    # a loader's processes start as anywhere, not as this one did
    multiprocessing.set_start_method(None, force=True)
    for name, value in settings.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    fine, made = _tried(make, *arguments)
    with contextlib.suppress(EOFError, OSError):  # who asks has gone
        connection.send((fine, None if fine else made))
        while fine:
            method, given = connection.recv()
            connection.send(_tried(getattr(made, method), *given))


def _end(*_: object) -> NoReturn:
    """At once, whatever is being done, and with a loader's processes: these would notice only
    seconds later."""
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(0)


def _tried(work: Callable[..., Any], *arguments: Any) -> tuple[bool, Any]:
    try:
        return True, work(*arguments)
    except LockstepError as error:
        return False, error
    except Exception as error:  # whatever it is, who asked is told in one line, and this process stays able to answer
        reason = next(iter(str(error).splitlines()), "")
        return False, f"{type(error).__name__}: {reason}"


def start(job: Job, cache: str | None) -> Worker:
    """A worker that has taken its first step.

    Args:
        cache: a name; workers that are started with the same one share the programs that they
            compile, and find no others. None: the usual folders.
    """
    settings: dict[str, str | None] = {}
    if cache is not None:
        folder = job.folder / "caches" / cache
        settings = {
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch"),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    if job.path not in OWN:  # what is not this project's runs as it would without it
        settings["GOMP_SPINCOUNT"] = backends.ORIGINAL_SPIN_COUNT
    return Worker(job.path, settings, Stopwatch, job)


def find_device(choice: str) -> tuple[str, str | None]:
    """ "auto", "cpu" or "cuda" as "cpu" or "cuda", and the card's name; "auto" is a card that both
    frameworks find.

    Raises:
        BackendError: if "cuda" is asked for and one of them finds none.
    """
    card = None
    for name in () if choice == "cpu" else BACKENDS:
        with Worker(name, {}, smallest_backend, name, choice) as worker:
            found = worker.ask("describe")
        if found["device"] == "cpu":
            return "cpu", None
        card = card or found["device_name"]
    return ("cpu", None) if card is None else ("cuda", card)
