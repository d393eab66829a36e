"""A network in both frameworks: where its two modules are, and what a user's pair says of them."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.common.config import MODELS
from lockstep.common.errors import ConfigError, did_you_mean, reason, user_code
from lockstep.common.system import environment

if TYPE_CHECKING:
    import numpy as np

SYNTAX = "PATH/TO/FILE.py:NAME or PACKAGE.MODULE:NAME"
INPUT_PREFIX = "input of "  # a layer, in the names of activations
RNG_HINT = "use Dropout of lockstep.backends.torch_backend.layers and lockstep.backends.flax_backend.layers, which leave out the same units"
NO_SMOOTHING = "--label-smoothing is of the cross entropy of one class per image: leave it out"
DATA_HINT = (
    "let it take them, or give the pair inputs and targets of its own, example=(x, y), images with the "
    "channels last"
)
NAN_HINT = "look for a division by zero, or for a root or a logarithm of what may be negative"
FLOAT_HINT = "let it give logits, in floating point"
STATE_HINT = "keep nothing from step to step but a batch norm's statistics"
Network = (
    Callable[..., Any] | str
)  # what builds the module, or where that is, as "package.module:NAME"
Shapes = Mapping[str, tuple[int, ...]]


CROSS_ENTROPY = "cross entropy"
LOSSES = CROSS_ENTROPY, "mean squared error", "binary cross entropy", "huber"


@dataclass(frozen=True)
class Pair:
    """A network in both frameworks; without an `example`, for images of 32 x 32 pixels and 3
    channels, and their classes.

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
    # Layers whose tensors lie otherwise in Flax, by PyTorch's name: a function from PyTorch's
    # tensors, NumPy arrays by name below that of the layer, to Flax's. It moves numbers and changes
    # none.
    convert: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = field(default_factory=dict)
    # One of LOSSES, the mean over all that is given; or a function of outputs and targets for each
    # framework, PyTorch's first.
    loss: str | tuple[Callable[..., Any], Callable[..., Any]] = CROSS_ENTROPY
    # The user's own optimizer, used unless --optimizer names another: a function for each framework,
    # PyTorch's first, such as (torch.optim.Adamax, optax.adamax). The first is called with the
    # parameters and the learning rate, the second with a schedule: a function from the number of
    # steps done to the learning rate.
    optimizer: tuple[Callable[..., object], Callable[..., object]] | None = None
    # Inputs and targets, NumPy arrays (n, ...) in Flax's layout; a function without arguments that
    # returns them; or the path of an .npz archive with x and y, from the folder of the pair's file.
    example: tuple[Any, Any] | Callable[[], tuple[Any, Any]] | str | None = None
    # What it is trained on where --data names nothing else: x_train, y_train, x_test and y_test, in
    # this order or by name; a function without arguments that returns them; or the path of an .npz
    # archive.
    data: Sequence[Any] | Mapping[str, Any] | Callable[[], Any] | str | None = None
    # How many classes there are, which the networks are built for; None: as many as the labels show.
    classes: int | None = None


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
    os.environ.update(environment.jax_cache())  # JAX reads them when the pair first imports it
    place, _, name = model.rpartition(":")
    if is_path(place):
        found = getattr(_imported(place, lambda: _import_file(Path(place))), name, None)
    else:
        found = getattr(_imported(place, lambda: importlib.import_module(place)), name, None)
    if found is None:
        raise ConfigError(
            f"--model {model}: {place} has no {name}: write {name} = Pair(torch=..., flax=...) there"
        )
    if not isinstance(found, Pair):
        raise ConfigError(
            f"--model {model}: {name} in {place} is not a Pair: write PAIR = Pair(torch=..., flax=...) "
            f"there, and give {place}:PAIR"
        )
    for side in ("torch", "flax"):
        if any(kind.__name__ == "Module" for kind in type(getattr(found, side)).__mro__):
            raise ConfigError(
                f"--model {model}: its {side} is a module that is already built: give its class, or "
                "a function that builds it"
            )
    if not _is_dictionary(found.names, lambda name: isinstance(name, str)):
        raise ConfigError(
            f"--model {model}: names must be a dictionary of texts: PyTorch's name, and Flax's"
        )
    if not _is_dictionary(found.flattened, _is_shape):
        raise ConfigError(
            f"--model {model}: flattened must be a dictionary: a layer, and (channels, height, width)"
        )
    if not _is_dictionary(found.convert, callable):
        raise ConfigError(
            f"--model {model}: convert must be a dictionary: a layer, and a function from its "
            "PyTorch tensors to Flax's"
        )
    if found.loss not in LOSSES and not _are_two_functions(found.loss):
        raise ConfigError(
            f"--model {model}: loss must be one of {', '.join(LOSSES)}, or two functions of outputs "
            "and targets, PyTorch's and Flax's"
        )
    if found.classes is not None and not (type(found.classes) is int and found.classes > 1):
        raise ConfigError(f"--model {model}: classes must be a whole number of 2 or more")
    if found.optimizer is not None and not _are_two_functions(found.optimizer):
        raise ConfigError(
            f"--model {model}: optimizer must be two functions, PyTorch's and optax's, such as "
            "(torch.optim.Adamax, optax.adamax)"
        )
    return found


