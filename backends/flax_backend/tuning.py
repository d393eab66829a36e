"""How JAX runs quickly, decided in one place. None of it changes what is computed.

The measurements behind each number are in results/bench/LOG.md.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from lockstep.common.system import environment

EVALUATION_BATCH = 50  # images per forward pass; fewer need less memory
SMALL_BATCH = 16  # up to this batch size, one thread is faster than two
# Without this option, XLA copies each weight in every step of a loop on the CPU.
XLA = {"xla_cpu_copy_insertion_use_region_analysis": True}


def has_library_convolution(step: jax.stages.Traced) -> bool:
    """Whether a traced step uses XLA's own convolution, which is slow inside a loop on the CPU."""
    return jax.lax.conv_general_dilated_p.name in str(step.jaxpr)


def compiler_options(device: str) -> dict[str, bool] | None:
    """Options of `jax.jit` for a loop of steps; None: its defaults."""
    return XLA if device == "cpu" and all(map(xla_has_option, XLA)) else None


@contextmanager
def limit_threads(batch_size: int, concurrent_processes: int) -> Iterator[None]:
    """Limit XLA to one thread for small batches, and otherwise to this process's share of the
    cores. Works only if JAX is initialised inside the block, by the first backend of a process."""
    given = os.environ.get("NPROC")  # read by XLA when JAX starts
    if given is None and batch_size <= SMALL_BATCH:
        os.environ["NPROC"] = "1"
    elif given is None and concurrent_processes > 1:
        os.environ["NPROC"] = str(max(1, environment.cores() // concurrent_processes))
    try:
        yield
    finally:
        if given is None:
            os.environ.pop("NPROC", None)


@functools.cache
def xla_has_option(name: str) -> bool:
    """Whether this version of XLA knows the option."""
    try:
        jax.jit(lambda: 0, compiler_options={name: True}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@contextmanager
def few_optimizations() -> Iterator[None]:
    """Compile in half the time within the block; the programs run slower. For those that are called a
    few times."""
    option = "jax_disable_most_optimizations"
    before = jax.config.values[option]
    jax.config.update(option, True)
    try:
        yield
    finally:
        jax.config.update(option, before)


def free_programs() -> None:
    """Forget the programs that JAX has compiled, where many backends are built one after the other:
    each has its own, and those of some thirty reach the 65,530 memory maps that Linux allows a
    process."""
    jax.clear_caches()
    gc.collect()
