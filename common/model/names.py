"""Which tensor of one module is which of the other: canonical names, and proposals for a pair.

The modules' tensors meet under canonical names, which each side works out on its own, without
importing the other: a path of attributes and list positions, and a role (`kernel`, `bias`, `scale`,
`mean`, ...). These are Flax's, but that list positions count layers with parameters only, and
`nnx.Sequential`'s own `layers` is left out: so `nn.Sequential(conv, relu, conv)` and
`nnx.Sequential(conv, nnx.relu, conv)` and `[conv, conv]` are alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lockstep.common.errors import ConfigError, shorten
from lockstep.common.model.pair import INPUT_PREFIX, Shapes


def canonical_names(
    roles: Mapping[str, str], declared: Mapping[str, str], side: str
) -> dict[str, str]:
    """A module's tensors, by its own names, as canonical names.

    Args:
        roles: by the tensor's own name (`features.0.weight`), its role (`kernel`).
        declared: own layers or tensors, with their canonical names, where these differ; of two that
            fit, the longer one counts. `*` stands for positions in lists, as in `blocks.*.norm1`.
        side: whose they are, for messages.

    Raises:
        ConfigError: if two tensors get one name, or `declared` names what is not there.
    """
    positions = _positions(roles)
    chosen, unused = {}, dict(declared)
    for key, value in declared.items():
        for layer, stars in _fitting(key, roles, positions):
            unused.pop(key, None)
            if "*" not in key or layer not in declared:
                chosen[layer] = _filled(value, stars)
    if unused:
        layers = dict.fromkeys(own.rpartition(".")[0] or own for own in roles)
        raise ConfigError(
            f"the pair names {shorten(unused)}, which {side}'s module does not have: its layers are {shorten(layers)}"
        )
    names = {}
    for own, role in roles.items():
        parts = own.split(".")
        if own in chosen:
            names[own] = strip_sequential(chosen[own])
            continue
        length = next((n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in chosen), 0)
        prefix = [chosen[".".join(parts[:length])]] if length else []
        rest = [
            positions.get(tuple(parts[: i + 1]), parts[i]) for i in range(length, len(parts) - 1)
        ]
        names[own] = strip_sequential(".".join([*prefix, *rest, role]))
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        own = [own for own, name in names.items() if name == twice[0]]
        raise ConfigError(
            f"{' and '.join(own)} of {side}'s module are both called {twice[0]}: "
            "tell them apart in the pair, with names={...}"
        )
    return names


def fits(wanted: Sequence[str], path: Sequence[str]) -> bool:
    """Whether a key names a path; `*` stands for positions in lists."""
    return len(wanted) == len(path) and all(
        w == p or (w == "*" and p.isdecimal()) for w, p in zip(wanted, path, strict=True)
    )


def _fitting(
    key: str, roles: Iterable[str], positions: Mapping[tuple[str, ...], str]
) -> Iterator[tuple[str, list[str]]]:
    """The layers and tensors that `key` names, each with the positions that its stars stand for."""
    wanted = key.split(".")
    paths = dict.fromkeys(tuple(own.split(".")[: len(wanted)]) for own in roles)
    for path in paths:
        if fits(wanted, path):
            stars = [positions[path[: i + 1]] for i, part in enumerate(wanted) if part == "*"]
            yield ".".join(path), stars


def _filled(value: str, stars: list[str]) -> str:
    left = iter(stars)
    return ".".join(next(left, part) if part == "*" else part for part in value.split("."))


def layer_names(names: Mapping[str, str]) -> dict[str, str]:
    """By a module's own names for its layers, the canonical ones; `names` are those of its
    tensors. What a layer with tensors has the same name in on both sides is in it as well: the
    attention around a query."""
    layers = {own.rpartition(".")[0]: name.rpartition(".")[0] for own, name in names.items()}
    for own, name in list(layers.items()):
        (outer, _, part), (around, _, other) = own.rpartition("."), name.rpartition(".")
        if part == other and outer:
            layers.setdefault(outer, around)
    return layers


def activation_key(layers: Mapping[str, str], name: str) -> str:
    """The name that `Backend.probe` gives an activation: `forward/<layer>` or `forward/input of <layer>`.

    Args:
        layers: from `layer_names`.
        name: by the module's own name for the layer.
    """
    layer = name.removeprefix(INPUT_PREFIX)
    return f"forward/{name[: len(name) - len(layer)]}{layers[layer]}"


def strip_sequential(name: str) -> str:
    """Without the `layers` that an `nnx.Sequential` within a network keeps its list in.

    Where the whole network is one, it stays, and is put before PyTorch's numbers.
    """
    parts = name.split(".")
    if parts[0].isdecimal():
        parts.insert(0, "layers")
    following = [*parts[1:], ""]
    left_out = [
        part == "layers" and after.isdecimal() for part, after in zip(parts, following, strict=True)
    ]
    return ".".join(part for i, part in enumerate(parts) if i == 0 or not left_out[i])


def _positions(names: Iterable[str]) -> dict[tuple[str, ...], str]:
    """Of each position in a list (a path that ends in a number): how many there with tensors come
    before it."""
    paths = [tuple(name.split(".")) for name in names]
    found = {path[: i + 1] for path in paths for i, part in enumerate(path) if part.isdecimal()}
    counted: Counter[tuple[str, ...]] = Counter()
    positions = {}
    for path in sorted(found, key=lambda path: (path[:-1], int(path[-1]))):
        positions[path] = str(counted[path[:-1]])
        counted[path[:-1]] += 1
    return positions


def suggest_names(torch: Shapes, flax: Shapes, own: Mapping[str, Mapping[str, str]]) -> str:
    """The line to write for layers under other names: those with equal roles and shapes, in their
    order.

    Layers of a block whose other layers were found are looked for in that block first.
    """
    left, right = _layers(torch, own["torch"]), _layers(flax, own["flax"])
    blocks: dict[str, str] = {}
    found: dict[str, str] = {}
    for layer, tensors in left.items():
        fitting = [other for other, theirs in right.items() if theirs == tensors]
        block = layer.rpartition(".")[0]
        match = next(
            (other for other in fitting if blocks.get(block) == other.rpartition(".")[0]), None
        )
        match = match or next(iter(fitting), None)
        if match is not None:
            found[layer] = match
            blocks.setdefault(block, match.rpartition(".")[0])
            del right[match]
    return f"names={shortened(found)}" if found else ""


def shortened(found: Mapping[str, str]) -> dict[str, str]:
    """The same correspondence in fewer lines: layers that differ in list positions only in one,
    with stars."""
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for one, other in found.items():
        groups.setdefault((_starred(one), _starred(other)), []).append((one, other))
    lines: dict[str, str] = {}
    for (one, other), members in groups.items():
        alike = all(_numbers(a) == _numbers(b) for a, b in members)
        alone = sum(_starred(layer) == one for layer in found) == len(members) > 1
        lines |= {one: other} if alike and alone else dict(members)
    return lines


def _starred(layer: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in layer.split("."))


def _numbers(layer: str) -> list[str]:
    return [part for part in layer.split(".") if part.isdecimal()]


def _layers(shapes: Shapes, own: Mapping[str, str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """By the module's own name for a layer, its roles and shapes; a tensor that is in no layer
    stands for itself."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer, _, _ = own[name].rpartition(".")
        role = name.rpartition(".")[2] if layer else ""
        layers.setdefault(layer or own[name], {})[role] = shape
    return layers
