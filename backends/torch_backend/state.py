"""The training state in PyTorch. Reads next to backends/flax_backend/state.py."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from lockstep.backends.torch_backend.optimizer import Scheduler


class State(NamedTuple):
    """The state of training; PyTorch changes it in place."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler
    step: int
