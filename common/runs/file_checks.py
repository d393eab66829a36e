"""Checks of what a file of a run holds, by whoever reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from lockstep.common.config import MAX_COUNT
from lockstep.common.protocol import Arrays

Check = tuple[str, Callable[[], bool]]  # what may be wrong, and whether it is


def first_problem(checks: Iterable[Check]) -> str | None:
    """The name of the first check that finds something wrong."""
    return next((problem for problem, wrong in checks if wrong()), None)


def same_tensors(arrays: Arrays, expected: Arrays) -> bool:
    """Whether both have the same names, shapes and dtypes."""
    found, wanted = (
        {name: (array.shape, array.dtype) for name, array in tensors.items()}
        for tensors in (arrays, expected)
    )
    return found == wanted


def has_all_layers(layers: list[str], first_steps: Arrays) -> bool:
    """Whether each of the first steps has the activations of these layers and no others: what one
    record lacks is not compared."""
    found: dict[str, set[str]] = {}
    for key in first_steps:
        step, stage, tensor = key.split("/", 2)
        found.setdefault(step, set()).update([tensor] if stage == "forward" else [])
    return all(names == set(layers) for names in found.values())


def all_finite(arrays: Arrays) -> bool:
    return all(bool(np.isfinite(array).all()) for array in arrays.values())


def are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def are_rank_differences(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, dict)
        and each.keys() == {"step", "rank", "tensor", "gap"}
        and is_count(each["step"], 0)
        and is_count(each["rank"], 1)
        and isinstance(each["tensor"], str)
        and (each["gap"] is None or is_time(each["gap"]))
        for each in value
    )


def is_count(value: object, least: int, most: int = MAX_COUNT) -> bool:
    """Whether `value` is a whole number, from JSON, between these two."""
    return type(value) is int and least <= value <= most


def is_time(value: object) -> bool:
    return type(value) is float and 0 <= value < np.inf
