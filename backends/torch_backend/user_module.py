"""From a pair to a `torch.nn.Module`. Reads next to backends/flax_backend/user_module.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lockstep.backends.torch_backend import convert
from lockstep.backends.torch_backend.inputs import Inputs
from lockstep.backends.torch_backend.layers import BatchNorm2d, LayerNorm
from lockstep.backends.torch_backend.losses import Loss, cross_entropy_of_each, of_pair
from lockstep.common.config import MODELS, Config
from lockstep.common.data import normalise
from lockstep.common.data.of_pair import task as task_of
from lockstep.common.errors import ConfigError, shorten
from lockstep.common.model import pair as pairs
from lockstep.common.model import trees
from lockstep.common.protocol import Arrays, Task

UNSUPPORTED = (nn.Bilinear,)  # layers that Flax has not
IGNORED_BUFFERS = "num_batches_tracked"  # for `momentum=None`, which Flax does not have


Kinds = Mapping[type[nn.Module], type[nn.Module]]  # of layers, by those that they replace
EXACT: Kinds = {nn.BatchNorm2d: BatchNorm2d, nn.LayerNorm: LayerNorm}
IN_FLOAT64: Kinds = {nn.BatchNorm2d: BatchNorm2d}


def exchanges(config: Config, dtype: str) -> Kinds:
    """The layers of a user's module that are replaced: none in the precisions of production, unless
    it is asked for. In float64 those whose sums are so serial that a deep network amplifies their
    rounding beyond the bound of the check."""
    return EXACT if config.exact_sums else IN_FLOAT64 if dtype == "float64" else {}


def build(model: str, classes: int, device: str, kinds: Kinds = EXACT) -> nn.Module:
    """The network that `--model` names, on the CPU, with weights that are not used.

    Args:
        kinds: of `exchanges`, for a user's module.

    Raises:
        ConfigError: if the user's network cannot be built, or cannot be compared.
    """
    network = pairs.network(model, "torch")
    if model in MODELS:
        with torch.device("meta"):  # so that PyTorch draws no random weights
            return network(classes, device)
    pair, module = pairs.load(model), build_module(model, classes)
    with pairs.user_code_errors(model, "torch", "copy its module"):
        replaced = exchanged(module, kinds)
        module = use_exact_sums(module, kinds)
    vars(module)["exchanged"] = replaced
    convert.attach_names(module, pair.names, pair.flattened, pair.convert)
    return module


def build_module(model: str, classes: int) -> nn.Module:
    """The user's module, with the weights that it draws."""
    network = pairs.network(model, "torch")
    with torch.random.fork_rng(devices=[]), pairs.user_code_errors(model, "torch", "build"):
        module = network(classes)
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"--model {model}: torch builds a {type(module).__name__}: "
            "let it build a torch.nn.Module"
        )
    return module


def exchanged(module: nn.Module, kinds: Kinds) -> list[str]:
    """The layers of the user's module that `use_exact_sums` replaces, by PyTorch's names."""
    layers = module.named_modules()
    return [name for name, layer in layers if exact_layer(layer, kinds) is not None]


def own_start(model: str, classes: int | Task, device: str, seed: int) -> Arrays:
    """The initial tensors that the user's module draws with this seed, by canonical name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build(model, task_of(model, classes).classes, device)
    return convert.to_canonical(
        module, dict(module.named_parameters()) | convert.statistics(module)
    )


def empty_copy(template: nn.Module, model: str, device: str) -> nn.Module:
    """A copy of the network on the device, to load weights into."""
    copied = copy.deepcopy(template)
    if model not in MODELS:  # it may have constants
        return copied.to(device)
    copied.to_empty(device=device)
    for buffer in copied.buffers():
        buffer.zero_()
    return copied


def use_exact_sums(module: nn.Module, kinds: Kinds = EXACT) -> nn.Module:
    """A copy of the module in which the norms of `layers`, whose sums are more exact, replace the
    library's; the module itself if it has none."""
    return exchange(module, lambda layer: exact_layer(layer, kinds))


def exchange(module: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """A copy of the module with the replacements of some layers; the module itself if none has one.

    A copy, so that plain lists and other attributes that refer to a layer get the replacement as
    well. Parameters, buffers and hooks are shared with `module`.
    """
    found = {id(layer): replacement(layer) for layer in module.modules()}
    found = {key: layer for key, layer in found.items() if layer is not None}
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo={**tensors, **found}) if found else module


