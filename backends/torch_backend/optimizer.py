"""`torch.optim.SGD` and the schedulers of `torch.optim.lr_scheduler`, set up from a `Config`. Reads
next to backends/flax_backend/optimizer.py. The other optimizers are in adaptive.py."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, lr_scheduler

from lockstep.backends.torch_backend import adaptive, convert, pair_optimizer
from lockstep.common.config import Config
from lockstep.common.optimizers import FROM_PAIR, is_bias_or_norm
from lockstep.common.protocol import Arrays

Slots = dict[str, dict[str, Tensor]]  # of an optimizer, then by PyTorch's names of the parameters


def make_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """Stochastic gradient descent. For gradient g, parameters p, buffer b, learning rate lr, in
    this order:

    g <- g min(1, clip_norm / (|g| + 1e-6))   with clip_norm, |g| of all gradients together; this
                                     line is in the backend's `_step`
    g <- -g                          with maximize
    g <- g + weight_decay p
    b <- g on the first step, else momentum b + (1 - dampening) g
    g <- g + momentum b              with nesterov, else b; without momentum, g as it is
    p <- p - lr g

    Source: the documentation of torch.optim.SGD, and of torch.nn.utils.clip_grads_with_norm_.
    """
    if config.optimizer == FROM_PAIR:
        return pair_optimizer.make_optimizer(config, model)
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[name] for name in names], "weight_decay": weight_decay}
        for names, weight_decay in parameter_groups(config, model)
    ]
    if config.optimizer != "sgd":
        return adaptive.make_optimizer(config, groups)
    return SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        dampening=config.dampening,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        maximize=config.maximize,
    )


def parameter_groups(config: Config, model: nn.Module) -> list[tuple[list[str], float]]:
    """PyTorch's names of the parameters that share a weight decay, and the weight decay."""
    canonical = convert.canonical_names(model)  # without a packed matrix, whose parts it names
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        can_be_spared = is_bias_or_norm(canonical.get(name, name), parameter.ndim)
        spares = not config.decay_biases_and_norms and can_be_spared
        (spared if spares else decayed).append(name)
    groups = [(decayed, config.weight_decay), (spared, 0.0)]
    return [group for group in groups if group[0]]


def make_schedule(config: Config, optimizer: Optimizer) -> Any:
    """The scheduler that sets `lr` in the optimizer; stepped once per optimizer step, plateau once
    per window."""
    schedule = cast(Any, config.schedule)  # resolved, so that no option is None
    match schedule.kind:
        case "constant":
            return lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        case "step":
            return lr_scheduler.StepLR(optimizer, schedule.period, schedule.gamma)
        case "multistep":
            return lr_scheduler.MultiStepLR(optimizer, schedule.milestones, schedule.gamma)
        case "exponential":
            return lr_scheduler.ExponentialLR(optimizer, schedule.gamma)
        case "cosine":
            return lr_scheduler.CosineAnnealingLR(optimizer, schedule.period, schedule.min_lr)
        case "warmup-cosine":  # the cosine starts at `lr` in the first step after the warm-up
            rising = lr_scheduler.LinearLR(optimizer, schedule.start, total_iters=schedule.warmup)
            falling = lr_scheduler.CosineAnnealingLR(optimizer, schedule.period, schedule.min_lr)
            return lr_scheduler.SequentialLR(
                optimizer, [rising, falling], milestones=[schedule.warmup]
            )
        case "plateau":
            return lr_scheduler.ReduceLROnPlateau(
                optimizer,
                factor=schedule.gamma,
                patience=schedule.patience,
                threshold=schedule.threshold,
                cooldown=schedule.cooldown,
                min_lr=schedule.min_lr,
                eps=0.0,  # its default ignores decays below 1e-8; optax has no such limit
            )


