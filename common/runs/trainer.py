"""The runs of one folder: trained, found there, or resumed."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.errors import BackendError, RecordError
from lockstep.common.protocol import Arrays, Backend
from lockstep.common.runs import checkpoint, record, training
from lockstep.common.runs.checkpoint import Checkpoint
from lockstep.common.runs.first_steps import first_steps
from lockstep.common.runs.record import Record
from lockstep.common.system import environment, interrupt, program

Family = dict[str, list[Record]]  # by backend: a run and its twins


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal; says where, and how to go on."""


@dataclass(frozen=True)
class Trainer:
    """What all training of one run shares."""

    folder: Path
    config: Config  # resolved
    dataset: Dataset
    build: Callable[[str, str], Backend]  # by name and dtype
    terminal: Any  # what `lockstep.common.report.Terminal` does
    weights: Arrays | None = None  # the user's own, canonical; None: drawn from the seed
    log_every: int = 0  # steps between two log lines; 0: none
    checkpoint_every: int = 0  # steps between two checkpoints; 0: none but where a run is stopped
    resumed: bool = False  # go on with what is in the folder
    continue_other_backend: bool = False  # from the other backend, where that one was stopped

    def train(self, name: str, dtype: str, members: Sequence[int | None]) -> list[Record]:
        """The records of one backend through one lens: of the run itself (None) and of its twins
        (1, 2, ...).

        Each is written to the folder as soon as it is finished.
        """
        terminal, total = self.terminal, self.config.total_steps
        backend, made = None, []
        for twin in members:
            stem, title = (
                record.file_stem(name, dtype, twin),
                f"{name} {dtype}" + (f", twin {twin}" if twin else ""),
            )
            finished = self.finished(name, stem)
            if finished is not None:
                made.append(finished)
                if finished.nonfinite_step is None:
                    checkpoint.remove(self.folder, stem)
                continue
            if interrupt.requested():
                raise Interrupted(f"{title} was not begun")
            backend = backend or self.build(name, dtype)
            start = self.starting_checkpoint(name, dtype, twin)
            done = start.step if start is not None else 0
            after = f" after step {done:,}" if done else ""
            terminal.line(f"Training {title}{after}: {total - done:,} steps on {backend.device}")
            if not self.resumed:
                checkpoint.remove(self.folder, stem)
            checkpoints = checkpoint.CheckpointManager(self.folder, self.checkpoint_every)
            with (
                backend_errors(name),
                terminal.progress(title, total) as advance,
                interrupt.deferred(),
            ):
                line = (
                    terminal.line
                    if environment.sharing == 1
                    else functools.partial(prefixed, name, terminal.line)
                )
                observer = TerminalObserver(line, advance)
                log_every = self.log_every if twin is None else 0
                try:
                    found = training.train(
                        backend,
                        self.config,
                        self.dataset,
                        dtype,
                        observer,
                        twin,
                        log_every,
                        weights=self.weights,
                        start=start,
                        checkpoints=checkpoints,
                    )
                except KeyboardInterrupt:
                    raise Interrupted(
                        f"{title} was interrupted at step {observer.steps:,} of {total:,}"
                    ) from None
                except RecordError as error:  # such as a full disk
                    raise RecordError(f"{error}; then {resume_hint(self.folder)}") from error
                with interrupt.masked():
                    record.write(found, self.folder)
            made.append(found)
            if found.nonfinite_step is None or twin is not None:
                checkpoint.remove(self.folder, stem)
            else:
                terminal.line(
                    f"{title}: the loss of step {found.nonfinite_step} is not finite, so training ended there; the last good "
                    f"state is in {checkpoints.last_path}: choose a smaller --lr, or start from it with --weights"
                )
        return made

    def read_records(self, name: str, dtype: str, members: Sequence[int | None]) -> list[Record]:
        """The records that another process has just trained for this one, as `train`'s, however
        large."""
        paths = [
            self.folder / f"{record.file_stem(name, dtype, twin)}.safetensors" for twin in members
        ]
        return [record.read(path, max_bytes=math.inf) for path in paths]

    def finished(self, name: str, stem: str) -> Record | None:
        """The record of a run that need not be trained again, since this run goes on with what is
        there."""
        path = self.folder / f"{stem}.safetensors"
        if not self.resumed or not path.exists():
            return None
        return matching_record(path, name, self.config, self.dataset)

    def starting_checkpoint(self, name: str, dtype: str, twin: int | None) -> Checkpoint | None:
        """The checkpoint to go on from, if this run goes on: its newest, or that of the other
        backend; else None."""
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
        """Raise RecordError if a run that was stopped here would be overwritten."""
        mine = [record.file_stem(name, dtype) for name, dtype in itertools.product(names, dtypes)]
        for path in sorted((self.folder / checkpoint.FOLDER).glob("*.safetensors")):
            stem = path.stem.rpartition("-")[0]
            ended = (self.folder / f"{stem}.safetensors").exists()
            if not ended and stem.partition("-twin")[0] in mine:
                raise RecordError(
                    f"{self.folder} holds a run that was stopped ({path.name}): {resume_hint(self.folder)}, "
                    f"or delete {self.folder / checkpoint.FOLDER} to start again"
                )

    def train_twins(self, dtype: str, names: Sequence[str]) -> Callable[[str, range], list[Record]]:
        """Trains the twins that `parity.judge` asks for, of the backends that may be trained."""

        def twins_of(name: str, twins: range) -> list[Record]:
            if name not in names or not twins:
                return []
            self.terminal.line(
                f"The {dtype} runs diverge after the first step; training twins of {name} to see whether rounding alone explains it"
            )
            return self.train(name, dtype, twins)

        return twins_of

    def train_first_steps(
        self, dtype: str, names: Sequence[str]
    ) -> Callable[[str, range], list[Record]]:
        """Likewise, but the first steps of them only, of which nothing is kept."""

        def first_steps_of(name: str, twins: range) -> list[Record]:
            if name not in names or not twins:
                return []
            self.terminal.line(
                f"The {dtype} runs diverge in the first steps; training the first steps of more twins of {name} to see whether rounding explains it"
            )
            backend, observer = (
                self.build(name, dtype),
                TerminalObserver(lambda text: None, lambda steps, loss: None),
            )
            with backend_errors(name), interrupt.deferred():
                return [
                    first_steps(
                        backend, self.config, self.dataset, dtype, observer, twin, self.weights
                    )
                    for twin in twins
                ]

        return first_steps_of


