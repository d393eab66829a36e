"""Faults of the optimizer and of the learning rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.common.config import Config, Schedule
from lockstep.common.data import Dataset


def _optimizer(patch: SetAttr, **changes: Any) -> None:
    """An optimizer made from another configuration; the schedule and what is reported stay."""
    from lockstep.backends.faults.frameworks import flax_backend, flax_optimizer

    make = flax_optimizer.make_optimizer
    patch(
        flax_backend,
        "make_optimizer",
        lambda config, dtype: make(dataclasses.replace(config, **changes), dtype),
    )


def _before_the_rest(patch: SetAttr, transformation: Callable[[], Any]) -> None:
    """Put a transformation of the gradients in front of weight decay and momentum."""
    from lockstep.backends.faults.frameworks import flax_optimizer, optax

    upcast_gradients = flax_optimizer.upcast_gradients
    patch(
        flax_optimizer,
        "upcast_gradients",
        lambda: optax.chain(upcast_gradients(), transformation()),
    )


def _sgd(patch: SetAttr, step: Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]) -> None:
    """`optax.sgd` with `step(buffer, gradient, momentum, lr, count)`, which gives the buffer and
    what is subtracted."""
    from lockstep.backends.faults.frameworks import jnp, optax

    sgd = optax.sgd

    def own(
        rate: Any, momentum: Any = None, nesterov: bool = False, accumulator_dtype: Any = None
    ) -> Any:
        right = sgd(rate, momentum, nesterov, accumulator_dtype)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            trace, counted = state
            buffers, changes = {}, {}
            for name, gradient in updates.items():
                lr = jnp.asarray(rate(counted.count), gradient.dtype)
                buffers[name], change = step(
                    trace.trace[name], gradient, momentum, lr, counted.count
                )
                changes[name] = -change
            return changes, (
                trace._replace(trace=buffers),
                counted._replace(count=counted.count + 1),
            )

        return optax.GradientTransformationExtraArgs(right.init, update)

    patch(optax, "sgd", own)


def _after_momentum(patch: SetAttr, change: Callable[[Config, str, Any, Any], Any]) -> None:
    """Change each update by `change(config, name, update, parameter)` after all else."""
    from lockstep.backends.faults.frameworks import flax_backend, optax

    make = flax_backend.make_optimizer

    def changed(config: Config, dtype: Any) -> Any:
        inner = make(config, dtype)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            updates, state = inner.update(updates, state, params, **extra)
            return {
                name: change(config, name, u, params[name]) for name, u in updates.items()
            }, state

        return optax.GradientTransformationExtraArgs(inner.init, update)

    patch(flax_backend, "make_optimizer", changed)


def _rate(patch: SetAttr, change: Callable[[Config, Callable[[Any], Any]], Any]) -> None:
    """Replace a schedule, a function of the steps done, by `change(config, schedule)`."""
    from lockstep.backends.faults.frameworks import flax_optimizer

    make = flax_optimizer.make_schedule
    patch(flax_optimizer, "make_schedule", lambda config: change(config, make(config)))


@fault(
    "update",
    "momentum of *",
    "a slip of the pen; the field: PyTorch docs, SGD: momentum",
    momentum=0.9,
)
def momentum_089(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Momentum is 0.89 in place of 0.9."""
    _optimizer(patch, momentum=0.89)


