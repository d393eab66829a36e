"""What a user's pair builds as its second side, as a `flax.nnx.Module`: one of nnx is taken as it
is, one of linen or Equinox by an adapter, in `linen.py` and `equinox.py`."""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import linen, nnx
from jax.extend.core import get_opaque_trace_state


@dataclass(eq=False)
class Parts:
    """What an adapter knows of the module that it holds."""

    kinds: Mapping[str, str]  # of the layers, by the module's own names, in their order
    classes: tuple[type, ...]  # of the module and the modules in it
    seen: OrderedDict[str, jax.Array] | None = None  # where activations are recorded, if they are
    trace: object = field(default_factory=get_opaque_trace_state)  # in which they are


def built(network: Callable[..., object], classes: int, seed: int) -> object:
    """What a pair's function builds; it is given `rngs` or, as in Equinox, a `key`, if it takes one
    of them."""
    taken = inspect.signature(network).parameters
    if "rngs" in taken or any(each.kind is each.VAR_KEYWORD for each in taken.values()):
        return network(classes, rngs=nnx.Rngs(seed))
    return network(classes, **({"key": jax.random.key(seed)} if "key" in taken else {}))


def adapted(module: Any, inputs: Callable[[], jax.Array], seed: int) -> object:
    """The module by its adapter, if it has one.

    Args:
        inputs: some for a trial: linen makes its parameters when it sees them.
    """
    if isinstance(module, linen.Module):
        from lockstep.backends.adapters.linen import Linen

        return Linen(module, inputs(), nnx.Rngs(seed))
    equinox = sys.modules.get("equinox")  # a module of it cannot be there without it
    if equinox is not None and isinstance(module, equinox.Module):
        from lockstep.backends.adapters.equinox import Equinox

        return Equinox(module)
    return module


def parts_of(module: nnx.Module) -> Parts | None:
    """What an adapter knows; None of a module of nnx."""
    found = vars(module).get("to_nnx__parts")
    return found if isinstance(found, Parts) else None


@contextmanager
def recording(parts: Parts) -> Iterator[OrderedDict[str, jax.Array]]:
    """Record within the block what `keep` is given."""
    parts.seen, parts.trace = OrderedDict(), get_opaque_trace_state()
    try:
        yield parts.seen
    finally:
        parts.seen = None


def keep(parts: Parts, name: str, inputs: Sequence[object], output: object) -> None:
    """Record `input of <layer>` and `<layer>`; not within a scan or a vmap of the user's own, whose
    values cannot leave it."""
    first = inputs[0] if inputs else None
    if parts.seen is None or get_opaque_trace_state() != parts.trace:
        return
    if isinstance(first, jax.Array) and isinstance(output, jax.Array):
        parts.seen[f"input of {name}"], parts.seen[name] = first, output
