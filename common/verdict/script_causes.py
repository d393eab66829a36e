"""Likely causes of a divergence of two scripts, by the place where it shows and by what can be seen
there."""

from __future__ import annotations

from lockstep.common.verdict.causes import Cause, find_causes
from lockstep.common.verdict.relations import INVERSE, ITSELF, UNCHANGED

TIMES = r" is .*times "  # of `relations.describe_relation` and `_times`
ZEROS, SAME_NUMBERS = "nothing but zeros", "another order"
PLACED = r"\bequals\b|stored as"  # of `matching.Difference.text`
STALE = "the updates before it agree"
BY_ONE_FACTOR = "as all that fail are"
BY_OWN_FACTORS = "each by its own factor"
BY_SINGLE = "float32's rounding"

CAUSES = (
    Cause(
        "data",
        "",
        SAME_NUMBERS,
        "the rows or the axes are in another order: another shuffle, channels in another order (BGR)",
    ),
    Cause("data", "", BY_SINGLE, "the batch is normalised in float32 on one side, or elsewhere"),
    Cause("data", "", TIMES, "the batch is scaled otherwise: normalisation, or 255 left in"),
    Cause(
        "data",
        "",
        "",
        "another shuffle, a sampler that was not given the epoch, another last batch, labels or "
        "tokens shifted by one",
        general=True,
    ),
    Cause(
        "weights", "", SAME_NUMBERS, "a kernel is transposed, or converted with the wrong layout"
    ),
    Cause(
        "weights",
        "",
        PLACED,
        "a converter, or the loading of a checkpoint, put it into the wrong place",
    ),
    Cause(
        "weights",
        "",
        "",
        "the two start from other weights: another seed or initialisation; --start-from A gives B "
        "the weights of A",
        general=True,
    ),
    Cause(
        "", "", BY_SINGLE, "something is float32 in this float64 run: a constant, a cast, a table"
    ),
    Cause(
        "forward",
        "",
        STALE,
        "the step uses parameters of before the last update (a copy that is not renewed), or what it "
        "counts or draws is that of another step",
    ),
    Cause(
        "forward",
        "norm|ln|bn",
        "",
        "epsilon (1e-5 in PyTorch, 1e-6 in Flax), the variance's formula, axes, train mode on one "
        "side; or its input: an embedding that is scaled, a residual that is left out",
    ),
    Cause(
        "forward",
        "emb|wte|wpe|pos",
        "",
        "an embedding is scaled, positions count from one, tokens are shifted",
    ),
    Cause(
        "forward",
        "att",
        "",
        "the mask (off by one; boolean or additive), q and k in each other's place, the scale of "
        "the scores, heads split in another order",
    ),
    Cause("forward", "drop", "", "dropout: its rate, its scale, its random numbers (run.random)"),
    Cause(
        "forward",
        "conv",
        "",
        "padding (Flax pads SAME by default), strides, kernel axes, precision (TF32)",
    ),
    Cause(
        "forward",
        r"\b(\w+_)?head\b|logits",
        "",
        "the head is tied to the embedding on one side alone",
    ),
    Cause(
        "forward",
        "lstm|gru|rnn|cell",
        "",
        "the order of the gates, two biases or one, the initial state, the activation",
    ),
    Cause(
        "forward",
        "",
        "",
        "the function before it: an activation (GELU: Flax approximates by default), dropout, "
        "flatten (PyTorch unrolls (C, H, W)), a missing bias, precision",
    ),
    Cause(
        "loss",
        "",
        "",
        "padding in the mean, a sum for a mean, labels shifted by one, label smoothing, softmax "
        "applied twice, a term of the loss left out",
        general=True,
    ),
    Cause("backward", "", ZEROS, "frozen or detached: requires_grad, stop_gradient, a mask"),
    Cause(
        "backward", "", ITSELF, "weight decay is added to the loss, or to the gradient, on one side"
    ),
    Cause(
        "backward",
        "",
        TIMES,
        "a sum for a mean (gradient accumulation, the batch), a loss that is scaled, gradients "
        "clipped before they were recorded",
    ),
    Cause(
        "backward",
        r"emb|tok|wte|\b(\w+_)?head\b",
        "",
        "the head is tied to the embedding on one side alone; a part that is frozen or detached",
    ),
    Cause(
        "backward",
        "",
        "",
        "a layer frozen or detached, gradients of older parameters, a custom gradient, precision",
        general=True,
    ),
    Cause(
        "update",
        "^lr",
        "",
        "the schedule: a warm-up off by one, counted from another step or epoch",
    ),
    Cause(
        "update",
        "moment",
        ITSELF,
        "weight decay in the gradient (Adam, SGD) against decay apart from it (AdamW)",
    ),
    Cause(
        "update",
        "momentum|first moment",
        BY_ONE_FACTOR,
        "beta1, dampening, accumulated gradients summed in place of their mean, or all clipped to "
        "another norm",
    ),
    Cause(
        "update",
        "momentum|moment",
        BY_OWN_FACTORS,
        "gradients are clipped otherwise: each tensor by its own norm, against all by one",
    ),
    Cause(
        "update",
        "second moment",
        "",
        "beta2 (0.999 in PyTorch and optax), or its gradient was clipped otherwise",
        general=True,
    ),
    Cause(
        "update",
        "momentum|first moment",
        "",
        "clipping (of each tensor against of all together, or another norm), beta1, dampening, "
        "accumulated gradients summed in place of their mean",
        general=True,
    ),
    Cause(
        "update",
        " of ",
        "",
        "another optimizer, or other constants of it (the betas), or clipped gradients",
        general=True,
    ),
    Cause(
        "update", r"var$", TIMES, "PyTorch keeps the unbiased variance, JAX libraries the biased"
    ),
    Cause(
        "update",
        r"(mean|var)$",
        "",
        "the momentum of running statistics (PyTorch's 0.1 is Flax's 0.9); where only the last step's "
        "differ, train mode left on in evaluation",
    ),
    Cause(
        "update",
        "^(?!.* of )",
        ITSELF,
        "decoupled weight decay: its factor, whether lr multiplies it (AdamW), or a mask: norms and "
        "biases decayed on one side alone",
    ),
    Cause(
        "update",
        "",
        UNCHANGED,
        "the tensor is frozen or not given to the optimizer, or the first learning rate is zero (a "
        "warm-up off by one)",
    ),
    Cause("update", "", INVERSE, "the optimizer's epsilon (AdamW's: 1e-8), or where it stands"),
    Cause(
        "update",
        "",
        r"\b(3\.16|0\.316)\d* times",
        "Adam's bias correction is left out on one side: 3.16 is (1 - beta1) / sqrt(1 - beta2)",
    ),
    Cause(
        "update",
        "",
        TIMES,
        "the learning rate, or its schedule: a warm-up off by one; an update scaled otherwise",
        general=True,
    ),
    Cause(
        "update",
        "",
        "",
        "the learning rate, the optimizer's epsilon, weight decay, bias correction, clipping",
        general=True,
    ),
    Cause("evaluate", "", "another numbering", "the classes are numbered otherwise"),
    Cause(
        "evaluate",
        "",
        "",
        "a last batch left out, means over unequal batches, older weights, dropout or train mode "
        "left on, other test data",
        general=True,
    ),
)


def causes_of(stage: str, tensor: str, pattern: str | None) -> tuple[str, ...]:
    """Likely causes, the likeliest first; at most two.

    Args:
        tensor: both sides' names of it.
        pattern: of `relation_of` or `relations.describe_relation`.
    """
    return find_causes(stage, tensor.lower(), pattern, "", CAUSES)
