"""Twins: the same run with its weights and images moved by at most one unit in the last place
(ulp)."""

from __future__ import annotations

import numpy as np

from lockstep.common.dtypes import compute_dtype, numpy_dtype
from lockstep.common.model.initial_weights import generator_for
from lockstep.common.protocol import Arrays

TWINS_STREAM, TWIN_IMAGES_STREAM = (
    2,
    3,
)  # keep these random numbers apart from the others of the same seed


REPLICATE = 0  # the number of the twin that nothing is moved in: the same run again


def ulp_of_weights(dtype: str, inputs: np.ndarray) -> np.dtype:
    """The dtype whose ulp a twin's weights are moved by: the weights' own, or the compute dtype
    where the inputs are integers, which are not moved.

    In mixed precision, the cast to the compute dtype rounds an ulp of the weights away. The twins of
    a network on tokens would then equal the run, and show nothing of rounding.
    """
    return compute_dtype(dtype) if inputs.dtype.kind == "i" else numpy_dtype(dtype)


def twin_weights(weights: Arrays, seed: int, twin: int, ulp: np.dtype | None = None) -> Arrays:
    """`weights`, each moved by one ulp up, one ulp down, or not at all, at random.

    Args:
        twin: 1, 2, ...
        ulp: of `ulp_of_weights`; None: that of the weights' own dtype.
    """
    return {
        name: perturb_one_ulp(array, generator_for(seed, TWINS_STREAM, name, twin), ulp)
        for name, array in weights.items()
    }


def perturb_one_ulp(
    array: np.ndarray, generator: np.random.Generator, ulp: np.dtype | None = None
) -> np.ndarray:
    """Each entry moved by one ulp up, one ulp down, or not at all, at random; zeros stay.

    Args:
        ulp: the dtype whose ulp it is, such as bfloat16 for a float32 array; None: the array's.
    """
    if array.dtype.kind in "iu":  # tokens, of a pair's own
        return array
    bits = array.view(f"i{array.itemsize}")  # the next integer is the next float of the same sign
    # bfloat16 is the first half of a float32
    step = 2 ** (8 * (array.itemsize - (ulp or array.dtype).itemsize))
    with np.errstate(invalid="ignore"):  # NaN
        direction = generator.integers(-1, 2, array.shape, np.int8) * (array != 0)
    return (bits + direction.astype(bits.dtype) * step).view(array.dtype)


def image_perturbation_rng(seed: int, twin: int) -> np.random.Generator:
    """The generator that perturbs a twin's images, batch after batch."""
    return np.random.default_rng([seed, TWIN_IMAGES_STREAM, twin])
