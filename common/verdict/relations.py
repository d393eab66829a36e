"""What can be seen in two tensors that should be equal: how one is made of the other, and where they
differ most."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from lockstep.common.verdict.comparison import Entry, format_distinct
from lockstep.common.verdict.distances import abs_differences

N_WORST = 5
REORDERED = "the same numbers in another order"
RTOL = 1e-6  # relative residual under which one tensor is called a multiple of the other


def largest_differences(a: np.ndarray, b: np.ndarray) -> tuple[Entry, ...]:
    """The entries of two arrays of one shape that differ most, the worst first."""
    differences = abs_differences(np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64))
    return tuple(
        Entry(
            tuple(int(part) for part in np.unravel_index(index, a.shape)),
            (float(a.flat[index]), float(b.flat[index])),
        )
        for index in np.argsort(-differences, kind="stable")[:N_WORST]
        if differences[index] > 0
    )


def describe_relation(
    a: np.ndarray, b: np.ndarray, names: Sequence[str], classes: bool = False
) -> str | None:
    """How one tensor is made of the other, where that can be seen: numbering, numbers that are not
    finite, order, or a common factor."""
    if classes:
        pairs = set(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
        sizes = {len(pairs), len({a for a, _ in pairs}), len({b for _, b in pairs})}
        renumbered = len(sizes) == 1 < len(pairs) and any(a != b for a, b in pairs)
        return "the same predictions under another numbering of the classes" if renumbered else None
    one, other = a.astype(np.float64), b.astype(np.float64)
    a, b = one.ravel(), other.ravel()
    if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        return _nonfinite(a, b, names)
    if len(a) < 2:
        return None
    zeros = [not np.any(a), not np.any(b)]
    if any(zeros):
        return None if all(zeros) else f"{names[zeros.index(True)]} has nothing but zeros"
    with np.errstate(all="ignore"):  # where squares overflow or vanish, nothing is to be seen
        size = np.linalg.norm(a)
        if np.linalg.norm(np.sort(a) - np.sort(b)) <= RTOL * size < np.linalg.norm(a - b):
            return REORDERED + _order(one, other, float(RTOL * size))
        factor = (a @ b) / np.square(size)
        if abs(factor - 1) > RTOL and np.linalg.norm(b - factor * a) <= RTOL * abs(factor) * size:
            return f"{names[1]} is {format_distinct(factor, 1.0)[0]} times {names[0]}"
    return None


def _nonfinite(a: np.ndarray, b: np.ndarray, names: Sequence[str]) -> str | None:
    """How many entries of each are not finite; None where they are the same ones."""
    wrong = ~np.isfinite(a), ~np.isfinite(b)
    if np.array_equal(wrong[0], wrong[1]):
        return None
    counts = [int(side.sum()) for side in wrong]
    first, second = sorted((0, 1), key=lambda side: -counts[side])
    if a.size == 1:
        return f"{names[first]} is not finite"
    other = f"{counts[second]:,}" if counts[second] else "none"
    return (
        f"{counts[first]:,} of {a.size:,} entries of {names[first]} are not finite, {other} of "
        f"{names[second]}"
    )


def _order(a: np.ndarray, b: np.ndarray, limit: float) -> str:
    """Which axes of a tensor are exchanged, or along which one its numbers are in another order; ""
    where neither is so, and along an axis of a matrix, where a flatten comes into question."""
    for axes in itertools.combinations(range(a.ndim), 2):
        turned = np.swapaxes(a, *axes)
        if turned.shape == b.shape and np.linalg.norm(turned - b) <= limit:
            return f": axes {axes[0]} and {axes[1]} are exchanged"
    for axis in range(a.ndim) if a.ndim > 2 else ():
        if np.linalg.norm(np.sort(a, axis) - np.sort(b, axis)) <= limit:
            return f" along axis {axis}"
    return ""