@fault("update", "momentum of *", "optax docs, trace and ema: often confused", momentum=0.9)
def running_mean_for_momentum(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The buffer is a running mean: it starts from zero, and gradients enter it times one minus
    momentum."""
    _sgd(
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
    _sgd(patch, lambda buffer, g, momentum, lr, count: (buffer, lr * (momentum * buffer + g)))


@fault(
    "update",
    "momentum of *",
    "lightning docs: optimizers made anew by each fit",
    train_images=1024,
    momentum=0.9,
)
def momentum_reset_every_epoch(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The optimizer is made anew for every epoch, with empty buffers."""
    from lockstep.backends.faults.frameworks import jnp

    batches = config.batches_per_epoch(len(dataset.train_images))

    def step(buffer: Any, g: Any, momentum: Any, lr: Any, count: Any) -> tuple[Any, Any]:
        b = jnp.where(count % batches == 0, jnp.zeros_like(buffer), momentum * buffer) + g
        return b, lr * b

    _sgd(patch, step)


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
    _optimizer(patch, nesterov=False)


@fault("update", None, "optax docs, sgd: nesterov", momentum=0.9)
def nesterov_unasked(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Nesterov momentum is used where it was not asked for."""
    _optimizer(patch, nesterov=True)


@fault(
    "update",
    "momentum of *",
    "optax's sgd has no dampening (optax, _src/alias.py)",
    momentum=0.9,
    dampening=0.5,
)
def dampening_ignored(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Dampening is ignored."""
    _optimizer(patch, dampening=0.0)


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
    _optimizer(patch, weight_decay=0.0)


@fault(
    "update",
    "momentum of *",
    "optax docs, losses: l2_loss has the factor one half",
    weight_decay=0.01,
)
def weight_decay_doubled(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The penalty is the weights' square without one half of it, so that its gradient is twice as
    large."""
    _optimizer(patch, weight_decay=2 * config.weight_decay)


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
    patch(optax, "add_decayed_weights", lambda weight_decay: decayed(weight_decay, mask=kernels))


@fault("update", "momentum of *", "pytorch#13801: PyTorch's own C++ SGD did so", weight_decay=0.01)
def weight_decay_after_momentum(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Weight decay is added to the momentum buffer's output, not to the gradient."""
    decay = config.lr * config.weight_decay
    _optimizer(patch, weight_decay=0.0)
    _after_momentum(patch, lambda config, name, update, parameter: update - decay * parameter)


@fault(
    "update", "momentum of *", "Loshchilov and Hutter 2019, SGDW; pytorch#22466", weight_decay=0.01
)
def decoupled_weight_decay(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Weights shrink by weight decay itself, beside the gradient's step and without the learning
    rate."""
    decay = config.weight_decay
    _optimizer(patch, weight_decay=0.0)
    _after_momentum(patch, lambda config, name, update, parameter: update - decay * parameter)


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
    patch(optax, "add_decayed_weights", lambda weight_decay: decayed(-weight_decay))


@fault(
    "update",
    "momentum of *",
    "PyTorch docs, clip_grad_norm_; optax docs, clip_by_global_norm",
    lr=0.05,
)
def clipped_gradients(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients are clipped to a norm of one."""
    from lockstep.backends.faults.frameworks import optax

    _before_the_rest(patch, lambda: optax.clip_by_global_norm(1.0))


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
    "Keras docs, optimizers: clipnorm, beside global_clipnorm",
    clip_norm=0.1,
)
def clipped_per_tensor(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Each tensor's gradient is clipped by its own norm, not by that of all together."""
    from lockstep.backends.faults.frameworks import flax_optimizer, optax

    together = flax_optimizer.clip_gradients

    def apart(clip_norm: float) -> Any:
        clip = together(clip_norm)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            clipped: list[Any] = [clip.update({name: g}, state)[0] for name, g in updates.items()]
            return {name: g for one in clipped for name, g in one.items()}, state

        return optax.GradientTransformation(clip.init, update)

    patch(flax_optimizer, "clip_gradients", apart)


@fault("update", "momentum of *", "Zhang et al. 2016, Staleness-aware Async-SGD")
def stale_gradients(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The optimizer is given the gradients of the step before, and zeros in the first."""
    from lockstep.backends.faults.frameworks import optax

    def late() -> Any:
        return optax.GradientTransformation(
            lambda params: optax.tree.zeros_like(params),
            lambda updates, state, params=None: (state, updates),
        )

    _before_the_rest(patch, late)


@fault(
    "update",
    "momentum of *",
    "PyTorch docs, Optimizer.zero_grad; its recipe on zeroing out gradients",
)
def gradients_not_zeroed(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients are added to those of all steps before."""
    from lockstep.backends.faults.frameworks import jax, jnp, optax

    def summed() -> Any:
        def update(updates: Any, state: Any, params: Any = None) -> Any:
            total = jax.tree.map(jnp.add, updates, state)
            return total, total

        return optax.GradientTransformation(lambda params: optax.tree.zeros_like(params), update)

    _before_the_rest(patch, summed)


@fault(
    "update",
    "momentum of fc1.*",
    "PyTorch docs, ModuleList: layers in a plain list are not registered",
)
def layer_not_in_the_optimizer(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """One layer's parameters were not given to the optimizer."""
    from lockstep.backends.faults.frameworks import optax

    def left_out(updates: Any, params: Any) -> Any:
        return {
            name: 0 * update if name.startswith("fc1.") else update
            for name, update in updates.items()
        }

    _before_the_rest(patch, lambda: optax.stateless(left_out))


@fault("update", "*.bias", "Caffe's LeNet example: lr_mult is 2 for biases")
def biases_twice_as_fast(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Biases have twice the learning rate."""
    _after_momentum(
        patch, lambda config, name, u, parameter: 2 * u if name.endswith(".bias") else u
    )


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
    _sgd(patch, lambda buffer, g, momentum, lr, count: ((b := momentum * buffer + lr * g), b))


@fault("update", "lr", "a wrong digit")
def lr_off_by_one_percent(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The learning rate is one percent too large."""
    _rate(patch, lambda config, schedule: lambda count: 1.01 * schedule(count))


@fault("update", "lr", "a wrong digit")
def lr_off_by_one_in_a_thousand(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The learning rate is one part in a thousand too large."""
    _rate(patch, lambda config, schedule: lambda count: 1.001 * schedule(count))


@fault("update", "lr", "a wrong digit")
def lr_off_by_one_in_a_million(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The learning rate is one part in a million too large."""
    _rate(patch, lambda config, schedule: lambda count: (1 + 1e-6) * schedule(count))


@fault(
    "update", "lr", "jax docs, Type promotion: int32 / int32 is float32", changes_function=False,
    schedule=Schedule("exponential"),
)  # fmt: skip
def lr_in_float32(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The learning rate is computed in float32."""
    from lockstep.backends.faults.frameworks import jnp

    _rate(patch, lambda config, schedule: lambda count: schedule(count).astype(jnp.float32))


@fault(
    "update",
    "lr",
    "pytorch#20124: the order of scheduler and optimizer",
    schedule=Schedule("exponential"),
)
def schedule_off_by_one(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The learning rate is that of the step after."""
    _rate(patch, lambda config, schedule: lambda count: schedule(count + 1))


@fault(
    "update",
    "lr",
    "NVIDIA/apex#609, pytorch/torchtitan#1261: counted from one",
    schedule=Schedule("warmup-cosine", warmup=10, start=0.1),
)
def warm_up_off_by_one(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The warm-up counts its steps from one, so that it ends one step early."""
    from lockstep.backends.faults.frameworks import jnp

    warmup = config.schedule.warmup
    _rate(
        patch,
        lambda config, schedule: (
            lambda count: schedule(jnp.where(count < warmup, count + 1, count))
        ),
    )


@fault(
    "update",
    "lr",
    "optax docs, exponential_decay: staircase",
    schedule=Schedule("step", period=49, gamma=0.1),
)
def staircase_one_step_late(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The step schedule is optax's staircase, which XLA computes by a reciprocal: it decays one
    step late."""
    from lockstep.backends.faults.frameworks import jnp, optax

    def staircase(config: Config, schedule: Any) -> Any:
        period, gamma = config.schedule.period, config.schedule.gamma
        assert period is not None and gamma is not None, "the schedule is resolved"
        decay = optax.exponential_decay(
            config.lr, transition_steps=period, decay_rate=gamma, staircase=True
        )
        return lambda count: decay(jnp.asarray(count, jnp.float64))

    _rate(patch, staircase)


# A threshold that no window passes, so that the learning rate does fall within a short run.
_PLATEAU = Schedule("plateau", window=5, patience=2, gamma=0.5, threshold=0.9)


@fault(
    "update",
    "lr",
    "PyTorch docs, ReduceLROnPlateau; optax docs, reduce_on_plateau: patience",
    schedule=_PLATEAU,
)
def plateau_one_window_early(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """`patience` windows without improvement reduce the learning rate, where PyTorch puts up with
    so many."""
    from lockstep.backends.faults.frameworks import flax_optimizer

    reduce = flax_optimizer.reduce_on_plateau
    patience = (config.schedule.patience or 0) - 1
    sooner = dataclasses.replace(
        config, schedule=dataclasses.replace(config.schedule, patience=patience)
    )
    patch(flax_optimizer, "reduce_on_plateau", lambda config: reduce(sooner))


@fault(
    "update",
    None,
    "optax docs, reduce_on_plateau: the scale applies to the update at hand",
    schedule=_PLATEAU,
)
def plateau_acts_at_once(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """A plateau reduces the very update whose loss ended the window, PyTorch the one after."""
    from lockstep.backends.faults.frameworks import flax_optimizer, jax, optax

    reduce = flax_optimizer.reduce_on_plateau

    def at_once(config: Config) -> Any:
        right = reduce(config)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            _, state = right.update(updates, state, params, **extra)
            return jax.tree.map(lambda u: u * state.scale.astype(u.dtype), updates), state

        return optax.GradientTransformationExtraArgs(right.init, update)

    patch(flax_optimizer, "reduce_on_plateau", at_once)
