"""The processes that run one script together: each keeps digests of what it holds, and the command
that started them compares these.

Parameters, and what the optimizer keeps of them, must be equal to the bit. Of all else a rank may
have its own: its rows of the batch, their loss. That is listed, so that nobody takes it for the
whole.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import numpy as np

from lockstep.common.errors import RecordError, ScriptError
from lockstep.common.protocol import Arrays, RankDifference, split_slot
from lockstep.common.recorder.recording import Recording, fingerprint, means

MAX_DIFFERENCES = 8  # tensors of one rank that are listed
# What the groups of `Recording` that a rank may have its own of are called in `Recording.local`.
LOCAL = {"batch_digests": "data", "series": "losses", "results": "results"}
STAGES = ("forward", "backward")  # likewise, of the first steps


class Digest(TypedDict):
    """What is kept of one tensor."""

    sha256: str
    means: list[float]


class RankFile(TypedDict):
    """What one rank leaves behind."""

    steps: int
    tensors: dict[str, Digest]  # by "<group>/<name>", as in the file of a recording


class Digests:
    """Of what one rank holds."""

    def __init__(self) -> None:
        self._tensors: dict[str, Digest] = {}

    def add(self, group: str, arrays: Arrays) -> None:
        for name, array in arrays.items():
            values = array + 0 if array.dtype.kind == "f" else array  # no -0
            self._tensors[f"{group}/{name}"] = {
                "sha256": hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest(),
                "means": means(fingerprint(values)).tolist(),
            }

    def write(self, path: Path, steps: int) -> None:
        """
        Raises:
            RecordError: if it cannot be written.
        """
        found: RankFile = {"steps": steps, "tensors": self._tensors}
        part = Path(f"{path}.part")
        try:
            part.write_text(json.dumps(found), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise RecordError(
                f"cannot write {path} ({error.strerror}): choose another --out"
            ) from error


def path_of(out: str, rank: int) -> Path:
    """Where a rank writes its digests, next to the recording `out`."""
    return Path(f"{out}.rank{rank}")


def compared(recording: Recording, out: str, suffix: str = "") -> Recording:
    """Rank 0's recording, with what the digests of all ranks say.

    Args:
        suffix: of the digests' names, after `path_of`.

    Raises:
        ScriptError: if a rank left none, or took another number of steps.
    """
    files = [
        _read(Path(f"{path_of(out, rank)}{suffix}"), rank, recording)
        for rank in range(recording.processes)
    ]
    for rank, file in enumerate(files):
        if file["steps"] != files[0]["steps"]:
            raise ScriptError(
                f"{recording.name}: rank {rank} took {file['steps']:,} steps and rank 0 "
                f"{files[0]['steps']:,}: have all ranks take as many"
            )
    first, *others = (file["tensors"] for file in files)
    differences = [
        found
        for rank, theirs in enumerate(others, 1)
        for found in _differences(recording, rank, first, theirs)
    ]
    local = dict.fromkeys(
        name
        for theirs in others
        for key, digest in theirs.items()
        if key in first and digest["sha256"] != first[key]["sha256"]
        if (name := _local_name(key)) is not None
    )
    return replace(recording, rank_differences=differences, local=sorted(local))


def _read(path: Path, rank: int, recording: Recording) -> RankFile:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ScriptError(
            f"{recording.name}: rank {rank} of {recording.processes} recorded nothing: call "
            "lockstep.Run(), run.begin and run.step in all ranks"
        ) from None


def _differences(
    recording: Recording, rank: int, ours: dict[str, Digest], theirs: dict[str, Digest]
) -> list[RankDifference]:
    """What must be equal and is not, at the first such step."""
    found: list[RankDifference] = []
    for key, digest in ours.items():
        place = _shared_tensor(recording, key)
        other = theirs.get(key)
        if place is None or (other is None and place[0] > 0):
            continue
        if other is None or other["sha256"] != digest["sha256"]:
            step, tensor = place
            gap = None if other is None else _gap(digest, other)
            found.append({"step": step, "rank": rank, "tensor": tensor, "gap": gap})
    first = min((each["step"] for each in found), default=0)
    return [each for each in found if each["step"] == first][:MAX_DIFFERENCES]


def _gap(one: Digest, other: Digest) -> float | None:
    """Between two means, norms or extremes, as of tensors that are too large to be kept; None if
    these do not show the difference."""
    gap = float(np.max(np.abs(np.subtract(one["means"], other["means"]))))
    return gap if np.isfinite(gap) and gap > 0 else None


def _shared_tensor(recording: Recording, key: str) -> tuple[int, str] | None:
    """The steps done, and the tensor, of a key whose tensor must be the same in all ranks."""
    group, _, name = key.partition("/")
    step = 0 if group in ("weights", "optimizer") else recording.steps
    if group == "parameter_history":
        done, _, name = name.partition("/")
        step = int(done)
    elif group == "first_steps":
        before, stage, name = name.split("/", 2)
        if stage != "update":
            return None
        step = int(before) + 1
    elif group in LOCAL:
        return None
    return (step, name) if split_slot(name)[1] in recording.parameters else None


def _local_name(key: str) -> str | None:
    group, _, name = key.partition("/")
    if group == "first_steps":
        _, stage, name = name.split("/", 2)
        return f"{stage}/{name}" if stage in STAGES else None
    return f"{LOCAL[group]}/{name}" if group in LOCAL else None
