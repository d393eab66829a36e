"""Dropout: which units a training step leaves out, the same for both backends, for their twins, and
after a resumption.

What is left out is a pure function of the seed, the step and the layer's name: no state is carried
along. A layer that draws by itself could not agree with the other framework's, whose random numbers
are others.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from lockstep.common.protocol import Arrays, Dropout

DROPOUT_STREAM = int.from_bytes(
    b"drop", "big"
)  # keeps these random numbers apart from those of lockstep.common.data


def masks(layers: Mapping[str, Dropout], seed: int, step: int, shape: Sequence[int]) -> Arrays:
    """Masks for step `step`, or for `shape[0]` consecutive steps from there on.

    Args:
        layers: by the canonical names of their masks.
        step: optimizer steps done before.
        shape: (batch,), or (steps, batch): of the labels.

    Returns:
        By the same names, bool arrays (*shape, *shape of the layer): True is kept.
    """
    if not layers:
        return {}
    *several, batch = shape
    drawn = _of_steps(tuple(layers.items()), seed, step, several[0] if several else 1, batch)
    return {name: mask.reshape(*shape, *layers[name].shape) for name, mask in drawn.items()}


@functools.lru_cache(maxsize=1)  # a run trains with them, and records their digest
def _of_steps(
    layers: tuple[tuple[str, Dropout], ...], seed: int, step: int, steps: int, batch: int
) -> Arrays:
    drawn = [_of_one_step(dict(layers), seed, step + later, batch) for later in range(steps)]
    return {name: np.stack([masks[name] for masks in drawn]) for name, _ in layers}


def _of_one_step(layers: Mapping[str, Dropout], seed: int, step: int, batch: int) -> Arrays:
    generator = np.random.default_rng(np.random.SeedSequence((seed, DROPOUT_STREAM, step)))
    return {
        name: generator.random((batch, *layers[name].shape), np.float32) >= layers[name].rate
        for name in sorted(layers)
    }
