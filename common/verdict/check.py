"""One thing that was compared, and how it came out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

BATCH = "batch"  # the name of the check of every step's data
OUTPUTS = "outputs"  # the name of the check of a network that predicts no classes
MEAN = "mean "  # before the name of a loss: the check of its mean over a range of steps


@dataclass(frozen=True)
class Check:
    """One thing that was compared, and how it came out."""

    step: int  # 0 is the first; the number of steps for what is measured after the last
    stage: str
    tensor: str
    gap: float  # between the closest runs of the two backends; infinite if none is finite
    bound: float
    spread: float | None = None  # between the most distant runs of one backend
    values: tuple[float, float] | None = None  # of both runs, where the gap is found
    start: int | None = None  # of a range of steps: its first ...
    stop: int | None = None  # ... and one past its last
    measure: Literal["largest", "median"] = "largest"  # of the differences of a tensor's entries
    sides: tuple[str, str] | None = None  # whose values; None: of the two backends
    most: float = math.inf  # no gap of two runs of this kind could be larger

    @property
    def agrees(self) -> bool:
        return math.isfinite(self.gap) and self.gap <= self.bound

    @property
    def has_power(self) -> bool:
        """Whether some run would fail this check; if none could, that it agrees says nothing."""
        return self.bound < self.most

    @property
    def bound_usage(self) -> float:
        """The gap as a multiple of its bound; infinite if the bound is zero."""
        if self.gap == 0:
            return 0.0
        return self.gap / self.bound if self.bound > 0 and math.isfinite(self.gap) else math.inf

    def to_json(self) -> dict[str, object]:
        """A row of report.json: of `stretches` for a range of steps, else of `ladder`."""
        if self.start is None:
            place: dict[str, object] = {
                "step": self.step,
                "stage": self.stage,
                "tensor": self.tensor,
            }
        else:
            place = {"quantity": self.tensor, "start": self.start, "stop": self.stop}
        return {
            **place,
            "gap": finite(self.gap),
            "drift": finite(self.spread),
            "bound": finite(self.bound),
            "agrees": self.agrees,
            "power": self.has_power,
            "measure": self.measure,
        }


def finite(value: float | None) -> float | None:
    """`value` for JSON, which cannot hold what is not finite: None."""
    return float(value) if value is not None and math.isfinite(value) else None
