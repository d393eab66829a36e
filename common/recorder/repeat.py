"""Whether a script is reproducible: two recordings of it are compared bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lockstep.common.protocol import STAGES
from lockstep.common.recorder.recording import Recording
from lockstep.common.runs.record import FIRST_STEPS

# Of the largest value. Threads that add in another order differ by less than 1e-14 in one step of
# float64; random numbers differ by 1e-3 and more.
ROUNDING = 1e-10


@dataclass(frozen=True)
class Difference:
    """The first tensor in which two runs of one script differ."""

    script: str
    step: int
    stage: str
    tensor: str
    rounding: bool  # they differ by so little that they computed the same

    def before(self, step: int, stage: str) -> bool:
        """Whether it comes before a step and stage, or there."""
        return (self.step, STAGES.index(self.stage)) <= (step, STAGES.index(stage))

    @property
    def message(self) -> str:
        where = {
            "data": self.tensor,
            "weights": f"the initial {self.tensor}",
            "forward": f"the output of {self.tensor}",
            "loss": f"the {self.tensor}" if self.tensor == "loss" else f"the loss {self.tensor}",
            "backward": f"the gradient of {self.tensor}",
            "evaluate": f"the result {self.tensor}",
        }.get(self.stage, self.tensor)
        return (
            f"{self.script} is not reproducible: two runs of it differ first at step {self.step}, "
            f"in {where} ({self.stage}): draw its random numbers with run.random, or seed it"
        )


def first_difference(one: Recording, other: Recording) -> Difference | None:
    """Where two recordings of one script differ first; None if each bit is equal."""
    for step, stage, tensor, x, y in _pairs(one, other):
        if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
            return Difference(one.name, step, stage, tensor, rounding=False)
        if not _same_bits(x, y):
            return Difference(one.name, step, stage, tensor, _is_rounding(x, y))
    return None


Pair = tuple[int, str, str, np.ndarray | None, np.ndarray | None]


def _pairs(one: Recording, other: Recording) -> Iterator[Pair]:
    """Step, stage, tensor and both arrays, in the order in which a run computes them."""
    for name in one.weights | other.weights:
        yield 0, "weights", name, one.weights.get(name), other.weights.get(name)
    steps = min(one.steps, other.steps)
    for step in range(min(steps, FIRST_STEPS)):
        for key in _in_order(one, step):
            _, stage, tensor = key.split("/", 2)
            yield step, stage, tensor, one.first_steps[key], other.first_steps.get(key)
    for step in range(FIRST_STEPS, steps):
        for stage, x, y in (
            ("data", one.batch_digests, other.batch_digests),
            ("loss", one.series, other.series),
        ):
            for name in x:
                if name not in y:
                    yield step, stage, name, x[name], None
                elif not _same_bits(x[name][step : step + 1], y[name][step : step + 1]):
                    yield step, stage, name, x[name][step : step + 1], y[name][step : step + 1]
    if one.steps == other.steps:
        for stage, x, y in (
            ("update", one.final, other.final),
            ("evaluate", one.results, other.results),
        ):
            for name in x:
                yield steps, stage, name, x[name], y.get(name)


def _in_order(recording: Recording, step: int) -> list[str]:
    layers = {name: number for number, name in enumerate(recording.layers)}

    def place(key: str) -> tuple[int, int]:
        _, stage, tensor = key.split("/", 2)
        return STAGES.index(stage), layers.get(tensor, len(layers)) if stage == "forward" else 0

    keys = [key for key in recording.first_steps if key.startswith(f"{step}/")]
    return sorted(keys, key=place)


def _same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    return x.tobytes() == y.tobytes()


def _is_rounding(x: np.ndarray, y: np.ndarray) -> bool:
    if x.dtype.kind not in "f" or x.size == 0:
        return False
    with np.errstate(invalid="ignore", over="ignore"):
        gap, scale = np.abs(x - y).max(), np.abs(x).max()
    return bool(gap <= ROUNDING * scale)
