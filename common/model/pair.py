"""A network in both frameworks: where its two modules are, and which tensor of one is which of the
other.

The modules' tensors meet under canonical names, which each side works out on its own, without
importing the other: a path of attributes and list positions, and a role (`kernel`, `bias`, `scale`,
`mean`, ...). These are Flax's, but that list positions count layers with parameters only, and
`nnx.Sequential`'s own `layers` is left out: so `nn.Sequential(conv, relu, conv)` and
`nnx.Sequential(conv, nnx.relu, conv)` and `[conv, conv]` are alike.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.common.config import MODELS
from lockstep.common.errors import ConfigError, did_you_mean, shorten

if TYPE_CHECKING:  # which imports NumPy, too slowly for `compare.py --help`
    from lockstep.common.protocol import Dropout

SYNTAX = "PATH/TO/FILE.py:NAME or PACKAGE.MODULE:NAME"
INPUT_PREFIX = "input of "  # a layer, in the names of activations
RNG_HINT = "use Dropout of lockstep.backends.torch_backend.layers and lockstep.backends.flax_backend.layers, which leave out the same units"
STATE_HINT = "keep nothing from step to step but a batch norm's statistics"
Network = (
    Callable[..., Any] | str
)  # what builds the module, or where that is, as "package.module:NAME"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pair:
    """A network in both frameworks, for images of 32 x 32 pixels and 3 channels.

    A name of a network, "package.module:NAME", is looked up when its framework is wanted, and not
    before.
    """

    torch: Network  # (classes) -> torch.nn.Module, which takes images (n, 3, 32, 32)
    flax: Network  # (classes, rngs=nnx.Rngs) -> nnx.Module, which takes images (n, 32, 32, 3)
    names: Mapping[str, str] = field(
        default_factory=dict
    )  # PyTorch's: Flax's; layers or parameters, where they differ
    # Dense layers that follow a flatten, by PyTorch's name: what it unrolls, (channels, height,
    # width). PyTorch unrolls channels first and Flax last.
    flattened: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def load(model: str) -> Pair:
    """The pair that `--model` names.

    Raises:
        ConfigError: if there is none, or it cannot be imported.
    """
    if model in MODELS:
        return Pair(
            torch=f"lockstep.backends.torch_backend.models.{MODELS[model]}",
            flax=f"lockstep.backends.flax_backend.models.{MODELS[model]}",
        )
    return _load_users(model)


@functools.cache
def _load_users(model: str) -> Pair:
    place, _, name = model.rpartition(":")
    if is_path(place):
        found = getattr(_imported(place, lambda: _import_file(Path(place))), name, None)
    else:
        found = getattr(_imported(place, lambda: importlib.import_module(place)), name, None)
    if not isinstance(found, Pair):
        what = f"no {name}" if found is None else f"{name}, which is a {type(found).__name__}"
        raise ConfigError(
            f"--model {model}: {place} has {what}: write {name} = Pair(torch=..., flax=...) there"
        )
    if not _is_dictionary(found.names, lambda name: isinstance(name, str)):
        raise ConfigError(
            f"--model {model}: names must be a dictionary of texts: PyTorch's name, and Flax's"
        )
    if not _is_dictionary(found.flattened, _is_shape):
        raise ConfigError(
            f"--model {model}: flattened must be a dictionary: a layer, and (channels, height, width)"
        )
    return found


def _is_dictionary(found: object, holds: Callable[[object], bool]) -> bool:
    """Whether it is one of texts and of what `holds` allows."""
    return isinstance(found, Mapping) and all(
        isinstance(key, str) and holds(value) for key, value in found.items()
    )


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and len(value) > 1
        and all(type(size) is int and size > 0 for size in value)
    )


def network(model: str, side: str) -> Callable[..., Any]:
    """The function that builds the module of one side, "torch" or "flax".

    Raises:
        ConfigError: if it cannot be imported.
    """
    found = getattr(load(model), side)
    if isinstance(found, str):
        place, _, name = found.rpartition(":")
        if model in MODELS:
            return getattr(importlib.import_module(place), name)
        found = getattr(_imported(place, lambda: importlib.import_module(place)), name, None)
    if not callable(found):
        raise ConfigError(
            f"--model {model}: {side} must be a class or a function that builds a module"
        )
    return found


def source_digest(model: str) -> str | None:
    """SHA-256, hexadecimal, of the file that a user's pair is in; None for those that are built in.

    Raises:
        ConfigError: if there is no such file.
    """
    if model in MODELS:
        return None
    place, colon, name = model.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ConfigError(f"unknown model {model!r}: {did_you_mean(model, MODELS)}, or {SYNTAX}")
    if is_path(place):
        path = place
    else:
        spec = _imported(place, lambda: importlib.util.find_spec(place))
        path = None if spec is None else spec.origin
    if path is None or not os.path.isfile(path):
        raise ConfigError(f"--model {model}: there is no {place}: give {SYNTAX}")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def is_path(place: str) -> bool:
    return place.endswith(".py") or os.sep in place


def _import_file(path: Path) -> Any:
    name = f"lockstep_pair_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    sys.path.insert(
        0, str(path.resolve().parent)
    )  # as for a script: what it imports may lie next to it
    spec.loader.exec_module(module)
    return module


def _imported(place: str, load: Callable[[], Any]) -> Any:
    """Call `load`; turn any exception of user code into a one-line ConfigError."""
    try:
        return load()
    except (Exception, SystemExit) as error:  # user code may raise anything
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"{place} cannot be imported ({type(error).__name__}: {reason}): fix it first"
        ) from error


@contextmanager
def user_code_errors(model: str, side: str, what: str) -> Iterator[None]:
    """Turn any exception of a user's module into a one-line ConfigError."""
    try:
        yield
    except Exception as error:  # user code may raise anything
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"--model {model}: {side} cannot {what} ({type(error).__name__}: {reason})"
        ) from error


# --- Which tensor is which


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


def _fitting(
    key: str, roles: Iterable[str], positions: Mapping[tuple[str, ...], str]
) -> Iterator[tuple[str, list[str]]]:
    """The layers and tensors that `key` names, each with the positions that its stars stand for."""
    wanted = key.split(".")
    paths = dict.fromkeys(tuple(own.split(".")[: len(wanted)]) for own in roles)
    for path in paths:
        pairs = list(zip(wanted, path, strict=False))
        if len(path) == len(wanted) and all(
            w == p or (w == "*" and p.isdecimal()) for w, p in pairs
        ):
            yield (
                ".".join(path),
                [positions[path[: i + 1]] for i, (w, _) in enumerate(pairs) if w == "*"],
            )


def _filled(value: str, stars: list[str]) -> str:
    left = iter(stars)
    return ".".join(next(left, part) if part == "*" else part for part in value.split("."))


def layer_names(names: Mapping[str, str]) -> dict[str, str]:
    """By a module's own names for its layers, the canonical ones; `names` are those of its
    tensors."""
    return {own.rpartition(".")[0]: name.rpartition(".")[0] for own, name in names.items()}


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
