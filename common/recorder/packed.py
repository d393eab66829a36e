"""Tensors that are parts of a larger one of the other side, such as q, k and v in one projection."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lockstep.common.recorder.conventions import Conventions
from lockstep.common.recorder.layout import Index, Reshaping, Shape, reshaped
from lockstep.common.recorder.tensors import Tensor
from lockstep.common.recorder.values import Lookup, samples

ROLES = ("q", "k", "v")  # in the order in which libraries pack them


@dataclass(frozen=True, eq=False)
class Part:
    """`small` is the part of `large` that `index` takes, in the layout of `small`."""

    small: Tensor
    large: Tensor
    index: Index


def find(small: Sequence[Tensor], large: Sequence[Tensor]) -> Iterator[Part]:
    """Each of `small` that lies in one of `large`, by value."""
    keyed = {tensor.number: samples(tensor.keys()) for tensor in small}
    for whole in large:
        fitting = [t for t in small if 1 < t.size < whole.size]
        if not fitting:
            continue
        lookup = Lookup(whole.keys())
        held: np.ndarray = lookup.holds(np.concatenate([keyed[t.number] for t in fitting]))
        for tensor, all_held in zip(
            fitting, np.asarray(held.reshape(len(fitting), -1).all(axis=1)), strict=True
        ):
            index = lookup.find(tensor.keys()) if all_held else None
            if index is not None:
                yield Part(tensor, whole, index)


class Space:
    """Which entries of the large tensors are taken."""

    def __init__(self) -> None:
        self._taken: dict[int, np.ndarray] = {}

    def take(self, large: Tensor, index: Index) -> bool:
        """Take a part, if all of it is free."""
        taken = self._taken.setdefault(large.number, np.zeros(large.size, bool))
        places = entries(index)
        if taken[places].any():
            return False
        taken[places] = True
        return True

    def left(self, large: Tensor) -> int:
        """How many entries are free."""
        return large.size - int(self._taken.get(large.number, np.zeros(0, bool)).sum())

    def free(self, large: Tensor) -> np.ndarray:
        """int64: the flat positions that are free."""
        return np.flatnonzero(~self._taken[large.number])


def entries(index: Index) -> np.ndarray:
    """int64, in the shape of what is taken: the flat positions of all entries."""
    return np.asarray(index.base + index.positions(0))


def role_rank(tensor: Tensor) -> int | None:
    """0, 1 or 2 for what is called q, k or v."""
    found = [rank for rank, role in enumerate(ROLES) if role in tensor.path.terms]
    return found[0] if len(found) == 1 else None


def _slot(part: Part) -> tuple[int, int] | None:
    """Which third of a packed q, k, v a part begins: 0, 1 or 2; and how far apart two begin."""
    if "qkv" not in part.large.path.terms or part.large.size != 3 * part.small.size:
        return None
    shape = part.large.shape
    for axis, at in enumerate(np.unravel_index(part.index.base, shape)):
        if shape[axis] % 3 == 0 and at and at % (shape[axis] // 3) == 0:
            return int(at) // (shape[axis] // 3), shape[axis] // 3 * math.prod(shape[axis + 1 :])
    return (0, 0) if part.index.base == 0 else None


def is_misplaced(part: Part) -> bool:
    """Whether it is called q, k or v and lies where another of these is by convention."""
    slot, rank = _slot(part), role_rank(part.small)
    return slot is not None and rank is not None and slot[0] != rank


def moved(part: Part, others: Sequence[Part]) -> Part | None:
    """The same part where it should lie, as far from another one as that is from its own place."""
    rank, slot = role_rank(part.small), _slot(part)
    steps = {found[1] for other in (part, *others) if (found := _slot(other)) and found[1]}
    if rank is None or slot is None or len(steps) != 1:
        return None
    base = part.index.base + (rank - slot[0]) * steps.pop()
    return replace(part, index=part.index.shifted(base))


def remaining(tensor: Tensor, parts: Sequence[Part], space: Space) -> Iterator[Part]:
    """Where a tensor of other values may lie, by parts of its shape in modules next to its own:
    in what they leave free."""
    for part in parts:
        near = tensor.path.parents[-2:-1] == part.small.path.parents[-2:-1]
        if not near or tensor.shape != part.small.shape or space.left(part.large) < tensor.size:
            continue
        places = entries(part.index)
        shift = int(space.free(part.large)[0] - places.min())
        places = places + shift
        if places.max() < part.large.size:
            yield Part(tensor, part.large, part.index.shifted(part.index.base + shift))


def beside(
    parts: Sequence[Part], small: Sequence[Tensor], large: Sequence[Tensor]
) -> Iterator[Part]:
    """Where the biases next to parts lie, in those next to the large tensors."""
    smaller, larger = _by_module(small), _by_module(large)
    for part in parts:
        for tensor in smaller.get(part.small.path.parents[-1], []):
            for whole in larger.get(part.large.path.parents[-1], []):
                if tensor.path.role == whole.path.role and tensor.size < whole.size:
                    index = derived(part.index, tensor.shape, whole.shape, part.small.is_out_first)
                    if index is not None:
                        yield Part(tensor, whole, index)


def _by_module(tensors: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.path.parents[-1], []).append(tensor)
    return found


def divided(
    large: Tensor, small: Sequence[Tensor], conventions: Conventions, in_a: bool
) -> list[Part]:
    """The parts of `large`, one after the other along one of its axes, in the layout that is usual
    for their kind; none if sizes and shapes do not allow it.

    Args:
        large: the packed tensor.
        small: its parts, in order.
        conventions: of the matches so far.
        in_a: whether `large` is A's.
    """
    if sum(t.size for t in small) != large.size:
        return []
    for axis in sorted(range(len(large.shape)), key=lambda axis: -large.shape[axis]):
        parts = _along(large, small, axis, conventions, in_a)
        if len(parts) == len(small):
            return parts
    return []


def _along(
    large: Tensor, small: Sequence[Tensor], axis: int, conventions: Conventions, in_a: bool
) -> list[Part]:
    parts: list[Part] = []
    start = 0
    for tensor in small:
        length, odd = divmod(tensor.size * large.shape[axis], large.size)
        if odd:
            return []
        cut = np.moveaxis(np.moveaxis(large.array, axis, 0)[start : start + length], 0, axis)
        block = replace(large, array=cut, gradient=None, update=None)
        found = conventions.layout(*((block, tensor) if in_a else (tensor, block)))
        if found is None:
            return []
        how = found[1]
        if in_a:  # the part has B's layout, taken out of A's
            index = reshaped(tensor.shape, block.shape, Reshaping(how.axes, not how.of_b))
        else:
            index = found[0]
        if index is None:
            return []
        parts.append(Part(tensor, large, _within(index, large.shape, axis, start)))
        start += length
    return parts


def _within(index: Index, large: Shape, axis: int, start: int) -> Index:
    """An index into a block of a larger array, as one into that."""

    def places(of: np.ndarray) -> np.ndarray:
        return np.asarray(np.ravel_multi_index(np.unravel_index(of, index.source), large), np.int64)

    base = int(places(np.asarray(index.base))) + start * math.prod(large[axis + 1 :])
    first = places(np.asarray(index.base))
    tables = tuple(places(index.base + table) - first for table in index.tables)
    return Index(large, base, tables)


def packings(
    large: Sequence[Tensor], small: Sequence[Tensor], alike: Callable[[Tensor, Tensor], float]
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """By names: each packed q, k, v, with the three of one module that are its parts.

    Args:
        large: the tensors of one side.
        small: those of the other.
        alike: how well the names of a large tensor and one of the others fit.
    """
    groups: dict[tuple[object, ...], dict[int, Tensor]] = {}
    for tensor in small:
        rank = role_rank(tensor)
        if rank is not None:
            key = (tensor.path.parents[-2:-1], tensor.path.role)
            groups.setdefault(key, {})[rank] = tensor
    whole = [[group[rank] for rank in range(3)] for group in groups.values() if len(group) == 3]
    for packed in (t for t in large if "qkv" in t.path.terms):
        fitting = [
            group
            for group in whole
            if sum(t.size for t in group) == packed.size and group[0].path.role == packed.path.role
        ]
        if fitting:
            best = max(fitting, key=lambda group: sum(alike(packed, t) for t in group))
            whole.remove(best)
            yield packed, best


def derived(weight: Index, small: Shape, large: Shape, leading: bool) -> Index | None:
    """Where a bias lies in another, by where the weight next to it lies; None if that says nothing.

    A bias has the weight's output axes: what is left of the weight's place, once the input axes are
    fixed, is that of the bias.

    Args:
        weight: takes the weight, in its layout, from the other side's.
        small: the shape of the bias.
        large: that of the other side's.
        leading: whether the output axes come first where sizes cannot tell.
    """
    n = len(weight.shape)
    starts = list(range(n - len(small) + 1))
    if not leading:
        starts.reverse()
    spans = [range(start, start + len(small)) for start in starts]
    spans = [kept for kept in spans if tuple(weight.shape[axis] for axis in kept) == small]
    for is_flat in (False, True):
        for kept in spans:
            index = _without_inputs(weight, list(kept), large, is_flat)
            if index is not None:
                return index
    return None


def _without_inputs(weight: Index, kept: list[int], large: Shape, is_flat: bool) -> Index | None:
    """`derived`, for some axes; `is_flat`: axes of the weight are one of the bias."""

    def coordinates(places: np.ndarray) -> np.ndarray:
        return np.stack(np.unravel_index(places, weight.source))

    start = coordinates(np.asarray(weight.base))
    fixed = set()
    for axis in set(range(len(weight.shape))) - set(kept):
        moved = coordinates(weight.base + weight.tables[axis]) != start[:, None]
        fixed |= set(np.flatnonzero(moved.any(axis=1)).tolist())
    axes = [axis for axis in range(len(weight.source)) if axis not in fixed]
    sizes = [weight.source[axis] for axis in axes]
    if not axes or math.prod(sizes) != math.prod(large) or (tuple(sizes) != large) != is_flat:
        return None

    def places(of: np.ndarray) -> np.ndarray:
        return np.asarray(np.ravel_multi_index(tuple(coordinates(of)[axes]), sizes), np.int64)

    base = int(places(np.asarray(weight.base)))
    tables = tuple(places(weight.base + weight.tables[axis]) - base for axis in kept)
    index = Index(large, base, tables)
    if any(len(table) > 1 and len(np.unique(table)) < len(table) for table in tables):
        return None
    corners = [
        np.array(c)
        for c in zip(*itertools.product(*([0, len(t) - 1] for t in tables)), strict=True)
    ]
    found = index.at(*corners)
    whole = [np.zeros_like(corners[0])] * len(weight.shape)
    for axis, corner in zip(kept, corners, strict=True):
        whole[axis] = corner
    fits = found.min() >= 0 and found.max() < math.prod(large)
    return index if fits and np.array_equal(found, places(weight.at(*whole))) else None
