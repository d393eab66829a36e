"""Initial weights, drawn once in NumPy for both backends, and their twins."""

from __future__ import annotations

import hashlib
import zlib

import ml_dtypes
import numpy as np

from common.protocol import Arrays

# These keep the random streams of one seed apart; the order of the batches has another.
WEIGHTS_STREAM, TWINS_STREAM, TWIN_IMAGES_STREAM = 1, 2, 3

CONSTANT = {"scale": 1.0, "bias": 0.0, "mean": 0.0, "var": 1.0}  # of a norm


def numpy_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype of a lens's weights, gradients, momentum and statistics; bfloat16 is ml_dtypes'.

    In mixed precision it is float32, as in Keras' policy of that name, in FSDP's `MixedPrecision` and in `jmp`.
    """
    return np.dtype(np.float32) if dtype == "mixed_bfloat16" else compute_dtype(dtype)


def compute_dtype(dtype: str) -> np.dtype:
    """That of its images, activations, and logits, which is what it computes in."""
    name = dtype.removeprefix("mixed_")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def initial_weights(shapes: dict[str, tuple[int, ...]], seed: int, dtype: str) -> Arrays:
    """PyTorch's default initialisation: kernels and biases uniform in +-1/sqrt(fan in of the layer's kernel).

    That is what `torch.nn.Conv2d.reset_parameters` and `torch.nn.Linear.reset_parameters` do
    (kaiming_uniform with a = sqrt(5)); Flax's own default would be lecun_normal with zero biases. Embeddings are
    normal; a norm begins as the identity, with the running statistics of normalised data. A network's own bare
    parameters, for which neither library has a default, are normal with standard deviation 0.02, as in vision
    transformers. Drawn in float64 and rounded to `dtype`, so that all lenses start from the same weights. Each tensor
    has its own stream, so the order of `shapes` does not matter.
    """
    return {name: _initial(name, shapes, seed).astype(numpy_dtype(dtype)) for name in shapes}


def _initial(name: str, shapes: dict[str, tuple[int, ...]], seed: int) -> np.ndarray:
    layer, _, role = name.rpartition(".")
    kernel, shape, generator = shapes.get(f"{layer}.kernel"), shapes[name], _generator(seed, WEIGHTS_STREAM, name)
    if kernel is not None and role in ("kernel", "bias"):
        return generator.uniform(-1, 1, shape) / np.sqrt(np.prod(kernel[:-1]))
    if role in CONSTANT:
        return np.full(shape, CONSTANT[role])
    return generator.normal(0, 1 if role == "embedding" else 0.02, shape)


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
