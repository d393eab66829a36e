"""What can be seen in two tensors that should be equal: how one is made of the other, where they
differ most, and how one update is made of the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from lockstep.common.verdict.comparison import Entry, format_distinct
from lockstep.common.verdict.distances import abs_differences

N_WORST = 5
REORDERED = "the same numbers in another order"
EXACT = 1e-6  # relative residual under which one tensor is called a multiple of the other
ABOUT = 0.02  # the same for "about": decay and rounding of small entries may be in it
SINGLE = (1e-9, 1e-5)  # relative gaps in which float32's rounding shows in a float64 run
ITSELF, UNCHANGED, INVERSE = "times the parameter itself", "does not change", "the smaller"
AS_BEFORE = "times what it was before"


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
        if np.linalg.norm(np.sort(a) - np.sort(b)) <= EXACT * size < np.linalg.norm(a - b):
            return REORDERED + _order(one, other, float(EXACT * size))
        factor = (a @ b) / np.square(size)
        if abs(factor - 1) > EXACT and np.linalg.norm(b - factor * a) <= EXACT * abs(factor) * size:
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
    most = f"{counts[first]:,} of {a.size:,} entries of {names[first]}"
    return f"not finite: {most}, {other} of {names[second]}"


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


# --- What can be seen in two updates


def update_relation(
    before: np.ndarray,
    after: tuple[np.ndarray, np.ndarray],
    gradient: np.ndarray | None,
    names: Sequence[str],
) -> str | None:
    """How the second run's update of a parameter is made of the first one's; None if that cannot
    be seen.

    Args:
        before: the parameter before the step, of both.
        after: of either side.
        gradient: of the step, if known.
    """
    changes = [(each - before).astype(np.float64).ravel() for each in after]
    if before.size < 2 or not all(np.isfinite(change).all() for change in changes):
        return None
    still = [not change.any() for change in changes]
    if any(still):
        return None if all(still) else f"{names[still.index(True)]} {UNCHANGED} it"
    factor = _factor(changes[1], changes[0], EXACT)
    if factor is not None and abs(factor - 1) > EXACT:
        return _times(names, "update", factor)
    difference = changes[1] - changes[0]
    if text := difference_relation(difference, before, gradient, names):
        return text
    if gradient is not None and _falls_with(difference, gradient.astype(np.float64).ravel()):
        return f"the two updates differ most {INVERSE} the gradient's entry is"
    if (factor := _factor(changes[1], changes[0], ABOUT)) and abs(factor - 1) > ABOUT:
        return _times(names, "update", factor, "about ")
    return None


def difference_relation(
    difference: np.ndarray, parameter: np.ndarray, gradient: np.ndarray | None, names: Sequence[str]
) -> str | None:
    """Whether what one side has more is a multiple of the parameter, or of its gradient."""
    difference = difference.astype(np.float64).ravel()
    if difference.size < 2:
        return None
    if factor := _factor(difference, parameter.astype(np.float64).ravel(), EXACT):
        return f"{names[1]} adds {factor:.3g} {ITSELF}"
    if gradient is None:
        return None
    if factor := _factor(difference, gradient.astype(np.float64).ravel(), EXACT):
        return f"{names[1]} adds {factor:.3g} times the gradient"
    return None


def slot_relation(
    before: np.ndarray,
    after: tuple[np.ndarray, np.ndarray],
    parameter: np.ndarray,
    names: Sequence[str],
) -> str | None:
    """How a moment or a momentum that the second run's optimizer keeps is made of the first one's.

    Args:
        before: the same before the step, of both.
        parameter: before the step, of both.
    """
    difference = after[1] - after[0]
    if text := difference_relation(difference, parameter, None, names):
        return text
    kept = before.astype(np.float64).ravel()
    factor = _factor(difference.astype(np.float64).ravel(), kept, EXACT)
    return f"{names[1]} adds {factor:.3g} {AS_BEFORE}" if factor and before.size > 1 else None


def scalar_relation(a: float, b: float, names: Sequence[str]) -> str | None:
    """Whether one number is a plain multiple of the other, such as the batch size or 1.1."""
    for one, other, (first, second) in ((a, b, names), (b, a, tuple(reversed(names)))):
        factor = other / one if one else math.nan
        if abs(factor) > 1 + EXACT and abs(factor - float(f"{factor:.3g}")) < 1e-9 * abs(factor):
            return f"{second} is {factor:.3g} times {first}"
    return None


def looks_single(gap: float, scale: float) -> bool:
    """Whether a gap of this size in a float64 run is that of float32's rounding."""
    return scale > 0 and SINGLE[0] < gap / scale < SINGLE[1]


def _times(names: Sequence[str], what: str, factor: float, about: str = "") -> str:
    shown = format_distinct(factor, 1.0)[0] if not about else f"{factor:.3g}"
    return f"{names[1]}'s {what} is {about}{shown} times {names[0]}'s"


def _factor(values: np.ndarray, of: np.ndarray, residual: float) -> float | None:
    """c where `values` are c times `of`, up to this relative residual; None if they are not."""
    with np.errstate(all="ignore"):
        square = float(of @ of)
        factor = float(values @ of) / square if square else 0.0
        left = float(np.linalg.norm(values - factor * of))
    size = float(np.linalg.norm(values))
    fits = np.isfinite(factor) and factor != 0 and left <= residual * size
    return factor if fits else None


def _falls_with(difference: np.ndarray, gradient: np.ndarray) -> bool:
    """Whether entries differ in inverse proportion to their gradient, as by Adam's epsilon:
    lr g / (|g| + e) differs by lr (e' - e) sign(g) / |g|."""
    large = np.abs(gradient) > 1e-2 * np.abs(gradient).max(initial=0.0)
    products = (difference * gradient)[large]
    if len(products) < 2 or not products.any():
        return False
    middle = float(np.median(products))
    return bool(np.median(np.abs(products - middle)) < 0.1 * abs(middle))
