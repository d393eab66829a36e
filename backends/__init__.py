"""The two ways to train. No framework is imported before `load` asks for it."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from common.errors import BackendError

# Read when PyTorch is first imported, by whomever. Its threads otherwise wait for each other at full speed, and where
# another process wants the same cores they wait for ever: `Net` at batch 4 in float64, two threads on two busy cores,
# 3 steps per second so, 23 to 158 with passive waiting.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from backends.flax_backend.backend import FlaxBackend
    from backends.torch_backend.backend import TorchBackend


def load(name: str) -> type[TorchBackend] | type[FlaxBackend]:
    """The backend class called `name`, "torch" or "flax".

    Raises:
        BackendError: if there is none of that name, or its framework is not installed.
    """
    known = {"torch": ("torch_backend", "TorchBackend"), "flax": ("flax_backend", "FlaxBackend")}
    if name not in known:
        raise BackendError(f"unknown backend {name!r}: choose one of {', '.join(known)}")
    folder, cls = known[name]
    try:
        return getattr(importlib.import_module(f"backends.{folder}.backend"), cls)
    except ModuleNotFoundError as error:
        raise BackendError(
            f"the {name} backend needs {error.name}, which is not installed: pip install -e ."
        ) from error
