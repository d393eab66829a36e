"""`optax.sgd`, completed to what `torch.optim.SGD` does, and optax's schedules, set up from a
`Config`. Reads next to backends/torch_backend/optimizer.py. The other optimizers are in adaptive.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lockstep.backends.flax_backend import adaptive, pair_optimizer
from lockstep.backends.flax_backend.state import OptimizerState, Parameters
from lockstep.common.config import Config
from lockstep.common.optimizers import FROM_PAIR
from lockstep.common.protocol import Arrays

Slots = dict[str, dict[str, jax.Array]]  # of an optimizer, then by name of the parameters


def make_optimizer(config: Config, dtype: np.dtype) -> optax.GradientTransformationExtraArgs:
    """Stochastic gradient descent. For gradient g, parameters p, buffer b, learning rate lr, in
    this order:

    g <- g min(1, clip_norm / (|g| + 1e-6))   with clip_norm, |g| of all gradients together
    g <- -g                          with maximize
    g <- g + weight_decay p
    b <- g on the first step, else momentum b + (1 - dampening) g
    g <- g + momentum b              with nesterov, else b; without momentum, g as it is
    p <- p - lr g                    the sign is in the update: optax.apply_updates adds

    Source: the documentation of torch.optim.SGD, and of torch.nn.utils.clip_grads_with_norm_;
    `optax.sgd` has the last three lines, without dampening.
    """
    none, schedule = optax.identity(), make_schedule(config)
    mask, plateau = adaptive.decayed(config), config.schedule.kind == "plateau"
    # AdamW and Lion decay the parameters themselves.
    weight_decay = 0.0 if config.optimizer in ("adamw", "lion") else config.weight_decay
    # Without a momentum buffer, PyTorch ignores dampening.
    dampens = config.momentum != 0 and config.dampening != 0
    if config.optimizer == "sgd":
        optimizer = optax.sgd(
            schedule, config.momentum or None, config.nesterov, accumulator_dtype=dtype
        )
    elif config.optimizer == FROM_PAIR:
        optimizer = adaptive.keep_precision(pair_optimizer.make_optimizer(config, schedule))
    else:
        optimizer = adaptive.keep_precision(adaptive.make_optimizer(config, schedule, dtype))
    return optax.named_chain(
        ("clip", none if config.clip_norm is None else clip_gradients(config.clip_norm)),
        ("precision", upcast_gradients()),
        ("maximize", optax.scale(-1.0) if config.maximize else none),
        ("weight_decay", optax.add_decayed_weights(weight_decay, mask) if weight_decay else none),
        ("dampening", dampen(config.dampening) if dampens else none),
        (config.optimizer, optimizer),
        ("plateau", reduce_on_plateau(config) if plateau else none),
    )


def make_schedule(config: Config) -> optax.Schedule:
    """The learning rate as a function of the steps done."""
    lr = config.lr
    schedule = cast(Any, config.schedule)  # resolved, so that no option is None
    period = 1  # steps between two learning rates
    match schedule.kind:
        case "step":
            # Not with `staircase`, which takes floor(count / period): XLA multiplies by 1 / period
            # instead, and 49 * (1 / 49) is less than 1, so lr would decay one step late.
            period = schedule.period
            rate = optax.exponential_decay(lr, transition_steps=1, decay_rate=schedule.gamma)
        case "multistep":
            rate = optax.piecewise_constant_schedule(
                lr, dict.fromkeys(schedule.milestones, float(schedule.gamma))
            )
        case "exponential":
            rate = optax.exponential_decay(lr, transition_steps=1, decay_rate=schedule.gamma)
        case "cosine":
            rate = optax.cosine_decay_schedule(
                lr, schedule.period, alpha=schedule.min_lr / lr if lr else 0.0
            )
        case "warmup-cosine":  # the cosine starts at `lr` in the first step after the warm-up
            rising = optax.linear_schedule(lr * schedule.start, lr, schedule.warmup)
            falling = optax.cosine_decay_schedule(
                lr, schedule.period, alpha=schedule.min_lr / lr if lr else 0.0
            )
            rate = optax.join_schedules([rising, falling], boundaries=[schedule.warmup])
        case _:  # constant; plateau, whose factor is applied after the optimizer
            rate = optax.constant_schedule(lr)
    # optax counts in int32, and JAX divides int32 by int32 in float32, whatever the dtype of the
    # parameters: lr would be off by 1e-8. PyTorch computes lr as a Python float, so convert the
    # count to float64 first.
    return lambda count: rate((jnp.asarray(count) // period).astype(jnp.float64))


def upcast_gradients() -> optax.GradientTransformation:
    """Cast bfloat16 gradients to float32, so that lr is not rounded to three digits before its use.

    PyTorch's kernels do the same within each operation. Parameters and momentum stay bfloat16.
    """

    def update(
        updates: optax.Updates, state: OptimizerState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, OptimizerState]:
        del params
        return jax.tree.map(
            lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), updates
        ), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def clip_gradients(clip_norm: float) -> optax.GradientTransformation:
    """Scale all gradients down to a norm of `clip_norm` together, as
    `torch.nn.utils.clip_grads_with_norm_` does.

    `optax.clip_by_global_norm` divides by the norm itself, without 1e-6. PyTorch writes the result
    into the gradients, so bfloat16 is rounded here, before `upcast_gradients`.
    """

    def update(
        updates: optax.Updates, state: OptimizerState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, OptimizerState]:
        del params
        norm = optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float64), updates))
        factor = jnp.minimum(clip_norm / (norm + 1e-6), 1.0)

        def scaled(g: jax.Array) -> jax.Array:
            return (g * factor.astype(jnp.promote_types(g.dtype, jnp.float32))).astype(g.dtype)

        return jax.tree.map(scaled, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class DampeningState(NamedTuple):
    step: jax.Array  # int32 (): steps done


def dampen(dampening: float) -> optax.GradientTransformation:
    """Scale gradients by 1 - dampening, from the second step on: PyTorch's first buffer is the
    gradient itself."""

    def init(params: optax.Params) -> DampeningState:
        del params
        return DampeningState(step=jnp.zeros((), jnp.int32))

    def update(
        updates: optax.Updates, state: OptimizerState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, DampeningState]:
        del params
        scale = jnp.where(state.step == 0, 1.0, 1.0 - dampening)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), DampeningState(
            state.step + 1
        )

    return optax.GradientTransformation(init, update)


def reduce_on_plateau(config: Config) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.reduce_on_plateau` with the timing and the counting of
    `torch.optim.lr_scheduler`.

    optax applies a reduction to the very update whose loss caused it, PyTorch to the one after;
    optax reduces at `patience` windows without improvement, PyTorch at the one after.
    """
    schedule = cast(Any, config.schedule)
    plateau = optax.contrib.reduce_on_plateau(
        factor=schedule.gamma,
        patience=schedule.patience + 1,
        rtol=schedule.threshold,
        cooldown=schedule.cooldown,
        accumulation_size=schedule.window,
        min_scale=schedule.min_lr / config.lr if config.lr else 0.0,
    )

    def init(params: optax.Params) -> OptimizerState:
        del params  # optax would use their dtype; PyTorch has lr, best and mean as Python floats
        return plateau.init(jnp.zeros((), jnp.float64))

    def update(
        updates: optax.Updates,
        state: OptimizerState,
        params: optax.Params | None = None,
        **extra: object,
    ) -> tuple[optax.Updates, OptimizerState]:
        scaled = jax.tree.map(lambda u: u * state.scale.astype(u.dtype), updates)
        _, state = plateau.update(updates, state, params, **extra)  # `extra` is the loss, `value`
        return scaled, state

    return optax.GradientTransformationExtraArgs(init, update)


