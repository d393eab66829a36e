"""What the two sides of a pair share: weights to start from and data, drawn by NumPy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

VOCABULARY, WIDTH, HEADS, BLOCKS, CONTEXT = 32, 32, 2, 2, 16
PADDING = 0  # the token that fills a row behind the end of its text


def gpt_weights() -> dict[str, np.ndarray]:
    """float32 matrices of the character model, dense kernels as (in, out). Biases start at 0,
    the scales of the norms at 1."""
    rng = np.random.default_rng(25)
    shapes = {"tokens": (VOCABULARY, WIDTH), "positions": (CONTEXT, WIDTH)}
    for block in range(BLOCKS):
        for name in ("query", "key", "value", "out"):
            shapes[f"{block}.{name}"] = (WIDTH, WIDTH)
        shapes[f"{block}.up"] = (WIDTH, 4 * WIDTH)
        shapes[f"{block}.down"] = (4 * WIDTH, WIDTH)
    return {name: normal(rng, shape, 0.08) for name, shape in shapes.items()}


def normal(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """float32, of `shape`."""
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def texts(steps: int, seed: int = 0, size: int = 8) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`steps` batches of inputs and targets, int64 (size, CONTEXT) each: texts of 9 to 17 letters in
    which every letter has three that can follow it. Targets are the inputs moved by one."""
    rng = np.random.default_rng(seed)
    followers = np.random.default_rng(7).integers(1, VOCABULARY, (VOCABULARY, 3))
    for _ in range(steps):
        rows = np.full((size, CONTEXT + 1), PADDING)
        for row in rows:
            row[0] = rng.integers(1, VOCABULARY)
            for i in range(1, rng.integers(9, CONTEXT + 2)):
                row[i] = followers[row[i - 1], rng.integers(3)]
        yield rows[:, :-1], rows[:, 1:]
