"""Checkpoints of an unfinished run, from which either backend can resume."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from lockstep.common import optimizers
from lockstep.common.config import BACKENDS, DTYPES, Config
from lockstep.common.dtypes import numpy_dtype
from lockstep.common.errors import ConfigError, RecordError
from lockstep.common.model.perturb import REPLICATE, image_perturbation_rng
from lockstep.common.protocol import STAGES, Arrays, RankDifference, Snapshot
from lockstep.common.runs.file_checks import (
    Check,
    all_finite,
    are_names,
    are_rank_differences,
    first_problem,
    has_all_layers,
    is_count,
    same_tensors,
)
from lockstep.common.runs.record import Segment, fields_of, file_name, file_stem, grouped, ungrouped
from lockstep.common.system.interrupt import SignalHandler
from lockstep.common.system.storage import JsonObject, flush_folder, read_tensors, write_tensors

SCHEMA = 2
FOLDER = "checkpoints"  # in the run's folder
KEEP_LAST = 3  # of each run; the older ones are removed
HINT = "delete it to resume from the one before, or delete the folder to start again"


@dataclass(frozen=True)
class Checkpoint:
    """One run of one backend in one precision, up to some step.

    It need not hold the order of the batches: that is a function of seed, epoch and step.
    """

    backend: str  # the one that took the last step
    dtype: str
    twin: int | None  # None: the run itself; 1, 2, ...: its twins
    config: JsonObject  # Config.to_json() of the resolved run
    data: JsonObject  # training.describe()
    source: str  # environment.source_digest(backend): the code that made it
    segments: list[Segment]
    layers: list[str]  # the tensors of the forward pass, in the order of the calls
    perturbation_rng_state: JsonObject | None  # of a twin, whose images are perturbed
    seconds: float  # wall time of the training steps
    loss: np.ndarray  # float64 (steps done,), as in the record
    gradient_norm: np.ndarray  # float64 (steps done,)
    lr: np.ndarray  # float64 (steps done,)
    batch_digests: np.ndarray  # int64 (steps done,)
    weights: Arrays  # initial parameters and model state
    first_steps: Arrays  # "<step>/<stage>/<tensor>" of the first steps
    parameter_history: Arrays  # "<steps done>/<parameter>"
    snapshot: Snapshot
    # Of a run of several processes: where their states were not equal, at the first such step.
    rank_differences: list[RankDifference] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.snapshot.step

    @property
    def stem(self) -> str:
        """The name of the run's files, without its ending."""
        return file_stem(self.backend, self.dtype, self.twin)


_SERIES = ("loss", "gradient_norm", "lr", "batch_digests")
_GROUPS = ("weights", "first_steps", "parameter_history")
_STATE = ("parameters", "model_state", "extra")
OTHER_SLOTS = (
    "slots"  # the group of all other slots, of a pair's own optimizer: "<slot>/<parameter>"
)
METADATA = tuple(
    f.name for f in fields(Checkpoint) if f.name not in (*_SERIES, *_GROUPS, "snapshot")
)


