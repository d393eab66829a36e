"""One of several processes that train a run together: `DistributedDataParallel`, and the numbers of
one process. Reads next to backends/flax_backend/processes.py.

Every process is given whole batches and takes its rows. DDP averages the gradients; the rest makes
that average the gradient of the whole batch's loss, also where the rows are not shared out evenly.
"""

from __future__ import annotations

import datetime
import os
import warnings
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed import _functional_collectives as collectives
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lockstep.backends.torch_backend import convert
from lockstep.backends.torch_backend.backend import TorchBackend
from lockstep.backends.torch_backend.compiled import ManySteps, Masks
from lockstep.backends.torch_backend.device import choose_device
from lockstep.backends.torch_backend.inputs import Array
from lockstep.backends.torch_backend.layers import BatchNorm2d
from lockstep.backends.torch_backend.losses import upcast
from lockstep.backends.torch_backend.state import State
from lockstep.backends.torch_backend.user_module import exchange
from lockstep.common.config import Config
from lockstep.common.data import check_shares, rows
from lockstep.common.data.dataset import IGNORED
from lockstep.common.errors import BackendError, reason
from lockstep.common.protocol import Arrays, Evaluation, Metrics, Rank, Snapshot, Task

TIMEOUT = datetime.timedelta(minutes=5)  # to join the others, and to wait for them in a step


class TorchRank(TorchBackend):
    """A `TorchBackend` that trains on its rows of each batch. All processes call it alike.

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
        self.rank, self.evaluating = rank, False
        join(rank, choose_device(device))
        super().__init__(config, classes, dtype, device, compile, concurrent_processes)
        if config.batch_norm == "global":
            self._template = use_global_batch_norms(self._template)
        self._many_steps = ManyAveragedSteps(
            config, self._template, self._step, self._loss, self._cast, self.device, self.compiled
        )

    def init(self, snapshot: Snapshot) -> State:
        state = super().init(snapshot)
        distributed = DistributedDataParallel(_ForwardPass(self, state.model))
        distributed.register_comm_hook(None, lambda _, bucket: average_in_order(bucket.buffer()))
        distributed.broadcast_buffers = False  # the masks of dropout are buffers, too
        vars(state.model)["distributed"] = distributed
        return state

    # --- One step, on the rows of this process

    def _on_device(
        self, state: State, images: Array, labels: Array, axis: int = 0
    ) -> tuple[Tensor, Tensor, Masks]:
        check_shares(self.config, self.rank.count, labels.shape[axis])
        own = (*[slice(None)] * axis, rows(self.rank, labels.shape[axis]))
        images, labels, masks = super()._on_device(state, images, labels, axis)
        return images[own], labels[own], {name: mask[own] for name, mask in masks.items()}

    def _forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Through `DistributedDataParallel`, except in evaluation."""
        if self.evaluating:
            return super()._forward(model, images)
        return vars(model)["distributed"](images)

    def _loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Of the whole batch, except in evaluation."""
        loss = super()._loss(logits, labels, smoothing)
        if self.evaluating:
            return loss
        # As `lockstep.common.data.label_count` counts them.
        if labels.is_floating_point() or labels.ndim == 1:
            return mean_of_all(loss, torch.tensor(len(labels), device=loss.device))
        return mean_of_all(loss, (labels != IGNORED).sum())

    def _step(
        self, state: State, images: Tensor, labels: Tensor, masks: Masks
    ) -> tuple[State, Metrics]:
        state, metrics = super()._step(state, images, labels, masks)
        if self.config.batch_norm == "local":
            # DDP does this before the next forward pass; here, so that all have the same state now.
            for name, buffer in state.model.named_buffers():
                if name not in masks:
                    dist.broadcast(buffer, src=0)
        return state, metrics

    def last_gradients(self, state: State) -> Arrays:
        """Those of the last step, as DDP has reduced them; none after compiled steps."""
        found = {name: parameter.grad for name, parameter in state.model.named_parameters()}
        kept = {name: gradient for name, gradient in found.items() if gradient is not None}
        return convert.to_canonical(state.model, kept)

    # --- Looking without touching

    def evaluate(self, state: State, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        """By this process alone, with its own copy of the state."""
        self.evaluating = True
        try:
            return super().evaluate(state, images, labels)
        finally:
            self.evaluating = False

    def probe(self, state: State, images: np.ndarray, labels: np.ndarray) -> Arrays:
        own = super().probe(state, images, labels)
        parts: list[Arrays] = [{} for _ in range(self.rank.count)]
        dist.all_gather_object(parts, own)
        return gather(parts)

    def _gradients(self, model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
        """As DDP has reduced them: `torch.autograd.grad` passes it by."""
        model.zero_grad()
        loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        return {name: gradient for name, gradient in found.items() if gradient is not None}


class _ForwardPass(nn.Module):
    """What DDP wraps: the forward pass of one process, with parameters rounded where precision is
    mixed."""

    def __init__(self, backend: TorchRank, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.run = super(TorchRank, backend)._forward

    def forward(self, images: Tensor) -> Tensor:
        return self.run(self.model, images)


class ManyAveragedSteps(ManySteps):
    """`ManySteps` whose compiled loop averages the gradients, as DDP does in single steps."""

    def _as_one_program(
        self, state: State, images: Tensor, labels: Tensor, masks: Masks
    ) -> tuple[State, Metrics]:
        state.optimizer.zero_grad()  # those of an earlier step
        return super()._as_one_program(state, images, labels, masks)

    def _gradients(
        self,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        images: Tensor,
        labels: Tensor,
        masks: Masks,
    ) -> tuple[dict[str, Tensor], tuple[Tensor, dict[str, Tensor]]]:
        gradients, (loss, buffers) = super()._gradients(parameters, buffers, images, labels, masks)
        gradients = {name: average(gradient) for name, gradient in gradients.items()}
        if self.config.batch_norm == "local":
            buffers = {name: of_rank_0(buffer) for name, buffer in buffers.items()}
        return gradients, (loss, buffers)


# --- The group of processes


def join(rank: Rank, device: str) -> None:
    """Join PyTorch's group of processes, once in a process: gloo on the CPU, NCCL on GPUs, which
    was not measured.

    Raises:
        BackendError: if that cannot be done.
    """
    if dist.is_initialized():
        assert (dist.get_rank(), dist.get_world_size()) == (rank.number, rank.count)
        return
    # A gradient whose memory lies otherwise is copied, which costs little.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    if device == "cuda":  # one for each process of this machine
        local = int(os.environ.get("LOCAL_RANK", rank.number))
        torch.cuda.set_device(local % torch.cuda.device_count())
    try:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=f"tcp://{rank.host}:{rank.port}",
            timeout=TIMEOUT,
            world_size=rank.count,
            rank=rank.number,
        )
    except RuntimeError as error:
        raise BackendError(
            f"rank {rank.number} of torch cannot join the others at {rank.host}:{rank.port}: "
            f"{reason(error)}"
        ) from error


def everyone() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.group.WORLD)


def gather(parts: list[Arrays]) -> Arrays:
    """The tensors of a step: those of the batch's images of all processes, the others of rank 0,
    which all have."""
    counts = [len(part["data/labels"]) for part in parts]

    def whole(name: str) -> np.ndarray:
        arrays = [part[name] for part in parts]
        of_images = name.startswith(("data/", "forward/"))
        if of_images and [len(array) for array in arrays] == counts:
            return np.concatenate(arrays)
        return arrays[0]

    return {name: whole(name) for name in parts[0]}


def average_in_order(own: Tensor) -> torch.futures.Future[Tensor]:
    """The average of the gradients of one of DDP's buckets, added in the order of the ranks.

    Gloo's own order depends on where a gradient lies in its bucket, which DDP changes after its
    first step: with three processes or more, a run that is resumed would have other last bits.
    """
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    work = cast(dist.Work, dist.all_gather(parts, own, async_op=True))

    def average_of_parts(_: object) -> Tensor:
        total = upcast(parts[0])
        for part in parts[1:]:
            total = total + upcast(part)
        return (total / len(parts)).to(own.dtype)

    return work.get_future().then(average_of_parts)


class _Sum(torch.autograd.Function):
    """The sum over all processes; the gradient of each one's tensor is the sum of all gradients."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return collectives.wait_tensor(collectives.all_reduce(tensor, "sum", everyone()))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        del ctx, inputs, output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        del ctx
        return _Sum.apply(gradients[0])


