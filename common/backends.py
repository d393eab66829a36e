"""The interface of the package `lockstep.backends`, which `common` does not import itself."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lockstep.common.protocol import Backend


class BackendPackage(NamedTuple):
    """`lockstep.backends`, passed in by `lockstep.cli` and `lockstep.compare`.

    All fields can be pickled, so that other processes can have them.
    """

    # By name, a backend's class: (config, classes, dtype, device, compile, concurrent_processes).
    load: Callable[[str], Callable[..., Backend]]
    # (config, classes, device, compile, name, dtype, concurrent_processes, rank)
    build: Callable[..., Backend]
    module: Callable[[str], ModuleType]  # a module of the package, such as "faults"
