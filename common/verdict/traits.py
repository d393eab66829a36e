"""What the tensors that fail have in common, and those that do not fail lack."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

MAX_NAMED = 3  # names in a list of them


def common_trait(
    failing: Collection[str],
    passing: Collection[str],
    names: Mapping[str, tuple[str, str]],
    axes: Mapping[str, int],
) -> str:
    """As "every tensor", "all kernels, no vector" or "all of blocks.1"; "" if there is none.

    Args:
        failing, passing: canonical names of parameters.
        names: both sides' own names of each.
        axes: the number of axes of each.
    """
    if not failing:
        return ""
    if not passing:
        return "every tensor"
    for trait in _traits(failing, names, axes):
        text, has = trait
        if all(map(has, failing)) and not any(map(has, passing)):
            return text
    if len(failing) <= MAX_NAMED:
        return ", ".join(failing)
    only = next((text for text, has in _kinds(axes) if all(map(has, failing))), "")
    return only and f"only {only.removeprefix('all ').partition(',')[0]}"


Trait = tuple[str, Callable[[str], bool]]


def _traits(
    failing: Collection[str], names: Mapping[str, tuple[str, str]], axes: Mapping[str, int]
) -> list[Trait]:
    found = _kinds(axes)
    for side in (0, 1):
        own = {name: pair[side] for name, pair in names.items()}
        leaves = sorted({_parts(own.get(name, name))[-1] for name in failing})
        if len(leaves) <= MAX_NAMED:
            text = f"all that end in {' or '.join(leaves)}, no other"
            found.append((text, lambda n, own=own, ends=leaves: _parts(own.get(n, n))[-1] in ends))
        below = _shared_start([_parts(own.get(name, name)) for name in failing])
        if below:
            found.append(
                (
                    f"all of {'.'.join(below)}, no other",
                    lambda n, own=own, start=below: _parts(own.get(n, n))[: len(start)] == start,
                )
            )
    return found


def _kinds(axes: Mapping[str, int]) -> list[Trait]:
    return [
        ("all kernels, no vector", lambda name: axes.get(name, 0) >= 2),
        ("all vectors, no kernel", lambda name: axes.get(name, 0) < 2),
    ]


def _parts(name: str) -> list[str]:
    return re.split(r"[./]", name.partition(" [")[0])


def _shared_start(paths: Sequence[list[str]]) -> list[str]:
    """The parts with which all paths begin, without their last ones."""
    shared = []
    for parts in zip(*(path[:-1] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared
