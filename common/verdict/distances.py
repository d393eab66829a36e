"""Distances between arrays, tensors and sets of weights."""

from __future__ import annotations

import math

import numpy as np


def abs_differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Absolute differences of two float64 arrays; infinite where either is not finite, even
    if both are."""
    with np.errstate(invalid="ignore", over="ignore"):
        differences = np.abs(a - b)
    return np.where(np.isfinite(differences), differences, np.inf)


def max_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, tuple[float, float] | None]:
    """The largest absolute difference of two float64 (n,) arrays, and both values there."""
    if len(a) == 0:
        return 0.0, None
    differences = abs_differences(a, b)
    worst = int(np.argmax(differences))
    return float(differences[worst]), (float(a[worst]), float(b[worst]))


def max_tensor_difference(
    a: np.ndarray | None, b: np.ndarray | None
) -> tuple[float, tuple[float, float] | None]:
    """The largest absolute difference and both values there; infinite for missing tensors, other
    shapes or dtypes. Integers are numbers of any width: PyTorch's have 64 bits, JAX's 32."""
    if a is None or b is None or a.shape != b.shape:
        return math.inf, None
    if a.dtype != b.dtype and not (a.dtype.kind == b.dtype.kind == "i"):
        return math.inf, None
    return max_difference(np.ravel(a).astype(np.float64), np.ravel(b).astype(np.float64))


def tensor_quantile_difference(
    a: np.ndarray | None, b: np.ndarray | None, quantile: float
) -> float:
    """The quantile of the absolute differences of all entries; infinite for missing tensors, other
    shapes or dtypes."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if a.size == 0:
        return 0.0
    differences = abs_differences(a.astype(np.float64), b.astype(np.float64))
    return float(np.quantile(differences, quantile, method="lower"))


def scalar_gap(a: float, b: float) -> float:
    return max_difference(np.array([a]), np.array([b]))[0]


def weights_distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The Euclidean distance of all parameters together; infinite if they are not the same
    tensors."""
    if any(
        max_tensor_difference(a.get(name), b.get(name))[0] == math.inf
        for name in a.keys() | b.keys()
    ):
        return math.inf
    squares = [
        np.sum(np.square(a[name].astype(np.float64) - b[name].astype(np.float64))) for name in a
    ]
    return float(np.sqrt(sum(squares)))


def magnitude(array: np.ndarray | None) -> float:
    """The largest absolute value that is finite; 0 if there is none."""
    if array is None:
        return 0.0
    values = np.abs(array.astype(np.float64))
    return float(np.max(values, initial=0.0, where=np.isfinite(values)))
