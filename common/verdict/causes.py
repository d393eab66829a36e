"""Likely causes of a divergence, by the place where it shows."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """A mistake that shows in one place."""

    stage: str
    tensor: str  # regular expression
    pattern: (
        str  # of `locate.describe_relation`, as a regular expression; "" fits any, none included
    )
    text: str


CAUSES = (
    Cause(
        "data",
        "images",
        "another order",
        "the channels are in another order (BGR), or the port shuffles for itself",
    ),
    Cause(
        "data",
        "images",
        "times",
        "images are scaled otherwise: normalisation constants, or 255 left in",
    ),
    Cause(
        "data",
        "images",
        "",
        "other images: another shuffle, another normalisation, an augmentation on one side",
    ),
    Cause(
        "data",
        "labels",
        "",
        "labels count from one, or the batch holds other images: another shuffle",
    ),
    Cause(
        "data",
        "^batch$",
        "that of step",
        "a batch is repeated, left out, or comes in another order: another shuffle, a sampler that "
        "was not given the epoch",
    ),
    Cause(
        "data",
        "^batch$",
        "",
        "other images or labels in a batch: another shuffle, padding of the last batch, labels "
        "changed in the copy on the device",
    ),
    Cause(
        "weights",
        "",
        "another order",
        "a kernel is transposed: OIHW against HWIO, (out, in) against (in, out)",
    ),
    Cause(
        "weights",
        "",
        "",
        "a layer kept its own initial weights, or was converted with the wrong layout",
    ),
    Cause(
        "forward",
        "input of",
        "another order",
        "flatten: PyTorch unrolls (C, H, W), Flax (H, W, C); see `flattened`",
    ),
    Cause(
        "forward",
        "input of",
        "",
        "the function between two layers: activation (nnx.gelu approximates by default), pooling, "
        "dropout",
    ),
    Cause(
        "forward",
        "^(?!input of).*(bn|norm)",
        "",
        "epsilon, the variance's formula, axes, train mode on one side",
    ),
    Cause(
        "forward",
        "conv",
        "",
        "padding (Flax pads SAME by default), strides, kernel axes, precision (TF32)",
    ),
    Cause(
        "forward",
        "",
        "",
        "padding (Flax's is SAME by default), strides, a missing bias, precision (float32, TF32)",
    ),
    Cause(
        "loss",
        "",
        "",
        "softmax applied twice, label smoothing, a sum for a mean, a mean over padded examples",
    ),
    Cause("backward", "", "times", "a loss summed over the batch, or scaled; gradients clipped"),
    Cause(
        "backward",
        "",
        "",
        "a layer frozen or detached, stale gradients, gradients cast to a lower precision",
    ),
    Cause("update", "^lr$", "", "the schedule: counted from another step, or computed in float32"),
    Cause(
        "update",
        "momentum of",
        "times",
        "dampening on the first step, lr in the momentum buffer, other clipping",
    ),
    Cause(
        "update",
        "momentum of",
        "",
        "momentum, dampening, weight decay (before momentum in PyTorch), precision",
    ),
    Cause(
        "update",
        r"\.var$",
        "",
        "PyTorch keeps the unbiased variance, nnx.BatchNorm the biased: layers.BatchNorm",
    ),
    Cause(
        "update",
        r"\.(mean|var)$",
        "",
        "momentum (PyTorch's 0.1 is Flax's 0.9), or statistics that are not updated",
    ),
    Cause(
        "update",
        "",
        "",
        "the learning rate, nesterov, weight decay after momentum or apart from the gradient, maximize",
    ),
    Cause(
        "evaluate",
        "test loss",
        "",
        "batch means averaged over unequal batches, other normalisation, older weights",
    ),
    Cause("evaluate", "", "another numbering", "the classes are numbered otherwise"),
    Cause(
        "evaluate",
        "",
        "",
        "a last batch left out, older weights, other normalisation, train mode left on",
    ),
)


def find_causes(stage: str, tensor: str, pattern: str | None) -> tuple[str, ...]:
    """The likely causes of a divergence there, the likeliest first; at most two.

    Args:
        pattern: how one tensor is made of the other, if that was seen.
    """
    fitting = (
        cause.text
        for cause in CAUSES
        if cause.stage == stage
        and re.search(cause.tensor, tensor)
        and (not cause.pattern or (pattern and re.search(cause.pattern, pattern)))
    )
    return tuple(itertools.islice(fitting, 2))
