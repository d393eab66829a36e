"""The tensors of a recording, prepared for matching."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lockstep.common.recorder import values
from lockstep.common.recorder.likeness import Path, paths
from lockstep.common.recorder.recording import Recording


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of one side."""

    number: int
    name: str
    array: np.ndarray
    path: Path
    is_parameter: bool
    is_kept: bool  # False: only its fingerprint is
    gradient: np.ndarray | None  # of step 0
    update: np.ndarray | None  # what the first steps added

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        return self.array.dtype.kind not in "biu"

    @property
    def is_out_first(self) -> bool:
        """Whether a weight is (out, in), by its name, as in PyTorch and Equinox."""
        return self.path.last.endswith("weight")

    def keys(self) -> np.ndarray:
        return values.keys(self.array)

    @cached_property
    def _digest(self) -> tuple[bool, int]:
        keyed = self.keys()
        return values.is_constant(keyed), values.signature(keyed)

    @property
    def is_constant(self) -> bool:
        return self._digest[0]

    @property
    def signature(self) -> int:
        return self._digest[1]


def tensors(recording: Recording) -> list[Tensor]:
    """Those of `weights`, in the order of their definition."""
    names = list(recording.weights)
    if names == sorted(names):  # a dictionary's order in JAX: layer 10 comes after layer 9
        names.sort(key=lambda name: [_natural(part) for part in name.split(".")])
    parameters, prints = set(recording.parameters), set(recording.fingerprints)
    return [
        Tensor(
            number,
            path.name,
            recording.weights[path.name],
            path,
            path.name in parameters,
            path.name not in prints and f"weights/{path.name}" not in prints,
            recording.first_steps.get(f"0/backward/{path.name}"),
            _update(recording, path.name),
        )
        for number, path in enumerate(paths(names))
    ]


def _natural(part: str) -> list[tuple[int, str]]:
    return [
        (int(text), "") if text.isdecimal() else (0, text) for text in re.findall(r"\d+|\D+", part)
    ]


def _update(recording: Recording, name: str) -> np.ndarray | None:
    before = recording.weights[name]
    steps = sorted(
        (key for key in recording.parameter_history if key.partition("/")[2] == name),
        key=lambda key: int(key.partition("/")[0]),
    )
    after = recording.first_steps.get(f"0/update/{name}")
    if after is None and steps:
        after = recording.parameter_history[steps[0]]
    if after is None or after.shape != before.shape or before.dtype == np.bool_:
        return None
    return after - before
