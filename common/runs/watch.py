"""Whether the first float64 steps of both backends differ by more than rounding, while they train."""

from __future__ import annotations

import threading

from lockstep.common.config import BACKENDS
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record

# Times the bound. Twins may explain a smaller gap: where a gradient cancels, an ulp in the weights
# moves it by 6.5 times the bound. A wrong padding exceeds the bound by 1e11.
CERTAIN = 1000.0


class FirstStepsDiffer(Exception):
    """The first steps decide the verdict: more training would not change it."""


class FirstStepsWatch:
    """Compares the first steps of both backends as soon as both are there. They may come from two
    threads."""

    def __init__(self) -> None:
        self.differs = False
        self._lock = threading.Lock()
        self.records: dict[str, Record] = {}  # of the first steps, by backend; kept if they differ

    def add(self, record: Record) -> None:
        """The first steps of one backend's run."""
        from lockstep.common.verdict.first_steps import check_first_steps

        with self._lock:
            self.records[record.backend] = record
            if len(self.records) == len(BACKENDS):
                torch, flax = (Ensemble(self.records[name]) for name in BACKENDS)
                checks = check_first_steps(torch, flax)
                self.differs = any(check.bound_usage > CERTAIN for check in checks)
                if not self.differs:
                    self.records.clear()

    def check(self) -> None:
        """Raise FirstStepsDiffer if they do."""
        if self.differs:
            raise FirstStepsDiffer
