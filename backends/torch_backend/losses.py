"""The loss, and the norm of all gradients. Reads next to backends/flax_backend/losses.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import get_total_norm


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over the batch of -log softmax(logits)[label], in nats; in float32 at least.

    With `smoothing`, that share of each label is spread evenly over all classes, its own included.
    """
    return F.cross_entropy(upcast(logits), labels, label_smoothing=smoothing)


def global_norm(gradients: Sequence[Tensor | None]) -> Tensor:
    """The Euclidean norm of all gradients together, in float64: PyTorch's in float32 is too
    inexact on the CPU to compare."""
    wide = [gradient.double() for gradient in gradients if gradient is not None]
    # Tensor by tensor on the CPU, as `foreach` does there, too; the compiler can then fuse it.
    return get_total_norm(wide, foreach=False if wide[0].device.type == "cpu" else None)


def upcast(tensor: Tensor) -> Tensor:
    """bfloat16 as float32: three digits are too few to sum in."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
