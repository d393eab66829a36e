"""How the values of two matched tensors differ at the start, in words."""

from __future__ import annotations

import math

import numpy as np

CHANCE = 4.0  # standard errors; beyond them, two draws are not of one distribution
FEWEST = 30  # entries, below which a distribution cannot be told
CLOSE = 1e-3  # of the root mean square: rounded otherwise, not drawn otherwise


def in_words(a: np.ndarray, b: np.ndarray, are_permuted: bool = False) -> str:
    """How the entries of two arrays of one layout differ; "" where chance explains it: two draws of
    one distribution.

    Args:
        a: one array.
        b: the other, of the same shape.
        are_permuted: both have the same entries, in different orders.
    """
    one, other = (np.asarray(x).astype(np.float64).ravel() for x in (a, b))
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        return "numbers that are not finite"
    if one.size == 0:
        return ""
    gap, scale = float(np.abs(one - other).max()), math.sqrt(float(np.square(one).mean()))
    if gap <= CLOSE * scale:
        return f"nearly equal: the largest gap is {gap:.1e}"
    described = [_constant(one), _constant(other)]
    if any(described):
        first, second = (
            text or _moments(x) for text, x in zip(described, (one, other), strict=True)
        )
        return f"{first} against {second}"
    if are_permuted:
        return "the same numbers in another order"
    if one.size < FEWEST:
        return ""
    return _distributions(one, other)


def _constant(values: np.ndarray) -> str:
    return f"all {values[0]:.6g}" if (values == values[0]).all() else ""


def _moments(values: np.ndarray) -> str:
    return f"mean {values.mean():.3g}, standard deviation {values.std():.3g}"


def _distributions(a: np.ndarray, b: np.ndarray) -> str:
    n = a.size
    means, deviations = (a.mean(), b.mean()), (a.std(), b.std())
    fourth = [_kurtosis(a), _kurtosis(b)]
    said = []
    if abs(means[0] - means[1]) > CHANCE * math.hypot(*deviations) / math.sqrt(n):
        said.append(f"mean {means[0]:.3g} against {means[1]:.3g}")
    error = math.sqrt(
        sum(d**2 * max(k - 1, 0.1) / 4 / n for d, k in zip(deviations, fourth, strict=True))
    )
    if abs(deviations[0] - deviations[1]) > CHANCE * error:
        said.append(f"standard deviation {deviations[0]:.3g} against {deviations[1]:.3g}")
    if abs(fourth[0] - fourth[1]) > 0.3 + CHANCE * math.sqrt(2 * 24 / n):
        shapes = [_shape(k, n) for k in fourth]
        said.append(f"{shapes[0]} against {shapes[1]}")
    return "; ".join(said)


def _kurtosis(values: np.ndarray) -> float:
    centred = values - values.mean()
    return float((centred**4).mean() / (centred**2).mean() ** 2)


def _shape(kurtosis: float, entries: int) -> str:
    """The kind of a distribution; 2.37 is a normal one's that is truncated at two deviations."""
    for name, value in (("uniform", 1.8), ("truncated normal", 2.37), ("normal", 3.0)):
        if abs(kurtosis - value) < 0.25 + math.sqrt(24 / entries):
            return name
    return f"of kurtosis {kurtosis:.2g}"
