"""Layers whose tensors lie otherwise in Flax by more than the order of axes: a packed matrix is
three kernels, a kernel is flipped.

For each such layer there is a function from its tensors in PyTorch to Flax's, which moves numbers
and changes none. Applied to the positions of the numbers, it tells where each one comes from; its
inverse follows from that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from lockstep.common.errors import ConfigError, shorten, user_code
from lockstep.common.protocol import Arrays

Convert = Callable[[Arrays], Arrays]  # from PyTorch's tensors of a layer to Flax's


class Moved(NamedTuple):
    """Where the numbers of a layer lie."""

    sources: dict[str, tuple[int, ...]]  # PyTorch's shapes, by PyTorch's names
    # By Flax's names below PyTorch's name for the layer: positions in the sources, one after
    # another, in Flax's layout.
    positions: dict[str, np.ndarray]


def is_within(name: str, layer: str) -> bool:
    """Whether a module or tensor is this one, or in it; all are in the whole module, ""."""
    return not layer or name == layer or name.startswith(f"{layer}.")


def find_moved(layer: str, function: Convert, shapes: Mapping[str, tuple[int, ...]]) -> Moved:
    """Where `function` puts the numbers of the tensors with these names and shapes."""
    start, tensors, prefix = 0, {}, f"{layer}." if layer else ""
    for name, shape in shapes.items():
        size = math.prod(shape)
        tensors[name.removeprefix(prefix)] = np.arange(start, start + size).reshape(shape)
        start += size
    text = f"{layer}'s tensors, {shorten(tensors)}, cannot be converted"
    with user_code(text, "let the pair's convert say how"):
        positions = {name: np.asarray(array) for name, array in function(tensors).items()}
        every = np.concatenate([array.ravel() for array in positions.values()])
    if not np.array_equal(np.sort(every), np.arange(start)):
        raise ConfigError(
            f"the pair's convert of {layer} does not give each number of {shorten(tensors)} once: "
            "let it move numbers, leave none out, and change none"
        )
    return Moved(dict(shapes), {f"{prefix}{name}": array for name, array in positions.items()})


def to_flax(tensors: Arrays, groups: Mapping[str, Moved]) -> Arrays:
    """Tensors by PyTorch's names, where those of some layers are in Flax's layout and by Flax's
    names below that of the layer; in the same order, of layers."""
    found, of_group = {}, {name: group for group in groups.values() for name in group.sources}
    for name, array in tensors.items():
        group = of_group.get(name)
        if group is None:
            found[name] = array
        elif name == next(iter(group.sources)):
            numbers = np.concatenate([tensors[source].ravel() for source in group.sources])
            found |= {other: numbers[places] for other, places in group.positions.items()}
    return found


def from_flax(tensors: Arrays, groups: Mapping[str, Moved]) -> Arrays:
    """The inverse of `to_flax`."""
    found, of_group = {}, {name: group for group in groups.values() for name in group.positions}
    for name, array in tensors.items():
        group = of_group.get(name)
        if group is None:
            found[name] = array
        elif name == next(iter(group.positions)):
            numbers = np.empty(sum(map(math.prod, group.sources.values())), array.dtype)
            for other, places in group.positions.items():
                numbers[places] = tensors[other]
            start = 0
            for source, shape in group.sources.items():
                found[source] = numbers[start : start + math.prod(shape)].reshape(shape)
                start += math.prod(shape)
    return found


def in_order(tensors: Iterable[str], groups: Mapping[str, Moved]) -> list[str]:
    """The names that `to_flax` gives tensors with these names."""
    of_group = {name: group for group in groups.values() for name in group.sources}
    found: dict[str, None] = {}
    for name in tensors:
        found |= dict.fromkeys(of_group[name].positions if name in of_group else [name])
    return list(found)


def sources(groups: Mapping[str, Moved]) -> set[str]:
    """PyTorch's names of the tensors of these layers."""
    return {name for group in groups.values() for name in group.sources}


def renamed(groups: Mapping[str, Moved]) -> set[str]:
    """The names that `to_flax` gives them."""
    return {name for group in groups.values() for name in group.positions}
