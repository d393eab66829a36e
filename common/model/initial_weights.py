"""Initial weights, drawn once in NumPy for both backends."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np

from lockstep.common.dtypes import numpy_dtype
from lockstep.common.protocol import Arrays

WEIGHTS_STREAM = (
    1  # keeps these random numbers apart from the others that are drawn from the same seed
)

CONSTANT = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}  # of a norm


def initial_weights(shapes: dict[str, tuple[int, ...]], seed: int, dtype: str) -> Arrays:
    """PyTorch's default initialisation: kernels and biases uniform in +-1/sqrt(fan in of the
    layer's kernel).

    That is what `torch.nn.Conv2d.reset_parameters` and `torch.nn.Linear.reset_parameters` do
    (kaiming_uniform with a = sqrt(5)); Flax's own default would be lecun_normal with zero biases.
    Embeddings are normal; a norm begins as the identity, with the running statistics of normalised
    data. A network's own bare parameters, for which neither library has a default, are normal with
    standard deviation 0.02, as in vision transformers. Drawn in float64 and rounded to `dtype`, so
    that all precisions start from the same weights. Each tensor has its own stream, so the order of
    `shapes` does not matter.
    """
    return {name: _initial(name, shapes, seed).astype(numpy_dtype(dtype)) for name in shapes}


def _initial(name: str, shapes: dict[str, tuple[int, ...]], seed: int) -> np.ndarray:
    layer, _, role = name.rpartition(".")
    kernel, shape, generator = (
        shapes.get(f"{layer}.kernel"),
        shapes[name],
        generator_for(seed, WEIGHTS_STREAM, name),
    )
    if kernel is not None and role in ("kernel", "bias"):
        return generator.uniform(-1, 1, shape) / np.sqrt(np.prod(kernel[:-1]))
    if role in CONSTANT:
        return np.full(shape, CONSTANT[role])
    return generator.normal(0, 1 if role == "embedding" else 0.02, shape)


def digest(weights: Arrays) -> str:
    """SHA-256, hexadecimal, of names, shapes and numbers; the same for all dtypes that hold the
    same numbers."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(
            f"{name} {weights[name].shape}".encode() + weights[name].astype(np.float64).tobytes()
        )
    return sha.hexdigest()


def generator_for(seed: int, stream: int, name: str, *more: int) -> np.random.Generator:
    """A stream of random numbers for one tensor."""
    return np.random.default_rng([seed, stream, zlib.crc32(name.encode()), *more])
