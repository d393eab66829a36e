"""The two ways to train. No framework is imported before `load` asks for it."""

from __future__ import annotations

import importlib
import os
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING

from lockstep.common.errors import BackendError
from lockstep.common.system import environment

# How many turns PyTorch's threads wait for each other before they sleep; read at its first import.
# Without a limit they take the cores from other processes, and asleep at once they wake up slowly:
# results/bench/LOG.md.
ORIGINAL_SPIN_COUNT = os.environ.get("GOMP_SPINCOUNT")  # for programs without this setting
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# XLA's older code generator, one file of code in place of 32, and few optimizations: measurements are
# in results/bench/LOG.md. An XLA that does not know an option ends the process, so versions that were
# not tried do without.
QUICK_XLA = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
)
KNOWN_JAXLIB = "0.10."

if TYPE_CHECKING:
    from lockstep.backends.flax_backend.backend import FlaxBackend
    from lockstep.backends.torch_backend.backend import TorchBackend
    from lockstep.common.config import Config
    from lockstep.common.protocol import Backend, Rank, Task


def load(name: str) -> type[TorchBackend] | type[FlaxBackend]:
    """The backend class called `name`, "torch" or "flax".

    Raises:
        BackendError: if there is none of that name, or its framework is not installed.
    """
    return getattr(_module(name, "backend"), f"{name.title()}Backend")


def _module(name: str, file: str) -> ModuleType:
    """A module of the backend called `name`; raises as `load` does."""
    known = ("torch", "flax")
    if name not in known:
        raise BackendError(f"unknown backend {name!r}: choose one of {', '.join(known)}")
    environment.keep_memory()
    if name == "flax":
        enable_jax_cache()
    try:
        return importlib.import_module(f"lockstep.backends.{name}_backend.{file}")
    except ModuleNotFoundError as error:
        raise BackendError(
            f"the {name} backend needs {error.name}, which is not installed: pip install -e ."
        ) from error


def build(
    config: Config,
    classes: int | Task,
    device: str,
    compile: str,
    name: str,
    dtype: str,
    concurrent_processes: int = 1,
    rank: Rank | None = None,
) -> Backend:
    """Build a backend. At module level, so that it can be pickled.

    Args:
        classes: how many; or what the network is built for, `Dataset.task`.
        concurrent_processes: that train at the same time on this machine; each uses its share of
            the cores.
        rank: of this process, where several train one run together.
    """
    arguments = config, classes, dtype, device, compile, concurrent_processes
    if rank is None:
        return load(name)(*arguments)
    return getattr(_module(name, "processes"), f"{name.title()}Rank")(*arguments, rank)


def compile_quickly() -> None:
    """Have XLA compile in less time, in this process and in those that it starts. The programs run
    slower, so this is for programs that run a few times. XLA reads the options once, when JAX
    starts."""
    try:
        version = metadata.version("jaxlib")
    except metadata.PackageNotFoundError:
        return  # the backend says so
    if version.startswith(KNOWN_JAXLIB):
        os.environ["XLA_FLAGS"] = f"{QUICK_XLA} {os.environ.get('XLA_FLAGS', '')}"


def enable_jax_cache() -> None:
    """Let JAX cache compiled programs on disk; it reads the settings at its first import.

    `torch.compile` has a cache of its own.
    """
    os.environ.update(environment.jax_cache())
