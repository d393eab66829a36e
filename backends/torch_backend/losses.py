"""The loss, and the norm of all gradients. Reads next to backends/flax_backend/losses.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import get_total_norm

from lockstep.common.data.dataset import IGNORED

Loss = Callable[..., Tensor]  # of outputs and targets


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over the batch of -log softmax(logits)[label], in nats; in float32 at least.

    With `smoothing`, that share of each label is spread evenly over all classes, its own included.
    """
    return F.cross_entropy(upcast(logits), labels, label_smoothing=smoothing)


def of_pair(loss: str | Loss) -> Loss:
    """The loss of a user's pair: its own function, or the one of this name."""
    return LOSSES[loss] if isinstance(loss, str) else loss


def cross_entropy_of_each(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over the last axis, of pixels the channels: the mean over all labels but those
    that are IGNORED."""
    logits = logits.movedim(1, -1) if logits.ndim > 3 else logits
    logits, labels = upcast(logits).flatten(0, -2), labels.flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORED)


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(upcast(outputs), like(targets, outputs))


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of targets from 0 to 1, each with a logit of its own."""
    return F.binary_cross_entropy_with_logits(upcast(logits), like(targets, logits))


def huber(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error up to 1, linear beyond (Huber 1964, doi:10.1214/aoms/1177703732)."""
    return F.huber_loss(upcast(outputs), like(targets, outputs))


LOSSES: dict[str, Loss] = {
    "cross entropy": cross_entropy_of_each,
    "mean squared error": mean_squared_error,
    "binary cross entropy": binary_cross_entropy,
    "huber": huber,
}


def like(targets: Tensor, outputs: Tensor) -> Tensor:
    """In the outputs' shape and dtype, float32 at least; without broadcasting: (n,) fits (n, 1)."""
    return targets.to(upcast(outputs).dtype).reshape(outputs.shape)


def global_norm(gradients: Sequence[Tensor | None]) -> Tensor:
    """The Euclidean norm of all gradients together, in float64: PyTorch's in float32 is too
    inexact on the CPU to compare."""
    wide = [gradient.double() for gradient in gradients if gradient is not None]
    # Tensor by tensor on the CPU, as `foreach` does there, too; the compiler can then fuse it.
    return get_total_norm(wide, foreach=False if wide[0].device.type == "cpu" else None)


def upcast(tensor: Tensor) -> Tensor:
    """bfloat16 as float32: three digits are too few to sum in."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
