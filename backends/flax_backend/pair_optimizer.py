"""The optimizer that a user's pair defines. Reads next to backends/torch_backend/pair_optimizer.py."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey, GetAttrKey, KeyPath

from lockstep.backends.flax_backend.state import OptimizerState, Parameters
from lockstep.common.config import Config
from lockstep.common.errors import ConfigError, RecordError
from lockstep.common.model import pair as pairs
from lockstep.common.protocol import Arrays
from lockstep.common.recorder.adapter import SLOTS

Slots = dict[str, dict[str, jax.Array]]  # of an optimizer, then by name of the parameters
PREFIX = "flax/"  # of the names of state that only optax can read


def make_optimizer(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The user's own optimizer.

    Raises:
        ConfigError: if it cannot be built.
    """
    build = pairs.own_optimizer(config.model, "flax")
    with pairs.user_code_errors(
        config.model, "flax", "build its optimizer", "its learning rate is a schedule, a function"
    ):
        optimizer = build(schedule)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ConfigError(
            f"--model {config.model}: the function of its optax optimizer returns a "
            f"{type(optimizer).__name__}: let it return an optax.GradientTransformation"
        )
    return optimizer


def validate_optimizer(
    config: Config, optimizer: optax.GradientTransformationExtraArgs, parameters: Parameters
) -> None:
    """Raise ConfigError unless the user's optimizer can take a step. It is traced, and not run."""

    def step(parameters: Parameters) -> Parameters:
        state, loss = optimizer.init(parameters), jnp.zeros(())  # for a plateau
        updates, _ = optimizer.update(parameters, state, parameters, value=loss)
        return optax.apply_updates(parameters, updates)

    with pairs.user_code_errors(config.model, "flax", "take a step of its optimizer"):
        jax.eval_shape(step, parameters)


def export_slots(state: OptimizerState, parameters: Parameters) -> Slots:
    """The arrays that the optimizer has for every parameter, of its shape, by slot.

    Args:
        state: of the user's optimizer alone.
    """
    slots: Slots = {}
    names = _slot_names(state, parameters)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if path[:-1] in names:
            slots.setdefault(names[path[:-1]], {})[_key(path)] = leaf
    return slots


def export_extra(state: OptimizerState, parameters: Parameters) -> Arrays:
    """The rest of its state, numbers and arrays, by their paths in optax's state."""
    names = _slot_names(state, parameters)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_name(path): np.array(leaf) for path, leaf in leaves if path[:-1] not in names}


def restore_state(
    config: Config,
    state: OptimizerState,
    parameters: Parameters,
    slots: Slots,
    extra: Arrays,
    step: int,
) -> OptimizerState:
    """The inverse of `export_slots` and `export_extra`, after `step` steps: a new state.

    Raises:
        RecordError: if the state comes from the other framework, whose optimizer lacks an array or
            a number of this one.
    """
    names = _slot_names(state, parameters)
    from_flax = any(name.startswith(PREFIX) for name in extra)

    def restored(path: KeyPath, leaf: jax.Array) -> jax.Array:
        slot = names.get(path[:-1])
        if slot is not None and slot in slots:
            return slots[slot][_key(path)]
        if slot is None and from_flax:
            return jnp.array(extra[_name(path)])
        if slot is None and _field(path) == "count":  # each is donated: an array of its own
            return jnp.full_like(leaf, step)
        what = slot or _name(path).removeprefix(PREFIX)
        raise RecordError(
            f'the Flax optimizer of {config.model} has the state "{what}", which the PyTorch one '
            "lacks: resume in Flax"
        )

    return jax.tree_util.tree_map_with_path(restored, state)


def _slot_names(state: OptimizerState, parameters: Parameters) -> dict[KeyPath, str]:
    """The slots, by their paths: dictionaries of one array per parameter, of its shape. Of two with
    one name the second is called so with a 2."""
    found: Counter[KeyPath] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if _key(path) in parameters and leaf.shape == parameters[_key(path)].shape:
            found[path[:-1]] += 1
    names: dict[KeyPath, str] = {}
    taken: Counter[str] = Counter()
    for path, count in found.items():
        if count == len(parameters):
            name = SLOTS.get(_field(path), _field(path))
            taken[name] += 1
            names[path] = name if taken[name] == 1 else f"{name} {taken[name]}"
    return names


def _key(path: KeyPath) -> str:
    """The last key of a path, which may be a parameter's name; "" if it has none."""
    return str(path[-1].key) if path and isinstance(path[-1], DictKey) else ""


def _field(path: KeyPath) -> str:
    """The innermost field of a NamedTuple on a path."""
    fields = [part.name for part in path if isinstance(part, GetAttrKey)]
    return fields[-1] if fields else "state"


def _name(path: KeyPath) -> str:
    return PREFIX + jax.tree_util.keystr(path)