def sum_of_all(tensor: Tensor) -> Tensor:
    """The sum over all processes, through which gradients flow."""
    return _Sum.apply(tensor.contiguous())


def mean_of_all(mean: Tensor, count: Tensor) -> Tensor:
    """The mean over the whole batch. The mean of the processes' means is another number where they
    have different counts; of none, it is not a number.

    Its gradient in each process is that of all processes' losses together, so that the average over
    the processes is that of the loss.
    """
    own = torch.where(count > 0, mean, 0) * count
    total, counts = sum_of_all(torch.stack([own, count.to(own.dtype)]))
    return total / counts


def average(tensor: Tensor) -> Tensor:
    return sum_of_all(tensor) / dist.get_world_size()


def of_rank_0(tensor: Tensor) -> Tensor:
    return collectives.wait_tensor(collectives.broadcast(tensor, 0, everyone()))


# --- Batch norms of the whole batch


class GlobalBatchNorm(_BatchNorm):
    """`nn.BatchNorm` with the statistics of the whole batch: those of `layers.BatchNorm2d`.
    `nn.SyncBatchNorm`, the library's, refuses the CPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Of any number of dimensions; the module that this replaces has checked it."""

    def forward(self, input: Tensor) -> Tensor:
        mean, var, momentum = self.running_mean, self.running_var, self.momentum
        if not self.training or mean is None or var is None or momentum is None:
            return super().forward(input)
        x = upcast(input)  # bfloat16 is too coarse for statistics
        axes, shape = (0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
        count = x.new_tensor([x[:, 0].numel()])
        total = sum_of_all(torch.cat([x.sum(axes), count]))
        pixels = total[-1]
        centred = x - (total[:-1] / pixels).view(shape)
        batch_var = sum_of_all(centred.square().sum(axes)) / pixels
        with torch.no_grad():
            mean.lerp_((total[:-1] / pixels).to(mean.dtype), momentum)
            var.lerp_((batch_var * (pixels / (pixels - 1))).to(var.dtype), momentum)
        normalised = centred * torch.rsqrt(batch_var + self.eps).view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)


def use_global_batch_norms(module: nn.Module) -> nn.Module:
    """The network, whose batch norms take the statistics of the whole batch. Those of a class of the
    user's own stay as they are."""
    names = [name for name, layer in module.named_modules() if type(layer) in LOCAL]
    module = exchange(module, _global_batch_norm)
    if "exchanged" in vars(module):  # a user's network, whose report says so
        vars(module)["exchanged"] = list(dict.fromkeys([*vars(module)["exchanged"], *names]))
    return module


LOCAL = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm2d)


def _global_batch_norm(layer: nn.Module) -> nn.Module | None:
    """The replacement for a batch norm, with all its attributes; None for other layers."""
    if type(layer) not in LOCAL:
        return None
    norm = GlobalBatchNorm.__new__(GlobalBatchNorm)
    vars(norm).update(vars(layer))
    return norm
