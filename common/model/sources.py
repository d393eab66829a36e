"""The lines of a network's source that are about one of its layers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

LIBRARIES = ("torch", "flax", "jax", "builtins")
PACKAGE = "lockstep."
ROLES = (
    "weight",
    "bias",
    "kernel",
    "scale",
    "embedding",
    "mean",
    "var",
    "running_mean",
    "running_var",
)
MAX_LINES = 6


class Excerpt(NamedTuple):
    """Some lines of a file."""

    file: str  # its name; of Lockstep's own networks with its folder
    lines: tuple[tuple[int, str], ...]  # with their numbers


def excerpt(classes: Iterable[type], own: str) -> Excerpt | None:
    """The lines in which a network's classes mention a layer; None where nothing is found.

    Args:
        classes: of the network and its modules, the outermost first.
        own: the module's own name of a tensor, such as `blocks.0.bn1.weight`.
    """
    found = [each for each in classes if each.__module__.partition(".")[0] not in LIBRARIES]
    if not found:
        return None
    module, lines = found[0].__module__, {}
    for each in dict.fromkeys(base for cls in found for base in cls.__mro__):
        if each.__module__ == module:
            lines |= _lines(each)
    for word in _words(own):
        about = [
            (number, text.strip())
            for number, text in sorted(lines.items())
            if re.search(rf"\b{re.escape(word)}\b", text)
        ]
        if about:
            return Excerpt(_file(found[0]), tuple(about[:MAX_LINES]))
    return None


def excerpts(classes: Mapping[str, Sequence[type]], own: Mapping[str, str]) -> dict[str, Excerpt]:
    """By side, where it is found: the lines about a tensor that each module calls by its own
    name."""
    found = {side: excerpt(classes[side], name) for side, name in own.items() if side in classes}
    return {side: lines for side, lines in found.items() if lines is not None}


def _words(own: str) -> list[str]:
    """The attributes in a tensor's name, the innermost first, without the tensor's role."""
    parts = own.split(".")
    return [part for part in reversed(parts) if not (part.isdigit() or part in ROLES)]


def _lines(cls: type) -> dict[int, str]:
    try:
        lines, start = inspect.getsourcelines(cls)
    except (OSError, TypeError):  # typed into a shell, or built at run time
        return {}
    return {start + place: line.rstrip() for place, line in enumerate(lines)}


def _file(cls: type) -> str:
    if cls.__module__.startswith(PACKAGE):
        return cls.__module__.removeprefix(PACKAGE).replace(".", "/") + ".py"
    try:
        return PurePath(inspect.getsourcefile(cls) or cls.__module__).name
    except (OSError, TypeError):
        return cls.__module__
