"""Faults that no rule of the verdict was set with.

The rule of the split is the date: every fault of the other files was there, and was looked at, when
the rules of the verdict were last set, on 26 November 2026; those of this file came after. The rate
of detection is stated on them apart. A fault for which a rule is changed moves to the file of its
stage.
"""

from __future__ import annotations

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.backends.faults.transforms import prepend_transform, replace_sgd
from lockstep.common.config import Config
from lockstep.common.data import Dataset


@fault(
    "update",
    "momentum of *",
    "PyTorch docs, clip_grad_value_ and clip_grad_norm_; optax docs, clip",
    clip_norm=0.1,
)
def clipped_by_value(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Each entry of a gradient is clipped, not the norm of all of them."""
    from lockstep.backends.faults.frameworks import flax_optimizer, optax

    patch(flax_optimizer, "clip_gradients", optax.clip)


@fault("update", "momentum of *", "optax docs, MultiSteps: gradients are averaged, not added")
def averaged_twice(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients of two micro-batches are averaged in the loss, and once more in the optimizer."""
    from lockstep.backends.faults.frameworks import optax

    prepend_transform(patch, lambda: optax.scale(0.5))


@fault("update", None, "optax docs, ema: debias", momentum=0.9)
def momentum_debiased(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The momentum buffer is divided by one minus momentum to the power of the step, as in Adam."""
    replace_sgd(
        patch,
        lambda buffer, g, momentum, lr, count: (
            (b := momentum * buffer + g),
            lr * b / (1 - momentum ** (count + 1)),
        ),
    )
