"""What `common` needs of the package `lockstep.backends`, which it does not import itself."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lockstep.common.protocol import Backend


class BackendPackage(NamedTuple):
    """`lockstep.backends`, handed over by `lockstep.cli` and `lockstep.compare`.

    All fields can be pickled, so that other processes can be given them.
    """

    load: Callable[
        [str], Callable[..., Backend]
    ]  # by name: (config, classes, dtype, device, compile)
    build: Callable[..., Backend]  # (config, classes, device, compile, name, dtype)
    module: Callable[[str], ModuleType]  # a module of the package, such as "faults"