def write(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write `checkpoint` to the run's folder, completely or not at all; then remove the oldest
    ones.

    Raises:
        RecordError: if the folder cannot be written.
    """
    snapshot = checkpoint.snapshot
    arrays = {name: getattr(checkpoint, name) for name in _SERIES}
    groups = {group: getattr(checkpoint, group) for group in _GROUPS}
    groups |= {group: getattr(snapshot, group) for group in _STATE} | {
        slot: arrays for slot, arrays in snapshot.slots.items() if slot in optimizers.SLOTS
    }
    groups[OTHER_SLOTS] = {
        f"{slot}/{name}": array
        for slot, arrays in snapshot.slots.items()
        if slot not in optimizers.SLOTS
        for name, array in arrays.items()
    }
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
    """The checkpoint in `path`, checked: complete, of the right shapes and dtypes, and finite.

    Raises:
        RecordError: if it is missing, damaged, or of another version.
    """
    metadata, arrays = read_tensors(path, SCHEMA, "checkpoint", HINT)
    try:
        series = {name: arrays.pop(name) for name in _SERIES}
        names = (*_GROUPS, *_STATE, *optimizers.SLOTS, OTHER_SLOTS, "schedule")
        groups: JsonObject = dict(grouped(arrays, names))
        schedule = {name: float(array) for name, array in groups.pop("schedule").items()}
        state = {name: groups.pop(name) for name in _STATE}
        slots = {name: groups.pop(name) for name in optimizers.SLOTS}
        for name, array in groups.pop(OTHER_SLOTS).items():
            slot, _, parameter = name.partition("/")
            slots.setdefault(slot, {})[parameter] = array
        slots = {name: arrays for name, arrays in slots.items() if arrays}
        snapshot = Snapshot(**state, slots=slots, schedule=schedule, step=metadata.pop("step"))
        checkpoint = Checkpoint(**fields_of(metadata), **series, **groups, snapshot=snapshot)
        problem = first_problem(_checks(checkpoint))
    except (
        ConfigError,
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
    """The same state, from which another backend resumes.

    Args:
        source: environment.source_digest(backend).
    """
    return replace(checkpoint, backend=backend, source=source)


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
    """Whether every parameter, statistic and tensor of the optimizer is finite."""
    kept = snapshot.optimizer_tensors | snapshot.extra
    return all_finite(snapshot.tensors) and all_finite(kept)


def check(
    checkpoint: Checkpoint,
    config: JsonObject,
    data: Mapping[str, object],
    shapes: dict[str, tuple[int, ...]] | None,
    source: str,
) -> None:
    """Raise RecordError unless the run of this configuration, data and network can resume from
    `checkpoint`.

    Args:
        shapes: Backend.shapes(); None: not compared.
        source: environment.source_digest(checkpoint.backend), as it is now.
    """
    # The same data may have another name, such as the path of their folder.
    location = {"name": data["name"]}
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
                f"the checkpoint of {checkpoint.stem} after step {checkpoint.step} {problem}: "
                "start the run again, in another folder (--out), or delete the folder's checkpoints"
            )


def _checks(c: Checkpoint) -> Iterator[Check]:
    """The checks of a checkpoint; each relies on those before it."""
    yield from _metadata_checks(c)
    yield from _tensor_checks(c)


def _metadata_checks(c: Checkpoint) -> list[Check]:
    steps = c.snapshot.step
    return [
        ("backend", lambda: c.backend not in BACKENDS),
        ("dtype", lambda: c.dtype not in DTYPES),
        ("twin", lambda: c.twin is not None and not is_count(c.twin, 0)),
        ("step", lambda: not is_count(steps, 0)),
        ("config", lambda: not _is_config(c.config)),
        ("data", lambda: not isinstance(c.data, dict)),
        ("source", lambda: not isinstance(c.source, str)),
        ("seconds", lambda: type(c.seconds) is not float or not 0 <= c.seconds < np.inf),
        ("layers", lambda: not are_names(c.layers)),
        ("segments", lambda: not _valid_segments(c.segments, steps)),
        ("rank_differences", lambda: not are_rank_differences(c.rank_differences)),
        ("perturbation_rng_state", lambda: not _valid_rng_state(c)),
        ("loss", lambda: not _series(c.loss, steps)),
        ("gradient_norm", lambda: not _norms(c.gradient_norm, steps)),
        ("lr", lambda: not _series(c.lr, steps)),
    ]


def _tensor_checks(c: Checkpoint) -> list[Check]:
    s, weights = c.snapshot, c.weights.values()

    def slots_are_right() -> bool:
        config = Config.from_json(c.config)
        if config.optimizer != optimizers.FROM_PAIR:
            expected = optimizers.slots(config) if s.step > 0 else ()
            if s.slots.keys() != {*expected} or s.extra:
                return False
        return all(same_tensors(arrays, s.parameters) for arrays in s.slots.values())

    def schedule_is_finite() -> bool:
        # Before the first observation, the best loss is infinite.
        return all(np.isfinite(x) for name, x in s.schedule.items() if name != "best")

    return [
        ("weights", lambda: not weights or any(a.dtype != numpy_dtype(c.dtype) for a in weights)),
        ("weights, not finite", lambda: not all_finite(c.weights)),
        ("model state, not finite", lambda: not all_finite(s.model_state)),
        ("parameters", lambda: not s.parameters or not same_tensors(s.tensors, c.weights)),
        ("parameters, not finite", lambda: not all_finite(s.parameters)),
        ("optimizer", lambda: not slots_are_right()),
        ("optimizer, not finite", lambda: not all_finite(s.optimizer_tensors)),
        ("schedule", lambda: s.schedule.keys() != _schedule(c)),
        ("schedule, not finite", lambda: not schedule_is_finite()),
        ("schedule, best", lambda: bool(np.isnan(s.schedule.get("best", 0.0)))),
        ("first_steps", lambda: not all(map(_is_first_steps_key, c.first_steps))),
        ("layers, of the first steps", lambda: not has_all_layers(c.layers, c.first_steps)),
        ("parameter_history", lambda: not all(map(_is_history_key, c.parameter_history))),
    ]


def _is_config(config: object) -> bool:
    return isinstance(config, dict) and isinstance(config["schedule"]["kind"], str)


def _series(array: np.ndarray, steps: int) -> bool:
    return array.dtype == np.float64 and array.shape == (steps,) and bool(np.isfinite(array).all())


def _norms(array: np.ndarray, steps: int) -> bool:
    """The squares may overflow where the loss is finite."""
    return array.dtype == np.float64 and array.shape == (steps,) and bool((array >= 0).all())


def _valid_segments(segments: list[Segment], steps: int) -> bool:
    stops = [0, *(segment["stop"] for segment in segments)]
    valid = all(
        is_count(segment["stop"], 1) and segment["backend"] in BACKENDS and len(segment) == 2
        for segment in segments
    )
    return valid and stops == sorted(set(stops)) and stops[-1] == steps


def _valid_rng_state(checkpoint: Checkpoint) -> bool:
    """A twin has a state that NumPy's generator accepts; the run itself, and the same run again,
    have none."""
    is_moved = checkpoint.twin not in (None, REPLICATE)
    if not is_moved or checkpoint.perturbation_rng_state is None:
        return not is_moved and checkpoint.perturbation_rng_state is None
    image_perturbation_rng(0, 1).bit_generator.state = checkpoint.perturbation_rng_state
    return True


def _schedule(checkpoint: Checkpoint) -> set[str]:
    """The names of the schedule's numbers."""
    if checkpoint.step == 0:
        return set()
    counters = {"scale", "best", "bad", "cooldown", "count", "mean"}
    return {"lr"} | (counters if checkpoint.config["schedule"]["kind"] == "plateau" else set())


def _is_first_steps_key(key: str) -> bool:
    step, stage, _ = key.split("/", 2)
    return step.isdecimal() and stage in STAGES


def _is_history_key(key: str) -> bool:
    return key.partition("/")[0].isdecimal()
