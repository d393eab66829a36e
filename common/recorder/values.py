"""Finding one tensor in another by its values.

Values are compared as float32, bit by bit (one side may have been through float32): `keys` turns
each into a number. `Lookup` sorts the keys of one array once; then the layout of another in it
takes one look-up for each index of each axis, through an entry whose value occurs once. Every
layout that is found is verified for all entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from lockstep.common.recorder.layout import (
    CHUNK,
    Index,
    Reshaping,
    reshaped,
    reshapings,
)

SAMPLES = 16  # values that are looked up before a layout is worked out
PROBES = 64  # entries that are compared before all are
LINES = 12  # entries, with values that occur once, whose lines along the axes are looked up
TRIED = 48  # indices by which two lines are brought together
MAX_PAIRS = 10**6  # of places that are compared at once
MAX_TIES = 4096  # places of one value that are considered


def keys(array: np.ndarray) -> np.ndarray:
    """uint32 (uint64 of complex numbers), in the array's shape: equal where values are, rounded to
    float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        if array.dtype.kind == "c":
            return np.ascontiguousarray(array.astype(np.complex64)).view(np.uint64)
        rounded = np.array(array, dtype=np.float32, order="C", copy=True)
    rounded += np.float32(0)  # -0.0 becomes 0.0
    return rounded.view(np.uint32)