def learning_rate(config: Config, optimizer_state: OptimizerState, step: jax.Array | int) -> Any:
    """The learning rate of the next step, float64 ()."""
    lr = make_schedule(config)(step)
    return lr * optimizer_state["plateau"].scale if config.schedule.kind == "plateau" else lr


def export_schedule(config: Config, optimizer_state: OptimizerState, step: int) -> dict[str, float]:
    """The schedule's state, canonical: `lr` of the next step; plateau's `scale`, `best`, `bad` and
    `cooldown`, and the window's `count` and `mean`. The scale, by which plateau has reduced lr, is
    optax's; PyTorch stores lr."""
    lr = float(learning_rate(config, optimizer_state, step))
    if config.schedule.kind != "plateau":
        return {"lr": lr}
    plateau = optimizer_state["plateau"]
    counters = {"best": float(plateau.best_value), "bad": int(plateau.plateau_count)}
    counters |= {
        "cooldown": int(plateau.cooldown_count),
        "count": int(plateau.count),
        "mean": float(plateau.avg_value),
    }
    return {"lr": lr, "scale": float(plateau.scale), **counters}


def restore_schedule(
    config: Config, optimizer_state: OptimizerState, schedule: dict[str, float], step: int
) -> OptimizerState:
    """The inverse of `export_schedule`, after `step` steps: a new optimizer state."""
    restored = dict(optimizer_state)
    if config.optimizer != FROM_PAIR:
        # Adam counts its own steps, too: a second array, since each is donated.
        restored[config.optimizer] = tuple(
            part._replace(count=jnp.asarray(step, jnp.int32)) if "count" in part._fields else part
            for part in optimizer_state[config.optimizer]
        )
    if config.momentum != 0 and config.dampening != 0:
        restored["dampening"] = DampeningState(jnp.asarray(step, jnp.int32))
    if config.schedule.kind == "plateau":
        restored["plateau"] = optimizer_state["plateau"]._replace(
            scale=jnp.asarray(schedule["scale"], jnp.float64),
            best_value=jnp.asarray(schedule["best"], jnp.float64),
            plateau_count=jnp.asarray(schedule["bad"], jnp.int32),
            cooldown_count=jnp.asarray(schedule["cooldown"], jnp.int32),
            count=jnp.asarray(schedule["count"], jnp.int32),
            avg_value=jnp.asarray(schedule["mean"], jnp.float64),
        )
    return type(optimizer_state)(restored)


