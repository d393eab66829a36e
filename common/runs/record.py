"""What one training run leaves behind, and how it is kept: one safetensors file per run, checked
before it is used."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.common.config import BACKENDS, DTYPES, MAX_COUNT, Config
from lockstep.common.dtypes import numpy_dtype
from lockstep.common.errors import ConfigError, RecordError
from lockstep.common.protocol import STAGES, Arrays
from lockstep.common.system.storage import MAX_BYTES, read_tensors, write_tensors

SCHEMA = 2
FIRST_STEPS = (
    2  # steps recorded tensor by tensor; two, since momentum and dampening first act in the second
)


@dataclass(frozen=True)
class Record:
    """One run of one backend through one lens."""

    backend: str  # "torch" or "flax"
    dtype: str  # the lens
    twin: int | None  # None: the run itself; 1, 2, ...: its twins
    config: dict[str, Any]  # Config.to_json() of the resolved run
    data: dict[str, Any]  # name, digest, order, sizes, classes
    environment: dict[str, Any]  # Backend.describe()
    source: str  # machine.source_digest(backend): the code that made it
    loss: np.ndarray  # float64 (steps,): mean cross entropy of each batch, nats
    gradient_norm: np.ndarray  # float64 (steps,)
    lr: np.ndarray  # float64 (steps,)
    predictions: np.ndarray  # int64 (test images,)
    test_loss: float  # mean cross entropy over the test images, nats
    seconds: float  # wall time of the training steps, compilation included
    steps_per_second: (
        float  # after the first chunk, which compiles; of all steps where there is no other
    )
    weights: Arrays = field(
        default_factory=dict
    )  # initial parameters and model state, as the backend held them
    first_steps: Arrays = field(
        default_factory=dict
    )  # "<step>/<stage>/<tensor>" of the first steps
    layers: list[str] = field(
        default_factory=list
    )  # the tensors of the forward pass, in the order of the calls
    parameter_history: Arrays = field(
        default_factory=dict
    )  # "<steps done>/<parameter>", about once per window
    final: Arrays = field(default_factory=dict)  # parameters and model state after the last step
    nonfinite_step: int | None = None  # the step whose loss was not finite, where training ended
    segments: list[dict[str, Any]] = field(
        default_factory=list
    )  # "backend", and "stop", one past the last step it took

    @property
    def steps(self) -> int:
        return len(self.loss)

    @property
    def stem(self) -> str:
        """The file's name, without its ending."""
        return file_stem(self.backend, self.dtype, self.twin)


