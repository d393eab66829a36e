"""Whether the two modules of a pair have the same tensors and the same dropout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lockstep.common.errors import ConfigError, shorten
from lockstep.common.model.names import suggest_names
from lockstep.common.model.pair import Shapes

if TYPE_CHECKING:
    from lockstep.common.protocol import Dropout

BIASES = (".dense_i.bias", ".dense_h.bias")
RECURRENT = (
    "PyTorch's recurrent layers have two biases, which train as one with twice the learning rate; "
    "cells with both are in lockstep.backends.flax_backend.layers"
)


def check_same(torch: Shapes, flax: Shapes, own: Mapping[str, Mapping[str, str]]) -> None:
    """Raise ConfigError unless both sides have the same tensors.

    Args:
        torch: PyTorch's tensors, canonical names and shapes.
        flax: Flax's.
        own: by side, what the module itself calls a tensor, by canonical name.
    """
    missing = {name: torch[name] for name in torch if name not in flax}
    extra = {name: flax[name] for name in flax if name not in torch}
    if missing or extra:
        sides = {"PyTorch": (missing, own["torch"]), "Flax": (extra, own["flax"])}
        found = "; ".join(
            f"{side} alone has "
            + shorten(f"{names[name]} {shape}" for name, shape in tensors.items())
            for side, (tensors, names) in sides.items()
            if tensors
        )
        lines = suggest_names(missing, extra, own)
        remedy = (
            f"if these belong together, add to the pair: {lines}"
            if lines
            else RECURRENT
            if all(name.endswith(BIASES) for name in (*missing, *extra))
            else "one of the modules lacks them"
        )
        raise ConfigError(
            f"the two modules have not the same tensors ({found}, in Flax's layout): {remedy}"
        )
    others = {name: (torch[name], flax[name]) for name in torch if torch[name] != flax[name]}
    if others:
        found = shorten(
            (f"{name}: PyTorch {one}, Flax {other}" for name, (one, other) in others.items()), "; "
        )
        raise ConfigError(
            f"the two modules' shapes differ, in Flax's layout ({found}): make them equal, "
            "and name what a flatten precedes in the pair's flattened"
        )


def check_dropout(torch: Mapping[str, Dropout], flax: Mapping[str, Dropout]) -> None:
    """Raise ConfigError unless both sides leave out as much in the same places, by the canonical
    names of the masks."""
    layers = {name: (torch.get(name), flax.get(name)) for name in {**torch, **flax}}
    layers = {name: (one, other) for name, (one, other) in layers.items() if one != other}
    if layers:
        found = (
            f"{name.rpartition('.')[0]}: PyTorch {_described(one)}, Flax {_described(other)}"
            for name, (one, other) in layers.items()
        )
        raise ConfigError(
            f"the two modules' dropout differs ({shorten(found, '; ')}): make it equal, shapes in Flax's layout"
        )


def _described(dropout: Dropout | None) -> str:
    return "has none" if dropout is None else f"{dropout.rate:g} of {dropout.shape}"
