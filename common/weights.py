"""Initial weights, drawn once in NumPy for both backends, and their twins."""

from __future__ import annotations

import hashlib
import zlib

import ml_dtypes
import numpy as np

from common.protocol import Arrays

# These keep the random streams of one seed apart; the order of the batches has another.
WEIGHTS_STREAM, TWINS_STREAM, TWIN_IMAGES_STREAM = 1, 2, 3


def numpy_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype of a lens; bfloat16 is ml_dtypes'."""
    return np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)


def initial_weights(shapes: dict[str, tuple[int, ...]], seed: int, dtype: str) -> Arrays:
    """PyTorch's default initialisation: kernels and biases uniform in +-1/sqrt(fan in of the layer's kernel).

    That is what `torch.nn.Conv2d.reset_parameters` and `torch.nn.Linear.reset_parameters` do
    (kaiming_uniform with a = sqrt(5)); Flax's own default would be lecun_normal with zero biases. Drawn in float64
    and rounded to `dtype`, so that all lenses start from the same weights. Each tensor has its own stream, so the
    order of `shapes` does not matter.
    """
    weights = {}
    for name, shape in shapes.items():
        layer, _, _ = name.rpartition(".")
        fan_in = np.prod(shapes[f"{layer}.kernel"][:-1])
        draws = _generator(seed, WEIGHTS_STREAM, name).uniform(-1, 1, shape)
        weights[name] = (draws / np.sqrt(fan_in)).astype(numpy_dtype(dtype))
    return weights


def digest(weights: Arrays) -> str:
    """SHA-256, hexadecimal, of names, shapes and numbers; the same for all dtypes that hold the same numbers."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(f"{name} {weights[name].shape}".encode() + weights[name].astype(np.float64).tobytes())
    return sha.hexdigest()


def twin_weights(weights: Arrays, seed: int, twin: int) -> Arrays:
    """`weights`, each moved by one ulp up, one ulp down, or not at all, at random; `twin` is 1, 2, ..."""
    return {name: moved(array, _generator(seed, TWINS_STREAM, name, twin)) for name, array in weights.items()}


def moved(array: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Each entry moved by one ulp up, one ulp down, or not at all, at random; zeros stay."""
    bits = array.view(f"i{array.itemsize}")  # the next integer is the next float of the same sign
    with np.errstate(invalid="ignore"):  # NaN
        direction = generator.integers(-1, 2, array.shape, np.int8) * (array != 0)
    return (bits + direction).view(array.dtype)


def twin_images(seed: int, twin: int) -> np.random.Generator:
    """What a twin's images are `moved` by, batch after batch."""
    return np.random.default_rng([seed, TWIN_IMAGES_STREAM, twin])


def _generator(seed: int, stream: int, name: str, *more: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream, zlib.crc32(name.encode()), *more])
