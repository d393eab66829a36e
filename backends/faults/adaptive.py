"""Faults of the optimizers other than SGD: one library's conventions in the other's place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.backends.faults.transforms import change_optimizer
from lockstep.common.config import Config
from lockstep.common.data import Dataset

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import optax

ADAM: dict[str, Any] = {"optimizer": "adam", "momentum": 0.0, "lr": 0.001}
ADAMW: dict[str, Any] = ADAM | {"optimizer": "adamw", "weight_decay": 0.1}
RMSPROP: dict[str, Any] = ADAM | {"optimizer": "rmsprop", "lr": 0.0001}
ADAGRAD: dict[str, Any] = ADAM | {"optimizer": "adagrad"}


@fault("update", None, "optax docs, adam: eps and eps_root", **ADAM)
def adam_epsilon_in_the_root(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Adam's epsilon is added to the second moment, inside the root."""
    from lockstep.backends.faults.frameworks import optax

    adam = optax.adam
    patch(
        optax,
        "adam",
        lambda rate, b1, b2, eps, mu_dtype: adam(rate, b1, b2, 0.0, eps, mu_dtype),
    )


@fault("update", None, "Kingma and Ba 2015, section 3; BERT's optimizer has none", **ADAM)
def no_bias_correction(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Adam's moments are not corrected for their start at zero."""
    from lockstep.backends.faults.frameworks import optax

    patch(optax.tree, "bias_correction", lambda moment, decay, count: moment)


@fault("update", "second moment of *", "optax docs, adam: b2; torch: betas", **ADAM)
def beta2_of_099(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Adam's second beta is 0.99 in place of 0.999."""
    change_optimizer(patch, betas=(0.9, 0.99))


@fault("update", "first moment of *", "Loshchilov and Hutter 2019; optax#417", **ADAMW)
def decay_in_the_gradient(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Weight decay is added to the gradient, as in Adam, where AdamW is asked for."""
    from lockstep.backends.faults.frameworks import optax

    def adam_with_penalty(
        rate: optax.Schedule, b1: float, b2: float, eps: float, **options: Any
    ) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(options["weight_decay"], options["mask"]),
            optax.scale_by_adam(b1, b2, eps),
            optax.scale_by_learning_rate(rate),
        )

    patch(optax, "adamw", adam_with_penalty)


@fault(
    "update",
    "*.bias",
    "nanoGPT, configure_optimizers: tensors of one dimension do not decay",
    **ADAMW,
    decay_biases_and_norms=False,
)
def biases_decayed(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Biases decay, too, where they should not."""
    change_optimizer(patch, decay_biases_and_norms=True)


@fault("update", None, "optax docs, rmsprop: eps_in_sqrt; optax#532", **RMSPROP)
def rmsprop_epsilon_in_the_root(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """RMSprop's epsilon is added inside the root, optax's default."""
    from lockstep.backends.faults.frameworks import optax

    by_rms = optax.scale_by_rms
    patch(optax, "scale_by_rms", lambda decay, eps, eps_in_sqrt: by_rms(decay, eps))


@fault("update", "second moment of *", "optax docs, rmsprop: decay; torch: alpha", **RMSPROP)
def rmsprop_alpha_of_09(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """RMSprop's factor is optax's default, 0.9, in place of PyTorch's, 0.99."""
    change_optimizer(patch, alpha=0.9)


@fault("update", "sum of squares of *", "optax docs, adagrad; torch docs, Adagrad", **ADAGRAD)
def adagrad_from_01(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Adagrad's sum of squares starts at 0.1, optax's default, in place of 0."""
    change_optimizer(patch, initial_accumulator_value=0.1)
