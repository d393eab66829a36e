"""The two ways to train. No framework is imported before `load` asks for it."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from lockstep.common.errors import BackendError
from lockstep.common.system import environment

# How many turns PyTorch's threads wait for each other before they sleep; read when it is first
# imported, by whomever. Without a limit they wait for ever where another process wants the same
# cores; asleep at once, they wake up slowly. `Net` at batch 32 in float32, two threads on two
# cores, milliseconds a step for 0, 1,000 and 10,000 turns: alone 5.5, 3.6 and 3.1; beside two busy
# processes 20, 15 and 41; two such runs at once 20 and 20, and 28 for 5,000.
ORIGINAL_SPIN_COUNT = os.environ.get(
    "GOMP_SPINCOUNT"
)  # for what is to run as it would without this
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if TYPE_CHECKING:
    from lockstep.backends.flax_backend.backend import FlaxBackend
    from lockstep.backends.torch_backend.backend import TorchBackend
    from lockstep.common.config import Config
    from lockstep.common.protocol import Backend


def load(name: str) -> type[TorchBackend] | type[FlaxBackend]:
    """The backend class called `name`, "torch" or "flax".

    Raises:
        BackendError: if there is none of that name, or its framework is not installed.
    """
    known = {"torch": ("torch_backend", "TorchBackend"), "flax": ("flax_backend", "FlaxBackend")}
    if name not in known:
        raise BackendError(f"unknown backend {name!r}: choose one of {', '.join(known)}")
    folder, cls = known[name]
    if name == "flax":
        enable_jax_cache()
    try:
        return getattr(importlib.import_module(f"lockstep.backends.{folder}.backend"), cls)
    except ModuleNotFoundError as error:
        raise BackendError(
            f"the {name} backend needs {error.name}, which is not installed: pip install -e ."
        ) from error


def build(
    config: Config,
    classes: int,
    device: str,
    compile: str,
    name: str,
    dtype: str,
    concurrent_processes: int = 1,
) -> Backend:
    """Build a backend. At module level, so that it can be pickled.

    Args:
        concurrent_processes: that train at the same time; each uses its share of the cores.
    """
    return load(name)(config, classes, dtype, device, compile, concurrent_processes)


def enable_jax_cache() -> None:
    """Have JAX keep its compiled programs on disk, unless the user has said where, so that later
    starts are quick.

    Read when JAX is first imported. A program may be run by whoever can write it, so the folder is
    the user's alone. `torch.compile` does the same of its own accord.
    """
    folder = environment.cache_folder() / "jax"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return  # without a place to keep them they are compiled each time
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        # bytes; the least recently used go first
        os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**30)
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
