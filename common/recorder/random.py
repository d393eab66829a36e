"""Random numbers that two scripts share: a function of seed, step and name alone."""

from __future__ import annotations

import hashlib

import numpy as np

from lockstep.common.errors import ConfigError

STREAM = 5  # keeps these numbers apart from Lockstep's others of the same seed


def draw(
    seed: int, step: int, name: str, count: int, shape: tuple[int, ...], kind: str
) -> np.ndarray:
    """float64 of `shape`.

    Args:
        count: how often this name was drawn in this step before.
        kind: "normal" or "uniform".

    Raises:
        ConfigError: for another kind.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    generator = np.random.default_rng([seed, STREAM, step, key, count])
    if kind == "normal":
        return generator.standard_normal(shape)
    if kind == "uniform":
        return generator.random(shape)
    raise ConfigError(f'run.random: kind must be "normal" or "uniform", and not {kind!r}')
