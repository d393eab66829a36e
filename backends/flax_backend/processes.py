"""One of several processes that train a run together: one compiled program over all of them. Reads
next to backends/torch_backend/processes.py.

Every process is given whole batches, and puts its rows on its device. `jax.jit` then computes the
numbers of one process: a mean over the batch is one over all of its rows, wherever they lie.
"""

from __future__ import annotations

import functools
import os
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lockstep.backends.flax_backend import convert
from lockstep.backends.flax_backend.backend import FlaxBackend
from lockstep.backends.flax_backend.inputs import Array
from lockstep.backends.flax_backend.layers import BatchNorm
from lockstep.backends.flax_backend.state import Parameters, State
from lockstep.backends.flax_backend.user_module import Network, exchange
from lockstep.common.config import Config
from lockstep.common.data import check_shares
from lockstep.common.errors import BackendError, reason
from lockstep.common.protocol import Evaluation, Metrics, Rank, Snapshot, Task

JOIN_TIMEOUT = 60  # seconds
HEARTBEAT_TIMEOUT = 20  # seconds after which JAX ends this process, where another one is gone
IMAGES = "images"  # the axis of the mesh

Tree = TypeVar("Tree")  # of arrays


class FlaxRank(FlaxBackend):
    """A `FlaxBackend` that trains on its rows of each batch. All processes call it alike.

    Raises:
        BackendError: if the group of processes cannot be joined.
        ConfigError: if the processes cannot share a batch.
    """

    # --- Set up: join the group, exchange the batch norms

    def __init__(
        self,
        config: Config,
        classes: int | Task,
        dtype: str,
        device: str,
        compile: str,
        concurrent_processes: int,
        rank: Rank,
    ) -> None:
        check_shares(config, rank.count, config.batch_size)
        self.rank = rank
        join(rank)
        super().__init__(config, classes, dtype, device, compile, concurrent_processes)
        first = {found.process_index: found for found in reversed(jax.devices(self.device))}
        mesh = Mesh([first[number] for number in range(rank.count)], (IMAGES,))
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        if config.batch_norm == "local":
            self.network = use_local_batch_norms(self.network, rank.count)

    def init(self, snapshot: Snapshot) -> State:
        return spread(super().init(snapshot), self._everywhere)

    def export(self, state: State) -> Snapshot:
        return super().export(own_copy(state))

    # --- One step, on the rows of this process

    def _on_device(
        self, state: State, images: Array, labels: Array, axis: int = 0
    ) -> tuple[jax.Array, jax.Array, Parameters]:
        check_shares(self.config, self.rank.count, labels.shape[axis])
        whole = super()._on_device(state, images, labels, axis)
        if (
            labels.shape[axis] % self.rank.count
        ):  # JAX does not shard it: every process computes the whole batch
            return spread(whole, self._everywhere)
        rows = PartitionSpec(*[None] * axis, IMAGES)
        return spread(whole, NamedSharding(self._everywhere.mesh, rows))

    def _step(
        self, state: State, images: jax.Array, labels: jax.Array, masks: Parameters
    ) -> tuple[State, Metrics]:
        stepped = super()._step(state, images, labels, masks)
        return jax.lax.with_sharding_constraint(stepped, self._everywhere)

    # --- Looking without touching

    def evaluate(self, state: State, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        """By this process alone, with its own copy of the state."""
        return super().evaluate(own_copy(state), images, labels)

    def _probe(
        self, state: State, images: jax.Array, labels: jax.Array, masks: Parameters
    ) -> tuple[tuple[jax.Array, tuple[Parameters, jax.Array]], Parameters]:
        found = super()._probe(state, images, labels, masks)
        return jax.lax.with_sharding_constraint(found, self._everywhere)

    def _to_numpy(self, array: jax.Array) -> np.ndarray:
        """Of rows that lie on several devices, too."""
        if not array.is_fully_addressable:
            array = own_copy(jax.jit(lambda rows: rows, out_shardings=self._everywhere)(array))
        return super()._to_numpy(array)


# --- The group of processes


def join(rank: Rank) -> None:
    """Join JAX's group of processes, once in a process and before JAX computes anything. GPUs, one
    for each process, were not measured.

    Raises:
        BackendError: if that cannot be done.
    """
    if jax.distributed.is_initialized():
        assert (jax.process_index(), jax.process_count()) == (rank.number, rank.count)
        return
    jax.config.update("jax_enable_preemption_service", False)  # which would keep SIGTERM to itself
    try:
        jax.distributed.initialize(
            f"{rank.host}:{rank.port}",
            rank.count,
            rank.number,
            local_device_ids=int(os.environ.get("LOCAL_RANK", rank.number)),
            initialization_timeout=JOIN_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except RuntimeError as error:
        raise BackendError(
            f"rank {rank.number} of flax cannot join the others at {rank.host}:{rank.port}: "
            f"{reason(error)}"
        ) from error


def spread(tree: Tree, sharding: NamedSharding) -> Tree:
    """Arrays that every process has whole, as arrays of all processes."""

    def of_all(array: jax.Array) -> jax.Array:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(of_all, tree)


def own_copy(tree: Tree) -> Tree:
    """What lies on this process's device of arrays that every process has whole."""
    return jax.tree.map(
        lambda leaf: leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf, tree
    )


# --- Batch norms of the rows of one process


@functools.cache
def local_batch_norm(kind: type[nnx.BatchNorm], count: int) -> type[nnx.BatchNorm]:
    """The class `kind` with the statistics of each of `count` equal parts of a batch, as
    `torch.nn.BatchNorm2d` within `DistributedDataParallel` takes them. The running ones are those of
    the first part."""

    class LocalBatchNorm(kind):
        def __call__(self, x: jax.Array) -> jax.Array:
            if self.use_running_average:
                return super().__call__(x)
            graph, state = nnx.split(self)

            def of_part(part: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
                norm = nnx.merge(graph, nnx.to_pure_dict(state))
                return kind.__call__(norm, part), norm.mean[...], norm.var[...]

            parts, mean, var = jax.vmap(of_part)(x.reshape(count, -1, *x.shape[1:]))
            self.mean[...], self.var[...] = mean[0], var[0]
            return parts.reshape(x.shape)

    return LocalBatchNorm


def use_local_batch_norms(network: Network, count: int) -> Network:
    """The network, whose batch norms take the statistics of each of `count` parts of a batch. Those
    of a class of the user's own stay as they are."""
    shapes = network.parameters | network.statistics
    tensors = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    tensors |= {name: np.asarray(mask) for name, mask in network.masks.items()}
    module = nnx.merge(network.training, convert.nest(tensors, network.names), network.constants)
    names = [
        ".".join(map(str, path))
        for path, layer in nnx.iter_modules(module)
        if type(layer) in GLOBAL
    ]
    module = exchange(module, functools.partial(_replacement, count=count))
    training = nnx.graphdef(module)
    module.eval()
    exchanged = [*dict.fromkeys([*network.exchanged, *names])]  # for the report
    return network._replace(training=training, evaluation=nnx.graphdef(module), exchanged=exchanged)


GLOBAL = (nnx.BatchNorm, BatchNorm)


def _replacement(layer: nnx.Module, count: int) -> nnx.Module | None:
    """The replacement for a batch norm, with all its attributes; None for other layers."""
    if not isinstance(layer, nnx.BatchNorm) or type(layer) not in GLOBAL:
        return None
    norm = object.__new__(local_batch_norm(type(layer), count))
    vars(norm).update(vars(layer))
    return norm
