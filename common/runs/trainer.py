"""The runs of one folder: trained, found there, or resumed."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.errors import BackendError, RecordError
from lockstep.common.model.perturb import REPLICATE
from lockstep.common.protocol import Arrays, Backend
from lockstep.common.runs import checkpoint, record, training
from lockstep.common.runs.checkpoint import Checkpoint, CheckpointManager
from lockstep.common.runs.find import matching_record
from lockstep.common.runs.first_steps import first_steps
from lockstep.common.runs.record import Record
from lockstep.common.runs.remote import StartTwin
from lockstep.common.runs.watch import FirstStepsWatch
from lockstep.common.system import environment, program
from lockstep.common.system.interrupt import SignalHandler

Advance = Callable[[int, float], object]  # called with the steps done since and the last loss


class Build(Protocol):
    """`lockstep.backends.build`, given all but these."""

    def __call__(self, name: str, dtype: str, concurrent_processes: int = 1) -> Backend: ...


class ProgressDisplay(Protocol):
    """Where training reports; `lockstep.common.report.Terminal` is one."""

    def line(self, text: str) -> None: ...

    def progress(self, title: str, total: int) -> AbstractContextManager[Advance]: ...


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal; the message says where, or how to resume."""


@dataclass(frozen=True)
class Trainer:
    """Trains the runs and twins of one folder."""

    folder: Path
    config: Config  # resolved
    dataset: Dataset
    build: Build
    terminal: ProgressDisplay
    weights: Arrays | None = None  # the user's own, canonical; None: drawn from the seed
    log_every: int = 0  # steps between two log lines; 0: none
    checkpoint_every: int = 0  # steps between two checkpoints; 0: only where a run is stopped
    resumed: bool = False  # resume what is in the folder
    continue_other_backend: bool = False  # from the other backend, where that one was stopped
    signals: SignalHandler = field(default_factory=SignalHandler)
    concurrent_processes: int = 1  # that train at the same time, this one included
    start_twin: StartTwin | None = None  # where others train the twins
    watch: FirstStepsWatch | None = None  # of the float64 runs; it may end any. None: it trains all

    def backend(self, name: str, dtype: str) -> Backend:
        return self.build(name, dtype, self.concurrent_processes)

    def train(self, name: str, dtype: str, twins: Sequence[int | None]) -> list[Record]:
        """The records of one backend in one precision, each written as soon as it is finished.

        Args:
            twins: None for the run itself; 1, 2, ... for its twins.

        Raises:
            Interrupted: if a signal stopped a run.
            BackendError: if the framework cannot train it here.
            RecordError: if a file cannot be used or written.
            FirstStepsDiffer: if `watch` says so.
        """
        backend, records = None, []
        elsewhere = self._start_twins(name, dtype, twins)
        for twin in twins:
            finished = self.finished(name, dtype, twin)
            if finished is None and twin in elsewhere:
                finished = self._receive(elsewhere[twin], run_title(name, dtype, twin))
            elif finished is None:
                if self.signals.requested():
                    raise Interrupted(f"{run_title(name, dtype, twin)} was not started")
                backend = backend or self.backend(name, dtype)
                finished = self._train_one(backend, name, dtype, twin)
            elif finished.nonfinite_step is None:
                self.remove_checkpoints(finished.stem)
            records.append(finished)
        return records

    def _start_twins(
        self, name: str, dtype: str, twins: Sequence[int | None]
    ) -> dict[int | None, Future[Record]]:
        """Have the cluster's workers train those that are not finished, if there is a cluster."""
        if self.start_twin is None:
            return {}
        return {
            twin: self.start_twin(name, dtype, twin)
            for twin in twins
            if twin is not None and twin != REPLICATE and self.finished(name, dtype, twin) is None
        }

    def _receive(self, twin: Future[Record], title: str) -> Record:
        """Wait for a twin that another process trains, and write its record."""
        self.terminal.line(f"Waiting for {title} from the cluster")
        try:
            with backend_errors("a worker"):
                found = twin.result()
        except KeyboardInterrupt:
            raise Interrupted(f"{title} was interrupted") from None
        with self.signals.masked():
            record.write(found, self.folder)
        return found

    def _train_one(self, backend: Backend, name: str, dtype: str, twin: int | None) -> Record:
        """Train one run and write its record."""
        title, total = run_title(name, dtype, twin), self.config.total_steps
        start = self.starting_checkpoint(name, dtype, twin)
        done = start.step if start is not None else 0
        after = f" after step {done:,}" if done else ""
        self.terminal.line(f"Training {title}{after}: {total - done:,} steps on {backend.device}")
        stem = record.file_stem(name, dtype, twin)
        if not self.resumed:
            self.remove_checkpoints(stem)
        checkpoints = CheckpointManager(self.folder, self.checkpoint_every, self.signals)
        with (
            backend_errors(name),
            self.terminal.progress(title, total) as advance,
            self.signals.deferred(),
        ):
            watch = self.watch if dtype == "float64" and twin is None else None
            observer = TerminalObserver(self._line_of(name), advance, self.watch)
            try:
                found = training.train(
                    backend,
                    self.config,
                    self.dataset,
                    dtype,
                    observer,
                    twin,
                    self.log_every if twin is None else 0,
                    weights=self.weights,
                    start=start,
                    checkpoints=checkpoints,
                    after_first_steps=None if watch is None else watch.add,
                )
            except KeyboardInterrupt:
                raise Interrupted(
                    f"{title} was interrupted at step {observer.steps:,} of {total:,}"
                ) from None
            except RecordError as error:  # such as a full disk
                raise RecordError(f"{error}; then {resume_hint(self.folder)}") from error
            with self.signals.masked():
                record.write(found, self.folder)
        if found.nonfinite_step is None or twin is not None:
            self.remove_checkpoints(stem)
        else:
            self.terminal.line(
                f"{title}: the loss of step {found.nonfinite_step} is not finite, so training "
                f"ended there; the last finite state is in {checkpoints.last_path}: choose a "
                "smaller --lr, or start from it with --weights"
            )
        return found

    def _line_of(self, name: str) -> Callable[[str], None]:
        """Prints a log line; where two backends train at once, each line names its own."""
        line = self.terminal.line
        return line if self.concurrent_processes == 1 else functools.partial(prefixed, name, line)

    def remove_checkpoints(self, stem: str) -> None:
        checkpoint.remove(self.folder, stem, shared=self.concurrent_processes > 1)

    def read_records(self, name: str, dtype: str, twins: Sequence[int | None]) -> list[Record]:
        """The records, of any size, that another process has just trained; as `train` returns
        them."""
        paths = [
            self.folder / f"{record.file_stem(name, dtype, twin)}.safetensors" for twin in twins
        ]
        return [record.read(path, max_bytes=math.inf) for path in paths]

    def finished(self, name: str, dtype: str, twin: int | None) -> Record | None:
        """The record of a run that is resumed, if it was finished before."""
        path = self.folder / f"{record.file_stem(name, dtype, twin)}.safetensors"
        if not self.resumed or not path.exists():
            return None
        return matching_record(path, name, self.config, self.dataset)

    def starting_checkpoint(self, name: str, dtype: str, twin: int | None) -> Checkpoint | None:
        """The checkpoint to resume from: the run's newest one, or that of the other backend; None
        if it starts at the first step."""
        if not self.resumed:
            return None
        own = checkpoint.found(self.folder, record.file_stem(name, dtype, twin))
        if own:
            return checkpoint.read(own[0])
        other = next(other for other in BACKENDS if other != name)
        theirs = checkpoint.found(self.folder, record.file_stem(other, dtype, twin))
        ended = (self.folder / f"{record.file_stem(other, dtype, twin)}.safetensors").exists()
        if not self.continue_other_backend or twin is not None or ended or not theirs:
            return None
        state = checkpoint.read(theirs[0])
        data = training.describe(self.config, self.dataset)
        checkpoint.check(state, self.config.to_json(), data, None, environment.source_digest(other))
        self.terminal.line(f"{name} continues where {other} stopped, after step {state.step:,}")
        return checkpoint.for_backend(state, name, environment.source_digest(name))

    def check_not_overwriting(self, names: Sequence[str], dtypes: Sequence[str]) -> None:
        """Raise RecordError if this would overwrite a run that was stopped."""
        mine = [record.file_stem(name, dtype) for name, dtype in itertools.product(names, dtypes)]
        for path in sorted((self.folder / checkpoint.FOLDER).glob("*.safetensors")):
            stem = path.stem.rpartition("-")[0]
            ended = (self.folder / f"{stem}.safetensors").exists()
            if not ended and stem.partition("-twin")[0] in mine:
                raise RecordError(
                    f"{self.folder} holds a run that was stopped ({path.name}): "
                    f"{resume_hint(self.folder)}, or delete {self.folder / checkpoint.FOLDER} to "
                    "start again"
                )

    def train_twins(self, dtype: str, names: Sequence[str]) -> Callable[[str, range], list[Record]]:
        """A function that trains the further twins that `verdict.judge` asks for.

        Args:
            names: the backends that may be trained; for others it returns none.
        """

        def twins_of(name: str, twins: range) -> list[Record]:
            if name not in names or not twins:
                return []
            self.terminal.line(
                f"The {dtype} runs diverge after the first step; training twins of {name} to see "
                "whether rounding alone explains it"
            )
            return self.train(name, dtype, twins)

        return twins_of

    def train_first_steps(
        self, dtype: str, names: Sequence[str]
    ) -> Callable[[str, range], list[Record]]:
        """As `train_twins`, but only their first steps, of which no file is written."""

        def first_steps_of(name: str, twins: range) -> list[Record]:
            if name not in names or not twins:
                return []
            self.terminal.line(
                f"The {dtype} runs diverge in the first steps; training the first steps of more "
                f"twins of {name} to see whether rounding explains it"
            )
            backend = self.backend(name, dtype)
            observer = TerminalObserver(lambda text: None, lambda steps, loss: None)
            with backend_errors(name), self.signals.deferred():
                return [
                    first_steps(
                        backend, self.config, self.dataset, dtype, observer, twin, self.weights
                    )
                    for twin in twins
                ]

        return first_steps_of


