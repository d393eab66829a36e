"""The device, and what makes runs on it comparable. Reads next to
backends/torch_backend/device.py."""

from __future__ import annotations

import os

# XLA reads these once, when JAX starts. Without the first, it leaves PyTorch no memory on the card.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"

import jax

from lockstep.common.errors import BackendError


def choose_device(device: str) -> str:
    """ "auto", "cpu" or "cuda" as "cpu" or "cuda".

    Raises:
        BackendError: if CUDA is asked for and JAX finds none.
    """
    available = any(found.platform == "gpu" for found in jax.devices())
    if device == "cuda" and not available:
        raise BackendError(
            "JAX finds no CUDA device here: use --device cpu, or install JAX for CUDA: "
            "pip install -e '.[gpu]'"
        )
    if device == "auto":
        return "cuda" if available else "cpu"
    return device


def configure_determinism(device: str) -> None:
    """Full float32, float64 where asked for: JAX's defaults are TF32 on a GPU, and no float64
    anywhere."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_default_device", jax.local_devices(backend=device)[0])
