"""`lockstep.Run`, with the adapters of `lockstep.backends`."""

from __future__ import annotations

import importlib
from types import ModuleType

from lockstep.common.recorder import run


def backend_module(name: str) -> ModuleType:
    return importlib.import_module(f"lockstep.backends.{name}")


class Run(run.Run):
    __doc__ = run.Run.__doc__

    def __init__(self) -> None:
        super().__init__(backend_module)
