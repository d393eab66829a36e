"""The optimizer that a user's pair defines. Reads next to backends/flax_backend/pair_optimizer.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lockstep.backends.torch_backend.inputs import as_array, as_tensor
from lockstep.common.config import Config
from lockstep.common.errors import ConfigError, RecordError
from lockstep.common.model import pair as pairs
from lockstep.common.protocol import Arrays
from lockstep.common.recorder.adapter import SLOTS

Slots = dict[str, dict[str, Tensor]]  # of an optimizer, then by PyTorch's names of the parameters
PREFIX = "torch/"  # of the names of state that only PyTorch can read
LR_KEYS = ("lr", "initial_lr")  # of a parameter group; they belong to the schedule


def make_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """The user's own optimizer.

    Raises:
        ConfigError: if it cannot be built, or has another learning rate than `config`.
    """
    build = pairs.own_optimizer(config.model, "torch")
    with pairs.user_code_errors(config.model, "torch", "build its optimizer"):
        optimizer = build(model.parameters(), config.lr)
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"--model {config.model}: the function of its PyTorch optimizer returns a "
            f"{type(optimizer).__name__}: let it return a torch.optim.Optimizer"
        )
    for group in optimizer.param_groups:
        if group.get("lr") != config.lr:
            raise ConfigError(
                f"--model {config.model}: its PyTorch optimizer has the learning rate "
                f"{group.get('lr')} in place of {config.lr}: use the one that its function is given, "
                "and set it with --lr"
            )
    return optimizer


def validate_optimizer(config: Config, model: nn.Module) -> None:
    """Raise ConfigError unless the user's optimizer can be built and can take a step."""
    optimizer = make_optimizer(config, model)
    with pairs.user_code_errors(config.model, "torch", "take a step of its optimizer"):
        _create_state(model, optimizer)


def export_slots(model: nn.Module, optimizer: Optimizer) -> Slots:
    """The tensors that the optimizer has for every parameter, of its shape, by slot."""
    parameters = dict(model.named_parameters())
    return {
        _slot_name(own): {name: optimizer.state[p][own] for name, p in parameters.items()}
        for own in _slots(model, optimizer)
    }


def export_extra(model: nn.Module, optimizer: Optimizer) -> Arrays:
    """The rest of its state, numbers and arrays, by PyTorch's names."""
    return {
        name: np.array(as_array(value) if isinstance(value := owner[key], Tensor) else value)
        for name, owner, key in _other_state(model, optimizer)
        if isinstance(owner[key], (Tensor, int, float)) and not isinstance(owner[key], bool)
    }


def restore_state(
    config: Config, model: nn.Module, optimizer: Optimizer, slots: Slots, extra: Arrays, step: int
) -> None:
    """The inverse of `export_slots` and `export_extra`, after `step` steps.

    Raises:
        RecordError: if the state comes from the other framework, whose optimizer lacks a tensor or
            a number of this one.
    """
    initial = export_extra(model, optimizer)
    _create_state(model, optimizer)
    created = export_extra(model, optimizer)
    own = {name: extra[name] for name in created.keys() & extra.keys()}
    if not own:  # Flax took the last step: options, and numbers of steps, are known
        own = {name: a for name, a in initial.items() if np.array_equal(created[name], a)}
        own |= {name: np.array(step) for name in created if name.startswith(f"{PREFIX}step of ")}
    missing = [slot for slot in map(_slot_name, _slots(model, optimizer)) if slot not in slots]
    missing += [name.removeprefix(PREFIX) for name in created if name not in own]
    if missing:
        raise RecordError(
            f'the PyTorch optimizer of {config.model} has the state "{missing[0]}", which the Flax '
            "one lacks: resume in PyTorch"
        )
    for key in _slots(model, optimizer):
        for name, parameter in model.named_parameters():
            optimizer.state[parameter][key].copy_(slots[_slot_name(key)][name])
    for name, owner, key in _other_state(model, optimizer):
        if name in own:
            value = owner[key]
            new = as_tensor(own[name]).to(value) if isinstance(value, Tensor) else own[name].item()
            owner[key] = new


def _slot_name(own: str) -> str:
    """The common name of a slot, where it has one."""
    return SLOTS.get(own, own)


def _create_state(model: nn.Module, optimizer: Optimizer) -> None:
    """Take a step, in which the optimizer creates its state, and undo it in the parameters."""
    parameters = list(model.parameters())
    values = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
            parameter.grad = None


def _slots(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """PyTorch's own names of the slots: a tensor for every parameter, of its shape."""
    parameters = list(model.parameters())
    states = [optimizer.state.get(parameter, {}) for parameter in parameters]

    def is_slot(key: str) -> bool:
        return all(
            isinstance(state.get(key), Tensor) and state[key].shape == parameter.shape
            for state, parameter in zip(states, parameters, strict=True)
        )

    return [key for key in states[0] if is_slot(key)] if states else []


def _other_state(
    model: nn.Module, optimizer: Optimizer
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The rest of the state, of any type: a name, and the dictionary and key that hold it."""
    slots = _slots(model, optimizer)
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        yield from ((f"{PREFIX}{key} of {name}", state, key) for key in state if key not in slots)
    for number, group in enumerate(optimizer.param_groups):
        keys = [key for key in group if key not in LR_KEYS]
        yield from ((f"{PREFIX}{key} of group {number}", group, key) for key in keys)