def export_slots(
    config: Config, optimizer_state: OptimizerState, step: int, parameters: Parameters = None
) -> Slots:
    """What the optimizer keeps, by name; empty before the first step.

    Args:
        parameters: only for a pair's own optimizer, in whose state their names are looked for.
    """
    if config.optimizer == FROM_PAIR:
        kept = pair_optimizer.export_slots(optimizer_state[FROM_PAIR], parameters)
    else:
        kept = {
            slot: dict(getattr(part, own))
            for part in optimizer_state[config.optimizer]
            for slot, own in adaptive.OWN_SLOTS.items()
            if own in part._fields
        }
    return kept if step > 0 else {}


def export_extra(
    config: Config, optimizer_state: OptimizerState, step: int, parameters: Parameters
) -> Arrays:
    """The rest of the state of a pair's own optimizer, by its paths in optax's state."""
    if config.optimizer != FROM_PAIR or step == 0:
        return {}
    return pair_optimizer.export_extra(optimizer_state[FROM_PAIR], parameters)


def restore_slots(
    config: Config,
    optimizer_state: OptimizerState,
    slots: Slots,
    step: int = 0,
    parameters: Parameters = None,
    extra: Arrays | None = None,
) -> OptimizerState:
    """The inverse of `export_slots` and `export_extra`: a new optimizer state."""
    if config.optimizer == FROM_PAIR:
        own = optimizer_state[FROM_PAIR], parameters, slots, extra or {}, step
        restored = pair_optimizer.restore_state(config, *own)
        return type(optimizer_state)(dict(optimizer_state, **{FROM_PAIR: restored}))
    own_names = adaptive.OWN_SLOTS
    parts = tuple(
        part._replace(
            **{own_names[slot]: slots[slot] for slot in slots if own_names[slot] in part._fields}
        )
        for part in optimizer_state[config.optimizer]
    )
    return type(optimizer_state)(dict(optimizer_state, **{config.optimizer: parts}))