def beside(model: str, path: str) -> Path:
    """A path that the pair names, from the folder of its file."""
    place = model.rpartition(":")[0]
    return (Path(place).parent if is_path(place) else Path()) / path


def is_labelled(model: str) -> bool:
    """Whether the loss is a cross entropy by name, whose targets are labels."""
    return model in MODELS or load(model).loss == CROSS_ENTROPY


def class_count(model: str) -> int:
    """How many classes a user's pair says that there are; 0 where it does not."""
    return load(model).classes or 0


def has_classes(model: str, targets: np.ndarray) -> bool:
    """Whether each input has one class, and the loss is their cross entropy: then predictions are
    classes.

    Args:
        targets: (n, ...), of some samples.
    """
    return is_labelled(model) and targets.ndim == 1


def own_loss(model: str, side: str, targets: np.ndarray) -> str | Callable[..., Any] | None:
    """The loss of a user's pair for one side, "torch" or "flax": a name or a function; None where
    it is the cross entropy of one class per input.

    Args:
        targets: (n, ...), of some samples.
    """
    if model in MODELS:
        return None
    loss = load(model).loss
    if not isinstance(loss, str):
        return loss[("torch", "flax").index(side)]
    return None if has_classes(model, targets) else loss


def has_optimizer(model: str) -> bool:
    """Whether the pair defines an optimizer; none of Lockstep's own networks does."""
    return model not in MODELS and load(model).optimizer is not None


def own_optimizer(model: str, side: str) -> Callable[..., object]:
    """The function that makes the optimizer of the user's pair, of one side, "torch" or "flax".

    Raises:
        ConfigError: if the pair defines none.
    """
    found = load(model).optimizer
    if found is None:
        raise ConfigError(
            f"--optimizer pair: {model} has no optimizer: write optimizer=(PyTorch's, optax's) in its "
            "Pair"
        )
    return found[("torch", "flax").index(side)]


def _are_two_functions(found: object) -> bool:
    return isinstance(found, Sequence) and len(found) == 2 and all(map(callable, found))


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
    if model.endswith(".py"):
        raise ConfigError(f"--model {model}: say which pair in it, such as {model}:PAIR")
    if not colon or not place or not name.isidentifier():
        raise ConfigError(f"unknown model {model!r}: {did_you_mean(model, MODELS)}, or {SYNTAX}")
    if is_path(place):
        path = place
    else:
        spec = _imported(place, lambda: importlib.util.find_spec(place))
        path = None if spec is None else spec.origin
    if path is None or not os.path.isfile(path):
        missing = "is not a Python file (.py)" if os.path.exists(place) else "does not exist"
        raise ConfigError(f"--model {model}: {place} {missing}: give {SYNTAX}")
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
        raise ConfigError(f"{place} cannot be imported ({reason(error)}): fix it first") from error


def user_code_errors(
    model: str, side: str, what: str, remedy: str = ""
) -> AbstractContextManager[None]:
    """Turn any exception of a user's module into a one-line ConfigError."""
    return user_code(f"--model {model}: {side} cannot {what}", remedy)


def named(inputs: np.ndarray) -> str:
    """What inputs are, in a message."""
    return "images" if inputs.ndim == 4 else "inputs"


def logits_hint(count: int, classes: int) -> str:
    """The remedy where a network's outputs are no logits of the classes of its data."""
    return (
        f"let it give logits, {(count, classes)}, say in the pair how many classes there are, "
        "classes=..., or give it its own inputs and targets, example=(x, y), and the loss that they need"
    )


def fitting(outputs: object, targets: object) -> str:
    """What a loss was given, and the remedy where it cannot be computed."""
    from lockstep.common.model import trees  # NumPy: not for --help

    outputs, targets = (
        ", ".join(f"{name.partition('.')[2]} {tuple(leaf.shape)}".strip() for name, leaf in found)
        for found in map(trees.leaves, (outputs, targets))
    )
    return (
        f"outputs are {outputs}, targets {targets}: let them fit, or name another loss in the pair, or "
        "two functions"
    )


def check_loss(model: str, side: str, shape: Sequence[int]) -> None:
    """Raise ConfigError unless a loss of this shape is one number."""
    if tuple(shape) != ():
        raise ConfigError(
            f"--model {model}: {side}'s loss has the shape {tuple(shape)}: let it give one number, such "
            "as the mean"
        )


def check_logits(count: int, classes: int) -> None:
    """Raise ValueError if there are labels without a logit: JAX says nothing of it."""
    if count < classes:
        raise ValueError(f"{count} logits for labels from 0 to {classes - 1}")
