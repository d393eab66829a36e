"""Where the entries of one array lie in another.

Every layout that two frameworks give one tensor is *separable*: entry (i0, i1, ...) of the one lies
at the flat position base + f0(i0) + f1(i1) + ... of the other. That holds for permuted axes, split
and merged axes, a part of a larger tensor, and for rows in another order. `Index` keeps the base
and the functions f, as tables.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

CHUNK = 2**22  # entries that are gathered at once
Shape = tuple[int, ...]
# A permutation of axes, then a reshape. Reshaping(perm): a = b.transpose(perm).reshape(a.shape);
# inverse: b = a.transpose(perm).reshape(b.shape).


@dataclass(frozen=True)
class Reshaping:
    """A permutation of axes before a reshape.

    `of_b`: a is b.transpose(axes).reshape(a.shape); else b is a.transpose(axes).reshape(b.shape).
    """

    axes: tuple[int, ...]
    of_b: bool = True


@dataclass(frozen=True, eq=False)
class Index:
    """How to take an array of another layout out of one of shape `source`."""

    source: Shape
    base: int  # the flat position of entry (0, 0, ...)
    tables: tuple[np.ndarray, ...]  # int64, for each axis of what is taken; each begins with 0

    @property
    def shape(self) -> Shape:
        return tuple(len(table) for table in self.tables)

    @property
    def whole(self) -> bool:
        """Whether it takes every entry."""
        return math.prod(self.shape) == math.prod(self.source)

    @property
    def is_plain(self) -> bool:
        """Whether it takes every entry in its order."""
        strides = _strides(self.shape)
        return self.whole and all(
            np.array_equal(table, np.arange(len(table)) * stride)
            for table, stride in zip(self.tables, strides, strict=True)
        )

    @cached_property
    def digits(self) -> tuple[tuple[tuple[int, int], ...], ...] | None:
        """For each axis, (size, stride) of the axes that it unrolls; None if a table is not of
        that kind."""
        every = [_digits(table) for table in self.tables]
        found = tuple(digits for digits in every if digits is not None)
        return found if len(found) == len(every) else None

    def take(self, array: np.ndarray) -> np.ndarray:
        """The entries of `array`, which has the shape `source`, in an array of the shape `shape`.

        Another shape than `source` is that of a fingerprint, which no permutation changes: it is
        returned as it is.

        Raises:
            ValueError: if it is a fingerprint, and a part is to be taken.
        """
        if array.shape != self.source:
            if self.whole:
                return array
            raise ValueError(f"an array of shape {array.shape}, not {self.source}")
        flat = np.ascontiguousarray(array).reshape(-1)
        if self.digits is not None:
            return self._strided(flat)
        taken = np.empty(self.shape, array.dtype)
        first, rest = self.tables[0], self.positions(1)
        step = max(1, CHUNK // max(1, rest.size))
        for start in range(0, len(first), step):
            rows = first[start : start + step].reshape(-1, *[1] * rest.ndim)
            taken[start : start + step] = flat[self.base + rows + rest]
        return taken

    def _strided(self, flat: np.ndarray) -> np.ndarray:
        digits = [digit for axis in self.digits or () for digit in axis]
        view = np.lib.stride_tricks.as_strided(
            flat[self.base :],
            [size for size, _ in digits],
            [stride * flat.itemsize for _, stride in digits],
        )
        return np.ascontiguousarray(view).reshape(self.shape)

    def positions(self, start: int) -> np.ndarray:
        """The sum of the tables from axis `start` on, for all their entries."""
        total = np.zeros((), np.int64)
        for table in self.tables[start:]:
            total = total[..., None] + table
        return total

    def at(self, *indices: np.ndarray) -> np.ndarray:
        """The flat positions of some entries: an array of indices for each axis."""
        total = np.int64(self.base)
        for table, index in zip(self.tables, indices, strict=True):
            total = total + table[index]
        return np.asarray(total)

    def shifted(self, base: int) -> Index:
        return Index(self.source, base, self.tables)


def _digits(table: np.ndarray) -> tuple[tuple[int, int], ...] | None:
    if len(table) == 1:
        return ()
    stride = int(table[1] - table[0])
    others = np.flatnonzero(np.diff(table) != stride)
    size = int(others[0]) + 1 if others.size else len(table)
    if len(table) % size:
        return None
    heads = table[::size]
    if not np.array_equal(table, (heads[:, None] + stride * np.arange(size)).ravel()):
        return None
    rest = _digits(heads)
    return None if rest is None else (*rest, (size, stride))


# --- Permutations of axes and reshapes


def reshaped(a: Shape, b: Shape, how: Reshaping) -> Index | None:
    """The index that takes shape `a` from shape `b`; None if the result is not separable for these
    shapes."""
    if math.prod(a) != math.prod(b) or len(how.axes) != len(b if how.of_b else a):
        return None
    if 0 in a:
        return None
    permuted = [(b if how.of_b else a)[axis] for axis in how.axes]
    if how.of_b:
        places = _strides(b)
        strides = [places[axis] for axis in how.axes]
        tables = [
            np.asarray(_mixed_radix(np.arange(size) * stride, permuted, strides))
            for size, stride in zip(a, _strides(a), strict=True)
        ]
    else:
        strides = dict(zip(how.axes, _strides(tuple(permuted)), strict=True))
        tables = [np.arange(size, dtype=np.int64) * strides[axis] for axis, size in enumerate(a)]
    index = Index(b, 0, tuple(tables))
    # A reshape across the bounds of axes is not a sum of tables: its last entry is elsewhere.
    return index if _is_bijection(index) else None


def _mixed_radix(flat: np.ndarray, shape: list[int], strides: list[int]) -> np.ndarray:
    """Of flat positions in an array of `shape`, those in one with these strides."""
    total = np.zeros(flat.shape, np.int64)
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        flat, digit = np.divmod(flat, size)
        total += digit * stride
    return total


def _is_bijection(index: Index) -> bool:
    """Whether it takes each entry of its source once, for tables that grow from 0."""
    size = math.prod(index.source)
    digits = index.digits
    if digits is None or sum(int(table[-1]) for table in index.tables) != size - 1:
        return False
    reached = 1
    for count, stride in sorted((d for axis in digits for d in axis), key=lambda d: d[1]):
        if stride != reached:
            return False
        reached *= count
    return reached == size


def _strides(shape: Shape) -> tuple[int, ...]:
    """In entries, in the C order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


