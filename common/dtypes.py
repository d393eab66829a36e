"""The NumPy dtypes that a run's `--dtype` stands for."""

from __future__ import annotations

import ml_dtypes
import numpy as np


def numpy_dtype(dtype: str) -> np.dtype:
    """The dtype of a precision's weights, gradients, momentum and statistics; bfloat16 is
    ml_dtypes'.

    In mixed precision it is float32, as in Keras' policy of that name, in FSDP's `MixedPrecision`
    and in `jmp`.
    """
    return np.dtype(np.float32) if dtype == "mixed_bfloat16" else compute_dtype(dtype)


def compute_dtype(dtype: str) -> np.dtype:
    """The dtype in which a precision computes: that of its images, activations and logits."""
    name = dtype.removeprefix("mixed_")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
