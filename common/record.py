"""What one training run leaves behind, and how it is kept: one safetensors file per run, checked before it is used."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import RecordError
from common.protocol import Arrays

SCHEMA = 1
OPENING_STEPS = 2  # steps recorded tensor by tensor; two, since momentum and dampening first act in the second


@dataclass(frozen=True)
class Record:
    """One run of one backend through one lens."""

    backend: str  # "torch" or "flax"
    dtype: str  # the lens
    twin: int | None  # None: the run itself; 1, 2, ...: its twins
    config: dict[str, Any]  # Config.to_json() of the resolved run
    data: dict[str, Any]  # name, digest, order, sizes, classes
    environment: dict[str, Any]  # Backend.describe()
    source: str  # machine.source(backend): the code that made it
    loss: np.ndarray  # float64 (steps,): mean cross entropy of each batch, nats
    gradient_norm: np.ndarray  # float64 (steps,)
    lr: np.ndarray  # float64 (steps,)
    predictions: np.ndarray  # int64 (test images,)
    test_loss: float  # mean cross entropy over the test images, nats
    seconds: float  # wall time of the training steps, compilation included
    steps_per_second: float  # after the first chunk, which compiles; of all steps where there is no other
    weights: Arrays = field(default_factory=dict)  # initial parameters, as the backend held them
    opening: Arrays = field(default_factory=dict)  # "<step>/<stage>/<tensor>" of the first steps
    layers: list[str] = field(default_factory=list)  # the tensors of the forward pass, in the order of the calls
    along: Arrays = field(default_factory=dict)  # "<steps done>/<parameter>", about once per stretch
    final: Arrays = field(default_factory=dict)  # parameters after the last step

    @property
    def steps(self) -> int:
        return len(self.loss)

    @property
    def stem(self) -> str:
        """The file's name, without its ending."""
        return file_stem(self.backend, self.dtype, self.twin)


def stretches(steps: int) -> list[tuple[int, int]]:
    """Cut `steps` at 1, 3, 10, 30, 100, ...: (start, stop) pairs; what is left over belongs to the last whole one."""
    edges = [0, 1]
    while (edge := (1, 3)[len(edges) % 2 == 0] * 10 ** ((len(edges) - 1) // 2)) <= steps:
        edges.append(edge)
    edges = [*edges[:-1], steps] if steps > 1 else edges
    return list(itertools.pairwise(edges))


def file_stem(backend: str, dtype: str, twin: int | None = None) -> str:
    return f"{backend}-{dtype}" + ("" if twin is None else f"-twin{twin}")


_SERIES = ("loss", "gradient_norm", "lr", "predictions")
_GROUPS = ("weights", "opening", "along", "final")
_FACTS = tuple(f.name for f in fields(Record) if f.name not in _SERIES + _GROUPS)


def write(record: Record, folder: Path) -> Path:
    """Keep `record` in `folder`, whole or not at all.

    Raises:
        RecordError: if the folder cannot be written.
    """
    arrays = {name: np.asarray(getattr(record, name), order="C") for name in _SERIES}
    for group in _GROUPS:
        arrays |= {f"{group}/{name}": np.asarray(a, order="C") for name, a in getattr(record, group).items()}
    facts = json.dumps({"schema": SCHEMA} | {name: getattr(record, name) for name in _FACTS}, sort_keys=True)
    content = save(arrays, metadata={"facts": facts, "digest": _digest(facts, arrays)})
    path = folder / f"{record.stem}.safetensors"
    write_whole(path, content)
    return path


def read(path: Path) -> Record:
    """The record in `path`.

    Raises:
        RecordError: if it is missing, damaged, or of another version.
    """
    remedy = "delete it and run that backend again"
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
        facts: dict[str, Any] = json.loads(metadata["facts"])
        if metadata["digest"] != _digest(metadata["facts"], arrays):
            raise RecordError(f"the record {path} is damaged (its digest does not match): {remedy}")
        if facts.pop("schema") != SCHEMA:
            raise RecordError(f"the record {path} is of another version of Lockstep: {remedy}")
        facts |= {name: arrays[name] for name in _SERIES} | {group: {} for group in _GROUPS}
        for name, array in arrays.items():
            group, slash, rest = name.partition("/")
            if slash:
                facts[group][rest] = array
        return Record(**facts)
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"the record {path} cannot be read ({type(error).__name__}): {remedy}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` aside, flush it, and give it its name: a reader finds the whole file or the one before.

    Raises:
        RecordError: if the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        finally:
            Path(aside).unlink(missing_ok=True)
    except OSError as error:
        raise RecordError(
            f"cannot write {path} ({error.strerror or error}): choose another folder with --out or free some space"
        ) from error


def _digest(facts: str, arrays: Arrays) -> str:
    sha = hashlib.sha256(facts.encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()
