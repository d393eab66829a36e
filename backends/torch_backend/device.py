"""The device, and what makes runs on it comparable. Reads next to
backends/flax_backend/device.py."""

from __future__ import annotations

import os

import torch

from lockstep.common.errors import BackendError


def choose_device(device: str) -> str:
    """ "auto", "cpu" or "cuda" as "cpu" or "cuda".

    Raises:
        BackendError: if CUDA is asked for and PyTorch finds none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            "PyTorch finds no CUDA device here: use --device cpu, or install a CUDA build of torch"
        )
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def configure_determinism(device: str) -> None:
    """Full float32 and deterministic kernels: TF32 keeps three digits of a float32's seven."""
    # cuBLAS is deterministic only with this
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    # The CPU's kernels are deterministic; Inductor would be half as fast.
    torch.use_deterministic_algorithms(device == "cuda")
