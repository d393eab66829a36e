"""Do the two modules of a pair draw their initial weights from the same distributions?

Lockstep trains both from the same weights, so it cannot see a difference there. A port that is
trained alone learns differently. Each module is built several times, with other seeds, and the
entries of each tensor are compared as two samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lockstep.common.protocol import Arrays

Draw = Callable[[int], Arrays]  # by seed, the initial tensors of a module, by canonical name

DRAWS = 20  # at most; fewer where each tensor has ENOUGH entries before
ENOUGH = 50_000  # tensors of 8,640 entries show each wrong start of tests/evidence/test_initialisation.py
# The probability of a false alarm, per tensor and test. The test of Kolmogorov and Smirnov sees
# another gain, fan or shape; that of the outermost entries sees a truncated tail.
LEVEL = 1e-6
MAX_ENTRIES = 10_000  # of a tensor in one draw; about so many of more


@dataclass(frozen=True)
class StartDifference:
    """A tensor whose initial values the two modules draw from different distributions."""

    name: str  # canonical
    torch: str  # its distribution in words
    flax: str


def compare_starts(draws: Mapping[str, Draw]) -> tuple[StartDifference, ...]:
    """The tensors whose initial values two modules draw differently, in the order of the first.

    Args:
        draws: by backend; both give the same tensors.
    """
    ours: dict[str, np.ndarray] = {}
    theirs: dict[str, np.ndarray] = {}
    for seed in range(DRAWS):
        for entries, draw in zip((ours, theirs), draws.values(), strict=True):
            for name, tensor in draw(seed).items():
                entries[name] = np.append(entries.get(name, ()), sample(tensor))
        if seed > 0 and all(is_enough(ours[name], theirs[name]) for name in ours):
            break
    return tuple(
        StartDifference(name, in_words(ours[name]), in_words(theirs[name]))
        for name in ours
        if differ(ours[name], theirs[name])
    )


def sample(tensor: np.ndarray) -> np.ndarray:
    """Entries of one tensor, float64 (entries,), at most about `MAX_ENTRIES`."""
    entries = tensor.ravel()
    return entries[:: max(1, entries.size // MAX_ENTRIES)].astype(np.float64)


def is_enough(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether more draws would tell no more of a tensor: one side is constant, or entries are many."""
    return is_constant(a) or is_constant(b) or a.size >= ENOUGH


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two samples of equal size come from two distributions.

    Tests: that of Kolmogorov and Smirnov, and on either end how many of the outermost entries come
    from one sample alone: k or more with a probability of 2^(1 - k), where both are drawn alike.
    """
    if is_constant(a) or is_constant(b):
        return not np.array_equal(a, b)
    if distribution_level(a, b) < LEVEL:
        return True
    outermost = max(beyond(a, b), beyond(b, a), beyond(-a, -b), beyond(-b, -a))
    return 2.0 ** (1 - outermost) < LEVEL


def distribution_level(a: np.ndarray, b: np.ndarray) -> float:
    """The p-value of the two-sample test of Kolmogorov and Smirnov, by its limit for large samples:
    2 sum over k of (-1)^(k - 1) exp(-2 k^2 n m / (n + m) D^2)."""
    from scipy.special import kolmogorov

    a, b = np.sort(a), np.sort(b)
    both = np.concatenate([a, b])
    shares = (np.searchsorted(side, both, side="right") / side.size for side in (a, b))
    largest = np.abs(np.subtract(*shares)).max()
    return float(kolmogorov(largest * np.sqrt(a.size * b.size / (a.size + b.size))))


def beyond(a: np.ndarray, b: np.ndarray) -> int:
    """How many entries of `a` are larger than all of `b`."""
    return int(np.sum(a > b.max()))


def is_constant(entries: np.ndarray) -> bool:
    """Whether all entries are one number, in all draws."""
    return bool(np.ptp(entries) == 0) if entries.size else True


def in_words(entries: np.ndarray) -> str:
    """As `all 0`, or `deviation 0.059 between -0.1 and 0.1`."""
    if entries.size == 0:
        return "empty"
    if is_constant(entries):
        return f"all {entries[0]:.3g}"
    low, high = entries.min(), entries.max()
    return f"deviation {entries.std():.2g}, between {low:.2g} and {high:.2g}"


def sentence(found: tuple[StartDifference, ...], tensors: int) -> str:
    """The result in plain words."""
    if not found:
        return "Both modules draw their initial weights alike, as far as repeated draws show."
    return (
        f"The two modules draw different initial values for {len(found)} of {tensors} tensors. "
        "Lockstep trains both from the same weights; trained alone, they would differ."
    )


def table(found: tuple[StartDifference, ...]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column names and lines."""
    rows = [(start.name, start.torch, start.flax) for start in found]
    return ("initial values", "PyTorch", "Flax"), rows