def run_title(name: str, dtype: str, twin: int | None) -> str:
    if twin is None:
        return f"{name} {dtype}"
    return f"{name} {dtype}, " + ("again" if twin == REPLICATE else f"twin {twin}")


@contextlib.contextmanager
def backend_errors(name: str) -> Iterator[None]:
    """Turn errors of a compiler, a driver, or the memory into one line with a hint; all of them
    are RuntimeErrors."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        hint = "try --compile off, --device cpu or a smaller --batch-size"
        raise BackendError(
            f"{name} cannot train here ({type(error).__name__}: {reason}): {hint}"
        ) from error


def prefixed(name: str, line: Callable[[str], None], text: str) -> None:
    line(f"{name}: {text}")


class TerminalObserver:
    """Passes the training loop's reports to the terminal, and counts the steps. `watch` may end the
    training."""

    def __init__(
        self,
        line: Callable[[str], None],
        advance: Advance,
        watch: FirstStepsWatch | None = None,
    ) -> None:
        self.line, self._advance, self._watch = line, advance, watch
        self.steps = 0  # done so far

    def advance(self, steps: int, loss: float) -> None:
        self.steps += steps
        self._advance(steps, loss)
        if self._watch is not None:
            self._watch.check()


def resume_hint(folder: Path) -> str:
    """The command that resumes the run in `folder`."""
    return f"resume with: {program.command('--resume', folder)}"