class Scheduler:
    """Steps the schedule once per optimizer step; plateau once per window, with the window's mean
    training loss."""

    def __init__(self, config: Config, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.start = config.lr
        self.schedule = make_schedule(config, optimizer)
        self.window = config.schedule.window if config.schedule.kind == "plateau" else None
        self.warmup = config.schedule.warmup if config.schedule.kind == "warmup-cosine" else None
        self.count = 0  # steps of the window so far
        self.mean: Tensor | float = 0.0  # of their losses; on the device until the window is full

    @property
    def lr(self) -> float:
        """The learning rate of the next optimizer step."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self, loss: Tensor) -> None:
        if self.window is None:
            self.schedule.step()
            return
        self.mean = (self.count * self.mean + loss.detach().double()) / (self.count + 1)
        self.count += 1
        if self.count == self.window:
            self.schedule.step(self.mean)
            self.count, self.mean = 0, 0.0

    def advance(self, steps: int) -> np.ndarray:
        """Step the schedule `steps` times; returns their learning rates, float64 (steps,). Not for
        plateau."""
        rates = []
        for _ in range(steps):
            rates.append(self.lr)
            self.schedule.step()
        return np.array(rates)


def export_schedule(scheduler: Scheduler) -> dict[str, float]:
    """The schedule's state, canonical: `lr` of the next step; plateau's `scale`, `best`, `bad` and
    `cooldown`, and the window's `count` and `mean`. The scale, by which plateau has reduced lr, is
    optax's; PyTorch stores lr."""
    if scheduler.window is None:
        return {"lr": scheduler.lr}
    plateau = scheduler.schedule
    counters = {
        "best": plateau.best,
        "bad": plateau.num_bad_epochs,
        "cooldown": plateau.cooldown_counter,
    }
    window = {"count": scheduler.count, "mean": float(scheduler.mean)}
    scale = scheduler.lr / scheduler.start if scheduler.start else 1.0
    return {"lr": scheduler.lr, "scale": scale, **counters, **window}


def restore_schedule(scheduler: Scheduler, schedule: dict[str, float], step: int) -> None:
    """The inverse of `export_schedule`, after `step` steps."""
    groups = scheduler.optimizer.param_groups
    for group in groups:
        group["lr"] = schedule["lr"]
    if scheduler.window is None:
        last_lr = [schedule["lr"]] * len(groups)
        done = {"last_epoch": step, "_step_count": step + 1, "_last_lr": last_lr}
        state = scheduler.schedule.state_dict() | done  # LambdaLR insists on all its keys
        if scheduler.warmup is not None:  # each of the two schedulers counts steps of its own
            counts = (step, step - scheduler.warmup)
            parts = zip(state["_schedulers"], counts, strict=True)
            state["_schedulers"] = [part | done | {"last_epoch": count} for part, count in parts]
        scheduler.schedule.load_state_dict(state)
        return
    scheduler.count, scheduler.mean = int(schedule["count"]), schedule["mean"]
    counters = {"best": schedule["best"], "num_bad_epochs": int(schedule["bad"])}
    counters |= {
        "cooldown_counter": int(schedule["cooldown"]),
        "last_epoch": step // scheduler.window,
    }
    scheduler.schedule.load_state_dict(counters)


def export_slots(config: Config, model: nn.Module, optimizer: Optimizer, step: int) -> Slots:
    """What the optimizer keeps, by PyTorch's names; empty before the first step."""
    if config.optimizer == FROM_PAIR:
        return pair_optimizer.export_slots(model, optimizer) if step > 0 else {}
    own_names = adaptive.OWN_SLOTS[config.optimizer]
    kept = {
        slot: {name: optimizer.state[p].get(own) for name, p in model.named_parameters()}
        for slot, own in own_names.items()
    }
    # Without momentum, SGD has a buffer of None. Adagrad has its sum before the first step.
    found = {
        slot: {name: tensor for name, tensor in tensors.items() if tensor is not None}
        for slot, tensors in kept.items()
    }
    return {slot: tensors for slot, tensors in found.items() if tensors and step > 0}


def export_extra(config: Config, model: nn.Module, optimizer: Optimizer, step: int) -> Arrays:
    """The rest of the state of a pair's own optimizer, by PyTorch's names."""
    if config.optimizer != FROM_PAIR or step == 0:
        return {}
    return pair_optimizer.export_extra(model, optimizer)


def restore_slots(
    config: Config,
    model: nn.Module,
    optimizer: Optimizer,
    slots: Slots,
    step: int,
    extra: Arrays | None = None,
) -> None:
    """The inverse of `export_slots` and `export_extra`, after `step` steps."""
    if config.optimizer == FROM_PAIR:
        pair_optimizer.restore_state(config, model, optimizer, slots, extra or {}, step)
        return
    own_names = adaptive.OWN_SLOTS[config.optimizer]
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for slot, tensors in slots.items():
            if name in tensors:
                state[own_names[slot]] = tensors[name].to(parameter.device)
        if config.optimizer not in ("sgd", "lion"):
            state["step"] = torch.tensor(float(step))  # each parameter counts its own
