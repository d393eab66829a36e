"""A run as far as it has come: what is kept of it on the way, and what either backend can go on
from."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.common.config import BACKENDS, DTYPES
from lockstep.common.dtypes import numpy_dtype
from lockstep.common.errors import RecordError
from lockstep.common.model.perturb import image_perturbation_rng
from lockstep.common.protocol import STAGES, Arrays, Snapshot
from lockstep.common.runs.record import (
    fields_of,
    file_name,
    file_stem,
    grouped,
    is_count,
    ungrouped,
)
from lockstep.common.system.interrupt import SignalHandler
from lockstep.common.system.storage import flush_folder, read_tensors, write_tensors

SCHEMA = 1
FOLDER = "checkpoints"  # in the run's folder
KEEP_LAST = 3  # of each run; the older ones are removed
HINT = "delete it to resume from the one before, or delete the folder to start again"


@dataclass(frozen=True)
class Checkpoint:
    """One run of one backend through one lens, up to some step. The order of its batches needs no
    keeping: it is a function of the seed, the epoch and the step."""

    backend: str  # who took the last step
    dtype: str  # the lens
    twin: int | None  # None: the run itself; 1, 2, ...: its twins
    config: dict[str, Any]  # Config.to_json() of the resolved run
    data: dict[str, Any]  # train.describe()
    source: str  # machine.source_digest(backend): the code that made it
    segments: list[dict[str, Any]]  # "backend", and "stop", one past the last step it took
    layers: list[str]  # the tensors of the forward pass, in the order of the calls
    # Of a twin: the state of the random numbers that perturb its images.
    perturbation_rng_state: dict[str, Any] | None
    seconds: float  # wall time of the training steps
    loss: np.ndarray  # float64 (steps done,), as in the record
    gradient_norm: np.ndarray  # float64 (steps done,)
    lr: np.ndarray  # float64 (steps done,)
    weights: Arrays  # initial parameters and model state
    first_steps: Arrays  # "<step>/<stage>/<tensor>" of the first steps
    parameter_history: Arrays  # "<steps done>/<parameter>"
    snapshot: Snapshot

    @property
    def step(self) -> int:
        """Steps done."""
        return self.snapshot.step

    @property
    def stem(self) -> str:
        """The name of the run's files, without ending."""
        return file_stem(self.backend, self.dtype, self.twin)


_SERIES = ("loss", "gradient_norm", "lr")
_GROUPS = ("weights", "first_steps", "parameter_history")
_STATE = ("parameters", "model_state", "momentum")
METADATA = tuple(
    f.name for f in fields(Checkpoint) if f.name not in (*_SERIES, *_GROUPS, "snapshot")
)


def write(checkpoint: Checkpoint, folder: Path) -> Path:
    """Keep `checkpoint` in the run's folder, whole or not at all; once it is durable, the oldest
    ones are removed.

    Raises:
        RecordError: if the folder cannot be written.
    """
    snapshot = checkpoint.snapshot
    arrays = {name: getattr(checkpoint, name) for name in _SERIES}
    groups = {group: getattr(checkpoint, group) for group in _GROUPS}
    groups |= {group: getattr(snapshot, group) for group in _STATE}
    groups["schedule"] = {name: np.float64(value) for name, value in snapshot.schedule.items()}
    for group, members in groups.items():
        arrays |= ungrouped(group, members)
    metadata = {"schema": SCHEMA, "step": snapshot.step} | {
        file_name(name): getattr(checkpoint, name) for name in METADATA
    }
    path = folder / FOLDER / f"{checkpoint.stem}-{snapshot.step:010d}.safetensors"
    write_tensors(path, metadata, arrays)
    remove(folder, checkpoint.stem, keep=KEEP_LAST, shared=True)
    return path


def read(path: Path) -> Checkpoint:
    """The checkpoint in `path`, checked: nothing is missing, of another shape or dtype, or not
    finite.

    Raises:
        RecordError: if it is missing, damaged, or of another version.
    """
    metadata, arrays = read_tensors(path, SCHEMA, "checkpoint", HINT)
    try:
        series = {name: arrays.pop(name) for name in _SERIES}
        groups: dict[str, Any] = grouped(arrays, (*_GROUPS, *_STATE, "schedule"))
        schedule = {name: float(array) for name, array in groups.pop("schedule").items()}
        state = {name: groups.pop(name) for name in _STATE}
        snapshot = Snapshot(**state, schedule=schedule, step=metadata.pop("step"))
        checkpoint = Checkpoint(**fields_of(metadata), **series, **groups, snapshot=snapshot)
        problem = _problem(checkpoint)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        problem = type(error).__name__
    if problem:
        raise RecordError(f"the checkpoint {path} cannot be used ({problem}): {HINT}")
    if path.name != f"{checkpoint.stem}-{checkpoint.step:010d}.safetensors":
        raise RecordError(f"the checkpoint {path} is not what its name says: {HINT}")
    return checkpoint


