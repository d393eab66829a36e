"""Which layout a pair of tensors has by convention: that of the matches of its kind, or else that
of the libraries."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from lockstep.common.recorder.layout import Index, Reshaping, Shape, reshaped, reshapings
from lockstep.common.recorder.tensors import Tensor

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

    def fit(self, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> np.ndarray:
        """bool (len(mine), len(theirs)): whether a usual layout fits; so of all vectors."""
        known: dict[tuple[object, ...], bool] = {}
        found = np.ones((len(mine), len(theirs)), bool)
        for i, a in enumerate(mine):
            for j, b in enumerate(theirs):
                if len(a.shape) > 1 < len(b.shape):
                    key = (a.path.last, b.path.last, a.shape, b.shape)
                    if key not in known:
                        known[key] = bool(self.of(a, b))
                    found[i, j] = known[key]
        return found

    def learn(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add what the shapes of matched tensors leave no choice about."""
        for a, b in pairs:
            plain = _plain(a.shape, b.shape) if len(a.shape) > 1 and a.is_kept else ()
            if len(plain) == 1:
                self.add(a, b, plain[0])

    def against(self, a: Tensor, b: Tensor, how: Reshaping | None) -> Reshaping | None:
        """The layout that this pair should have instead of `how`, by the matches of its kind; None
        if nothing speaks against it.

        Args:
            how: None for one that no permutation of whole axes gives, such as rows in the order of
                another flatten, which is right as it is.
        """
        if how is None:
            return None
        votes = Counter(self._seen.get(_kind(a, b), Counter()))
        for prior in _of_libraries(a, b):
            votes[prior] += PRIOR
        usual = next((u for u, _ in votes.most_common() if fits(a.shape, b.shape, u)), None)
        if usual is None or votes[usual] < SURE or _are_same(a, b, usual, how):
            return None
        return usual if votes[how] <= max(1, votes[usual] // 8) else None

    def layout(self, a: Tensor, b: Tensor) -> tuple[Index, Reshaping] | None:
        """The most usual layout, or else the plainest that keeps or merges whole axes."""
        for how in (*self.of(a, b), *_plain(a.shape, b.shape)):
            index = reshaped(a.shape, b.shape, how)
            if index is not None:
                return index, how
        return None


@functools.cache
def _plain(a: Shape, b: Shape) -> tuple[Reshaping, ...]:
    return tuple(how for how in reshapings(a, b) if fits(a, b, how))


@functools.cache
def are_possible(a: Shape, b: Shape) -> bool:
    """Whether any permutation of axes that keeps or merges them makes these shapes equal."""
    return any(reshaped(a, b, how) is not None for how in _plain(a, b))


def _kind(a: Tensor, b: Tensor) -> Kind:
    return a.path.kind, b.path.kind, len(a.shape), len(b.shape)


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
    """(out, in, ...) of what is called a weight against (..., in, out) of any other name, with
    heads as axes or without; embeddings have one layout."""
    one, other = a.is_out_first, b.is_out_first
    if one == other or {a.path.last, b.path.last} & {"embedding", "embeddings"}:
        return [Reshaping(tuple(range(len(b.shape))))] if a.shape == b.shape else []
    return (_torch_from_jax if one else _jax_from_torch)(a.shape, b.shape)


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
