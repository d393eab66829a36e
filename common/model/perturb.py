"""Twins: the same run with its weights and images moved by at most one unit in the last place
(ulp)."""

from __future__ import annotations

import numpy as np

from lockstep.common.model.initial_weights import generator_for
from lockstep.common.protocol import Arrays

TWINS_STREAM, TWIN_IMAGES_STREAM = (
    2,
    3,
)  # keep these random numbers apart from the others of the same seed


REPLICATE = 0  # the number of the twin that nothing is moved in: the same run again


def twin_weights(weights: Arrays, seed: int, twin: int) -> Arrays:
    """`weights`, each moved by one ulp up, one ulp down, or not at all, at random; `twin` is 1, 2,
    ..."""
    return {
        name: perturb_one_ulp(array, generator_for(seed, TWINS_STREAM, name, twin))
        for name, array in weights.items()
    }


def perturb_one_ulp(array: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Each entry moved by one ulp up, one ulp down, or not at all, at random; zeros stay."""
    if array.dtype.kind in "iu":  # tokens, of a pair's own
        return array
    bits = array.view(f"i{array.itemsize}")  # the next integer is the next float of the same sign
    with np.errstate(invalid="ignore"):  # NaN
        direction = generator.integers(-1, 2, array.shape, np.int8) * (array != 0)
    return (bits + direction).view(array.dtype)


def image_perturbation_rng(seed: int, twin: int) -> np.random.Generator:
    """The generator that perturbs a twin's images, batch after batch."""
    return np.random.default_rng([seed, TWIN_IMAGES_STREAM, twin])
