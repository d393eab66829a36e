"""The inputs and outputs of each layer of a `flax.nnx.Module`. Reads next to
backends/torch_backend/activations.py."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.recurrent import RNNCellBase

from lockstep.backends.adapters import modules as adapters
from lockstep.common.model.layers import NORM, kind_of_class

LAYERS = (
    nnx.Linear,
    nnx.Conv,
    nnx.ConvTranspose,
    nnx.BatchNorm,
    nnx.InstanceNorm,
    nnx.LayerNorm,
    nnx.GroupNorm,
    nnx.RMSNorm,
    nnx.Embed,
    nnx.MultiHeadAttention,
)


@contextmanager
def record_activations(model: nnx.Module) -> Iterator[dict[str, jax.Array]]:
    """Record `input of <layer>` and `<layer>` of Flax's own layers with parameters and of a user's
    own norms, in the order of calls; of a layer that is called twice, the last call.

    A user's other layers are left out, since the order of their axes is unknown. `nnx` has no
    hooks: within the block, an object that calls the layer takes its place. Inside `jax.jit` the
    values are traced and must be returned; it would sort a plain dictionary, and keeps the order of
    this one.
    """
    parts = adapters.parts_of(model)
    if parts is not None:
        with adapters.recording(parts) as seen:
            yield seen
        return
    seen: dict[str, jax.Array] = OrderedDict()
    modules = list(nnx.iter_modules(model))
    cells = [path for path, layer in modules if isinstance(layer, RNNCellBase)]
    layers = [
        (path, layer)
        for path, layer in modules
        if path
        and (isinstance(layer, LAYERS) or is_own_norm(layer))
        # what a cell computes in one step of its scan cannot leave it
        and not any(path[: len(cell)] == cell for cell in cells)
    ]
    layers = [(path, layer) for path, layer in layers if has_parameters(layer)]
    for path, layer in layers:
        set_attribute(model, path, RecordedLayer(".".join(map(str, path)), layer, seen))
    try:
        yield seen
    finally:
        for path, layer in layers:
            set_attribute(model, path, layer)


class RecordedLayer:
    """A layer whose calls are recorded; all else that it has is the layer's."""

    def __init__(self, name: str, layer: Any, seen: dict[str, jax.Array]) -> None:
        self._name, self._layer, self._seen = name, layer, seen

    def __call__(self, inputs: jax.Array, *arguments: Any, **options: Any) -> Any:
        output = self._layer(inputs, *arguments, **options)
        # A norm of the user's own may take and give other things than arrays.
        if isinstance(inputs, jax.Array) and isinstance(output, jax.Array):
            self._seen[f"input of {self._name}"], self._seen[self._name] = inputs, output
        return output

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._layer, attribute)


def is_own_norm(layer: nnx.Module) -> bool:
    """Whether it is a norm that is not of the library: as elsewhere in Flax, its last axis is the
    channels."""
    return kind_of_class(layer, ()) == NORM


def has_parameters(layer: nnx.Module) -> bool:
    """Whether it has parameters of its own; an attention's are in layers within it."""
    own = any(isinstance(value, nnx.Param) for value in vars(layer).values())
    return own or isinstance(layer, nnx.MultiHeadAttention)


def set_attribute(model: Any, path: tuple[Any, ...], value: Any) -> None:
    """Set what `path` leads to, a sequence of attributes and list positions, to `value`."""
    for part in path[:-1]:
        model = model[part] if isinstance(part, int) else getattr(model, part)
    if isinstance(path[-1], int):
        model[path[-1]] = value
    else:
        setattr(model, path[-1], value)
