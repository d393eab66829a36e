"""Benchmark workers: own threads, memory and compilation cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from lockstep import backends
from lockstep.backends.benchmark.loops import BenchmarkJob, Timer, smallest_backend
from lockstep.common.config import BACKENDS
from lockstep.common.errors import BackendError
from lockstep.common.system.process import Report, WorkerFailed, WorkerProcess

LOCKSTEP_PATHS = ("torch", "torch fused", "flax", "flax fused")
HINT = "free some memory, or try a smaller --batch-size or --device cpu"
Settings = Mapping[str, str | None]  # environment variables; None removes one


class Worker:
    """An object in a separate process, as a context manager.

    Args:
        title: for messages.
        settings: made before the object's framework is imported.
        make: of a module that imports no framework; called with `arguments` it gives the object.

    Raises:
        BackendError: if `make` fails, or the process ends.
    """

    def __init__(
        self, title: str, settings: Settings, make: Callable[..., object], *arguments: object
    ) -> None:
        self.title = title
        start = time.perf_counter()
        try:
            self._process = WorkerProcess(_make, dict(settings), make, arguments)
        except WorkerFailed as error:
            raise self._failure(error) from error
        try:
            self._result(0)
        except BaseException:
            self._process.stop()
            raise
        self.seconds = time.perf_counter() - start  # until the object was made, from the start on

    def call(self, method: str, *arguments: object) -> Any:
        """Call the object's method.

        Raises:
            LockstepError: what the method raised; BackendError if it was something else, or if the
                process has ended.
        """
        return self._result(self._process.send(method, *arguments))

    def _result(self, number: int) -> Any:
        try:
            return self._process.receive(number)
        except WorkerFailed as error:
            raise self._failure(error) from error

    def _failure(self, error: WorkerFailed) -> BackendError:
        return BackendError(f"{self.title} cannot be measured here ({error}): {HINT}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.stop()


def _make(
    report: Report, settings: Settings, make: Callable[..., object], arguments: tuple[object, ...]
) -> object:
    for name, value in settings.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    return make(*arguments)


def start(job: BenchmarkJob, cache: str | None) -> Worker:
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
    if job.path not in LOCKSTEP_PATHS:  # other code runs as it would without this project
        settings["GOMP_SPINCOUNT"] = backends.ORIGINAL_SPIN_COUNT
    return Worker(job.path, settings, Timer, job)


def find_device(choice: str) -> tuple[str, str | None]:
    """ "auto", "cpu" or "cuda" as "cpu" or "cuda", and the card's name; "auto" is a card that both
    frameworks find.

    Raises:
        BackendError: if "cuda" is asked for and one of them finds none.
    """
    card = None
    for name in () if choice == "cpu" else BACKENDS:
        with Worker(name, {}, smallest_backend, name, choice) as worker:
            found = worker.call("describe")
        if found["device"] == "cpu":
            return "cpu", None
        card = card or found["device_name"]
    return ("cpu", None) if card is None else ("cuda", card)