def windows(steps: int) -> list[tuple[int, int]]:
    """Cut `steps` at 1, 3, 10, 30, 100, ...: (start, stop) pairs; what is left over belongs to the
    last whole one."""
    edges = [0, 1]
    while (edge := (1, 3)[len(edges) % 2 == 0] * 10 ** ((len(edges) - 1) // 2)) <= steps:
        edges.append(edge)
    edges = [*edges[:-1], steps] if steps > 1 else edges
    return list(itertools.pairwise(edges))


def file_stem(backend: str, dtype: str, twin: int | None = None) -> str:
    return f"{backend}-{dtype}" + ("" if twin is None else f"-twin{twin}")


SERIES = ("loss", "gradient_norm", "lr", "predictions")
ARRAY_GROUPS = ("weights", "first_steps", "parameter_history", "final")
# The names that files of schema 2 use, where the fields have others.
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
    """Keep `record` in `folder`, whole or not at all.

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
    """The record in `path`, checked: nothing is missing, or of another type, shape or dtype, or not
    finite where it is to be.

    Args:
        max_bytes: a larger file is refused.

    Raises:
        RecordError: if it is missing, damaged, or of another version.
    """
    hint = "delete it and run that backend again"
    metadata, arrays = read_tensors(path, SCHEMA, "record", hint, max_bytes)
    try:
        series: dict[str, Any] = {name: arrays.pop(name) for name in SERIES}
        groups: dict[str, Any] = grouped(arrays, ARRAY_GROUPS)
        found = Record(**fields_of(metadata), **series, **groups)
        problem = next((problem for problem, wrong in _checks(found) if wrong()), None)
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


def fields_of(metadata: dict[str, Any]) -> dict[str, Any]:
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


def _checks(r: Record) -> list[tuple[str, Callable[[], bool]]]:
    """What may be wrong with a record, in an order in which each check may rely on those before
    it."""
    like = {name: (array.shape, array.dtype) for name, array in r.weights.items()}

    def mismatches(arrays: Arrays) -> bool:
        return {name: (array.shape, array.dtype) for name, array in arrays.items()} != like

    return [
        ("backend", lambda: r.backend not in BACKENDS),
        ("dtype", lambda: r.dtype not in DTYPES),
        ("twin", lambda: r.twin is not None and not is_count(r.twin, 1)),
        ("config", lambda: not is_count(Config.from_json(r.config).steps, 1)),
        ("data", lambda: not _is_data(r.data)),
        ("environment", lambda: not isinstance(r.environment, dict)),
        ("source", lambda: not isinstance(r.source, str)),
        (
            "times",
            lambda: (
                not _is_time(r.seconds)
                or not (_is_time(r.steps_per_second) or _is_nan(r.steps_per_second))
            ),
        ),
        (
            "layers",
            lambda: (
                not isinstance(r.layers, list)
                or not all(isinstance(name, str) for name in r.layers)
            ),
        ),
        (
            "nonfinite_step",
            lambda: (
                r.nonfinite_step is not None
                and not is_count(r.nonfinite_step, 0, r.config["steps"] - 1)
            ),
        ),
        ("segments", lambda: not _valid_segments(r.segments, r.config["steps"], r.nonfinite_step)),
        ("loss", lambda: not _is_series(r.loss, r.config["steps"])),
        ("gradient_norm", lambda: not _is_series(r.gradient_norm, r.config["steps"])),
        ("lr", lambda: not _is_series(r.lr, r.config["steps"])),
        ("loss, not finite", lambda: not _finite_until(r.loss, r.nonfinite_step)),
        (
            "lr, not finite",
            lambda: (
                not np.isfinite(
                    r.lr[: r.steps if r.nonfinite_step is None else r.nonfinite_step + 1]
                ).all()
            ),
        ),
        ("gradient_norm, not a number", lambda: not _are_norms(r.gradient_norm, r.nonfinite_step)),
        ("test_loss", lambda: type(r.test_loss) is not float),
        ("predictions", lambda: not _are_predictions(r.predictions, r.data)),
        (
            "weights",
            lambda: (
                not like or any(array.dtype != numpy_dtype(r.dtype) for array in r.weights.values())
            ),
        ),
        (
            "weights, not finite",
            lambda: not all(np.isfinite(array).all() for array in r.weights.values()),
        ),
        ("final", lambda: mismatches(r.final)),
        (
            "first_steps",
            lambda: (
                not r.first_steps
                or not all(
                    _is_first_steps_tensor(key, array) for key, array in r.first_steps.items()
                )
            ),
        ),
        (
            "parameter_history",
            lambda: any(mismatches(arrays) for arrays in parameters_by_step(r).values()),
        ),
    ]


def is_count(value: object, least: int, most: int = MAX_COUNT) -> bool:
    """Whether `value` is a whole number, from JSON, between these two."""
    return type(value) is int and least <= value <= most


def _is_time(value: object) -> bool:
    return type(value) is float and 0 <= value < np.inf


def _is_nan(value: object) -> bool:
    return type(value) is float and value != value


def _is_data(data: object) -> bool:
    """What `train.describe` makes."""
    if not isinstance(data, dict) or data.keys() != {"name", "digest", "order", "sizes", "classes"}:
        return False
    sizes, classes = data["sizes"], data["classes"]
    return (
        all(isinstance(data[name], str) for name in ("name", "digest", "order"))
        and (isinstance(sizes, dict) and sizes.keys() == {"train", "test"})
        and all(is_count(size, 1) for size in sizes.values())
        and (
            isinstance(classes, list)
            and len(classes) >= 2
            and all(isinstance(name, str) for name in classes)
        )
    )


def _valid_segments(segments: object, steps: int, nonfinite_step: int | None) -> bool:
    """Who took the steps, one after the other; a run whose loss was not finite ended before its
    last step."""
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
    """Squares may overflow where a loss is finite; what is not even a number shows in the next
    loss."""
    last = len(norms) if nonfinite_step is None else nonfinite_step
    return bool((norms[: max(0, last - 1)] >= 0).all() and not (norms < 0).any())


def _are_predictions(predictions: np.ndarray, data: dict[str, Any]) -> bool:
    right = predictions.dtype == np.int64 and predictions.shape == (data["sizes"]["test"],)
    return right and bool(predictions.min() >= 0 and predictions.max() < len(data["classes"]))


def _is_first_steps_tensor(key: str, array: np.ndarray) -> bool:
    step, stage, tensor = key.split("/", 2)
    named = step in map(str, range(FIRST_STEPS)) and stage in STAGES and tensor != ""
    return named and any(array.dtype == numpy_dtype(kind) for kind in ALLOWED_DTYPES)


def parameters_by_step(record: Record) -> dict[int, Arrays]:
    """The parameters along the run by the number of steps done.

    Raises:
        ValueError: for a key that is not "<steps done>/<parameter>", of steps that the run has.
    """
    found: dict[int, Arrays] = {}
    for key, array in record.parameter_history.items():
        step, _, name = key.partition("/")
        if not re.fullmatch("[1-9][0-9]{0,9}", step) or int(step) > record.steps:
            raise ValueError(key)
        found.setdefault(int(step), {})[name] = array
    return found
