"""Between Flax's layout and the canonical one. They are the same: kernels are HWIO and (in, out), names are dotted.

What is left is where the arrays live, and `nnx`'s nested dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from common.protocol import Arrays


def to_canonical(arrays: Mapping[str, jax.Array]) -> Arrays:
    """JAX arrays by dotted name (`conv1.kernel`) as NumPy arrays by the same name."""
    return {name: to_numpy(array) for name, array in arrays.items()}


def from_canonical(arrays: Arrays) -> dict[str, jax.Array]:
    """The inverse of `to_canonical`."""
    return {name: to_array(array) for name, array in arrays.items()}


def flatten(state: Any) -> dict[str, Any]:
    """An `nnx` state as a flat dictionary with dotted names: this is what gradients are taken of."""
    return flatten_dict(nnx.to_pure_dict(state), sep=".")


def nest(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`, as `nnx.merge` takes it."""
    return unflatten_dict(dict(parameters), sep=".")


def to_numpy(array: jax.Array) -> np.ndarray:
    """A copy on the host; bfloat16 as ml_dtypes.bfloat16, JAX's own."""
    return np.array(array)


def to_array(array: np.ndarray) -> jax.Array:
    """A copy as an array of the same dtype, which may be donated."""
    return jnp.array(array, copy=True)
