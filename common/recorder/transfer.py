"""The weights of one script, or its state after some steps, under the names and in the layout of
the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from lockstep.common.errors import ScriptError, shorten
from lockstep.common.protocol import Arrays, split_slot
from lockstep.common.recorder.recording import Recording
from lockstep.common.system.storage import write_tensors

SCHEMA = 1


class MatchLike(Protocol):
    """What is used of `matching.Match`: one tensor, or a piece of one, of either side."""

    @property
    def a(self) -> str: ...
    @property
    def b(self) -> str: ...
    def of_a(self, array: np.ndarray) -> np.ndarray: ...
    def of_b(self, array: np.ndarray) -> np.ndarray: ...


class Piece(NamedTuple):
    """One match, seen from the side that gives its weights."""

    source: str
    target: str
    of_source: Callable[[np.ndarray], np.ndarray]
    of_target: Callable[[np.ndarray], np.ndarray]


def pieces(matches: Sequence[MatchLike], from_b: bool = False) -> list[Piece]:
    """The matches, from A to B or from B to A."""
    if from_b:
        return [Piece(match.b, match.a, match.of_b, match.of_a) for match in matches]
    return [Piece(match.a, match.b, match.of_a, match.of_b) for match in matches]


def transfer(source: Recording, target: Recording, found: Sequence[Piece]) -> Arrays:
    """The weights of `source`, by the names of `target`, in its shapes and in `source`'s dtypes.

    Tensors of `target` that have no counterpart and are not trained are left out.

    Raises:
        ScriptError: if a parameter of `target`, or some of its entries, have no counterpart.
    """
    taken: Arrays = {}
    missing = {name: np.ones(array.size, bool) for name, array in target.weights.items()}
    for piece in found:
        known = (f"weights/{piece.source}", f"weights/{piece.target}")
        if known[0] in source.fingerprints or known[1] in target.fingerprints:
            raise ScriptError(
                f"{source.name}: {piece.source} is larger than --record-limit allows: raise it"
            )
        array = target.weights[piece.target]
        # Where each entry of the piece stands in the target, whatever the layout is.
        places = piece.of_target(np.arange(array.size).reshape(array.shape)).ravel()
        values = piece.of_source(source.weights[piece.source]).ravel()
        flat = taken.setdefault(piece.target, np.zeros(array.shape, values.dtype)).reshape(-1)
        flat[places] = values
        missing[piece.target][places] = False
    lacking = [name for name in target.parameters if missing[name].any()]
    if lacking:
        raise ScriptError(
            f"{target.name} cannot start from the weights of {source.name}: there is no "
            f"counterpart of {shorten(lacking)}: name it in a file for --names"
        )
    return {name: array for name, array in taken.items() if not missing[name].any()}


def transfer_optimizer(source: Recording, target: Recording, found: Sequence[Piece]) -> Arrays:
    """The state of `source`'s optimizer, as `transfer` has its weights: "<slot> of <parameter>"."""
    taken: Arrays = {}
    slots = dict.fromkeys(slot for slot, _ in map(split_slot, source.optimizer))
    for slot in slots:
        weights = {
            name: source.optimizer[f"{slot} of {name}"]
            for name in source.parameters
            if f"{slot} of {name}" in source.optimizer
        }
        pieces = [piece for piece in found if piece.source in weights]
        covered = {piece.target for piece in pieces}
        held = replace(target, parameters=[name for name in target.parameters if name in covered])
        state = transfer(replace(source, weights=weights), held, pieces)
        taken |= {f"{slot} of {name}": array for name, array in state.items()}
    return taken


def write(weights: Arrays, path: Path) -> None:
    """Write weights for `Settings.start_from`, or a state for `Settings.state`.

    Raises:
        RecordError: if the folder cannot be written.
    """
    write_tensors(path, {"schema": SCHEMA, "kind": "weights"}, weights)
