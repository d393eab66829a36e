"""Both backends at once: Flax trains in a worker process, and each has half of the cores.

The worker starts with the command, and imports JAX while this process reads the data; in the end it
writes the images while this one writes the page. results/bench/LOG.md has the measurements.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

from lockstep.common.config import BACKENDS, Config
from lockstep.common.errors import BackendError, LockstepError
from lockstep.common.model import pair
from lockstep.common.protocol import Backend, Dropout
from lockstep.common.runs import checkpoint
from lockstep.common.runs.record import Record
from lockstep.common.runs.trainer import Advance, Build, Interrupted, Trainer, resume_hint
from lockstep.common.runs.watch import FirstStepsDiffer, FirstStepsWatch
from lockstep.common.system import environment
from lockstep.common.system.interrupt import SignalHandler
from lockstep.common.system.process import Report, WorkerFailed, WorkerProcess

if TYPE_CHECKING:
    import numpy as np

    from lockstep.common.report.json import ReportJson

# Training images from which on it pays: the worker takes some seconds to start.
MIN_IMAGES = 8_000
STOP_TIMEOUT = 30.0  # seconds that the worker has to save a checkpoint, before it is ended
WORKER_BACKEND = BACKENDS[-1]  # the one that the worker trains
PROCESSES = 2  # that train at the same time
T = TypeVar("T")
TwinNumbers = Mapping[str, Sequence[int | None]]  # by dtype: the run itself (None) and its twins


class ModelInfo(NamedTuple):
    """The facts of a backend that the session needs before training, as in
    `lockstep.common.protocol.Backend`."""

    device: str
    shapes: dict[str, tuple[int, ...]]
    native_names: dict[str, str]
    dropout_layers: dict[str, Dropout]


def describe_model(build: Build, name: str, concurrent_processes: int = 1) -> ModelInfo:
    return model_info(build(name, "float32", concurrent_processes))


def model_info(backend: Backend) -> ModelInfo:
    return ModelInfo(
        backend.device, backend.shapes(), backend.native_names(), backend.dropout_layers()
    )


class TrainingWorker:
    """The worker, as a context manager. It is optional; everything it does can be done in this
    process.

    Args:
        wanted: whether to start one.
        load: called there at once with WORKER_BACKEND, to import its framework.
        model: the network, of which a user's file is imported there, too.
    """

    def __init__(self, wanted: bool, load: Callable[[str], object], model: str) -> None:
        self.process: WorkerProcess | None = None
        if wanted:
            with contextlib.suppress(WorkerFailed):  # the system has no room for it
                self.process = WorkerProcess(start_commands)
                self.process.send("preload", load, model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.stop()
            self.process = None

    def model_info(self, build: Build, name: str) -> Callable[[], ModelInfo]:
        """Ask the worker to build the backend; returns a function that waits for its answer."""
        return self._call(functools.partial(describe_model, build, name), "model_info", build, name)

    def write_images(self, write: Callable[[], object], *arguments: object) -> Callable[[], object]:
        """Ask the worker to write the report's images; returns a function that waits for them.

        Args:
            write: writes them in this process, if the worker cannot.
            arguments: of `WorkerCommands.write_images`.
        """
        return self._call(write, "write_images", *arguments)

    def _call(self, here: Callable[[], T], method: str, *arguments: object) -> Callable[[], T]:
        process = self.process
        number = None if process is None else process.send(method, *arguments)

        def wait() -> T:
            if process is not None and number is not None:
                # Whatever went wrong there, it is tried here, where its error is reported.
                with contextlib.suppress(WorkerFailed, LockstepError):
                    return process.receive(number)
            return here()

        return wait


class ParallelTraining:
    """Trains one backend in the worker, inside the block, and every other one in this process.

    Args:
        name: the worker's backend; None: all are trained in this process, and the worker is ended.
        twins: of each precision.
    """

    def __init__(
        self, trainer: Trainer, worker: TrainingWorker, name: str | None, twins: TwinNumbers
    ) -> None:
        self.worker, self.twins = worker, twins
        self.process = worker.process if name is not None else None
        self.name = name if self.process is not None else None
        self.trainer = trainer
        if self.name is not None:
            self.trainer = dataclasses.replace(trainer, concurrent_processes=PROCESSES)
        self._changed = threading.Condition()
        self._finished: list[str] = []  # dtypes
        self._failure: BaseException | None = None
        self._done = False
        self._stopped = False
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        if self.process is None:
            self.worker.stop()
            return self
        try:
            self.trainer.signals.forward_to(self._stop)
            self._listener.start()
        except BaseException as error:
            self.__exit__(error)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is None:
            return
        if error and isinstance(error[1], FirstStepsDiffer):
            self.worker.stop()  # at once: its unfinished runs are not needed
            self._stopped = True
        elif any(error):
            self._stop()
        try:
            if self._listener.is_alive():
                self._listener.join(STOP_TIMEOUT)
        finally:
            if any(error) or self._listener.is_alive():
                self.worker.stop()
            if self._listener.is_alive():
                self._listener.join()  # then all that it has finished is known
            self.trainer.signals.forward_to(None)
        checkpoint.remove_folder(self.trainer.folder)

    def _stop(self) -> None:
        """Ask the worker to checkpoint and stop. A second request would kill it, so send only
        one."""
        if not self._stopped and self.process is not None:
            self._stopped = True
            self.process.terminate()

    def train(self, name: str, dtype: str) -> list[Record]:
        """The records of one backend in one precision, as `Trainer.train` returns them.

        Raises:
            KeyboardInterrupt: if a signal stopped it.
            LockstepError: what went wrong in either process.
            FirstStepsDiffer: if the trainer's `watch` says so.
        """
        if name != self.name:
            return self.trainer.train(name, dtype, self.twins[dtype])
        try:
            with self._changed:
                self._changed.wait_for(
                    lambda: dtype in self._finished or self._done or self._differs()
                )
        except KeyboardInterrupt:
            raise Interrupted(f"{name} {dtype} was interrupted") from None
        if self._differs():
            raise FirstStepsDiffer
        if dtype in self._finished:
            return self.trainer.read_records(name, dtype, self.twins[dtype])
        if not isinstance(self._failure, WorkerFailed) and self._failure is not None:
            raise self._failure
        if self.trainer.signals.requested():
            raise Interrupted(f"{name} {dtype} was interrupted")
        hint = f"free some memory, then {resume_hint(self.trainer.folder)}"
        raise BackendError(f"{name} cannot train here ({self._failure}): {hint}")

    def _differs(self) -> bool:
        return self.trainer.watch is not None and self.trainer.watch.differs

    def finished_records(self, dtype: str) -> dict[str, list[Record]]:
        """The worker's records in one precision; empty if it did not finish that."""
        if self.name is None or dtype not in self._finished:
            return {}
        return {self.name: self.trainer.read_records(self.name, dtype, self.twins[dtype])}

    def _listen(self) -> None:
        """Ask the worker to train everything, and follow it until it has."""
        assert self.process is not None
        trainer = dataclasses.replace(
            self.trainer,
            terminal=RemoteProgress(_discard),
            signals=SignalHandler(),
            watch=None if self.trainer.watch is None else RemoteWatch(_discard),
        )
        try:
            number = self.process.send("train", trainer, self.name, self.twins)
            self.process.receive(number, self._follow)
        except (WorkerFailed, LockstepError, KeyboardInterrupt) as error:
            self._failure = error
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _follow(self, report: object) -> None:
        assert isinstance(report, tuple)
        kind, text = report
        if kind == "first steps" and self.trainer.watch is not None:
            self.trainer.watch.add(text)
            with self._changed:
                self._changed.notify_all()
            return
        if kind == "line":
            with contextlib.suppress(Exception):  # such as a full disk below standard output
                self.trainer.terminal.line(text)
        else:
            with self._changed:
                self._finished.append(text)
                self._changed.notify_all()