MAX_AXES = 5  # of tensors whose every permutation is tried: 120


def reshapings(a: Shape, b: Shape) -> Iterator[Reshaping]:
    """All that take shape `a` from shape `b`, the plain ones first."""
    if len(a) == len(b) and len(b) <= MAX_AXES:
        for axes in itertools.permutations(range(len(b))):
            if tuple(b[axis] for axis in axes) == a:
                yield Reshaping(axes)
    if len(b) <= MAX_AXES:
        for axes in itertools.permutations(range(len(b))):
            if len(a) != len(b) or tuple(b[axis] for axis in axes) != a:
                yield Reshaping(axes)
    if len(a) <= MAX_AXES and len(a) > len(b):
        yield from (Reshaping(axes, False) for axes in itertools.permutations(range(len(a))))


# --- In words


def words(index: Index, how: Reshaping | None, part_of: str = "") -> str:
    """A layout, for a table; "" if both are alike."""
    if part_of:
        order = _order(index)
        plain = order == tuple(range(len(order)))
        return f"part of {part_of}" + ("" if plain else f", {_permuted(order)}") + _unrolled(index)
    if how is None:
        order = _order(index)
        turned = len(order) == 2 and order == (1, 0)
        if index.is_plain:
            return "" if index.shape == index.source else "reshaped"
        return ("transposed, " if turned else "") + (_unrolled(index)[2:] or "another order")
    if len(index.shape) == len(index.source):
        if index.shape == tuple(index.source[axis] for axis in how.axes):
            return "" if how.axes == tuple(range(len(how.axes))) else _permuted(how.axes)
        return "reshaped"
    heads = "split" if len(index.source) > len(index.shape) else "merged"
    if how.axes == tuple(range(len(how.axes))):
        return "reshaped"
    return f"heads {heads}, axes {how.axes}"


def _permuted(axes: tuple[int, ...]) -> str:
    return "transposed" if axes == (1, 0) else f"axes {axes}"


def _order(index: Index) -> tuple[int, ...]:
    """The axes of what is taken, by how far apart their neighbours lie in the source."""
    far = [int(np.abs(table).max()) for table in index.tables]
    axes = [axis for axis in range(len(far)) if len(index.tables[axis]) > 1]
    if len(axes) < len(far):
        return tuple(range(len(far)))
    return tuple(sorted(axes, key=lambda axis: -far[axis]))


def _unrolled(index: Index) -> str:
    """What is unusual about single axes."""
    found = ""
    for axis, table in enumerate(index.tables):
        what = {0: "rows", 1: "columns"}.get(axis, f"axis {axis}")
        digits = _digits(table)
        if digits is None:
            found += f", {what} in another order"
        elif any(stride < 0 for _, stride in digits):
            found += f", {what} reversed"
        elif len(digits) > 1:
            strides = [stride for _, stride in digits]
            order = tuple(sorted(range(len(digits)), key=lambda digit: -strides[digit]))
            if order != tuple(range(len(digits))):
                sizes = tuple(size for size, _ in digits)
                found += f", {what} unrolled {sizes} in the order {order}"
    return found