@contextlib.contextmanager
def backend_errors(name: str) -> Iterator[None]:
    """Errors of a compiler, a driver, or the memory, which all come as RuntimeError, as one line
    with a remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        remedy = "try --compile off, --device cpu or a smaller --batch-size"
        raise BackendError(
            f"{name} cannot train here ({type(error).__name__}: {reason}): {remedy}"
        ) from error


def prefixed(name: str, line: Callable[[str], None], text: str) -> None:
    """Where two train at once, each says who it is."""
    line(f"{name}: {text}")


class TerminalObserver:
    """Passes what the training loop tells on to the terminal, and knows how far it has come."""

    def __init__(self, line: Any, advance: Any) -> None:
        self.line, self._advance = line, advance
        self.steps = 0  # done so far

    def advance(self, steps: int, loss: float) -> None:
        self.steps += steps
        self._advance(steps, loss)


def runs_and_twins(
    families: dict[str, Family],
) -> tuple[dict[str, dict[str, Record]], dict[str, Family]]:
    """By dtype and backend: the runs, and the twins of each."""
    runs = {
        dtype: {name: members[0] for name, members in family.items()}
        for dtype, family in families.items()
    }
    twins = {
        dtype: {name: members[1:] for name, members in family.items()}
        for dtype, family in families.items()
    }
    return runs, twins


def find_runs(
    folder: Path,
    dtypes: Sequence[str],
    names: Sequence[str],
    config: Config,
    dataset: Dataset,
    announce: Callable[[str], None],
) -> dict[str, Family]:
    """By dtype, the runs of these backends that are in the folder.

    They are read before anything is trained, so that what is damaged is said at once.
    """
    families: dict[str, Family] = {dtype: {} for dtype in dtypes}
    for dtype, name in itertools.product(dtypes, names):
        found = find_ensemble(folder, name, dtype, config, dataset, announce)
        if found:
            families[dtype][name] = found
    return families


def find_ensemble(
    folder: Path,
    name: str,
    dtype: str,
    config: Config,
    dataset: Dataset,
    announce: Callable[[str], None],
) -> list[Record]:
    """The other backend's record of this run, followed by those of its twins; empty if there is
    none.

    Raises:
        RecordError: if a record is damaged, stale, or not what its name says.
    """
    stem = record.file_stem(name, dtype)
    main = folder / f"{stem}.safetensors"
    if not main.exists():
        return []
    found = matching_record(main, name, config, dataset)
    if found is None:
        announce(f"Not compared: {main} is of a run with another configuration or other data")
        return []
    family = [found]
    for path in sorted(folder.glob(f"{stem}-twin*.safetensors")):
        twin = record.read(path)
        if twin.source == environment.source_digest(name) and (
            twin := matching_record(path, name, config, dataset)
        ):
            family.append(twin)  # others an earlier run left here
    return family


def matching_record(path: Path, name: str, config: Config, dataset: Dataset) -> Record | None:
    """The record in `path`, if it is one of this run; None if it is one of another.

    Raises:
        RecordError: if it is damaged, stale, or not what its name says.
    """
    found = record.read(path)
    if found.stem != path.stem or found.backend != name:
        raise RecordError(
            f"the record {path} is not what its name says: delete it and run {name} again"
        )
    mine = training.describe(config, dataset) | {
        "name": found.data.get("name")
    }  # the same data may lie elsewhere
    if found.config != config.to_json() or found.data != mine:
        return None
    if found.source != environment.source_digest(name):
        raise RecordError(
            f"the record {path} is stale, the code has changed since: run --backend {name} again"
        )
    return found


def resume_hint(folder: Path) -> str:
    """For whoever stopped the run in `folder`."""
    return f"resume with: {program.command('--resume', folder)}"