def may_use_worker(config: Config, names: Sequence[str], device: str) -> bool:
    """Whether a worker will probably be used; asked before the data are read."""
    short = config.steps is not None and config.steps * config.batch_size < MIN_IMAGES
    return (
        len(names) == len(BACKENDS) and device != "cuda" and environment.cores() >= 2 and not short
    )


def choose_worker_backend(
    trainer: Trainer, names: Sequence[str], device: str, found: Iterable[str]
) -> str | None:
    """The backend to train in the worker; None if that does not pay, or there are not two to train.

    Args:
        found: backends whose records need not be trained.
    """
    config = trainer.config
    worthwhile = config.total_steps * config.batch_size >= MIN_IMAGES and environment.cores() >= 2
    both = len({*names} - {*found}) == len(BACKENDS)
    return WORKER_BACKEND if worthwhile and both and device == "cpu" else None


# --- In the worker


class RemoteProgress:
    """A terminal that passes its lines on; the caller shows the progress of its own runs only."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def line(self, text: str) -> None:
        self._report(("line", text))

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Advance]:
        del title, total
        yield lambda steps, loss: None


class RemoteWatch(FirstStepsWatch):
    """Passes the first steps on; the caller compares them, and ends the worker."""

    def __init__(self, report: Report) -> None:
        self.differs, self._report = False, report

    def add(self, record: Record) -> None:
        self._report(("first steps", record))


def _discard(report: object) -> None:
    """Not a lambda, so that it can be pickled."""


def start_commands(report: Report) -> WorkerCommands:
    """Make the commands of the worker, which handles signals from then on.

    Signals are deferred all the time: in the middle of an import, a library may print
    KeyboardInterrupt and forget it.
    """
    environment.relax_gc()
    commands = WorkerCommands(report, SignalHandler(announce=False))
    for context in (commands.signals, commands.signals.deferred()):
        commands.until_the_end.enter_context(context)
    return commands


class WorkerCommands:
    """The commands of the worker."""

    def __init__(self, report: Report, signals: SignalHandler) -> None:
        self.report, self.signals = report, signals
        self.until_the_end = contextlib.ExitStack()

    def preload(self, load: Callable[[str], object], model: str) -> None:
        load(WORKER_BACKEND)
        pair.load(model)

    def model_info(self, build: Build, name: str) -> ModelInfo:
        return describe_model(build, name, PROCESSES)

    def train(self, trainer: Trainer, name: str, twins: TwinNumbers) -> None:
        self.trainer = dataclasses.replace(
            trainer,
            terminal=RemoteProgress(self.report),
            signals=self.signals,
            watch=None if trainer.watch is None else RemoteWatch(self.report),
        )
        self.twins = twins
        for dtype in twins:
            self.trainer.train(name, dtype, twins[dtype])
            self.report(("finished", dtype))
        # Half a second, in which the other backend may be training.
        importlib.import_module("matplotlib.figure")

    def write_images(self, report: ReportJson, sample: np.ndarray) -> None:
        """The images of a report on all that was trained.

        Args:
            sample: numbers of the training images to show, int64 (n,).
        """
        from lockstep.common.report import write_pictures

        runs: dict[str, dict[str, Record]] = {}
        twins: dict[str, dict[str, list[Record]]] = {}
        for dtype, numbers in self.twins.items():
            found = {name: self.trainer.read_records(name, dtype, numbers) for name in BACKENDS}
            runs[dtype] = {name: records[0] for name, records in found.items()}
            twins[dtype] = {name: records[1:] for name, records in found.items()}
        write_pictures(self.trainer.folder, report, runs, self.trainer.dataset, twins, sample)