def exact_layer(layer: nn.Module, kinds: Kinds) -> nn.Module | None:
    """The replacement for a norm, with all its attributes; None for other layers, and for a norm
    without one of its parameters or statistics."""
    kind = kinds.get(type(layer))
    # A layer norm has the first two only.
    parts = "weight", "bias", "running_mean", "running_var", "momentum"
    if kind is None or any(getattr(layer, part, 0) is None for part in parts):
        return None
    exact = kind.__new__(kind)
    vars(exact).update(vars(layer))
    return exact


def own_loss(config: Config, task: Task) -> Loss | None:
    """The loss of a user's pair; None if that is the cross entropy of one class per image.

    Raises:
        ConfigError: if label smoothing is asked for, and targets are not classes.
    """
    loss = pairs.own_loss(config.model, "torch", task.targets)
    if loss is not None and config.label_smoothing:
        raise ConfigError(pairs.NO_SMOOTHING)
    return None if loss is None else of_pair(loss)


def trial(task: Task, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two inputs and their targets, for a user's network."""
    images = inputs.images(normalise(task.inputs, inputs.dtype))
    images = images.to(dtype) if images.is_floating_point() else images
    return images, inputs.labels(task.targets)


def validate_module(
    model: str, module: nn.Module, task: Task, inputs: Inputs, loss: Loss | None
) -> None:
    """Raise ConfigError unless a user's network can be compared: two trials, on copies in training
    mode."""
    convert.canonical_names(module)
    for name, layer in module.named_modules():
        if isinstance(layer, UNSUPPORTED) and not convert.is_converted(module, name):
            raise ConfigError(
                f"--model {model}: torch's {name} is a {type(layer).__name__}, whose layout is not "
                f"known: add to the pair convert={{{name!r}: ...}}, a function from its tensors to "
                "Flax's"
            )
    for name, shape in convert.flattened(module).items():
        layer = dict(module.named_modules()).get(name)
        if not isinstance(layer, nn.Linear) or layer.in_features != math.prod(shape):
            raise ConfigError(
                f"--model {model}: flattened says {name} follows a flatten of {shape}, "
                "which does not fit"
            )
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    images, labels = trial(task, inputs, dtype)
    outputs, copies = [], []
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        pairs.user_code_errors(
            model,
            "torch",
            f"take {pairs.named(task.inputs)} {tuple(images.shape)}",
            pairs.DATA_HINT,
        ),
    ):
        for _ in range(2):
            copies.append(copy.deepcopy(module).train())
            before = torch.get_rng_state()
            outputs.append(copies[-1](images))
            drawn = not torch.equal(before, torch.get_rng_state())
    check_outputs(model, outputs[0], labels, task.classes, loss)
    leaves = [[leaf for _, leaf in trees.leaves(output)] for output in outputs]
    if any(bool(leaf.isnan().any()) for leaf in leaves[0]):
        raise ConfigError(f"--model {model}: torch's module gives NaN: {pairs.NAN_HINT}")
    if drawn or not all(map(torch.equal, *leaves)):
        names = [
            name
            for name, layer in module.named_modules()
            if isinstance(layer, _DropoutNd) and layer.p
        ]
        where = f" ({shorten(names)})" if names else ""
        raise ConfigError(
            f"--model {model}: torch's module draws its own random numbers{where}: {pairs.RNG_HINT}"
        )
    kept, after = convert.statistics(module), copies[0].state_dict()
    for name, tensor in module.state_dict().items():
        tracked = name in kept or name.endswith(IGNORED_BUFFERS)
        if not tracked and not torch.equal(tensor, after[name]):
            raise ConfigError(
                f"--model {model}: torch's forward pass changes {name}: {pairs.STATE_HINT}"
            )


def check_outputs(
    model: str, outputs: object, labels: Tensor, classes: int, loss: Loss | None
) -> None:
    """Raise ConfigError unless a network's outputs for two inputs have a loss."""
    if loss is None:
        shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if shape != (len(labels), classes):
            raise ConfigError(
                f"--model {model}: torch gives {shape} for {len(labels)} images: "
                f"{pairs.logits_hint(len(labels), classes)}"
            )
        if isinstance(outputs, Tensor) and not outputs.is_floating_point():
            dtype = str(outputs.dtype).removeprefix("torch.")
            raise ConfigError(f"--model {model}: torch gives {dtype}: {pairs.FLOAT_HINT}")
        return
    remedy = pairs.fitting(outputs, labels)
    with torch.no_grad(), pairs.user_code_errors(model, "torch", "compute the loss", remedy):
        if loss is cross_entropy_of_each and isinstance(outputs, Tensor):
            pairs.check_logits(outputs.shape[1 if outputs.ndim > 3 else -1], classes)
        pairs.check_loss(model, "torch", loss(outputs, labels).shape)
