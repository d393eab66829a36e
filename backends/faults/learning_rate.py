"""Faults of the learning rate."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, cast

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.backends.faults.transforms import replace_schedule, transform
from lockstep.common.config import Config, Schedule
from lockstep.common.data import Dataset

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import Tensors, optax
    from lockstep.backends.faults.transforms import Rate

    Plateau = optax.contrib.ReduceLROnPlateauState


@fault("update", "lr", "a wrong digit")
def lr_off_by_one_percent(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The learning rate is one percent too large."""
    replace_schedule(patch, lambda config, schedule: lambda count: 1.01 * schedule(count))


@fault("update", "lr", "a wrong digit")
def lr_off_by_one_in_a_thousand(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The learning rate is one part in a thousand too large."""
    replace_schedule(patch, lambda config, schedule: lambda count: 1.001 * schedule(count))


@fault("update", "lr", "a wrong digit")
def lr_off_by_one_in_a_million(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The learning rate is one part in a million too large."""
    replace_schedule(patch, lambda config, schedule: lambda count: (1 + 1e-6) * schedule(count))


@fault(
    "update", "lr", "jax docs, Type promotion: int32 / int32 is float32", changes_function=False,
    schedule=Schedule("exponential"),
)  # fmt: skip
def lr_in_float32(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The learning rate is computed in float32."""
    from lockstep.backends.faults.frameworks import jnp

    replace_schedule(
        patch, lambda config, schedule: lambda count: schedule(count).astype(jnp.float32)
    )


@fault(
    "update",
    "lr",
    "pytorch#20124: the order of scheduler and optimizer",
    schedule=Schedule("exponential"),
)
def schedule_off_by_one(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The learning rate is that of the step after."""
    replace_schedule(patch, lambda config, schedule: lambda count: schedule(count + 1))


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
    assert warmup is not None, "the schedule is resolved"
    replace_schedule(
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

    def staircase(config: Config, schedule: Rate) -> Rate:
        period, gamma = config.schedule.period, config.schedule.gamma
        assert period is not None and gamma is not None, "the schedule is resolved"
        decay = optax.exponential_decay(
            config.lr, transition_steps=period, decay_rate=gamma, staircase=True
        )
        return lambda count: jnp.asarray(decay(jnp.asarray(count, jnp.float64)))

    replace_schedule(patch, staircase)


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
    from lockstep.backends.faults.frameworks import flax_optimizer, jax, jnp

    reduce = flax_optimizer.reduce_on_plateau

    def at_once(config: Config) -> optax.GradientTransformationExtraArgs:
        right = reduce(config)

        def update(
            updates: Tensors, state: Plateau, params: Tensors, **extra: object
        ) -> tuple[Tensors, Plateau]:
            new = cast("Plateau", right.update(updates, state, params, **extra)[1])
            return jax.tree.map(lambda u: u * jnp.asarray(new.scale, u.dtype), updates), new

        return transform(right.init, update)

    patch(flax_optimizer, "reduce_on_plateau", at_once)