def found(folder: Path, stem: str) -> list[Path]:
    """The checkpoints of one run, the newest first."""
    pattern = re.compile(re.escape(stem) + r"-\d{10}\.safetensors")
    return sorted(
        (p for p in (folder / FOLDER).glob("*.safetensors") if pattern.fullmatch(p.name)),
        reverse=True,
    )


def remove(folder: Path, stem: str, keep: int = 0, shared: bool = False) -> None:
    """Remove a run's checkpoints, but the newest `keep`; their folder, too, if it is empty then.

    Args:
        shared: another process may write to the folder now, so it stays.

    Raises:
        RecordError: if the folder cannot be written.
    """
    try:
        for path in found(folder, stem)[keep:]:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_remove(folder, error) from error
    if not shared:
        remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Remove the folder of checkpoints, if it is empty.

    Raises:
        RecordError: if it cannot be removed.
    """
    try:
        if (folder / FOLDER).is_dir() and not any((folder / FOLDER).iterdir()):
            (folder / FOLDER).rmdir()
            flush_folder(folder)
    except OSError as error:
        raise _cannot_remove(folder, error) from error


def _cannot_remove(folder: Path, error: OSError) -> RecordError:
    return RecordError(
        f"cannot remove old checkpoints from {folder} ({error.strerror}): make the folder writable"
    )


def for_backend(checkpoint: Checkpoint, backend: str, source: str) -> Checkpoint:
    """The same state for another backend to go on from.

    Args:
        source: machine.source_digest(backend).
    """
    changed: dict[str, Any] = {
        name: getattr(checkpoint, name) for name in (*METADATA, *_SERIES, *_GROUPS, "snapshot")
    }
    changed |= {"backend": backend, "source": source}
    return Checkpoint(**changed)


class CheckpointManager:
    """Writes the checkpoints of a run, and says when to stop it.

    Args:
        every: steps between two checkpoints; 0: only where the run is stopped.
        signals: a signal stops the run; None: there are none.
        stopping: whether the run should stop; None: after a signal.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        signals: SignalHandler | None = None,
        stopping: Callable[[], bool] | None = None,
    ) -> None:
        self.folder, self.every = folder, every
        self.signals = SignalHandler() if signals is None else signals
        self.stopping = self.signals.requested if stopping is None else stopping
        self.last_path: Path | None = None

    def should_save(self, before: int, now: int) -> bool:
        """Whether to write one after `now` steps, if the last chance was after `before`."""
        return self.every > 0 and now // self.every > before // self.every

    def save(self, checkpoint: Checkpoint) -> None:
        with self.signals.masked():
            self.last_path = write(checkpoint, self.folder)


# --- Checks


def is_finite(snapshot: Snapshot) -> bool:
    """Whether every parameter, momentum buffer and statistic is."""
    groups = (snapshot.parameters, snapshot.model_state, snapshot.momentum)
    return all(bool(np.isfinite(array).all()) for group in groups for array in group.values())


def check(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    data: dict[str, Any],
    shapes: dict[str, tuple[int, ...]] | None,
    source: str,
) -> None:
    """Raise RecordError unless the run of this configuration, data and network can go on from
    `checkpoint`.

    Args:
        shapes: Backend.shapes(); None: not looked at.
        source: machine.source_digest(checkpoint.backend), as it is now.
    """
    location = {"name": data["name"]}  # the same data may lie elsewhere
    mismatches = [
        ("is of a run with another configuration", checkpoint.config != config),
        ("is of a run on other data", checkpoint.data | location != data),
        (
            "is of another network",
            shapes not in (None, {n: a.shape for n, a in checkpoint.weights.items()}),
        ),
        ("is stale, the code has changed since", checkpoint.source != source),
    ]
    for problem, applies in mismatches:
        if applies:
            raise RecordError(
                f"the checkpoint of {checkpoint.stem} after step {checkpoint.step} {problem}: start the run again, in "
                "another folder (--out), or delete the folder's checkpoints"
            )


def _problem(checkpoint: Checkpoint) -> str | None:
    """What is wrong with it, if anything is."""
    return next((problem for problem, wrong in _checks(checkpoint) if wrong()), None)


