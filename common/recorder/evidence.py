"""What the first step tells of tensors whose values do not: their gradients, or else what the first
steps added to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from lockstep.common.recorder.layout import Reshaping, reshaped, reshapings
from lockstep.common.recorder.recording import fingerprint
from lockstep.common.recorder.tensors import Tensor
from lockstep.common.recorder.values import Found

EQUAL = 1e-6  # of the root of the sum of squares; twice float32's rounding over such sums
NOISE = 1e-9  # of the largest gradient: below it, a gradient is rounding alone
Prints = dict[int, np.ndarray]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of tensors whose evidence has the same numbers, in any order, and that of no other."""
    found = []
    for kind in ("gradient", "update"):
        prints = [_prints(side, kind) for side in (a, b)]
        done = {t.number for t, _ in found}
        mine = [t for t in a if t.number in prints[0] and t.number not in done]
        theirs = [t for t in b if t.number in prints[1]]
        if not mine or not theirs:
            continue
        one = np.stack([prints[0][t.number] for t in mine])
        other = np.stack([prints[1][t.number] for t in theirs])
        same = _same(one, other)
        for i, j in zip(*np.nonzero(same), strict=True):
            if same[i].sum() == same[:, j].sum() == 1 and _sorted_same(mine[i], theirs[j], kind):
                found.append((mine[i], theirs[j]))
        if found:
            break
    return found


def _prints(side: Sequence[Tensor], kind: str) -> Prints:
    """By tensor, the fingerprint of its evidence, if that is more than rounding."""
    found: Prints = {}
    for t in side:
        values = getattr(t, kind)
        if values is not None:
            found[t.number] = fingerprint(values) if values.shape == t.shape else values
    largest = max((norm[3] for norm in found.values()), default=0.0)
    return {
        number: norm
        for number, norm in found.items()
        if np.isfinite(norm).all()
        and norm[0] > 1
        and norm[3] > NOISE * largest
        and norm[4] != norm[5]  # all equal: as an update's sign may be
    }


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """bool (len(a), len(b)): equal fingerprints."""
    scale = np.minimum(a[:, None, 3], b[None, :, 3])
    # A sum of n numbers that differ by EQUAL each may differ by n times as much.
    sums = EQUAL * scale * np.sqrt(a[:, None, 0])
    gaps = np.abs(a[:, None] - b[None])
    return (
        (gaps[..., 0] == 0)
        & (gaps[..., 1] <= sums)
        & (gaps[..., 2] <= sums)
        & (gaps[..., 3:] <= EQUAL * scale[..., None]).all(axis=-1)
    )


def _sorted_same(a: Tensor, b: Tensor, kind: str) -> bool:
    one, other = getattr(a, kind), getattr(b, kind)
    if one.shape != a.shape or other.shape != b.shape:
        return True  # fingerprints
    gap = np.abs(np.sort(one, axis=None) - np.sort(other, axis=None)).max()
    return bool(gap <= EQUAL * np.sqrt(np.square(one.astype(np.float64)).sum()))


def layout(a: Tensor, b: Tensor, first: Iterable[Reshaping]) -> Found | None:
    """The layout in which the evidence of both is equal; None if there is none, or several."""
    for kind in ("gradient", "update"):
        one, other = getattr(a, kind), getattr(b, kind)
        if one is None or other is None or one.shape != a.shape or other.shape != b.shape:
            continue
        limit = EQUAL * float(np.sqrt(np.square(one.astype(np.float64)).sum()))
        if limit == 0 or one.size < 2:
            continue
        for how in (*first, *reshapings(a.shape, b.shape)):
            index = reshaped(a.shape, b.shape, how)
            if index is not None and np.abs(one - index.take(other)).max() <= limit:
                return Found(index, how)
    return None
