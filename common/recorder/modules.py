"""Which tensor of the forward pass of one side is which of the other: a module corresponds to the
module that holds the same parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# Parts of a name that one side alone has: collections of variables, and Haiku's mark of a method.
_COLLECTIONS = frozenset(("params", "batch_stats", "~"))


def components(name: str) -> tuple[str, ...]:
    """The parts of a module's or a parameter's path, without the collections of variables."""
    return tuple(part for part in re.split(r"[./]", name) if part not in (*_COLLECTIONS, ""))


def layer_of(parameter: str, modules: Sequence[str]) -> str | None:
    """The innermost of `modules` that holds a parameter; None if none does."""
    path = components(parameter)
    holding = [m for m in modules if _holds(components(m), path)]
    return max(holding, key=lambda m: len(components(m)), default=None)


def corresponding(
    modules_a: Sequence[str], modules_b: Sequence[str], parameters: Mapping[str, tuple[str, str]]
) -> dict[str, str]:
    """The modules of either side below which there are the same parameters, innermost first.

    Args:
        modules_a, modules_b: in the order of their calls.
        parameters: A's and B's names by canonical name.
    """
    ours = _by_parameters(modules_a, {name: pair[0] for name, pair in parameters.items()})
    theirs = _by_parameters(modules_b, {name: pair[1] for name, pair in parameters.items()})
    pairs = {
        a: b
        for held, modules in ours.items()
        for a, b in zip(modules, theirs.get(held, ()), strict=False)
    }
    return {name: pairs[name] for name in modules_a if name in pairs}


def _by_parameters(
    modules: Sequence[str], parameters: Mapping[str, str]
) -> dict[frozenset[str], list[str]]:
    """Modules by the parameters below them, the innermost first; those without any are left out."""
    found: dict[frozenset[str], list[str]] = {}
    paths = {name: components(own) for name, own in parameters.items()}
    for module in sorted(modules, key=lambda m: -len(components(m))):
        path = components(module)
        held = frozenset(name for name, own in paths.items() if _holds(path, own))
        if held:
            found.setdefault(held, []).append(module)
    return found


def _holds(module: tuple[str, ...], parameter: tuple[str, ...]) -> bool:
    return len(module) < len(parameter) and parameter[: len(module)] == module
