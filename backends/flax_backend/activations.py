"""What goes into and comes out of each layer of a `flax.nnx.Module`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
from flax import nnx

LAYERS = (
    nnx.Linear,
    nnx.Conv,
    nnx.BatchNorm,
    nnx.InstanceNorm,
    nnx.LayerNorm,
    nnx.GroupNorm,
    nnx.RMSNorm,
    nnx.Embed,
)


@contextmanager
def record_activations(model: nnx.Module) -> Iterator[dict[str, jax.Array]]:
    """Within the context, each layer of Flax's own keeps `input of <layer>` and `<layer>`, in the
    order of calls.

    A layer that is called twice keeps the last call, one without parameters none, and so do a
    user's own, whose axes nobody knows. `nnx` has no hooks: each layer is replaced by one that
    calls it. In a `jax.jit` these are traced values, to be returned from it; it sorts plain
    dictionaries, not ordered ones.
    """
    seen: dict[str, jax.Array] = OrderedDict()

    def keep(name: str, layer: Callable[[jax.Array], jax.Array], inputs: jax.Array) -> jax.Array:
        seen[f"input of {name}"] = inputs
        seen[name] = layer(inputs)
        return seen[name]

    layers = [
        (path, layer)
        for path, layer in nnx.iter_modules(model)
        if path and isinstance(layer, LAYERS)
    ]
    layers = [(path, layer) for path, layer in layers if has_parameters(layer)]
    for path, layer in layers:
        set_attribute(model, path, partial(keep, ".".join(map(str, path)), layer))
    try:
        yield seen
    finally:
        for path, layer in layers:
            set_attribute(model, path, layer)


def has_parameters(layer: nnx.Module) -> bool:
    return any(isinstance(value, nnx.Param) for value in vars(layer).values())


def set_attribute(model: Any, path: tuple[Any, ...], value: Any) -> None:
    """Put `value` where `path`, a sequence of attributes and list positions, leads to."""
    for part in path[:-1]:
        model = model[part] if isinstance(part, int) else getattr(model, part)
    if isinstance(path[-1], int):
        model[path[-1]] = value
    else:
        setattr(model, path[-1], value)
