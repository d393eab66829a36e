"""A run and its twins: runs of the same program that differ from it by rounding alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lockstep.common.model.perturb import REPLICATE
from lockstep.common.runs.record import Record


@dataclass(frozen=True)
class Ensemble:
    """One backend's run in one precision, and its twins."""

    run: Record
    twins: tuple[Record, ...] = ()
    short_twins: tuple[Record, ...] = ()  # of these only the first steps were trained
    replicate: Record | None = None  # the same run again, with nothing moved

    @classmethod
    def of(cls, records: Sequence[Record]) -> Ensemble:
        """The ensemble of a run, which comes first, and its twins."""
        return cls(records[0]).add_twins(records[1:])

    @property
    def records(self) -> list[Record]:
        """The run, then its twins."""
        return [self.run, *self.twins]

    def add_twins(self, twins: Iterable[Record]) -> Ensemble:
        """With these twins, too, and the replicate, if it is among them."""
        twins = list(twins)
        replicate = next((twin for twin in twins if twin.twin == REPLICATE), self.replicate)
        moved = [twin for twin in twins if twin.twin != REPLICATE]
        return replace(self, twins=(*self.twins, *moved), replicate=replicate)

    def until(self, step: int) -> Ensemble:
        """The ensemble as it was after `step` steps."""
        return Ensemble(
            self.run.until(step),
            tuple(twin.until(step) for twin in self.twins),
            tuple(twin.until(step) for twin in self.short_twins),
            None if self.replicate is None else self.replicate.until(step),
        )

    def with_short_twins(self, twins: Iterable[Record]) -> Ensemble:
        return replace(self, short_twins=tuple(twins))


Ensembles = dict[str, Ensemble]  # by backend, in one precision
