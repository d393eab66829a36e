"""An Equinox module as a `flax.nnx.Module`. It takes one input, images with the channels first as
its layers do, and is mapped over the batch; its tensors lie as in Flax."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lockstep.backends.adapters.modules import Parts, keep, recording
from lockstep.common.model import pair
from lockstep.common.model.layers import (
    ATTENTION,
    CONVOLUTION,
    DENSE,
    EMBEDDING,
    NORM,
    kind_of_class,
)

NORMS = (eqx.nn.LayerNorm, eqx.nn.GroupNorm, eqx.nn.RMSNorm)
CHANNELS_FIRST = (eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.GroupNorm)
KINDS = (
    ((eqx.nn.Conv, eqx.nn.ConvTranspose), CONVOLUTION),
    (eqx.nn.Linear, DENSE),
    (NORMS, NORM),
    (eqx.nn.Embedding, EMBEDDING),
    (eqx.nn.MultiheadAttention, ATTENTION),
)
LAYERS = tuple(
    each for kinds, _ in KINDS for each in (kinds if isinstance(kinds, tuple) else (kinds,))
)
# Flax's names for Equinox's tensors, by the kind of the layer; those with `kernel` are transposed.
ROLES = (
    ((eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.Linear), {"weight": "kernel"}),
    (NORMS, {"weight": "scale"}),
    (eqx.nn.Embedding, {"weight": "embedding"}),
    (
        (eqx.nn.LSTMCell, eqx.nn.GRUCell),
        {"weight_ih": "dense_i.kernel", "weight_hh": "dense_h.kernel", "bias": "dense_i.bias"},
    ),
)
PROJECTIONS = {f"{name}_proj": name for name in ("query", "key", "value")} | {"output_proj": "out"}


class Place(NamedTuple):
    """Where a tensor of Equinox lies in Flax."""

    path: tuple[str | int, ...]
    axes: tuple[int, ...]  # permuted so,
    turned: tuple[int, ...]  # it has this shape,
    shape: tuple[int, ...]  # and then this one


class Equinox(nnx.Module):
    """Its floating-point arrays are trained, under names such as `layers.0.kernel`.

    Raises:
        ValueError: if it keeps state, as `eqx.nn.BatchNorm` does.
    """

    def __init__(self, module: eqx.Module) -> None:
        nodes = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, eqx.nn.StateIndex))
        if any(isinstance(node, eqx.nn.StateIndex) for node in nodes):
            raise ValueError(f"it has an eqx.nn.StateIndex: {pair.STATE_HINT}")
        arrays, rest = eqx.partition(module, eqx.is_inexact_array)
        leaves, structure = jax.tree_util.tree_flatten_with_path(arrays)
        kinds, classes, tree = {"": kind_of_class(module, KINDS)}, [type(module)], {}
        places = []
        for path, leaf in leaves:
            place, owners = place_of(module, path, leaf)
            for name, owner in owners:
                kinds[name] = kind_of_class(owner, KINDS)
                classes.append(type(owner))
            places.append(place)
            inner = tree
            for part in place.path[:-1]:
                inner = inner.setdefault(part, {})
            inner[place.path[-1]] = nnx.Param(leaf.transpose(place.axes).reshape(place.shape))
        for name, node in tree.items():
            setattr(self, str(name), nnx.data(node))
        self.to_nnx__parts = Parts(kinds, tuple(dict.fromkeys(classes)))
        self.to_nnx__module = Whole(places, structure, rest)

    def __call__(self, inputs: jax.Array) -> Any:
        model, parts = self.to_nnx__module.filled(self), self.to_nnx__parts
        if inputs.ndim > 3:
            inputs = jnp.moveaxis(inputs, -1, 1)

        def one(x: jax.Array) -> tuple[Any, OrderedDict[str, jax.Array]]:
            if parts.seen is None:
                return model(x), OrderedDict()
            own = Parts(parts.kinds, parts.classes)
            with recording(own) as seen:
                return recorded(model, own)(x), seen

        outputs, activations = jax.vmap(one)(inputs)
        if parts.seen is not None:
            parts.seen.update(activations)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 1, -1) if x.ndim > 3 else x, outputs)


class Whole:
    """An Equinox module without its trained arrays, and where these lie."""

    def __init__(self, places: list[Place], structure: Any, rest: Any) -> None:
        self.places, self.structure, self.rest = places, structure, rest

    def filled(self, holder: nnx.Module) -> Any:
        """The module, with the parameters of its adapter."""
        leaves = []
        for place in self.places:
            node = vars(holder)[str(place.path[0])]
            for part in place.path[1:]:
                node = node[part]
            leaf = node[...].reshape(place.turned)
            leaves.append(leaf.transpose(np.argsort(place.axes)))
        return eqx.combine(jax.tree.unflatten(self.structure, leaves), self.rest)


def place_of(
    module: eqx.Module, path: tuple[Any, ...], leaf: jax.Array
) -> tuple[Place, list[tuple[str, eqx.Module]]]:
    """A tensor's place, and the modules that it is in, by Flax's names, the outermost first."""
    node: Any = module
    owners, names = [], []
    for key in path:
        if isinstance(node, eqx.Module):
            owners.append((tuple(names), node))
        part, inner = part_of(key), cast(Any, node)
        node = getattr(inner, str(part)) if hasattr(key, "name") else inner[part]
        names.append(part)
    owner, around = owners[-1][1], owners[-2][1] if len(owners) > 1 else None
    role = next((roles for kinds, roles in ROLES if isinstance(owner, kinds)), {})
    last = str(names.pop())
    name = role.get(last, last)
    axes = tuple(range(leaf.ndim))
    if name.endswith("kernel"):
        axes = (*axes[2:], 1, 0)
    turned: tuple[int, ...] = tuple(leaf.shape[axis] for axis in axes)
    shape: tuple[int, ...] = turned
    if isinstance(owner, eqx.nn.Conv | eqx.nn.ConvTranspose) and name == "bias":
        shape = (math.prod(shape),)  # (channels, 1, 1)
    if isinstance(around, eqx.nn.MultiheadAttention):
        names[-1], heads = PROJECTIONS[names[-1]], around.num_heads
        if names[-1] != "out":
            shape = (*shape[:-1], heads, shape[-1] // heads)
        elif name == "kernel":
            shape = (heads, shape[0] // heads, *shape[1:])
    place = Place((*names, *name.split(".")), axes, turned, shape)
    return place, [(".".join(map(str, own)), each) for own, each in owners]


def part_of(key: Any) -> str | int:
    """An attribute, a position in a list or a key of a dictionary."""
    return next(getattr(key, kind) for kind in ("name", "idx", "key") if hasattr(key, kind))


def recorded(model: Any, parts: Parts) -> Callable[..., Any]:
    """The model, with an object in the place of each layer that records what it computes."""

    def wrapped(path: tuple[Any, ...], node: Any) -> Any:
        name = ".".join(str(part_of(key)) for key in path)
        return RecordedLayer(name, node, parts) if isinstance(node, LAYERS) and name else node

    return jax.tree_util.tree_map_with_path(
        wrapped, model, is_leaf=lambda node: isinstance(node, LAYERS)
    )


class RecordedLayer:
    """A layer whose calls are recorded, channels last; all else that it has is the layer's."""

    def __init__(self, name: str, layer: Any, parts: Parts) -> None:
        self._name, self._layer, self._parts = name, layer, parts

    def __call__(self, inputs: jax.Array, *arguments: Any, **options: Any) -> Any:
        output = self._layer(inputs, *arguments, **options)
        first = isinstance(self._layer, CHANNELS_FIRST)
        moved = [jnp.moveaxis(x, 0, -1) if first else x for x in (inputs, output)]
        keep(self._parts, self._name, moved[:1], moved[1])
        return output

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._layer, attribute)
