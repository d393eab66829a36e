"""JAX's arrays that several processes hold together, as a recorder reads them: parameters whole, and
of a batch the rows of this process."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lockstep.common.errors import ConfigError

Array = np.ndarray | jax.Array


def _is_split(leaf: jax.Array) -> bool:
    """Whether other processes hold parts of it that this one lacks."""
    return not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def whole(leaf: Array) -> np.ndarray:
    """
    Raises:
        ConfigError: if this process lacks parts of it.
    """
    if isinstance(leaf, jax.Array) and _is_split(leaf):
        raise ConfigError(
            f"an array {leaf.shape} is split over processes ({leaf.sharding}): give Lockstep "
            "parameters, gradients and losses that each process has whole, "
            "NamedSharding(mesh, PartitionSpec())"
        )
    return np.asarray(leaf)


def own_rows(leaf: Array) -> np.ndarray:
    """The array, or the rows of it that this process holds.

    Raises:
        ConfigError: if it is split along another axis.
    """
    if not isinstance(leaf, jax.Array) or not _is_split(leaf):
        return np.asarray(leaf)
    shards = {shard.index[0].start or 0: shard for shard in leaf.addressable_shards}
    if any(shard.data.shape[1:] != leaf.shape[1:] for shard in shards.values()):
        whole(leaf)
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def placed_like(leaf: Array, array: np.ndarray) -> Array:
    """`array` in the library and on the devices of `leaf`."""
    if not isinstance(leaf, jax.Array):
        return array
    if leaf.is_fully_addressable:
        return jnp.asarray(array)
    return jax.make_array_from_process_local_data(leaf.sharding, array, leaf.shape)
