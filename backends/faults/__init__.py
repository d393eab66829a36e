"""Known faults: each puts one mistake into the Flax backend, where a person makes it who ports
training code.

The catalogue is in the order in which a difference spreads: data, weights, forward, loss, backward,
update, evaluate. Faults of `Net` and of code that all networks share are in a file for each stage,
those of the other networks in `networks.py` and `dropout.py`, those of a pair's layers in
`layers.py`. `inject` puts a fault in and takes it
out again. The PyTorch backend stays correct. No framework is imported before a fault is applied.
"""

from __future__ import annotations

from importlib import import_module

from lockstep.backends.faults.registry import REGISTRY, Fault, inject
from lockstep.common.errors import ConfigError, nearest
from lockstep.common.protocol import STAGES
from lockstep.common.system import program

__all__ = ["FAULTS", "QUICK", "Fault", "inject", "named"]

_FILES = (
    "data",
    "batches",
    "weights",
    "forward",
    "loss",
    "backward",
    "update",
    "adaptive",
    "learning_rate",
    "lost_updates",
    "evaluate",
    "networks",
    "dropout",
    "layers",
    "held_out",
)
for _file in _FILES:
    import_module(f"lockstep.backends.faults.{_file}")  # fills `REGISTRY`

# Faults of the other networks come last in their stage.
FAULTS = tuple(
    sorted(REGISTRY, key=lambda fault: (STAGES.index(fault.stage), "model" in fault.options))
)
# One of each stage; all show on grey images and within a few steps.
QUICK = (
    "labels-from-one",
    "zero-biases",
    "flatten-order",
    "sum-for-mean",
    "stopped-gradient",
    "momentum-089",
    "classes-moved",
)


def named(name: str) -> Fault:
    """The fault called `name`.

    Raises:
        ConfigError: if there is none.
    """
    for fault in FAULTS:
        if fault.name == name:
            return fault
    proposal = nearest(name, [fault.name for fault in FAULTS])
    hint = f"did you mean {proposal}? " if proposal else ""
    raise ConfigError(f"unknown fault {name!r}: {hint}{program.name()} faults --list names all")
