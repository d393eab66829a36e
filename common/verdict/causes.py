"""Likely causes of a divergence, by the place where it shows."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lockstep.common.model.layers import (
    ATTENTION,
    CONVOLUTION,
    DENSE,
    EMBEDDING,
    NORM,
    plain_name,
)
from lockstep.common.verdict.relations import AS_BEFORE, INVERSE, ITSELF, UNCHANGED


@dataclass(frozen=True)
class Cause:
    """A mistake that shows in one place."""

    stage: str  # "" fits any
    tensor: str  # regular expression; "" fits any
    # Of what was seen (`relations.describe_relation`, `failures.common`), a regular expression; "" fits
    # any, and that nothing was seen.
    pattern: str
    text: str
    kind: str = ""  # of the layer; "" fits any
    general: bool = False  # only said where nothing else fits
    fix: str = ""  # code to try, where a line of it says what to change


CAUSES = (
    Cause(
        "data",
        "images",
        "another order along axis 0",
        "the samples of the batch come in another order: another shuffle",
    ),
    Cause(
        "data",
        "images",
        "another order(?! along axis 0)",
        "the channels are in another order (BGR), or the port shuffles for itself",
        fix="images = images[..., ::-1]  # BGR to RGB",
    ),
    Cause(
        "data",
        "images",
        "times",
        "images are scaled otherwise: normalisation constants, or 255 left in",
        fix="images = (images / 255 - mean) / std  # the same mean and std on both sides",
    ),
    Cause(
        "data",
        "images",
        "",
        "other images: another shuffle, another normalisation, an augmentation on one side",
        general=True,
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
        "masks of dropout",
        "masks of another step or seed: a key that is used twice, or split at the wrong place",
    ),
    Cause(
        "data",
        "^batch$",
        "",
        "other images or labels in a batch: another shuffle, padding of the last batch, labels "
        "changed in the copy on the device",
        general=True,
    ),
    Cause(
        "weights",
        "",
        "another order",
        "a kernel is transposed: OIHW against HWIO, (out, in) against (in, out)",
        fix="kernel = weight.transpose(2, 3, 1, 0)  # OIHW to HWIO; a dense one: weight.T",
    ),
    Cause(
        "weights",
        "",
        "",
        "a layer kept its own initial weights, or was converted with the wrong layout",
        general=True,
    ),
    Cause(
        "forward",
        "input of",
        "another order: axes",
        "the module exchanges two axes on one side, such as rows and columns",
        fix="x = x.swapaxes(1, 2)  # of one side, rows and columns exchanged",
    ),
    Cause(
        "forward",
        "input of",
        "another order along",
        "one side reverses or shuffles an axis: the order of the colours (BGR), a mirrored image",
        fix="x = x[..., ::-1]  # of one side, the colours reversed",
    ),
    Cause(
        "forward",
        "input of",
        "another order(?!:| along)",
        "flatten: PyTorch unrolls (C, H, W), Flax (H, W, C); see `flattened`",
        fix="x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # in Flax: PyTorch's order",
    ),
    Cause(
        "forward",
        "",
        "",
        "attention: its scale, 1 / sqrt(width of a head), the split into heads, the mask, the axis "
        "of the softmax",
        kind=ATTENTION,
    ),
    Cause(
        "forward",
        "input of",
        "",
        "the function between two layers: activation (nnx.gelu approximates by default), pooling, "
        "dropout, the gates of a recurrent layer",
        general=True,
    ),
    Cause(
        "forward",
        "",
        "",
        "epsilon, the variance's formula, axes, train mode on one side",
        kind=NORM,
        fix="epsilon=1e-5  # in nnx.LayerNorm, where the default is 1e-6",
    ),
    Cause(
        "forward",
        "",
        "",
        "padding (Flax pads SAME by default), strides, dilation, kernel axes, precision (TF32)",
        kind=CONVOLUTION,
        fix='padding=1  # in nnx.Conv, the number that nn.Conv2d has; without one Flax pads "SAME"',
    ),
    Cause(
        "forward",
        "",
        "",
        "a missing bias, a transposed kernel, a scale on the output, precision (TF32)",
        kind=DENSE,
    ),
    Cause(
        "forward",
        "",
        "",
        "indices that count from another start, a scale on the embedding, positions",
        kind=EMBEDDING,
    ),
    Cause(
        "forward",
        "",
        "",
        "padding (Flax's is SAME by default), strides, a missing bias, precision (float32, TF32)",
        general=True,
    ),
    Cause(
        "loss",
        "",
        "",
        "softmax applied twice, label smoothing, a sum for a mean, a mean over padded examples or "
        "masked labels",
    ),
    Cause(
        "backward",
        "",
        "times",
        "a loss summed over the batch, or scaled; gradients clipped",
        fix="loss = losses.mean()  # not .sum()",
    ),
    Cause(
        "backward",
        "",
        "",
        "padding that has a gradient on one side only (padding_idx of nn.Embedding)",
        kind=EMBEDDING,
    ),
    Cause(
        "backward",
        "",
        "",
        "a layer frozen or detached, stale gradients, gradients cast to a lower precision",
        general=True,
    ),
    Cause("update", "^lr$", "", "the schedule: counted from another step, or computed in float32"),
    Cause(
        "update",
        "^(?!.* of )",
        ITSELF,
        "decoupled decay (AdamW): its factor, or whether the learning rate multiplies it",
    ),
    Cause(
        "update",
        " of ",
        ITSELF,
        "decay added to the gradient (SGD, Adam): its factor, or on one side only",
    ),
    Cause(
        "update",
        " of ",
        AS_BEFORE,
        "the factor that keeps it from step to step: momentum, beta1 or beta2",
    ),
    Cause(
        "update",
        "^(?!.* of )",
        UNCHANGED,
        "the tensor is frozen or not given to the optimizer, or the first learning rate is zero",
    ),
    Cause("update", "^(?!.* of )", INVERSE, "the optimizer's epsilon, or where it stands"),
    Cause(
        "update",
        "^(?!.* of )",
        "update is .*times",
        "the learning rate of this step; bias correction",
    ),
    Cause(
        "update",
        "",
        "all (biases|scales|kernels)[^;]*, no [^;]*(bias|scale|kernel)",
        "weight decay on some tensors only: biases and norms left out on one side",
    ),
    Cause(
        "update",
        "momentum of",
        " is .*times",
        "dampening on the first step, lr in the momentum buffer, other clipping",
        fix="dampening=0  # in torch.optim.SGD: optax.sgd has no dampening",
    ),
    Cause(
        "update",
        "momentum of",
        "",
        "momentum, dampening, weight decay (before momentum in PyTorch), precision",
        general=True,
        fix="optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(lr, momentum))",
    ),
    Cause(
        "update",
        "sum of squares of",
        "",
        "where Adagrad's sum of squares starts (0 in PyTorch, 0.1 in optax)",
        fix="optax.adagrad(lr, initial_accumulator_value=0.0)",
    ),
    Cause(
        "update",
        "second moment of",
        " is .*times",
        "beta2 (0.999), or RMSprop's factor (alpha is 0.99 in PyTorch, decay is 0.9 in optax)",
    ),
    Cause(
        "update",
        "first moment of",
        " is .*times",
        "beta1 (0.9), or other clipping",
    ),
    Cause(
        "update",
        "moment of",
        "",
        "weight decay in the gradient (Adam) against decay apart from it (AdamW), clipping, the betas",
        general=True,
    ),
    Cause(
        "update",
        "",
        f"^(?!.*({ITSELF}|{UNCHANGED}|{INVERSE}|update is)).*no [^;]*(moment|sum of squares)",
        "epsilon (its size, or inside the root), bias correction, decay apart from the gradient, the "
        "learning rate",
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
        fix="momentum=0.9  # in nnx.BatchNorm, where nn.BatchNorm2d has 0.1",
    ),
    Cause(
        "update",
        "",
        "",
        "the learning rate, nesterov, weight decay after momentum or apart from the gradient, maximize",
        general=True,
    ),
    Cause(
        "evaluate",
        "test loss",
        "",
        "batch means averaged over unequal batches, other normalisation, older weights",
        fix="test_loss = (losses * sizes).sum() / sizes.sum()  # of batches of unequal sizes",
    ),
    Cause("evaluate", "", "another numbering", "the classes are numbered otherwise"),
    Cause(
        "evaluate",
        "",
        "",
        "a last batch left out, older weights, other normalisation, train mode left on",
        general=True,
        fix="model.eval()  # before evaluation, on both sides",
    ),
)
NOT_FINITE = (
    "a division by 0, a logarithm of 0, or a root whose gradient is taken at 0; `jnp.where` alone does "
    "not keep NaN out of a gradient"
)
FLOAT32 = (
    "float32 inside: a gap of {share:.0e} of the largest entry is what float32 rounds: a constant, "
    "a cast, or a layer that keeps float32"
)
FLOAT32_SHARES = 1e-9, 1e-6  # of the largest entry; float32 rounds to 6e-8 of each
ATTENTION_NAME = r"attn|attention"
# The kind that a name suggests, where no side says what its layers are.
NAMED = (
    (NORM, r"^(bn|ln|gn)\d*$|norm"),
    (CONVOLUTION, r"conv"),
    (ATTENTION, ATTENTION_NAME),
    (EMBEDDING, r"emb(ed|_|\d|$)"),
    (DENSE, r"^(fc|head|dense|linear)"),
)


def find_causes(
    stage: str,
    tensor: str,
    pattern: str | None,
    kind: str | None = None,
    known: Sequence[Cause] = CAUSES,
) -> tuple[str, ...]:
    """The likely causes of a divergence there, the likeliest first; at most two.

    Args:
        pattern: how one tensor is made of the other, or which tensors fail, if that was seen.
        kind: of the layer (see `lockstep.common.model.layers`), "" if it has none; None: guessed
            from its name.
        known: in the order in which they are tried.
    """
    if pattern and "not finite" in pattern:
        return (NOT_FINITE,)
    if kind is None:
        kind = kind_by_name(tensor)
    fitting = [
        cause
        for cause in known
        if cause.stage in ("", stage)
        and cause.kind in ("", kind)
        and re.search(cause.tensor, tensor)
        and (not cause.pattern or (pattern and re.search(cause.pattern, pattern)))
    ]
    said = [cause for cause in fitting if not cause.general] or fitting[:1]
    return tuple(cause.text for cause in itertools.islice(said, 2))


def fixes(causes: Iterable[str]) -> tuple[str, ...]:
    """The code to try for each of these causes that has some."""
    known = {cause.text: cause.fix for cause in CAUSES if cause.fix}
    return tuple(known[text] for text in causes if text in known)


def kind_by_name(tensor: str) -> str:
    """The kind of layer that its name suggests; "" if it suggests none, and for what lies between
    two layers."""
    outer, _, name = plain_name(tensor).lower().rpartition(".")
    if tensor != plain_name(tensor):
        return ATTENTION if re.search(ATTENTION_NAME, outer.rpartition(".")[2]) else ""
    return next((kind for kind, pattern in NAMED if re.search(pattern, name)), "")


def float32_cause(share: float) -> str | None:
    """What a gap in float64 of this share of the largest entry says; None if nothing."""
    low, high = FLOAT32_SHARES
    return FLOAT32.format(share=share) if low <= share <= high else None
