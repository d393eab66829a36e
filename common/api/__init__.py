"""Lockstep: are these two training runs the same run?

Importing it is cheap: each public name is loaded when it is first used, and no framework before it
trains.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockstep.backends import load as load_backend
    from lockstep.cli import compare
    from lockstep.common.config import Config, Schedule
    from lockstep.common.data import load as load_data
    from lockstep.common.errors import LockstepError
    from lockstep.common.model.pair import Pair
    from lockstep.common.protocol import Backend
    from lockstep.common.recipes import RECIPES
    from lockstep.common.request import Result
    from lockstep.common.runs.record import read as read_record
    from lockstep.common.scripts import check, diff, record
    from lockstep.common.testing import same_run
    from lockstep.run import Run

__version__ = "0.2.0"
_SOURCES = {
    "Backend": ("common.protocol", "Backend"),
    "Config": ("common.config", "Config"),
    "LockstepError": ("common.errors", "LockstepError"),
    "Pair": ("common.model.pair", "Pair"),
    "RECIPES": ("common.recipes", "RECIPES"),
    "Run": ("run", "Run"),
    "Result": ("common.request", "Result"),
    "Schedule": ("common.config", "Schedule"),
    "check": ("common.scripts", "check"),
    "compare": ("cli", "compare"),
    "diff": ("common.scripts", "diff"),
    "load_backend": ("backends", "load"),
    "load_data": ("common.data", "load"),
    "record": ("common.scripts", "record"),
    "read_record": ("common.runs.record", "read"),
    "same_run": ("common.testing", "same_run"),
}

__all__ = [
    "RECIPES",
    "Backend",
    "Config",
    "LockstepError",
    "Pair",
    "Result",
    "Run",
    "Schedule",
    "__version__",
    "check",
    "compare",
    "diff",
    "load_backend",
    "load_data",
    "read_record",
    "record",
    "same_run",
]


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module 'lockstep' has no attribute {name!r}")
    module, attribute = _SOURCES[name]
    return getattr(importlib.import_module(f"lockstep.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
