"""Where one side's array holds the entries of the other's: axes in another order, or merged."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

CLOSE = 1e-3  # relative: two arrays that differ by less are the same one, with a mistake in it
MAX_AXES = 5  # of more, no order of the axes is tried: there are too many
MAX_TRIED = 10**6  # entries; axes of larger arrays are not merged


@dataclass(frozen=True)
class Layout:
    """How an array is brought into another one's layout: axes in another order, then a shape."""

    axes: tuple[int, ...]
    shape: tuple[int, ...]  # of the result

    @property
    def keeps_rows(self) -> bool:
        """Whether the first axis stays where it is."""
        return self.axes[:1] in ((), (0,))

    def of(self, array: np.ndarray) -> np.ndarray:
        """`array` in the layout.

        Raises:
            ValueError: if it has another shape than the array that the layout was found for.
        """
        return array.transpose(self.axes).reshape(self.shape)


def find_layout(a: np.ndarray, b: np.ndarray) -> Layout | None:
    """The layout that makes `b` most like `a`; None if no order of its axes has the shape of `a`.

    Equal shapes stay as they are, unless another order makes the two nearly equal and this one does
    not. Axes are merged or split only where that makes them nearly equal.
    """
    if a.size != b.size:
        return None
    same = Layout(tuple(range(b.ndim)), a.shape)
    if a.shape == b.shape and (a.size == 0 or _distance(a, b) <= CLOSE):
        return same
    orders = itertools.permutations(range(b.ndim)) if b.ndim <= MAX_AXES else [same.axes]
    found = [Layout(axes, a.shape) for axes in orders]
    shaped = [each for each in found if tuple(b.shape[axis] for axis in each.axes) == a.shape]
    merged = [] if a.size > MAX_TRIED else [each for each in found if each not in shaped]
    ranked = sorted((_distance(a, each.of(b)), n) for n, each in enumerate([*shaped, *merged]))
    distance, best = ranked[0] if ranked else (math.inf, 0)
    if distance <= CLOSE:
        return [*shaped, *merged][best]
    if a.shape == b.shape:
        return same
    return min(shaped, key=lambda each: _distance(a, each.of(b)), default=None)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Relative to the size of `a`; infinite if either is not finite."""
    with np.errstate(all="ignore"):
        x, y = a.astype(np.float64), b.astype(np.float64)
        size = float(np.linalg.norm(x.ravel()))
        distance = float(np.linalg.norm((x - y).ravel())) / (size or 1.0)
    return distance if math.isfinite(distance) else math.inf
