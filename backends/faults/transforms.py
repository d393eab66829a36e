"""How faults change the optimizer and the learning rate of the Flax backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lockstep.backends.faults.registry import SetAttr
from lockstep.common.config import Config

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import Tensors, jax, optax

    # (buffer, gradient, momentum, lr, steps done) to the new buffer and what is subtracted
    SgdStep = Callable[
        [jax.Array, jax.Array, float, jax.Array, jax.Array], tuple[jax.Array, jax.Array]
    ]
    Rate = Callable[[jax.Array], jax.Array]  # the learning rate, from the number of steps done
    SgdState = tuple[optax.TraceState, optax.ScaleByScheduleState]


def change_optimizer(patch: SetAttr, **changes: object) -> None:
    """Make the optimizer from another configuration; the schedule and the report stay."""
    from lockstep.backends.faults.frameworks import flax_backend, flax_optimizer

    make = flax_optimizer.make_optimizer
    patch(
        flax_backend,
        "make_optimizer",
        lambda config, dtype: make(dataclasses.replace(config, **changes), dtype),
    )


def prepend_transform(
    patch: SetAttr, transformation: Callable[[], optax.GradientTransformation]
) -> None:
    """Put a transformation of the gradients in front of weight decay and momentum."""
    from lockstep.backends.faults.frameworks import flax_optimizer, optax

    upcast_gradients = flax_optimizer.upcast_gradients
    patch(
        flax_optimizer,
        "upcast_gradients",
        lambda: optax.chain(upcast_gradients(), transformation()),
    )


def transform(
    init: Callable[[Tensors], object], update: Callable[..., tuple[Tensors, object]]
) -> optax.GradientTransformationExtraArgs:
    """An optax transformation from `init(params)` and `update(updates, state, params, **extra)`.

    Optax allows any tree of arrays; here each is a dictionary.
    """
    from lockstep.backends.faults.frameworks import optax

    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))


def zeros(params: Tensors) -> Tensors:
    """The start of a transformation that keeps an array for each parameter."""
    from lockstep.backends.faults.frameworks import jax, jnp

    return jax.tree.map(jnp.zeros_like, params)


def replace_sgd(patch: SetAttr, step: SgdStep) -> None:
    """Replace the step of `optax.sgd`."""
    from lockstep.backends.faults.frameworks import jnp, optax

    sgd = optax.sgd

    def own(
        rate: optax.Schedule,
        momentum: float,
        nesterov: bool = False,
        accumulator_dtype: jax.typing.DTypeLike | None = None,
    ) -> optax.GradientTransformation:
        right = sgd(rate, momentum, nesterov, accumulator_dtype)

        def update(
            updates: Tensors, state: SgdState, params: Tensors, **extra: object
        ) -> tuple[Tensors, SgdState]:
            trace, counted = state
            old, buffers, changes = cast("Tensors", trace.trace), {}, {}
            count = jnp.asarray(counted.count)
            for name, gradient in updates.items():
                lr = jnp.asarray(rate(count), gradient.dtype)
                buffers[name], change = step(old[name], gradient, momentum, lr, count)
                changes[name] = -change
            return changes, (
                trace._replace(trace=buffers),
                counted._replace(count=counted.count + 1),
            )

        return transform(right.init, update)

    patch(optax, "sgd", own)


def append_transform(
    patch: SetAttr, change: Callable[[str, jax.Array, jax.Array], jax.Array]
) -> None:
    """Change each update, last of all, to `change(name, update, parameter)`."""
    from lockstep.backends.faults.frameworks import flax_backend

    make = flax_backend.make_optimizer

    def changed(config: Config, dtype: np.dtype) -> optax.GradientTransformationExtraArgs:
        inner = make(config, dtype)

        def update(
            updates: Tensors, state: optax.OptState, params: Tensors, **extra: object
        ) -> tuple[Tensors, optax.OptState]:
            changes, state = inner.update(updates, state, params, **extra)
            right = cast("Tensors", changes)
            return {name: change(name, u, params[name]) for name, u in right.items()}, state

        return transform(inner.init, update)

    patch(flax_backend, "make_optimizer", changed)


def replace_schedule(patch: SetAttr, change: Callable[[Config, Rate], Rate]) -> None:
    """Replace the schedule by `change(config, schedule)`."""
    from lockstep.backends.faults.frameworks import flax_optimizer

    make = flax_optimizer.make_schedule
    patch(
        flax_optimizer,
        "make_schedule",
        lambda config: change(config, cast("Rate", make(config))),
    )