def signature(keyed: np.ndarray) -> int:
    """A digest that no permutation of the entries changes."""
    flat = keyed.reshape(-1)
    total = 0
    with np.errstate(over="ignore"):
        for start in range(0, flat.size, CHUNK // 4):
            z = flat[start : start + CHUNK // 4].astype(np.uint64)
            z *= np.uint64(0x9E3779B97F4A7C15)
            z ^= z >> np.uint64(29)
            z *= np.uint64(0xBF58476D1CE4E5B9)
            z ^= z >> np.uint64(32)
            total += int(z.sum(dtype=np.uint64))
    return total % 2**64


def is_constant(keyed: np.ndarray) -> bool:
    return keyed.size < 2 or bool(keyed.min() == keyed.max())


@dataclass(frozen=True)
class Found:
    index: Index  # takes the array, in its shape, from where it was found
    how: Reshaping | None  # None: not by permuting and reshaping axes


def whole_layout(
    wanted: np.ndarray, source: np.ndarray, first: Iterable[Reshaping] = ()
) -> Found | None:
    """How the array with the keys `wanted` is taken from that with the keys `source`, of equal
    size; None if in no separable way.

    Args:
        wanted: keys of the array in its own shape.
        source: keys of the array it may lie in.
        first: what is tried before all others; it decides where several fit.
    """
    found = by_axes(wanted, source, first)
    if found is not None:
        return found
    index = Lookup(source).find(wanted)
    return None if index is None else Found(index, None)


def by_axes(
    wanted: np.ndarray, source: np.ndarray, first: Iterable[Reshaping] = ()
) -> Found | None:
    """As `whole_layout`, by permuting and reshaping axes only."""
    probes = _probes(wanted)
    values = wanted[probes]
    flat = source.reshape(-1)
    for how in (*first, *reshapings(wanted.shape, source.shape)):
        index = reshaped(wanted.shape, source.shape, how)
        if (
            index is not None
            and np.array_equal(flat[index.at(*probes)], values)
            and np.array_equal(index.take(source), wanted)
        ):
            return Found(index, how)
    return None


def _probes(array: np.ndarray) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(array.size)
    return tuple(random.integers(0, size, PROBES) for size in array.shape)


class Lookup:
    """The keys of one array, sorted, to find others in it."""

    def __init__(self, source: np.ndarray) -> None:
        self.source = source
        flat = source.reshape(-1)
        if flat.itemsize > 4 or flat.size > 2**32:
            self._order = np.argsort(flat, kind="stable")
            self._sorted = flat[self._order]
            return
        # Sorting keys and positions in one number takes a third of the time of `argsort`.
        both = flat.astype(np.uint64)
        both <<= np.uint64(32)
        both |= np.arange(flat.size, dtype=np.uint32)
        both.sort()
        self._order = (both & np.uint64(2**32 - 1)).astype(np.uint32)
        both >>= np.uint64(32)
        self._sorted = both.astype(np.uint32)

    def holds(self, values: np.ndarray) -> np.ndarray:
        """bool, for each value: whether it occurs."""
        places = np.searchsorted(self._sorted, values)
        return self._sorted[np.minimum(places, self._sorted.size - 1)] == values

    def places(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64, for each value: its first flat position, and how often it occurs."""
        low = np.searchsorted(self._sorted, values, "left")
        count = np.searchsorted(self._sorted, values, "right") - low
        place = self._order[np.minimum(low, self._sorted.size - 1)].astype(np.int64)
        return place, count

    def ties(self, value: np.generic) -> np.ndarray:
        """int64: the flat positions of a value; none if there are too many."""
        low = int(np.searchsorted(self._sorted, value, "left"))
        high = int(np.searchsorted(self._sorted, value, "right"))
        if high - low > MAX_TIES:
            return np.empty(0, np.int64)
        return self._order[low:high].astype(np.int64)

    def find(self, wanted: np.ndarray) -> Index | None:
        """How `wanted` is taken from the source; None if it does not lie in it in a separable
        way."""
        if wanted.ndim == 0 or wanted.size == 0 or wanted.size > self.source.size:
            return None
        entries, places = self._anchors(wanted)
        for start in range(min(2, len(places))):  # the second, should chance have misled the first
            index = self._through(wanted, entries[start:], places[start:])
            if index is not None and self._verified(index, wanted):
                return index
        return None

    def _anchors(self, wanted: np.ndarray) -> tuple[list[tuple[int, ...]], list[int]]:
        """Entries whose value occurs once in the source, and where; well apart."""
        flat = wanted.reshape(-1)
        tried = np.random.default_rng(0).permutation(min(flat.size, 2**16))
        tried = tried * (flat.size // len(tried))
        place, count = self.places(flat[tried])
        if (count == 0).any():
            return [], []
        once = tried[count == 1]
        if once.size < LINES:  # values that repeat: the few that do not are looked for everywhere
            alone = self._sorted
            if alone.size > 1:
                differs = alone[1:] != alone[:-1]
                alone = alone[np.concatenate([[True], differs]) & np.concatenate([differs, [True]])]
            once = np.flatnonzero(np.isin(flat, alone[:: max(1, alone.size // 2**12)]))
            place, count = self.places(flat[once])
            place = place[count == 1]
            once = once[count == 1]
        else:
            place = place[count == 1]
        once, place = once[:LINES], place[:LINES]
        entries = [tuple(map(int, np.unravel_index(entry, wanted.shape))) for entry in once]
        return entries, [int(p) for p in place]

    def _through(
        self, wanted: np.ndarray, entries: list[tuple[int, ...]], places: list[int]
    ) -> Index | None:
        tables = []
        for axis in range(wanted.ndim):
            table = self._table(wanted, axis, entries, places)
            if table is None:
                return None
            tables.append(table)
        steps = sum(int(table[i]) for table, i in zip(tables, entries[0], strict=True))
        base = places[0] - steps
        low = base + sum(int(table.min()) for table in tables)
        high = base + sum(int(table.max()) for table in tables)
        if low < 0 or high >= self.source.size:
            return None
        return Index(self.source.shape, base, tuple(tables))

    def _table(
        self, wanted: np.ndarray, axis: int, entries: list[tuple[int, ...]], places: list[int]
    ) -> np.ndarray | None:
        """How far each index of one axis lies from index 0; None if that cannot be said."""
        size = wanted.shape[axis]
        table = np.zeros(size, np.int64)
        known = np.zeros(size, bool)
        known[entries[0][axis]] = True  # relative to this one, for now
        for entry in entries:
            line = wanted[(*entry[:axis], slice(None), *entry[axis + 1 :])]
            where, count = self.places(line)
            if not count.all():
                return None
            once = count == 1
            common = np.flatnonzero(once & known)
            if common.size:
                shift = table[common[0]] - where[common[0]]
                new = once & ~known
                table[new] = where[new] + shift
                known |= new
            if known.all():
                return table - table[0]
        return self._with_ties(wanted, axis, entries, places, table, known)

    def _with_ties(
        self,
        wanted: np.ndarray,
        axis: int,
        entries: list[tuple[int, ...]],
        places: list[int],
        table: np.ndarray,
        known: np.ndarray,
    ) -> np.ndarray | None:
        """The same for indices whose value repeats on every line: the one place that all lines
        have in common."""
        lines = [
            _Line(self, wanted, axis, entry, place)
            for entry, place in zip(entries, places, strict=True)
        ]
        shifts = [(lines[0], 0)]
        for line in lines[1:]:
            shift = table[line.at] if known[line.at] else lines[0].shift_of(line)
            if shift is not None:
                shifts.append((line, int(shift)))
        for i in np.flatnonzero(~known):
            left: np.ndarray | None = None
            for line, shift in shifts:
                steps = line.steps(int(i)) + shift
                if steps.size:
                    left = steps if left is None else np.intersect1d(left, steps)
                if left is not None and left.size == 1:
                    break
            if left is None or left.size != 1:
                return None
            table[i] = left[0]
        return table - table[0]

    def _verified(self, index: Index, wanted: np.ndarray) -> bool:
        probes = _probes(wanted)
        flat = self.source.reshape(-1)
        return np.array_equal(flat[index.at(*probes)], wanted[probes]) and np.array_equal(
            index.take(self.source), wanted
        )


class _Line:
    """A line along one axis, through an entry whose place is known."""

    def __init__(
        self, lookup: Lookup, wanted: np.ndarray, axis: int, entry: tuple[int, ...], place: int
    ) -> None:
        self.at = entry[axis]
        self._values = wanted[(*entry[:axis], slice(None), *entry[axis + 1 :])]
        self._lookup, self._place = lookup, place

    def steps(self, i: int) -> np.ndarray:
        """int64: how far index `i` may lie from the entry's; none if nothing can be said."""
        return self._lookup.ties(self._values[i]) - self._place

    def shift_of(self, other: _Line) -> int | None:
        """How far the index of another line's entry lies from that of this one's: the only way in
        which the two lines have places in common for each of some indices."""
        tried = np.linspace(0, len(self._values) - 1, TRIED).astype(int)
        candidates = self.steps(other.at)
        for i in tried:
            mine, theirs = self.steps(int(i)), other.steps(int(i))
            if mine.size and theirs.size and 0 < candidates.size * theirs.size <= MAX_PAIRS:
                together = np.isin(candidates[:, None] + theirs, mine).any(axis=1)
                candidates = candidates[together]
        return int(candidates[0]) if candidates.size == 1 else None


def samples(keyed: np.ndarray) -> np.ndarray:
    """Some of the keys."""
    flat = keyed.reshape(-1)
    return flat[np.random.default_rng(1).integers(0, math.prod(keyed.shape), SAMPLES)]
