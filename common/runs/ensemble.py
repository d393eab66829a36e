"""A run and its twins: runs of the same program that differ from it by rounding alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lockstep.common.runs.record import Record


@dataclass(frozen=True)
class Ensemble:
    """One backend's run in one precision, and its twins."""

    run: Record
    twins: tuple[Record, ...] = ()
    short_twins: tuple[Record, ...] = ()  # of these only the first steps were trained

    @classmethod
    def of(cls, records: Sequence[Record]) -> Ensemble:
        """The ensemble of a run, which comes first, and its twins."""
        return cls(records[0], tuple(records[1:]))

    @property
    def records(self) -> list[Record]:
        """The run, then its twins."""
        return [self.run, *self.twins]

    def add_twins(self, twins: Iterable[Record]) -> Ensemble:
        return replace(self, twins=(*self.twins, *twins))

    def with_short_twins(self, twins: Iterable[Record]) -> Ensemble:
        return replace(self, short_twins=tuple(twins))


Ensembles = dict[str, Ensemble]  # by backend, in one precision
