"""Many steps as one compiled program: the step of `TorchBackend._step` without side effects. Reads
next to backends/flax_backend/compiled.py.

`torch.compile` cannot trace `loss.backward` and `SGD.step` as a whole, so this step takes its
gradients with `torch.func` and calls `sgd`, the function behind `SGD.step`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch._higher_order_ops import scan
from torch.func import functional_call, grad_and_value
from torch.optim.sgd import sgd
from torch.utils._pytree import tree_map

from lockstep.backends.torch_backend.losses import Loss, global_norm
from lockstep.backends.torch_backend.optimizer import export_momentum, restore_momentum
from lockstep.backends.torch_backend.state import State
from lockstep.backends.torch_backend.tuning import compiler_options
from lockstep.common.config import Config
from lockstep.common.protocol import Metrics

Masks = dict[str, Tensor]  # of dropout, by PyTorch's names
Step = Callable[[State, Tensor, Tensor, Masks], tuple[State, Metrics]]
Cast = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # to the precision to compute in
# parameters, buffers and momentum, by PyTorch's names
Carry = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]
Batch = tuple[Tensor, Tensor, dict[str, Tensor], Tensor]  # images, labels, dropout masks, lr
Scan = Callable[[Carry, Batch], tuple[Carry, tuple[Tensor, Tensor]]]


class ManySteps:
    """Takes a training step for each batch along the leading axis: in one compiled loop, or one by
    one."""

    def __init__(
        self,
        config: Config,
        template: nn.Module,
        step: Step,
        loss: Loss,
        cast: Cast,
        device: str,
        compiled: bool,
    ) -> None:
        self.config, self.template, self.step, self.cast = config, template, step, cast
        self.loss, self.device, self.compiled = loss, device, compiled

    def __call__(
        self, state: State, images: Tensor, labels: Tensor, masks: Masks
    ) -> tuple[State, Metrics]:
        """Train on images (steps, batch, channels, height, width), labels (steps, batch) and masks
        (steps, batch, ...)."""
        if not self.compiled or len(labels) == 1:
            return self._one_by_one(state, images, labels, masks)
        if state.step > 0:
            return self._as_one_program(state, images, labels, masks)
        # The first step creates the momentum buffers, so it is taken alone.
        batches = images, labels, masks
        state, first = self(state, *tree_map(lambda tensor: tensor[:1], batches))
        state, others = self(state, *tree_map(lambda tensor: tensor[1:], batches))
        return state, Metrics(*map(np.concatenate, zip(first, others, strict=True)))

    def _one_by_one(
        self, state: State, images: Tensor, labels: Tensor, masks: Masks
    ) -> tuple[State, Metrics]:
        history = []
        for number in range(len(labels)):
            batch_masks = {name: mask[number] for name, mask in masks.items()}
            state, metrics = self.step(state, images[number], labels[number], batch_masks)
            history.append(metrics)
        loss, gradient_norm, lr = zip(*history, strict=True)
        loss, gradient_norm = to_array(torch.stack(loss)), to_array(torch.stack(gradient_norm))
        return state, Metrics(loss, gradient_norm, np.array(lr))

    def _as_one_program(
        self, state: State, images: Tensor, labels: Tensor, masks: Masks
    ) -> tuple[State, Metrics]:
        model, optimizer, scheduler, step = state
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        momentum = export_momentum(model, optimizer)
        buffers = {name: buffer for name, buffer in model.named_buffers() if name not in masks}
        lr = scheduler.advance(len(labels))
        with torch.no_grad():  # `grad_and_value` takes the gradients
            rates = torch.from_numpy(lr).to(self.device)
            carry = parameters, buffers, momentum
            carry, series = self._compiled_scan(carry, (images, labels, masks, rates))
        parameters, buffers, momentum = carry
        model.load_state_dict(model.state_dict() | parameters | buffers)
        restore_momentum(model, optimizer, momentum)
        loss, gradient_norm = map(to_array, series)
        metrics = Metrics(loss, gradient_norm, lr)
        return State(model, optimizer, scheduler, step + len(labels)), metrics

    @cached_property
    def _compiled_scan(self) -> Scan:
        """Compiled at first use: importing the compiler takes a second."""
        # All backends of a process share the compiled versions of `_scan`: allow for many.
        torch._dynamo.config.recompile_limit = 1024
        if self.device == "cpu":  # that CUDA's tools lie here without a GPU is no news
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        options = compiler_options(self.device)
        return torch.compile(self._scan, fullgraph=True, dynamic=False, options=options)

    def _scan(self, carry: Carry, batches: Batch) -> tuple[Carry, tuple[Tensor, Tensor]]:
        """PyTorch's counterpart of `lax.scan`, a prototype: tests compare it with single steps."""
        return scan(self._functional_step, carry, batches)

    def _functional_step(self, carry: Carry, batch: Batch) -> tuple[Carry, tuple[Tensor, Tensor]]:
        parameters, buffers, momentum = carry
        images, labels, masks, lr = batch

        def loss_of(parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            # The forward pass writes into the buffers.
            new_buffers = {name: buffer.clone() for name, buffer in buffers.items()}
            tensors = parameters | new_buffers
            logits = functional_call(
                self.template, (tensors | self.cast(tensors), masks), (images,)
            )
            return self.loss(logits, labels, self.config.label_smoothing), new_buffers

        gradients, (loss, buffers) = grad_and_value(loss_of, has_aux=True)(parameters)
        norm = global_norm(list(gradients.values()))
        if self.config.clip_norm is not None:  # as `clip_grads_with_norm_` does
            factor = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = {name: gradient * factor for name, gradient in gradients.items()}
        # `sgd` writes into its arguments.
        parameters = {name: parameter.clone() for name, parameter in parameters.items()}
        momentum = {name: buffer.clone() for name, buffer in momentum.items()}
        sgd(
            list(parameters.values()),
            list(gradients.values()),
            list(momentum.values()) or [None] * len(gradients),
            foreach=False,  # inside `scan`, torch 2.15 fails on True
            lr=lr,
            momentum=self.config.momentum,
            dampening=self.config.dampening,
            weight_decay=self.config.weight_decay,
            nesterov=self.config.nesterov,
            maximize=self.config.maximize,
        )
        return (parameters, buffers, momentum), (loss, norm)


def to_array(series: Tensor) -> np.ndarray:
    """Scalars on the device as a float64 array on the host, with one synchronisation for all."""
    return series.double().cpu().numpy()
