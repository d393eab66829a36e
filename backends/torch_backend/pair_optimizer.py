"""The optimizer that a user's pair brings. Reads next to backends/flax_backend/pair_optimizer.py."""

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
PREFIX = "torch/"  # begins the names of what PyTorch alone keeps
RATES = ("lr", "initial_lr")  # numbers of a group that belong to the schedule


def make_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """The user's own, which was given the learning rate.

    Raises:
        ConfigError: if it cannot be made, or takes another learning rate.
    """
    build = pairs.own_optimizer(config.model, "torch")
    with pairs.user_code_errors(config.model, "torch", "make its optimizer"):
        optimizer = build(model.parameters(), config.lr)
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"--model {config.model}: torch makes a {type(optimizer).__name__} for its optimizer: "
            "let it make a torch.optim.Optimizer"
        )
    for group in optimizer.param_groups:
        if group.get("lr") != config.lr:
            raise ConfigError(
                f"--model {config.model}: its PyTorch optimizer has the learning rate "
                f"{group.get('lr')}, and was given {config.lr}: pass on what it is given, and set "
                "it with --lr"
            )
    return optimizer


def validate_optimizer(config: Config, model: nn.Module) -> None:
    """Raise ConfigError unless the user's optimizer can be made, and take a step."""
    optimizer = make_optimizer(config, model)
    with pairs.user_code_errors(config.model, "torch", "take a step of its optimizer"):
        _fill(model, optimizer)


def export_slots(model: nn.Module, optimizer: Optimizer) -> Slots:
    """What the optimizer keeps of every parameter, of its shape, by the common name of the slot."""
    parameters = dict(model.named_parameters())
    return {
        _common(own): {name: optimizer.state[p][own] for name, p in parameters.items()}
        for own in _slots(model, optimizer)
    }


def export_extra(model: nn.Module, optimizer: Optimizer) -> Arrays:
    """The other numbers and arrays that it keeps, by PyTorch's names."""
    return {
        name: np.array(as_array(value) if isinstance(value := owner[key], Tensor) else value)
        for name, owner, key in _numbers(model, optimizer)
        if isinstance(owner[key], (Tensor, int, float)) and not isinstance(owner[key], bool)
    }


def restore_state(
    config: Config, model: nn.Module, optimizer: Optimizer, slots: Slots, extra: Arrays, step: int
) -> None:
    """The inverse of `export_slots` and `export_extra`, after `step` steps.

    Raises:
        RecordError: if the state is that of the other framework, and lacks something.
    """
    before = export_extra(model, optimizer)
    _fill(model, optimizer)
    kept = export_extra(model, optimizer)
    own = {name: extra[name] for name in kept.keys() & extra.keys()}
    if not own:  # it was Flax that took the last step
        own = {name: array for name, array in before.items() if kept[name] == array}
        own |= {name: np.array(step) for name in kept if name.startswith(f"{PREFIX}step of ")}
    missing = [slot for slot in map(_common, _slots(model, optimizer)) if slot not in slots]
    missing += [name.removeprefix(PREFIX) for name in kept if name not in own]
    if missing:
        raise RecordError(
            f"the PyTorch optimizer of {config.model} keeps {missing[0]}, which the Flax one does "
            "not: go on in PyTorch"
        )
    for key in _slots(model, optimizer):
        for name, parameter in model.named_parameters():
            optimizer.state[parameter][key].copy_(slots[_common(key)][name])
    for name, owner, key in _numbers(model, optimizer):
        if name in own:
            value = owner[key]
            new = as_tensor(own[name]).to(value) if isinstance(value, Tensor) else own[name].item()
            owner[key] = new


def _common(own: str) -> str:
    """The common name of a slot, where it has one."""
    return SLOTS.get(own, own)


def _fill(model: nn.Module, optimizer: Optimizer) -> None:
    """Take a step, so that the optimizer makes what it keeps, and put the parameters back."""
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
    """PyTorch's own names of what it keeps of every parameter, of its shape."""
    parameters = list(model.parameters())
    kept = [optimizer.state.get(parameter, {}) for parameter in parameters]

    def is_slot(key: str) -> bool:
        return all(
            isinstance(state.get(key), Tensor) and state[key].shape == parameter.shape
            for state, parameter in zip(kept, parameters, strict=True)
        )

    return [key for key in kept[0] if is_slot(key)] if kept else []


def _numbers(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Any], str]]:
    """What else it keeps, of whatever type: the name, a dictionary, and the key there."""
    slots = _slots(model, optimizer)
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        yield from ((f"{PREFIX}{key} of {name}", state, key) for key in state if key not in slots)
    for number, group in enumerate(optimizer.param_groups):
        keys = [key for key in group if key not in RATES]
        yield from ((f"{PREFIX}{key} of group {number}", group, key) for key in keys)
