"""Which layout a pair of tensors has by convention: that of the matches of its kind, or else that
of the libraries."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np

from lockstep.common.recorder.layout import Index, Reshaping, Shape, reshaped, reshapings
from lockstep.common.recorder.likeness import components
from lockstep.common.recorder.tensors import Tensor

KERNELS = ("kernel", "w")  # of Flax and Haiku: (..., in, out), where PyTorch's weight has (out, in)
PRIOR = 2  # as many matches as the libraries' convention counts for
SURE = 3  # matches of one layout, before a tensor of another counts as wrong
Kind = tuple[str, str, int, int]


class Conventions:
    """The layouts of the matches so far, by kind: the last components of both names, and how many
    axes there are."""

    def __init__(self) -> None:
        self._seen: dict[Kind, Counter[Reshaping]] = {}

    def add(self, a: Tensor, b: Tensor, how: Reshaping, count: int = 1) -> None:
        self._seen.setdefault(_kind(a, b), Counter())[how] += count

    def of(self, a: Tensor, b: Tensor) -> list[Reshaping]:
        """Those that fit the shapes, the most usual first."""
        votes = Counter(self._seen.get(_kind(a, b), Counter()))
        for how in _of_libraries(a, b):
            votes[how] += PRIOR
        return [how for how, _ in votes.most_common() if fits(a.shape, b.shape, how)]

    def against(self, a: Tensor, b: Tensor, how: Reshaping | None) -> Reshaping | None:
        """The layout that this pair should have instead of `how`, by the matches of its kind; None
        if nothing speaks against it."""
        votes = Counter(self._seen.get(_kind(a, b), Counter()))
        for prior in _of_libraries(a, b):
            votes[prior] += PRIOR
        usual = next((u for u, _ in votes.most_common() if fits(a.shape, b.shape, u)), None)
        if usual is None or votes[usual] < SURE or _are_same(a, b, usual, how):
            return None
        mine = votes[how] if how is not None else 1
        return usual if mine <= max(1, votes[usual] // 8) else None

    def layout(self, a: Tensor, b: Tensor) -> tuple[Index, Reshaping] | None:
        """The most usual layout, or else the plainest that keeps or merges whole axes."""
        plain = [how for how in reshapings(a.shape, b.shape) if fits(a.shape, b.shape, how)]
        for how in (*self.of(a, b), *plain):
            index = reshaped(a.shape, b.shape, how)
            if index is not None:
                return index, how
        return None


def _kind(a: Tensor, b: Tensor) -> Kind:
    return components(a.name)[-1], components(b.name)[-1], len(a.shape), len(b.shape)


def _are_same(a: Tensor, b: Tensor, one: Reshaping, other: Reshaping | None) -> bool:
    """Whether two descriptions give one layout, for these shapes."""
    if one == other or other is None:
        return one == other
    left, right = reshaped(a.shape, b.shape, one), reshaped(a.shape, b.shape, other)
    return (
        left is not None
        and right is not None
        and all(map(np.array_equal, left.tables, right.tables))
    )


def fits(a: Shape, b: Shape, how: Reshaping) -> bool:
    """Whether the permuted axes of the one are those of the other, some of them merged."""
    one, other = (a, b) if how.of_b else (b, a)
    if len(how.axes) != len(other) or math.prod(a) != math.prod(b):
        return False
    first, second = set(_products(one)), set(_products(tuple(other[axis] for axis in how.axes)))
    return first <= second or second <= first


def _products(shape: Shape) -> Iterator[int]:
    total = 1
    for size in shape:
        total *= size
        yield total


def _of_libraries(a: Tensor, b: Tensor) -> list[Reshaping]:
    """PyTorch's (out, in, ...) against (..., in, out), with heads as axes or without."""
    roles = [components(tensor.name)[-1] for tensor in (a, b)]
    if roles[0] == roles[1]:
        same = Reshaping(tuple(range(len(b.shape))))
        return [same] if a.shape == b.shape else []
    if roles[0] in KERNELS and roles[1] == "weight":
        return _jax_from_torch(a.shape, b.shape)
    return _torch_from_jax(a.shape, b.shape) if roles[1] in KERNELS else []


def _torch_from_jax(torch: Shape, jax: Shape) -> list[Reshaping]:
    if len(torch) == len(jax) > 1:
        n = len(jax)
        return [Reshaping((n - 1, n - 2, *range(n - 2)))]
    if len(torch) == 2 and len(jax) == 3:  # (in, heads, size) and (heads, size, out)
        both = [Reshaping((1, 2, 0)), Reshaping((2, 0, 1))]
        return [how for how in both if fits(torch, jax, how)]
    return []


def _jax_from_torch(jax: Shape, torch: Shape) -> list[Reshaping]:
    if len(torch) == len(jax) > 1:
        return [Reshaping((*range(2, len(jax)), 1, 0))]
    return [Reshaping((1, 0))] if len(torch) == 2 and len(jax) == 3 else []
