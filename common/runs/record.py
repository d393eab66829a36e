"""The record of a finished run: one safetensors file, checked before it is used."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TypedDict

import numpy as np

from lockstep.common.config import BACKENDS, DTYPES, Config
from lockstep.common.dtypes import numpy_dtype
from lockstep.common.errors import ConfigError, RecordError
from lockstep.common.protocol import STAGES, Arrays, RankDifference
from lockstep.common.runs.file_checks import (
    Check,
    all_finite,
    are_names,
    are_rank_differences,
    first_problem,
    has_all_layers,
    is_count,
    is_time,
    same_tensors,
)
from lockstep.common.system.storage import MAX_BYTES, JsonObject, read_tensors, write_tensors

SCHEMA = 3
# Steps recorded tensor by tensor; two, since momentum and dampening first act in the second.
FIRST_STEPS = 2


class Segment(TypedDict):
    """Consecutive steps that one backend took."""

    backend: str
    stop: int  # one past the last step


@dataclass(frozen=True)
class Record:
    """One run of one backend in one precision."""

    backend: str  # "torch" or "flax"
    dtype: str
    twin: int | None  # None: the run itself; 1, 2, ...: its twins; 0: the same run again
    config: JsonObject  # Config.to_json() of the resolved run
    data: JsonObject  # training.describe()
    environment: JsonObject  # Backend.describe()
    source: str  # environment.source_digest(backend): the code that made it
    loss: np.ndarray  # float64 (steps,): mean cross entropy of each batch, nats
    gradient_norm: np.ndarray  # float64 (steps,)
    lr: np.ndarray  # float64 (steps,)
    # int64 (test images,); of a pair that predicts no classes, its outputs: floating-point (n,
    # numbers), for the first test inputs
    predictions: np.ndarray
    test_loss: float  # mean cross entropy over the test images, nats
    seconds: float  # wall time of the training steps, compilation included
    steps_per_second: float  # without the first chunk, which compiles, if there are others
    # Initial parameters and model state, as the backend held them.
    weights: Arrays = field(default_factory=dict)
    # "<step>/<stage>/<tensor>" of the first steps.
    first_steps: Arrays = field(default_factory=dict)
    # The tensors of the forward pass, in the order of the calls.
    layers: list[str] = field(default_factory=list)
    # "<steps done>/<parameter>", about once per window.
    parameter_history: Arrays = field(default_factory=dict)
    final: Arrays = field(default_factory=dict)  # parameters and model state after the last step
    # int64 (steps,): `batch_digests` of each step's batch; 0 for no batch
    batch_digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    nonfinite_step: int | None = None  # the step whose loss was not finite, where training ended
    segments: list[Segment] = field(default_factory=list)
    # Of a run of several processes: where their states were not equal, at the first such step.
    rank_differences: list[RankDifference] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.loss)

    @property
    def processes(self) -> int:
        """How many trained it together."""
        found = self.environment.get("processes")
        return found if isinstance(found, int) else 1

    @property
    def first_nonfinite(self) -> int | None:
        """The first step whose loss or gradient norm is not finite."""
        finite = np.isfinite(self.loss) & np.isfinite(self.gradient_norm)
        return None if finite.all() else int(np.argmin(finite))

    def until(self, step: int) -> Record:
        """The record of the first `step` steps. `final` and the evaluation stay: they belong to a
        later state."""

        def earlier(arrays: Arrays, last: int) -> Arrays:
            return {k: array for k, array in arrays.items() if int(k.partition("/")[0]) <= last}

        return replace(
            self,
            loss=self.loss[:step],
            gradient_norm=self.gradient_norm[:step],
            lr=self.lr[:step],
            batch_digests=self.batch_digests[:step],
            first_steps=earlier(self.first_steps, step - 1),
            parameter_history=earlier(self.parameter_history, step),
        )

    @property
    def stem(self) -> str:
        """The file's name, without its ending."""
        return file_stem(self.backend, self.dtype, self.twin)


