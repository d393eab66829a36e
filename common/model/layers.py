"""What the layers of a network are, by the classes of their modules, and each side's own names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from lockstep.common.model.names import layer_names
from lockstep.common.model.pair import INPUT_PREFIX

CONVOLUTION, DENSE, NORM, EMBEDDING, ATTENTION = (
    "convolution",
    "dense",
    "norm",
    "embedding",
    "attention",
)
# Of a user's own layers the class's name tells the kind.
OWN_CLASSES = {"norm": NORM, "attention": ATTENTION, "attn": ATTENTION}


class ModuleNames(NamedTuple):
    """One side's module."""

    native: Mapping[str, str]  # its own names of its tensors, by canonical name
    kinds: Mapping[str, str]  # of its layers, by canonical name
    classes: Sequence[type] = ()  # of the module and the modules in it, the outermost first


class NamedModule(Protocol):
    """The part of a backend that says what its module is made of."""

    def native_names(self) -> dict[str, str]: ...
    def layer_kinds(self) -> dict[str, str]: ...
    def module_classes(self) -> tuple[type, ...]: ...


def module_names(backend: NamedModule) -> ModuleNames:
    return ModuleNames(backend.native_names(), backend.layer_kinds(), backend.module_classes())


def kind_of_class(layer: object, known: Iterable[tuple[type | tuple[type, ...], str]]) -> str:
    """The kind of a layer: that of the library's class, or what its own class's name says; "" if
    neither tells.

    Args:
        known: the library's classes, with their kinds.
    """
    found = next((kind for classes, kind in known if isinstance(layer, classes)), None)
    name = type(layer).__name__.lower()
    return found or next((kind for word, kind in OWN_CLASSES.items() if word in name), "")


def kinds_by_layer(names: Mapping[str, str], kind: Callable[[str], str]) -> dict[str, str]:
    """The kinds of all layers with tensors and of the modules around them, by canonical name.

    Args:
        names: of the tensors, canonical by own.
        kind: of a layer, by its own name; "" if it has none.
    """
    found: dict[str, str] = {}
    for own, layer in layer_names(names).items():
        while own and layer:
            if known := kind(own):
                found.setdefault(layer, known)
            own, layer = own.rpartition(".")[0], layer.rpartition(".")[0]
    return found


def plain_name(tensor: str) -> str:
    """The layer or parameter in "input of <layer>" and in "<slot> of <parameter>"."""
    return tensor.rpartition(" of ")[2]


def kind_of(tensor: str, modules: Iterable[ModuleNames]) -> str:
    """The kind of the layer that a tensor belongs to; "" if no side knows it.

    The input of a layer within an attention is of the attention: what was computed there lies
    between two layers.
    """
    layer = plain_name(tensor)
    outer = layer.rpartition(".")[0]
    for module in modules:
        around = module.kinds.get(outer, "")
        if tensor.startswith(INPUT_PREFIX):
            if around == ATTENTION:
                return around
        elif found := module.kinds.get(layer) or around:
            return found
    return ""


def own_names(tensor: str, modules: Mapping[str, ModuleNames]) -> dict[str, str]:
    """By side, the module's own name of a tensor or layer; empty where both use one name, or a side
    does not know it."""
    found = native_names(tensor, modules)
    known = len(found) == len(modules) and len(set(found.values())) > 1
    return found if known else {}


def native_names(tensor: str, modules: Mapping[str, ModuleNames]) -> dict[str, str]:
    """By side that knows it, the module's own name of a tensor or layer."""
    wanted, found = plain_name(tensor), {}
    for side, module in modules.items():
        layers = {name.rpartition(".")[0]: own for name, own in module.native.items()}
        if wanted in module.native:
            found[side] = module.native[wanted]
        elif wanted and wanted in layers:
            found[side] = layers[wanted].rpartition(".")[0]
    return found
