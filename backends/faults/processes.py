"""Faults of training in several processes: each is put into every rank of the PyTorch backend.

In JAX one program runs over all processes, and can hardly sum their shards wrongly: here PyTorch's
ranks are at fault, and Flax, in one process or in ranks of its own, stays correct.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.backends.faults.registry import Fault, SetAttr, fault, inject
from lockstep.common.config import Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.errors import ConfigError, did_you_mean
from lockstep.common.protocol import Backend, Rank

if TYPE_CHECKING:
    from torch import Tensor
    from torch.futures import Future

    from lockstep.backends.torch_backend.processes import TorchRank
    from lockstep.backends.torch_backend.state import State
    from lockstep.common.protocol import Metrics, Snapshot
    from lockstep.common.runs.rank_process import BuildRank

PROCESS_FAULTS: list[Fault] = []
INJECTED = ExitStack()  # the fault that this process has
LATE = 3  # the step of the fault that happens once
DDP = "PyTorch docs, DistributedDataParallel"
SAMPLER = "PyTorch docs, DistributedSampler: drop_last"
UNEVEN: dict[str, Any] = {"batch_size": 33}  # neither 2 nor 4 processes share it evenly
DROPOUT: dict[str, Any] = {"model": "vit", "batch_size": 8, "steps": 4}  # which has dropout
RESNET: dict[str, Any] = {"model": "resnet20", "batch_size": 16, "steps": 4}

process_fault = functools.partial(fault, into=PROCESS_FAULTS)


def process_fault_named(name: str) -> Fault:
    """The fault of `PROCESS_FAULTS` called `name`.

    Raises:
        ConfigError: if there is none.
    """
    for each in PROCESS_FAULTS:
        if each.name == name:
            return each
    names = [each.name for each in PROCESS_FAULTS]
    raise ConfigError(f"unknown fault {name!r}: {did_you_mean(name, names)}")


def build_with_fault(
    fault_name: str | None,
    config: Config,
    dataset: Dataset,
    build: BuildRank,
    name: str,
    dtype: str,
    concurrent_processes: int = 1,
    rank: Rank | None = None,
) -> Backend:
    """As `lockstep.backends.build`; until the next call, a rank of PyTorch has the fault (None: has
    none)."""
    INJECTED.close()
    if name == "torch" and rank is not None and fault_name is not None:
        INJECTED.enter_context(inject(process_fault_named(fault_name), config, dataset))
    return build(name, dtype, concurrent_processes, rank)


def _rebuild(patch: SetAttr, change: Callable[[Config, Rank], Config]) -> None:
    """Build the ranks with `change(config, rank)` for the configuration."""
    from lockstep.backends.torch_backend import processes

    init = processes.TorchRank.__init__

    def changed(self: TorchRank, config: Config, *arguments: Any) -> None:
        init(self, change(config, arguments[-1]), *arguments)

    patch(processes.TorchRank, "__init__", changed)


# --- Data


@process_fault("data", "images", SAMPLER)
def same_shard(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Every rank trains on the rows of rank 0."""
    from lockstep.backends.torch_backend import processes

    rows = processes.rows
    patch(processes, "rows", lambda rank, batch: rows(rank._replace(number=0), batch))


