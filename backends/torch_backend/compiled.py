"""Many steps as one compiled program: the step of `TorchBackend._step` without side effects. Reads
next to backends/flax_backend/compiled.py.

`torch.compile` cannot trace `loss.backward` and `SGD.step` as a whole, so this step takes its
gradients with `torch.func` and calls `sgd`, the function behind `SGD.step`, or that of another
optimizer.
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

from lockstep.backends.torch_backend.adaptive import functional_update
from lockstep.backends.torch_backend.losses import Loss, global_norm
from lockstep.backends.torch_backend.optimizer import (
    Slots,
    export_slots,
    parameter_groups,
    restore_slots,
)
from lockstep.backends.torch_backend.state import State
from lockstep.backends.torch_backend.tuning import compiler_options
from lockstep.common.config import Config
from lockstep.common.protocol import Metrics

Masks = dict[str, Tensor]  # of dropout, by PyTorch's names
Step = Callable[[State, Tensor, Tensor, Masks], tuple[State, Metrics]]
Cast = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # to the precision to compute in
# parameters and buffers, by PyTorch's names, and what the optimizer keeps
Carry = tuple[dict[str, Tensor], dict[str, Tensor], Slots]
# images, labels, dropout masks, lr, steps done
Batch = tuple[Tensor, Tensor, dict[str, Tensor], Tensor, Tensor]
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
        self.groups = parameter_groups(config, template)

    def __call__(
        self, state: State, images: Tensor, labels: Tensor, masks: Masks
    ) -> tuple[State, Metrics]:
        """Train on images (steps, batch, channels, height, width), labels (steps, batch) and masks
        (steps, batch, ...)."""
        if not self.compiled or len(labels) == 1:
            return self._one_by_one(state, images, labels, masks)
        if state.step > 0:
            return self._as_one_program(state, images, labels, masks)
        # The first step creates what the optimizer keeps, so it is taken alone.
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
        slots = export_slots(self.config, model, optimizer, step)
        buffers = {name: buffer for name, buffer in model.named_buffers() if name not in masks}
        lr = scheduler.advance(len(labels))
        with torch.no_grad():  # `grad_and_value` takes the gradients
            rates = torch.from_numpy(lr).to(self.device)
            steps = torch.arange(step, step + len(labels), dtype=torch.float64, device=self.device)
            carry = parameters, buffers, slots
            carry, series = self._compiled_scan(carry, (images, labels, masks, rates, steps))
        parameters, buffers, slots = carry
        model.load_state_dict(model.state_dict() | parameters | buffers)
        restore_slots(self.config, model, optimizer, slots, step + len(labels))
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
        parameters, buffers, slots = carry
        images, labels, masks, lr, step = batch
        gradients, (loss, buffers) = self._gradients(parameters, buffers, images, labels, masks)
        norm = global_norm(list(gradients.values()))
        if self.config.clip_norm is not None:  # as `clip_grads_with_norm_` does
            factor = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = {name: gradient * factor for name, gradient in gradients.items()}
        # The optimizer's function writes into its arguments.
        parameters = {name: parameter.clone() for name, parameter in parameters.items()}
        slots = tree_map(torch.clone, slots)
        for names, weight_decay in self.groups:
            self._update(names, weight_decay, parameters, gradients, slots, lr, step)
        return (parameters, buffers, slots), (loss, norm)

    def _gradients(
        self,
        parameters: dict[str, Tensor],
        buffers: dict[str, Tensor],
        images: Tensor,
        labels: Tensor,
        masks: Masks,
    ) -> tuple[dict[str, Tensor], tuple[Tensor, dict[str, Tensor]]]:
        """Gradients, loss, and the buffers after the forward pass."""

        def loss_of(parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            # The forward pass writes into the buffers.
            new_buffers = {name: buffer.clone() for name, buffer in buffers.items()}
            tensors = parameters | new_buffers
            logits = functional_call(
                self.template, (tensors | self.cast(tensors), masks), (images,)
            )
            return self.loss(logits, labels, self.config.label_smoothing), new_buffers

        return grad_and_value(loss_of, has_aux=True)(parameters)

    def _update(
        self,
        names: list[str],
        weight_decay: float,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        slots: Slots,
        lr: Tensor,
        step: Tensor,
    ) -> None:
        """Update in place the parameters that share a weight decay, and what is kept of them."""
        chosen = [parameters[name] for name in names], [gradients[name] for name in names]
        kept = {slot: [tensors[name] for name in names] for slot, tensors in slots.items()}
        if self.config.optimizer != "sgd":
            update = functional_update(self.config, lr, weight_decay)
            update(*chosen, kept, [step.clone() for _ in names])  # which it counts on
            return
        momentum: list[Tensor | None] = [*kept.get("momentum", [None] * len(names))]
        sgd(
            *chosen,
            momentum,
            foreach=False,  # inside `scan`, torch 2.15 fails on True
            lr=lr,
            momentum=self.config.momentum,
            dampening=self.config.dampening,
            weight_decay=weight_decay,
            nesterov=self.config.nesterov,
            maximize=self.config.maximize,
        )


def to_array(series: Tensor) -> np.ndarray:
    """Scalars on the device as a float64 array on the host, with one synchronisation for all."""
    return series.double().cpu().numpy()
