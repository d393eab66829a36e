"""Faults of the optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.backends.faults.transforms import (
    append_transform,
    change_optimizer,
    prepend_transform,
    replace_sgd,
    transform,
    zeros,
)
from lockstep.common.config import Config, Schedule
from lockstep.common.data import Dataset

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import Tensors, jax, optax


@fault(
    "update",
    "momentum of *",
    "a slip of the pen; the field: PyTorch docs, SGD: momentum",
    momentum=0.9,
)
def momentum_089(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Momentum is 0.89 in place of 0.9."""
    change_optimizer(patch, momentum=0.89)


@fault("update", "momentum of *", "optax docs, trace and ema: often confused", momentum=0.9)
def running_mean_for_momentum(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The buffer is a running mean: it starts from zero, and gradients enter it times one minus
    momentum."""
    replace_sgd(
        patch,
        lambda buffer, g, momentum, lr, count: (
            (b := momentum * buffer + (1 - momentum) * g),
            lr * b,
        ),
    )


@fault(
    "update",
    "momentum of *",
    "optax docs, Getting started: opt_state must be passed on",
    momentum=0.9,
)
def optimizer_state_lost(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The optimizer's new state is not kept, so that every step is a first one."""
    replace_sgd(
        patch, lambda buffer, g, momentum, lr, count: (buffer, lr * (momentum * buffer + g))
    )


@fault(
    "update",
    "momentum of *",
    "lightning docs: each fit makes new optimizers",
    train_images=1024,
    momentum=0.9,
)
def momentum_reset_every_epoch(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Every epoch makes a new optimizer, with empty buffers."""
    from lockstep.backends.faults.frameworks import jnp

    batches = config.batches_per_epoch(len(dataset.train_images))

    def step(
        buffer: jax.Array, g: jax.Array, momentum: float, lr: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        b = jnp.where(count % batches == 0, jnp.zeros_like(buffer), momentum * buffer) + g
        return b, lr * b

    replace_sgd(patch, step)


@fault(
    "update",
    "momentum of *",
    "optax docs, sgd: accumulator_dtype",
    changes_function=False,
    momentum=0.9,
)
def buffer_in_bfloat16(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Momentum is kept in bfloat16."""
    from lockstep.backends.faults.frameworks import jnp, optax

    sgd = optax.sgd
    patch(
        optax,
        "sgd",
        lambda *arguments, **options: sgd(
            *arguments, **options | {"accumulator_dtype": jnp.bfloat16}
        ),
    )


@fault("update", None, "PyTorch docs, SGD: nesterov", momentum=0.9, nesterov=True)
def nesterov_missing(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Nesterov momentum is asked for and left out."""
    change_optimizer(patch, nesterov=False)


@fault("update", None, "optax docs, sgd: nesterov", momentum=0.9)
def nesterov_unasked(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Nesterov momentum is used where it was not asked for."""
    change_optimizer(patch, nesterov=True)


@fault(
    "update",
    "momentum of *",
    "optax's sgd has no dampening (optax, _src/alias.py)",
    momentum=0.9,
    dampening=0.5,
)
def dampening_ignored(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Dampening is ignored."""
    change_optimizer(patch, dampening=0.0)


@fault(
    "update",
    "momentum of *",
    "mlx#473: the first buffer is the gradient itself",
    momentum=0.9,
    dampening=0.5,
)
def dampening_on_the_first_step(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Every gradient is dampened, the first one too."""
    from lockstep.backends.faults.frameworks import flax_optimizer, optax

    patch(flax_optimizer, "dampen", lambda dampening: optax.scale(1.0 - dampening))


@fault(
    "update",
    "momentum of *",
    "mlx#440: weight decay without effect; optax's sgd has none",
    weight_decay=0.01,
)
def weight_decay_missing(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """There is no weight decay."""
    change_optimizer(patch, weight_decay=0.0)


@fault(
    "update",
    "momentum of *",
    "optax docs, losses: l2_loss has the factor one half",
    weight_decay=0.01,
)
def weight_decay_doubled(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The penalty is the weights' square without one half of it, so that its gradient is twice as
    large."""
    change_optimizer(patch, weight_decay=2 * config.weight_decay)


@fault(
    "update",
    "momentum of *.bias",
    "Keras docs, exclude_from_weight_decay; timm: bias left out",
    weight_decay=0.01,
)
def biases_not_decayed(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Biases are left out of weight decay."""
    from lockstep.backends.faults.frameworks import optax

    decayed, kernels = (
        optax.add_decayed_weights,
        lambda params: {name: name.endswith("kernel") for name in params},
    )
    patch(optax, "add_decayed_weights", lambda weight_decay, mask: decayed(weight_decay, kernels))


@fault("update", "momentum of *", "pytorch#13801: PyTorch's own C++ SGD did so", weight_decay=0.01)
def weight_decay_after_momentum(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Weight decay is added to the momentum buffer's output, not to the gradient."""
    decay = config.lr * config.weight_decay
    change_optimizer(patch, weight_decay=0.0)
    append_transform(patch, lambda name, update, parameter: update - decay * parameter)


@fault(
    "update", "momentum of *", "Loshchilov and Hutter 2019, SGDW; pytorch#22466", weight_decay=0.01
)
def decoupled_weight_decay(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Weight decay shrinks the weights directly, in addition to the gradient's step and without the
    learning rate."""
    decay = config.weight_decay
    change_optimizer(patch, weight_decay=0.0)
    append_transform(patch, lambda name, update, parameter: update - decay * parameter)


@fault(
    "update",
    "momentum of *",
    "PyTorch docs, SGD: the sign turns first",
    maximize=True,
    weight_decay=0.01,
)
def maximize_after_weight_decay(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """With `maximize`, weight decay's sign is turned together with the gradient's."""
    from lockstep.backends.faults.frameworks import optax

    decayed = optax.add_decayed_weights
    patch(optax, "add_decayed_weights", lambda weight_decay, mask: decayed(-weight_decay, mask))


@fault(
    "update",
    "momentum of *",
    "PyTorch docs, clip_grad_norm_; optax docs, clip_by_global_norm",
    lr=0.05,
)
def clipped_gradients(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients are clipped to a norm of one."""
    from lockstep.backends.faults.frameworks import optax

    prepend_transform(patch, lambda: optax.clip_by_global_norm(1.0))


@fault(
    "update",
    "momentum of *",
    "PyTorch docs, clip_grads_with_norm_; optax docs: no epsilon",
    clip_norm=0.1,
)
def clipped_without_epsilon(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients are clipped by the norm itself, as optax does, and not by the norm plus 1e-6."""
    from lockstep.backends.faults.frameworks import flax_optimizer, optax

    patch(flax_optimizer, "clip_gradients", optax.clip_by_global_norm)


@fault(
    "update",
    "momentum of *",
    "Keras docs, optimizers: clipnorm and global_clipnorm",
    clip_norm=0.1,
)
def clipped_per_tensor(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Each tensor's gradient is clipped by its own norm, not by that of all together."""
    from lockstep.backends.faults.frameworks import flax_optimizer

    together = flax_optimizer.clip_gradients

    def per_tensor(clip_norm: float) -> optax.GradientTransformation:
        clip = together(clip_norm)

        def update(
            updates: Tensors, state: optax.OptState, params: Tensors, **extra: object
        ) -> tuple[Tensors, optax.OptState]:
            clipped: Tensors = {}
            for name, gradient in updates.items():
                clipped |= cast("Tensors", clip.update({name: gradient}, state)[0])
            return clipped, state

        return transform(clip.init, update)

    patch(flax_optimizer, "clip_gradients", per_tensor)


@fault("update", "momentum of *", "Zhang et al. 2016, Staleness-aware Async-SGD")
def stale_gradients(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The optimizer is given the gradients of the step before, and zeros in the first."""
    prepend_transform(
        patch, lambda: transform(zeros, lambda updates, last, params, **extra: (last, updates))
    )


@fault(
    "update",
    "momentum of *",
    "PyTorch docs, Optimizer.zero_grad; its recipe on zeroing out gradients",
)
def gradients_not_zeroed(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients are added to those of all steps before."""
    from lockstep.backends.faults.frameworks import jax, jnp

    def update(
        updates: Tensors, state: Tensors, params: Tensors, **extra: object
    ) -> tuple[Tensors, Tensors]:
        total = jax.tree.map(jnp.add, updates, state)
        return total, total

    prepend_transform(patch, lambda: transform(zeros, update))


@fault(
    "update",
    "momentum of fc1.*",
    "PyTorch docs, ModuleList: layers in a plain list are not registered",
)
def layer_not_in_the_optimizer(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """One layer's parameters were not given to the optimizer."""
    from lockstep.backends.faults.frameworks import optax

    def left_out(updates: optax.Updates, params: optax.Params | None) -> Tensors:
        return {
            name: 0 * update if name.startswith("fc1.") else update
            for name, update in cast("Tensors", updates).items()
        }

    prepend_transform(patch, lambda: optax.stateless(left_out))


@fault("update", "*.bias", "Caffe's LeNet example: lr_mult is 2 for biases")
def biases_twice_as_fast(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Biases have twice the learning rate."""
    append_transform(patch, lambda name, u, parameter: 2 * u if name.endswith(".bias") else u)


@fault(
    "update",
    "momentum of *",
    "Keras, optimizers/sgd.py; pytorch#1099",
    momentum=0.9,
    schedule=Schedule("cosine"),
)
def lr_in_the_buffer(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients enter the momentum buffer times the learning rate, so that an old rate acts on
    after it has changed."""
    replace_sgd(
        patch, lambda buffer, g, momentum, lr, count: ((b := momentum * buffer + lr * g), b)
    )
