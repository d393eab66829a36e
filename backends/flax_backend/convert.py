"""Between Flax's layout and the canonical one, which are the same: kernels are HWIO and (in, out),
names are dotted. Reads next to backends/torch_backend/convert.py.

What remains is to copy between host and device, to nest and flatten dictionaries for `nnx`, and to
rename what a user's pair renames.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from lockstep.common.model import names as pair_names
from lockstep.common.model import trees
from lockstep.common.protocol import Arrays


def to_canonical(arrays: Mapping[str, jax.Array]) -> Arrays:
    """JAX arrays by dotted name (`conv1.kernel`) as NumPy arrays by the same name."""
    return {name: to_numpy(array) for name, array in arrays.items()}


def from_canonical(arrays: Arrays) -> dict[str, jax.Array]:
    """The inverse of `to_canonical`."""
    return {name: to_array(array) for name, array in arrays.items()}


def canonical_names(tensors: Iterable[str], declared: Mapping[str, str]) -> dict[str, str]:
    """The canonical names of all parameters, statistics and masks of dropout, by Flax's own.

    Args:
        tensors: Flax's own dotted names.
        declared: canonical names of Flax's layers, where the user's pair gives them.

    Raises:
        ConfigError: if two tensors get one name, or `declared` names one that does not exist.
    """
    return pair_names.canonical_names(
        {native: native.rpartition(".")[2] for native in tensors}, declared, "Flax"
    )


def cast_to_compute(
    tensors: Mapping[str, jax.Array], dtype: np.dtype, keep: Collection[str]
) -> dict[str, jax.Array]:
    """Tensors in the precision to compute in; gradients flow through.

    Args:
        keep: layers whose tensors stay as they are: batch norms, as in PyTorch's FSDP.
    """
    return {
        name: tensor if name.rpartition(".")[0] in keep else tensor.astype(dtype)
        for name, tensor in tensors.items()
    }


def activations_to_canonical(
    names: Mapping[str, str], activations: Mapping[str, jax.Array]
) -> Arrays:
    """The recorded activations as `forward/<name>`, with canonical names and in the canonical
    layout. `names` are those of the tensors."""
    layers = pair_names.layer_names(names)
    return {pair_names.activation_key(layers, name): to_numpy(a) for name, a in activations.items()}


def outputs_to_canonical(outputs: object) -> Arrays:
    """The outputs of a network, with a name for each."""
    return {name: to_numpy(leaf) for name, leaf in trees.leaves(outputs)}


def exchanged(names: Sequence[str]) -> dict[str, object]:
    """For the report: the layers of a user's module that were exchanged, if there are any."""
    return {"exchanged": list(names)} if names else {}


def flatten(state: nnx.State, names: Mapping[str, str] | None = None) -> dict[str, jax.Array]:
    """An `nnx` state as a flat dictionary with dotted names; gradients are taken with respect to
    such dictionaries.

    Args:
        names: from `canonical_names`; None: Flax's own.
    """
    paths = cast(dict[tuple[str | int, ...], jax.Array], flatten_dict(nnx.to_pure_dict(state)))
    leaves = {".".join(map(str, path)): leaf for path, leaf in paths.items()}
    return leaves if names is None else {names[native]: leaf for native, leaf in leaves.items()}


def nest(
    arrays: Mapping[str, jax.Array | np.ndarray], names: Mapping[str, str] | None = None
) -> dict[str | int, object]:
    """The inverse of `flatten`, as `nnx.merge` takes it."""
    if names is not None:
        native_names = {name: native for native, name in names.items()}
        arrays = {native_names.get(name, name): array for name, array in arrays.items()}
    paths = {
        tuple(int(part) if part.isdecimal() else part for part in native.split(".")): native
        for native in arrays
    }
    return unflatten_dict({path: arrays[native] for path, native in paths.items()})


def to_numpy(array: jax.Array) -> np.ndarray:
    """A copy on the host; bfloat16 as ml_dtypes.bfloat16, JAX's own."""
    return np.array(array)


def to_array(array: np.ndarray) -> jax.Array:
    """A copy as an array of the same dtype, which may be donated."""
    return jnp.array(array, copy=True)
