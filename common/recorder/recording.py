"""What one run of a training script leaves behind, under the script's own names.

`compare` does not read it as it is: `lockstep.common.recorder.align` brings two recordings into the
names and the layout of the first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from lockstep.common.errors import RecordError
from lockstep.common.protocol import STAGES, Arrays, RankDifference
from lockstep.common.runs.file_checks import (
    Check,
    are_names,
    are_rank_differences,
    first_problem,
    is_count,
)
from lockstep.common.runs.record import FIRST_STEPS, grouped, ungrouped
from lockstep.common.system.storage import JsonObject, read_tensors, write_tensors

SCHEMA = 1
MAX_FILE = 2**33  # bytes; the limit of a recording is the user's
MAX_STEPS = 10**8
MINUS_ZERO = np.iinfo(np.int32).min  # the bits of -0.0 in float32
# Arrays of a file, as "<group>/<name>".
GROUPS = (
    "weights",
    "optimizer",
    "first_steps",
    "parameter_history",
    "final",
    "series",
    "batch_digests",
    "results",
)


@dataclass(frozen=True)
class Recording:
    """One run of one script in one precision.

    Tensors have the script's own names and layout. "<slot> of <parameter>" is an optimizer's state,
    with the slot's common name ("first moment", "second moment", "momentum").
    """

    name: str  # of the side: the script's file name
    framework: str  # "torch" or "jax"
    dtype: str  # "float64", or that of the first parameter
    twin: int | None  # None: the run itself; 1, 2, ...: its twins; 0: the same run again
    script: str  # as it was given
    arguments: list[str]
    source: str  # SHA-256 of the script's file
    environment: JsonObject  # versions, processor, threads
    complete: bool  # the script called `finish`, or took as many steps as was asked for
    # Parameters and buffers after `begin`, in the order of their definition.
    weights: Arrays = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)  # those of `weights` that are trained
    # Of a replay, the optimizer's state before its first step: "<slot> of <parameter>".
    optimizer: Arrays = field(default_factory=dict)
    synced: bool = False  # the script calls `Run.sync`
    # "<step>/<stage>/<tensor>" of the first FIRST_STEPS steps: `data/batch[0]`, `forward/<layer>`,
    # `loss/<name>`, `backward/<parameter>`, `update/<slot> of <parameter>`, `update/<parameter>`.
    first_steps: Arrays = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)  # of `forward`, in the order of the calls
    # "<steps done>/<parameter>": after 3, 10, 30, 100, ... steps.
    parameter_history: Arrays = field(default_factory=dict)
    final: Arrays = field(default_factory=dict)  # parameters and buffers after the last step
    # float64 (steps,) each: the losses by name, and "lr" where it is known.
    series: Arrays = field(default_factory=dict)
    # int64 (steps, 2) for each array of a batch: a digest of its rows in their order, and one that
    # no permutation of its entries changes. 0 where a step had no such array.
    batch_digests: Arrays = field(default_factory=dict)
    results: Arrays = field(default_factory=dict)  # given to `finish`
    # Of names in the groups: tensors over the limit, of which `fingerprint` is kept.
    fingerprints: list[str] = field(default_factory=list)
    # In float64: tensors that are float32 all the same, as "<stage>/<tensor>".
    pinned: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what could not be recorded, a sentence each
    lines: dict[str, str] = field(default_factory=dict)  # "file:line" of the source, by tensor
    seconds: float = 0.0  # from `begin` to the last step
    processes: int = 1  # that ran the script together; this is what rank 0 recorded
    # Of several processes: where their parameters were not equal, at the first such step. None: they
    # were not compared.
    rank_differences: list[RankDifference] | None = None
    # Of several processes: what was not the same in all of them and need not be, as "data/<array>",
    # "forward/<layer>", "losses/<name>", "backward/<parameter>" or "results/<name>".
    local: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return max((len(values) for values in self.series.values()), default=0)

    @property
    def losses(self) -> list[str]:
        return [name for name in self.series if name != "lr"]


# Arrays are stored without an order; these lists keep it.
_ORDERED = ("weights", "series", "batch_digests", "results")
METADATA = tuple(f.name for f in fields(Recording) if f.name not in GROUPS)


def write(recording: Recording, path: Path) -> None:
    """Write `recording` to `path`, completely or not at all.

    Raises:
        RecordError: if the folder cannot be written.
    """
    arrays: Arrays = {}
    for group in GROUPS:
        arrays |= ungrouped(group, getattr(recording, group))
    order = {group: list(getattr(recording, group)) for group in _ORDERED}
    metadata = {name: getattr(recording, name) for name in METADATA}
    write_tensors(path, {"schema": SCHEMA, "kind": "recording", "order": order} | metadata, arrays)


def read(path: Path) -> Recording:
    """The recording in `path`, checked.

    Raises:
        RecordError: if it is missing, damaged, or of another version.
    """
    hint = "record the script again"
    metadata, arrays = read_tensors(path, SCHEMA, "recording", hint, MAX_FILE)
    try:
        if metadata.pop("kind") != "recording":
            raise ValueError
        order = metadata.pop("order")
        groups: JsonObject = dict(grouped(arrays, GROUPS))
        for group in _ORDERED:
            groups[group] = {name: groups[group].pop(name) for name in order[group]}
        found = Recording(**metadata, **groups)
        problem = first_problem(_checks(found))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        problem = type(error).__name__
    if problem:
        raise RecordError(f"the recording {path} cannot be used ({problem}): {hint}")
    return found


def _checks(r: Recording) -> Iterator[Check]:
    """Each relies on those before it."""
    texts = (r.name, r.framework, r.dtype, r.script, r.source)
    yield "names", lambda: not all(isinstance(text, str) for text in texts)
    yield "twin", lambda: r.twin is not None and not is_count(r.twin, 0)
    yield "synced", lambda: not isinstance(r.synced, bool)
    lists = (r.arguments, r.parameters, r.layers, r.fingerprints, r.pinned, r.notes, r.local)
    yield "lists", lambda: not all(are_names(names) for names in lists)
    yield "processes", lambda: not is_count(r.processes, 1)
    yield (
        "rank_differences",
        lambda: r.rank_differences is not None and not are_rank_differences(r.rank_differences),
    )
    yield "parameters", lambda: not set(r.parameters) <= set(r.weights)
    yield (
        "series",
        lambda: any(
            values.dtype != np.float64 or values.shape != (r.steps,) for values in r.series.values()
        ),
    )
    yield (
        "batch_digests",
        lambda: any(
            values.dtype != np.int64 or values.shape != (r.steps, 2)
            for values in r.batch_digests.values()
        ),
    )
    yield "first_steps", lambda: not all(map(_is_first_steps_key, r.first_steps))
    yield (
        "parameter_history",
        lambda: any(not is_count(int(key.partition("/")[0]), 1) for key in r.parameter_history),
    )


def _is_first_steps_key(key: str) -> bool:
    step, stage, tensor = key.split("/", 2)
    return step in map(str, range(FIRST_STEPS)) and stage in STAGES and tensor != ""


# --- What is kept of an array that is not kept


def batch_digest(array: np.ndarray) -> tuple[int, int]:
    """Two digests of an array of a batch, as signed 64-bit numbers: of its rows in their order, and
    of its entries in any order.

    Entries count by their value in float32, whatever their dtype. Within a row their order does not
    count, so that (n, channels, height, width) and (n, height, width, channels) are the same; it
    does in rows of signed integers, such as a text's.
    """
    given = np.asarray(array)
    values = given.reshape(len(given), -1) if given.ndim else given.reshape(1, 1)
    values = values.astype(np.float32, copy=False)
    if values.view(np.int32).min(initial=0) == MINUS_ZERO:
        values = values + np.float32(0)  # -0.0 + 0 is 0.0; all else stays, at the cost of a copy
    bits = values.view(np.uint32)
    of_rows = bits.sum(axis=1, dtype=np.uint32).astype(np.uint64)  # modulo 2^32, which is fast
    # Modulo 2^32 as well: else the sum would depend on which entries share a row.
    unordered = int(of_rows.sum(dtype=np.uint64)) % 2**32
    if given.ndim == 2 and given.dtype.kind == "i":
        of_rows = (bits * _places(bits.shape[1])).sum(axis=1, dtype=np.uint64)
    ordered = _mixed(of_rows + _places(len(of_rows))).sum(dtype=np.uint64)
    return int(ordered.astype(np.int64)), unordered


@functools.lru_cache
def _places(rows: int) -> np.ndarray:
    """uint64 (rows,): a number for each place."""
    return _mixed(np.arange(1, rows + 1, dtype=np.uint64))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer (Steele, Lea and Flood 2014) of each entry, uint64."""
    z = numbers
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fingerprint(array: np.ndarray) -> np.ndarray:
    """float64 (6,): what no permutation of the entries changes: their number, sum, sum of absolute
    values, root of the sum of squares, smallest and largest."""
    values = np.asarray(array).astype(np.float64).ravel()
    if values.size == 0:
        return np.zeros(6)
    norm = float(np.sqrt(np.square(values).sum()))
    sums = [float(values.sum()), float(np.abs(values).sum()), norm]
    return np.array([values.size, *sums, float(values.min()), float(values.max())])


def means(summary: np.ndarray) -> np.ndarray:
    """float64 (5,): mean, mean absolute value, root mean square, smallest and largest of an array of
    which only the `fingerprint` is known: all of the size of its entries."""
    count = max(1.0, float(summary[0]))
    return summary[1:] / np.array([count, count, np.sqrt(count), 1.0, 1.0])