def _checks(c: Checkpoint) -> list[tuple[str, Callable[[], bool]]]:
    """What may be wrong, in an order in which each check may rely on those before it."""
    s, kind = c.snapshot, numpy_dtype

    def mismatches(arrays: Arrays, like: Arrays) -> bool:
        one, other = (
            {name: (a.shape, a.dtype) for name, a in tensors.items()} for tensors in (arrays, like)
        )
        return one != other

    def nonfinite(arrays: Arrays) -> bool:
        return not all(bool(np.isfinite(array).all()) for array in arrays.values())

    return [
        ("backend", lambda: c.backend not in BACKENDS),
        ("dtype", lambda: c.dtype not in DTYPES),
        ("twin", lambda: c.twin is not None and not is_count(c.twin, 1)),
        ("step", lambda: not is_count(s.step, 0)),
        (
            "config",
            lambda: (
                not isinstance(c.config, dict) or not isinstance(c.config["schedule"]["kind"], str)
            ),
        ),
        ("data", lambda: not isinstance(c.data, dict)),
        ("source", lambda: not isinstance(c.source, str)),
        ("seconds", lambda: type(c.seconds) is not float or not 0 <= c.seconds < np.inf),
        (
            "layers",
            lambda: (
                not isinstance(c.layers, list)
                or not all(isinstance(name, str) for name in c.layers)
            ),
        ),
        ("segments", lambda: not _valid_segments(c.segments, s.step)),
        ("perturbation_rng_state", lambda: not _valid_rng_state(c)),
        ("loss", lambda: not _series(c.loss, s.step)),
        ("gradient_norm", lambda: not _norms(c.gradient_norm, s.step)),
        ("lr", lambda: not _series(c.lr, s.step)),
        (
            "weights",
            lambda: (
                not c.weights or any(array.dtype != kind(c.dtype) for array in c.weights.values())
            ),
        ),
        ("weights, not finite", lambda: nonfinite(c.weights)),
        ("model state, not finite", lambda: nonfinite(s.model_state)),
        ("parameters", lambda: not s.parameters or mismatches(s.tensors, c.weights)),
        ("parameters, not finite", lambda: nonfinite(s.parameters)),
        (
            "momentum",
            lambda: mismatches(
                s.momentum, s.parameters if s.step > 0 and c.config["momentum"] != 0 else {}
            ),
        ),
        ("momentum, not finite", lambda: nonfinite(s.momentum)),
        ("schedule", lambda: s.schedule.keys() != _schedule(c)),
        (
            "schedule, not finite",
            lambda: any(not np.isfinite(x) for name, x in s.schedule.items() if name != "best"),
        ),
        ("schedule, best", lambda: s.schedule.get("best", 0.0) != s.schedule.get("best", 0.0)),
        ("first_steps", lambda: not all(_is_first_steps_key(key) for key in c.first_steps)),
        (
            "parameter_history",
            lambda: not all(key.partition("/")[0].isdecimal() for key in c.parameter_history),
        ),
    ]


def _series(array: np.ndarray, steps: int) -> bool:
    return array.dtype == np.float64 and array.shape == (steps,) and bool(np.isfinite(array).all())


def _norms(array: np.ndarray, steps: int) -> bool:
    """Their squares may overflow where the loss is finite."""
    return array.dtype == np.float64 and array.shape == (steps,) and bool((array >= 0).all())


def _valid_segments(segments: list[dict[str, Any]], steps: int) -> bool:
    stops = [0, *(segment["stop"] for segment in segments)]
    whole = all(
        is_count(segment["stop"], 1) and segment["backend"] in BACKENDS and len(segment) == 2
        for segment in segments
    )
    return whole and stops == sorted(set(stops)) and stops[-1] == steps


def _valid_rng_state(checkpoint: Checkpoint) -> bool:
    """A twin has the state of a generator that NumPy takes, and the run itself has none."""
    if checkpoint.twin is None or checkpoint.perturbation_rng_state is None:
        return checkpoint.twin is None and checkpoint.perturbation_rng_state is None
    image_perturbation_rng(0, 1).bit_generator.state = checkpoint.perturbation_rng_state
    return True


def _schedule(checkpoint: Checkpoint) -> set[str]:
    """The numbers that the schedule has, by name."""
    if checkpoint.step == 0:
        return set()
    counters = {"scale", "best", "bad", "cooldown", "count", "mean"}
    return {"lr"} | (counters if checkpoint.config["schedule"]["kind"] == "plateau" else set())


def _is_first_steps_key(key: str) -> bool:
    step, stage, _ = key.split("/", 2)
    return step.isdecimal() and stage in STAGES
