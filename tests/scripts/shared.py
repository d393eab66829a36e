"""What the two sides of a pair share: weights to start from and data, drawn by NumPy."""

from __future__ import annotations

import itertools
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


def dense(seed: int, *sizes: int) -> list[np.ndarray]:
    """float32 kernels (in, out) of a network with these widths, one after the other."""
    rng = np.random.default_rng(seed)
    return [normal(rng, (a, b), a**-0.5) for a, b in itertools.pairwise(sizes)]


def stations(steps: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Batches of a regression: a dictionary of two inputs, "fields" (32, 12) and "station" (32, 3),
    and what they give, (32, 1), with a few outliers; float32."""
    rng = np.random.default_rng(1)
    effect, slope = normal(rng, (12, 1), 0.4), normal(rng, (3, 1), 1.0)
    for _ in range(steps):
        inputs = {"fields": normal(rng, (32, 12), 1.0), "station": normal(rng, (32, 3), 1.0)}
        outliers = normal(rng, (32, 1), 8.0) * (rng.random((32, 1)) < 0.1)
        found = np.tanh(inputs["fields"] @ effect) + inputs["station"] @ slope + outliers
        yield inputs, found.astype(np.float32)


def waves(steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of sequences (16, 20, 2), a wave and its noisy copy, and their class, int64 (16,):
    which of four frequencies it has."""
    rng = np.random.default_rng(2)
    for _ in range(steps):
        kinds = rng.integers(0, 4, 16)
        phase = rng.random((16, 1)) * 2 * np.pi
        wave = np.sin(0.3 * (kinds[:, None] + 1) * np.arange(20) + phase)
        pair = np.stack([wave, wave + 0.3 * rng.standard_normal(wave.shape)], axis=-1)
        yield pair.astype(np.float32), kinds


def ring(steps: int) -> Iterator[np.ndarray]:
    """Batches of points, float32 (32, 2), round eight places on a circle."""
    rng = np.random.default_rng(3)
    for _ in range(steps):
        angle = rng.integers(0, 8, 32) * np.pi / 4
        places = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        yield (places + 0.05 * rng.standard_normal((32, 2))).astype(np.float32)


def digits(steps: int) -> Iterator[np.ndarray]:
    """Batches of pictures, float32 (16, 64) from 0 to 1: a bright bar on 8 x 8 pixels."""
    rng = np.random.default_rng(4)
    for _ in range(steps):
        place, width, turned = rng.integers(1, 6, 16), rng.integers(1, 3, 16), rng.random(16) < 0.5
        bars = np.abs(np.arange(8) - place[:, None]) < width[:, None]
        rows = np.repeat(bars[:, :, None], 8, axis=2)
        pictures = np.where(turned[:, None, None], rows, rows.transpose(0, 2, 1))
        yield pictures.reshape(16, 64).astype(np.float32)


class Walk:
    """An environment: `size` walkers on a line start near 0 and are paid for being close to 1.
    Actions are 0 (left), 1 (stay) and 2 (right). Walkers see their place and their speed."""

    def __init__(self, seed: int, size: int = 16) -> None:
        self.place = np.random.default_rng([5, seed]).normal(0, 0.3, size)
        self.speed = np.zeros(size)

    def see(self) -> np.ndarray:
        """float32 (size, 2)."""
        return np.stack([self.place, self.speed], axis=1).astype(np.float32)

    def act(self, actions: np.ndarray) -> np.ndarray:
        """The reward of each walker, float32 (size,)."""
        self.speed = 0.8 * self.speed + 0.1 * (actions - 1)
        self.place = self.place + self.speed
        return (-np.abs(self.place - 1)).astype(np.float32)