@process_fault("data", "images", SAMPLER, **UNEVEN)
def sampler_pads(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Ranks with fewer rows than others train on rows from the batch's start as well."""
    from lockstep.backends.torch_backend import processes

    def padded(rank: Rank, batch: int) -> list[int]:
        most = -(-batch // rank.count)
        return [row % batch for row in range(rank.number * most, (rank.number + 1) * most)]

    patch(processes, "rows", padded)


@process_fault("data", "images", SAMPLER, **UNEVEN)
def sampler_drops(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The rows that the ranks cannot share evenly are left out."""
    from lockstep.backends.torch_backend import processes

    def dropped(rank: Rank, batch: int) -> slice:
        each = batch // rank.count
        return slice(rank.number * each, (rank.number + 1) * each)

    patch(processes, "rows", dropped)


# --- Weights


@process_fault("weights", None, DDP)
def weights_not_broadcast(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Each rank starts from weights of its own."""
    from lockstep.backends.torch_backend import processes

    init = processes.TorchRank.init

    def own(self: TorchRank, snapshot: Snapshot) -> State:
        state = init(self, snapshot)
        for parameter in state.model.parameters():
            parameter.data.mul_(1 + 0.01 * self.rank.number)
        return state

    patch(processes.TorchRank, "init", own)


# --- Forward


@process_fault("forward", None, "PyTorch docs, SyncBatchNorm", **RESNET)
def batch_norm_of_each_rank(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Batch norms take the statistics of each rank's rows, where the other side takes those of the
    batch."""
    _rebuild(patch, lambda config, rank: dataclasses.replace(config, batch_norm="local"))


@process_fault("forward", None, "PyTorch docs, Reproducibility: one seed", **DROPOUT)
def dropout_of_one_seed(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The masks of dropout are the same in all ranks, for other rows."""
    from lockstep.backends.torch_backend import processes

    masks = processes.TorchRank._masks

    def of_rank_0(self: TorchRank, state: State, shape: Sequence[int]) -> dict[str, Tensor]:
        found = masks(self, state, shape)
        first = processes.rows(self.rank._replace(number=0), shape[-1])
        tiled = np.arange(shape[-1]) % len(range(shape[-1])[first])
        return {
            name: mask[(*[slice(None)] * (len(shape) - 1), tiled)] for name, mask in found.items()
        }

    patch(processes.TorchRank, "_masks", of_rank_0)


@process_fault("forward", None, "PyTorch docs, Reproducibility: a seed for each rank", **DROPOUT)
def dropout_seed_of_each_rank(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Each rank draws its masks of dropout from a seed of its own."""
    _rebuild(
        patch, lambda config, rank: dataclasses.replace(config, seed=config.seed + rank.number)
    )


# --- Loss


@process_fault("loss", None, "PyTorch forum: loss averaged over uneven batches", **UNEVEN)
def mean_of_means(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The loss is the mean of the ranks' means, which have different numbers of rows."""
    from lockstep.backends.torch_backend import processes

    patch(processes, "mean_of_all", lambda mean, count: processes.average(mean))


# --- Backward


@process_fault("backward", None, DDP + ": gradients are averaged")
def gradients_summed(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The gradients of the ranks are summed, and not averaged."""
    from lockstep.backends.torch_backend import processes

    average = processes.average_in_order

    def total(own: Tensor) -> Future[Tensor]:
        count = processes.dist.get_world_size()
        return average(own).then(lambda future: future.value() * count)

    patch(processes, "average_in_order", total)


@process_fault(
    "backward", None, "PyTorch docs, clip_grad_norm_: after the reduction", clip_norm=0.2
)
def clipped_in_each_rank(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Each rank clips its own gradients before they are averaged."""
    from lockstep.backends.torch_backend import processes

    average, limit = processes.average_in_order, config.clip_norm
    assert limit is not None

    def clipped(own: Tensor) -> Future[Tensor]:
        return average(own * (limit / (own.norm() + 1e-6)).clamp(max=1.0))

    patch(processes, "average_in_order", clipped)


@process_fault("backward", None, DDP + ": no_sync")
def no_sync_in_one_step(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """In one step the gradients are not exchanged, as when accumulation is off by one."""
    from lockstep.backends.torch_backend import processes

    step = processes.TorchRank._step

    def unsynced(self: TorchRank, state: State, *arguments: Any) -> tuple[State, Metrics]:
        if state.step != LATE:
            return step(self, state, *arguments)
        with vars(state.model)["distributed"].no_sync():
            return step(self, state, *arguments)

    patch(processes.TorchRank, "_step", unsynced)


# --- Update


@process_fault("update", "lr", "Goyal et al. 2017: the linear scaling rule")
def lr_times_processes(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The learning rate is multiplied by the number of processes."""
    _rebuild(patch, lambda config, rank: dataclasses.replace(config, lr=config.lr * rank.count))


@process_fault(
    "update",
    None,
    "PyTorch docs, ReduceLROnPlateau",
    lr=0.5,
    schedule=Schedule("plateau", gamma=0.5, window=2, patience=0, threshold=0.001, cooldown=0),
)
def plateau_of_own_loss(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Each rank's plateau schedule follows the loss of its own rows."""
    from lockstep.backends.torch_backend import optimizer, processes

    mean_of_all, step = processes.mean_of_all, optimizer.Scheduler.step
    own: list[Tensor] = []

    def kept(mean: Tensor, count: Tensor) -> Tensor:
        own[:] = [mean.detach()]
        return mean_of_all(mean, count)

    patch(processes, "mean_of_all", kept)
    patch(optimizer.Scheduler, "step", lambda self, loss: step(self, own[0]))


@process_fault("update", None, DDP + ": broadcast_buffers", batch_norm="local", **RESNET)
def buffers_not_broadcast(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Each rank keeps the running statistics of its own batch norms."""
    from lockstep.backends.torch_backend import processes

    patch(processes.TorchRank, "_step", super(processes.TorchRank, processes.TorchRank)._step)