def windows(steps: int) -> list[tuple[int, int]]:
    """Split the run into windows [0, 1), [1, 3), [3, 10), [10, 30), ...: (start, stop) pairs; the
    remainder joins the last. Without steps there is none."""
    if steps == 0:
        return []
    bounds = [0, 1]
    while (bound := (1, 3)[len(bounds) % 2 == 0] * 10 ** ((len(bounds) - 1) // 2)) <= steps:
        bounds.append(bound)
    bounds = [*bounds[:-1], steps] if steps > 1 else bounds
    return list(itertools.pairwise(bounds))


def file_stem(backend: str, dtype: str, twin: int | None = None) -> str:
    return f"{backend}-{dtype}" + ("" if twin is None else f"-twin{twin}")


SERIES = ("loss", "gradient_norm", "lr", "batch_digests", "predictions")
ARRAY_GROUPS = ("weights", "first_steps", "parameter_history", "final")
# The names that files use, where the fields have others.
FILE_NAMES = {
    "first_steps": "opening",
    "parameter_history": "along",
    "segments": "legs",
    "nonfinite_step": "broken",
    "perturbation_rng_state": "rounding",
}
_FIELDS = {name: field for field, name in FILE_NAMES.items()}
METADATA = tuple(f.name for f in fields(Record) if f.name not in SERIES + ARRAY_GROUPS)


def write(record: Record, folder: Path) -> Path:
    """Write `record` to `folder`, completely or not at all.

    Raises:
        RecordError: if the folder cannot be written.
    """
    arrays = {name: getattr(record, name) for name in SERIES}
    for group in ARRAY_GROUPS:
        arrays |= ungrouped(group, getattr(record, group))
    path = folder / f"{record.stem}.safetensors"
    metadata = {file_name(name): getattr(record, name) for name in METADATA}
    write_tensors(path, {"schema": SCHEMA} | metadata, arrays)
    return path


def read(path: Path, max_bytes: float = MAX_BYTES) -> Record:
    """The record in `path`, checked: complete, of the right types, shapes and dtypes, and finite.

    Args:
        max_bytes: a larger file is refused.

    Raises:
        RecordError: if it is missing, damaged, or of another version.
    """
    hint = "delete it and run that backend again"
    metadata, arrays = read_tensors(path, SCHEMA, "record", hint, max_bytes)
    try:
        series = {name: arrays.pop(name) for name in SERIES}
        groups: JsonObject = dict(grouped(arrays, ARRAY_GROUPS))
        found = Record(**fields_of(metadata), **series, **groups)
        problem = first_problem(_checks(found))
    except (
        ConfigError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        problem = type(error).__name__
    if problem:
        raise RecordError(f"the record {path} cannot be used ({problem}): {hint}")
    return found


def file_name(field: str) -> str:
    """The name that files use for a field of a record or a checkpoint."""
    return FILE_NAMES.get(field, field)


def fields_of(metadata: JsonObject) -> JsonObject:
    """Metadata of a file, by the names of the fields.

    Raises:
        KeyError: for a name that files do not use.
    """
    return {
        (_FIELDS[name] if name in FILE_NAMES else _FIELDS.get(name, name)): value
        for name, value in metadata.items()
    }


def ungrouped(group: str, arrays: Arrays) -> Arrays:
    """The arrays of one group as "<group>/<name>", as files name them."""
    return {f"{file_name(group)}/{name}": array for name, array in arrays.items()}


def grouped(arrays: Arrays, groups: Sequence[str]) -> dict[str, Arrays]:
    """Arrays called "<group>/<name>", as files name them, by group and name.

    Raises:
        KeyError: for a name that is in none of `groups`.
    """
    found: dict[str, Arrays] = {group: {} for group in groups}
    named = {file_name(group): found[group] for group in groups}
    for name, array in arrays.items():
        group, _, rest = name.partition("/")
        named[group][rest] = array
    return found


# --- Checks

# Of the tensors of the first steps.
ALLOWED_DTYPES = ("float64", "float32", "bfloat16", "int64", "int32")


def _checks(r: Record) -> Iterator[Check]:
    """The checks of a record; each relies on those before it."""
    yield from _metadata_checks(r)
    yield from _series_checks(r)
    yield from _tensor_checks(r)


def _metadata_checks(r: Record) -> list[Check]:
    return [
        ("backend", lambda: r.backend not in BACKENDS),
        ("dtype", lambda: r.dtype not in DTYPES),
        ("twin", lambda: r.twin is not None and not is_count(r.twin, 0)),
        ("config", lambda: not is_count(Config.from_json(r.config).steps, 1)),
        ("data", lambda: not _is_data(r.data)),
        ("environment", lambda: not isinstance(r.environment, dict)),
        ("source", lambda: not isinstance(r.source, str)),
        ("times", lambda: not is_time(r.seconds) or not _is_speed(r.steps_per_second)),
        ("layers", lambda: not are_names(r.layers)),
        ("nonfinite_step", lambda: not _is_step(r.nonfinite_step, r.config["steps"])),
        ("segments", lambda: not _valid_segments(r.segments, r.config["steps"], r.nonfinite_step)),
        ("rank_differences", lambda: not are_rank_differences(r.rank_differences)),
    ]


def _series_checks(r: Record) -> list[Check]:
    def taken() -> int:
        """Steps that were taken."""
        return r.steps if r.nonfinite_step is None else r.nonfinite_step + 1

    return [
        ("loss", lambda: not _is_series(r.loss, r.config["steps"])),
        ("gradient_norm", lambda: not _is_series(r.gradient_norm, r.config["steps"])),
        ("lr", lambda: not _is_series(r.lr, r.config["steps"])),
        (
            "batch_digests",
            lambda: (
                r.batch_digests.dtype != np.int64 or r.batch_digests.shape != (r.config["steps"],)
            ),
        ),
        ("loss, not finite", lambda: not _finite_until(r.loss, r.nonfinite_step)),
        ("lr, not finite", lambda: not np.isfinite(r.lr[: taken()]).all()),
        ("gradient_norm, not a number", lambda: not _are_norms(r.gradient_norm, r.nonfinite_step)),
        ("test_loss", lambda: type(r.test_loss) is not float),
        ("predictions", lambda: not _are_predictions(r.predictions, r.data)),
    ]


def _tensor_checks(r: Record) -> list[Check]:
    dtype, weights, first_steps = r.dtype, r.weights.values(), r.first_steps.items()
    return [
        ("weights", lambda: not r.weights or any(a.dtype != numpy_dtype(dtype) for a in weights)),
        ("weights, not finite", lambda: not all_finite(r.weights)),
        ("final", lambda: not same_tensors(r.final, r.weights)),
        (
            "first_steps",
            lambda: (
                not first_steps
                or not all(_is_first_steps_tensor(key, array) for key, array in first_steps)
            ),
        ),
        ("layers, of the first steps", lambda: not has_all_layers(r.layers, r.first_steps)),
        (
            "parameter_history",
            lambda: not all(same_tensors(a, r.weights) for a in parameters_by_step(r).values()),
        ),
    ]


def _is_speed(value: object) -> bool:
    """NaN is one, too: of a run that took no step."""
    return is_time(value) or (type(value) is float and value != value)


def _is_step(value: object, steps: int) -> bool:
    """Whether it is the number of a step of the run, or None."""
    return value is None or is_count(value, 0, steps - 1)


def _is_data(data: object) -> bool:
    """Whether it is what `training.describe` returns."""
    if not isinstance(data, dict) or data.keys() != {"name", "digest", "order", "sizes", "classes"}:
        return False
    sizes, classes = data["sizes"], data["classes"]
    return (
        all(isinstance(data[name], str) for name in ("name", "digest", "order"))
        and (isinstance(sizes, dict) and sizes.keys() == {"train", "test"})
        and all(is_count(size, 1) for size in sizes.values())
        and are_names(classes)
        and len(classes) != 1
    )


def _valid_segments(segments: object, steps: int, nonfinite_step: int | None) -> bool:
    """Whether they follow each other up to the last step; a run whose loss was not finite ended
    before that."""
    if not isinstance(segments, list) or not all(
        isinstance(segment, dict) and len(segment) == 2 for segment in segments
    ):
        return False
    if not all(
        segment["backend"] in BACKENDS and is_count(segment["stop"], 1, steps)
        for segment in segments
    ):
        return False
    stops = [segment["stop"] for segment in segments]
    return stops == sorted(set(stops)) and (nonfinite_step is not None or stops[-1] == steps)


def _is_series(array: np.ndarray, steps: int) -> bool:
    return array.dtype == np.float64 and array.shape == (steps,)


def _finite_until(loss: np.ndarray, nonfinite_step: int | None) -> bool:
    """Whether losses are finite up to step `nonfinite_step`, not there, and NaN after it."""
    if nonfinite_step is None:
        return bool(np.isfinite(loss).all())
    before, after = loss[:nonfinite_step], loss[nonfinite_step + 1 :]
    return bool(
        np.isfinite(before).all()
        and not np.isfinite(loss[nonfinite_step])
        and np.isnan(after).all()
    )


def _are_norms(norms: np.ndarray, nonfinite_step: int | None) -> bool:
    """Squares may overflow where the loss is finite; a NaN makes the next loss NaN."""
    last = len(norms) if nonfinite_step is None else nonfinite_step
    return bool((norms[: max(0, last - 1)] >= 0).all() and not (norms < 0).any())


def _are_predictions(predictions: np.ndarray, data: JsonObject) -> bool:
    count = data["sizes"]["test"]
    if not data["classes"]:
        floating = any(predictions.dtype == numpy_dtype(dtype) for dtype in DTYPES)
        return floating and predictions.ndim == 2 and 1 <= len(predictions) <= count
    right = predictions.dtype == np.int64 and predictions.shape == (count,)
    return right and bool(predictions.min() >= 0 and predictions.max() < len(data["classes"]))


def _is_first_steps_tensor(key: str, array: np.ndarray) -> bool:
    step, stage, tensor = key.split("/", 2)
    named = step in map(str, range(FIRST_STEPS)) and stage in STAGES and tensor != ""
    return named and any(array.dtype == numpy_dtype(kind) for kind in ALLOWED_DTYPES)


def parameters_by_step(record: Record) -> dict[int, Arrays]:
    """The parameters along the run by the number of steps done.

    Raises:
        ValueError: for a key that is not "<steps done>/<parameter>", or a step that the run does
            not have.
    """
    found: dict[int, Arrays] = {}
    for key, array in record.parameter_history.items():
        step, _, name = key.partition("/")
        if not re.fullmatch("[1-9][0-9]{0,9}", step) or int(step) > record.steps:
            raise ValueError(key)
        found.setdefault(int(step), {})[name] = array
    return found
