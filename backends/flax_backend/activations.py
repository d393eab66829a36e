"""The inputs and outputs of each layer of a `flax.nnx.Module`. Reads next to
backends/torch_backend/activations.py."""

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
    """Record `input of <layer>` and `<layer>` of Flax's own layers with parameters, in the order of
    calls; of a layer that is called twice, the last call.

    A user's own layers are left out, since the order of their axes is unknown. `nnx` has no hooks:
    within the block, a function that calls the layer takes its place. Inside `jax.jit` the values
    are traced and must be returned; it would sort a plain dictionary, and keeps the order of this
    one.
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
    """Set what `path` leads to, a sequence of attributes and list positions, to `value`."""
    for part in path[:-1]:
        model = model[part] if isinstance(part, int) else getattr(model, part)
    if isinstance(path[-1], int):
        model[path[-1]] = value
    else:
        setattr(model, path[-1], value)
