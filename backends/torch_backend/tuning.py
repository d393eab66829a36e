"""How PyTorch runs quickly, decided in one place. None of it changes what is computed.

The measurements behind each number are in results/bench/LOG.md.
"""

from __future__ import annotations

from typing import Any

import torch

from lockstep.common.config import Config
from lockstep.common.optimizers import FROM_PAIR

CompilerOptions = dict[str, Any]  # of `torch.compile`

EVALUATION_BATCH = 50  # images per forward pass; fewer need less memory
ALL_THREADS = torch.get_num_threads()
SMALL_BATCH = 16  # up to this batch size, one thread is faster than two
LONG_RUN = 20_000  # from this many steps on, compiling for half a minute pays
# Inductor recomputes an expression that reads at most four values at each use; a lower threshold
# keeps the pooled images. A loop in C++ calls its kernels faster, but torch 2.11 cannot compile it.
INDUCTOR: CompilerOptions = {"realize_reads_threshold": 3}
INDUCTOR |= {"cpp_wrapper": True} if torch.__version__ >= "2.14" else {}
# Without this, Inductor keeps no compiled loop on disk; with it, a later start takes 9 seconds in
# place of 31.
INDUCTOR |= {"unsafe_marked_cacheable_functions": {"torch.ops.higher_order.scan": "1"}}
# The largest batch for which compiled steps are faster than eager ones; `SMALL_BATCH` for others.
COMPILED_BATCH = {"net": 128} if "cpp_wrapper" in INDUCTOR else {}
CHANNELS_LAST = ("net",)  # networks that train faster on the CPU with the channels last


def compiles(config: Config, requested: str) -> bool:
    """Whether to train in one compiled loop.

    Args:
        config: the run.
        requested: "on", "off" or "auto" (in long runs of small batches).
    """
    if config.schedule.kind == "plateau":  # the next learning rate depends on the losses
        return False
    if config.optimizer == FROM_PAIR:  # its step has no function without side effects
        return False
    max_batch = COMPILED_BATCH.get(config.model, SMALL_BATCH)
    worthwhile = (config.steps or 0) >= LONG_RUN and config.batch_size <= max_batch
    return requested == "on" or (requested == "auto" and worthwhile)


def channels_last(model: str, device: str) -> bool:
    """Whether images are laid out as in NumPy, with the channels last."""
    return device == "cpu" and model in CHANNELS_LAST


def compiler_options(device: str) -> CompilerOptions | None:
    """Options of `torch.compile`; None: its defaults."""
    return INDUCTOR if device == "cpu" else None


def limit_threads(batch_size: int, concurrent_processes: int) -> None:
    """Use one thread for small batches, and otherwise this process's share of the cores."""
    share = max(1, ALL_THREADS // concurrent_processes)
    torch.set_num_threads(1 if batch_size <= SMALL_BATCH else share)
