"""Between PyTorch's layout and the canonical one: names, axes, and the order of rows after a
flatten. Reads next to backends/flax_backend/convert.py.

A parameter, its gradient and its momentum buffer share a shape, so the same two functions convert
all three.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lockstep.backends.torch_backend import layers
from lockstep.common.errors import ConfigError, shorten
from lockstep.common.model import layouts, trees
from lockstep.common.model import names as pair_names
from lockstep.common.model.layers import (
    ATTENTION,
    CONVOLUTION,
    DENSE,
    EMBEDDING,
    NORM,
    kind_of_class,
    kinds_by_layer,
)
from lockstep.common.model.pair import INPUT_PREFIX
from lockstep.common.protocol import Arrays, Dropout

# layers whose activations have the channels in axis 1
CHANNELS_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)
# Flax's names for PyTorch's tensors, by the kind of the layer
ROLES = (
    (_NormBase, {"weight": "scale", "running_mean": "mean", "running_var": "var"}),
    ((nn.LayerNorm, nn.GroupNorm, nn.RMSNorm), {"weight": "scale"}),
    ((_ConvNd, nn.Linear), {"weight": "kernel"}),
    (nn.Embedding, {"weight": "embedding"}),
)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
KINDS = (
    (_ConvNd, CONVOLUTION),
    (nn.Linear, DENSE),
    (NORMS, NORM),
    (nn.Embedding, EMBEDDING),
    (nn.MultiheadAttention, ATTENTION),
)


def to_canonical(model: nn.Module, tensors: Mapping[str, Tensor]) -> Arrays:
    """PyTorch tensors by PyTorch's names (`conv1.weight`) as canonical arrays by canonical names
    (`conv1.kernel`)."""
    names, moved, arrays = canonical_names(model), moved_layers(model), {}
    own = {native: to_numpy(tensor) for native, tensor in tensors.items()}
    for native, array in layouts.to_flax(own, moved).items():
        layer, _, role = native.rpartition(".")
        if native not in layouts.renamed(moved) and flax_role(model, layer, role) == "kernel":
            array = kernel_to_canonical(model, layer, array)
        arrays[names[native]] = np.ascontiguousarray(array)
    return arrays


def from_canonical(model: nn.Module, arrays: Arrays) -> dict[str, Tensor]:
    """The inverse of `to_canonical`."""
    native_names = {name: native for native, name in canonical_names(model).items()}
    moved, tensors = moved_layers(model), {}
    named = {native_names[name]: array for name, array in arrays.items()}
    for native, array in layouts.from_flax(named, moved).items():
        layer, _, role = native.rpartition(".")
        if native not in layouts.sources(moved) and flax_role(model, layer, role) == "kernel":
            array = kernel_from_canonical(model, layer, array)
        tensors[native] = to_tensor(array)
    return tensors


def canonical_names(model: nn.Module) -> dict[str, str]:
    """The canonical names of all parameters, statistics and masks of dropout, by PyTorch's own;
    those of the layers of `layouts` by the names that they have in Flax, below PyTorch's for the
    layer.

    Raises:
        ConfigError: if two tensors get one name, or the user's pair names one that does not exist.
    """
    moved = moved_layers(model)
    parameters = [name for name, _ in model.named_parameters()]
    native = [*layouts.in_order(parameters, moved), *statistics(model), *dropout_modules(model)]
    roles = {name: name.rpartition(".")[2] for name in layouts.renamed(moved)}
    roles = {n: roles.get(n) or flax_role(model, *n.rpartition(".")[::2]) for n in native}
    return pair_names.canonical_names(roles, getattr(model, "flax_names", {}), "PyTorch")


def attach_names(
    model: nn.Module,
    names: Mapping[str, str],
    flattened: Mapping[str, tuple[int, ...]],
    convert: Mapping[str, layouts.Convert] | None = None,
) -> None:
    """Attach what the user's pair says of its tensors to the module."""
    vars(model)["flax_names"] = dict(names)
    if flattened:
        vars(model)["flattened"] = dict(flattened)
    attach_converts(model, convert or {})


def flax_role(model: nn.Module, layer: str, role: str) -> str:
    """Flax's name for a tensor, by the kind of its layer, never by shapes; PyTorch's name in other
    layers."""
    kind = model.get_submodule(layer)
    return next((names.get(role, role) for kinds, names in ROLES if isinstance(kind, kinds)), role)


def layer_kinds(model: nn.Module) -> dict[str, str]:
    """What each layer is, by the class of its module and by canonical name."""
    layers = dict(model.named_modules())  # without the parts of a packed layer
    return kinds_by_layer(
        canonical_names(model), lambda layer: kind_of_class(layers.get(layer), KINDS)
    )


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running statistics of batch and instance norms, by PyTorch's names."""
    norms = [name for name, module in model.named_modules() if isinstance(module, _NormBase)]
    found = {name for norm in norms for name in (f"{norm}.running_mean", f"{norm}.running_var")}
    return {
        name: buffer for name, buffer in model.named_buffers() if name.removeprefix(".") in found
    }


def dropout_modules(model: nn.Module) -> dict[str, layers.Dropout]:
    """The dropout layers, by PyTorch's names for their masks."""
    return {
        f"{name}.mask": layer
        for name, layer in model.named_modules()
        if isinstance(layer, layers.Dropout)
    }


def dropout_layers(model: nn.Module) -> dict[str, Dropout]:
    """The dropout of each layer, by the canonical name of its mask."""
    names, found = canonical_names(model), {}
    for native, layer in dropout_modules(model).items():
        shape = tuple(layer.mask.shape[1:])
        found[names[native]] = Dropout(
            layer.rate, (*shape[1:], shape[0]) if layer.channels_first else shape
        )
    return found


def masks_from_canonical(model: nn.Module, masks: Arrays) -> dict[str, Tensor]:
    """Masks of dropout by PyTorch's names and in PyTorch's layout."""
    if not masks:
        return {}  # most networks, in every step: do not look for names
    names, tensors = canonical_names(model), {}
    for native, layer in dropout_modules(model).items():
        mask = masks[names[native]]
        tensors[native] = torch.from_numpy(
            np.moveaxis(mask, -1, -3) if layer.channels_first else mask
        )
    return tensors


def set_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the masks of the dropout layers to those from `masks_from_canonical`."""
    for native, mask in masks.items():
        model.get_submodule(native.removesuffix(".mask")).mask = mask


def cast_to_compute(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, keep: Collection[str]
) -> dict[str, Tensor]:
    """Floating-point tensors in the precision to compute in; gradients flow through.

    Args:
        keep: layers whose tensors stay as they are: batch norms, as in PyTorch's FSDP.
    """
    return {
        name: tensor.to(dtype)
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and name.rpartition(".")[0] not in keep
    }


def kernel_to_canonical(model: nn.Module, layer: str, weight: np.ndarray) -> np.ndarray:
    """OIHW to HWIO for a convolution; (out, in) to (in, out) for a dense layer.

    PyTorch flattens (channels, height, width), Flax (height, width, channels): the rows of the
    first dense kernel after a flatten are put in the other order here, so that no network has to
    transpose its activations.
    """
    if isinstance(model.get_submodule(layer), _ConvNd):
        return weight.transpose(*range(2, weight.ndim), 1, 0)
    kernel = weight.transpose(1, 0)
    if layer in flattened(model):
        channels, *others = flattened(model)[layer]
        kernel = np.moveaxis(kernel.reshape(channels, *others, -1), 0, -2).reshape(kernel.shape)
    return kernel


def kernel_from_canonical(model: nn.Module, layer: str, kernel: np.ndarray) -> np.ndarray:
    """HWIO to OIHW for a convolution; (in, out) to (out, in) for a dense layer."""
    if isinstance(model.get_submodule(layer), _ConvNd):
        return kernel.transpose(-1, -2, *range(kernel.ndim - 2))
    if layer in flattened(model):
        channels, *others = flattened(model)[layer]
        kernel = np.moveaxis(kernel.reshape(*others, channels, -1), -2, 0).reshape(kernel.shape)
    return kernel.transpose(1, 0)


def attention(layer: nn.MultiheadAttention, tensors: Arrays) -> Arrays:
    """As in `nnx.MultiHeadAttention`: one kernel each for query, key and value, (embed, heads, head
    dim), and one for the output, (heads, head dim, embed)."""
    heads, width, found = layer.num_heads, layer.embed_dim, {}
    kernels = np.split(tensors["in_proj_weight"], 3)
    for part, kernel in zip(("query", "key", "value"), kernels, strict=True):
        found[f"{part}.kernel"] = kernel.T.reshape(width, heads, -1)
    found["out.kernel"] = tensors["out_proj.weight"].T.reshape(heads, -1, width)
    if "in_proj_bias" in tensors:
        biases = np.split(tensors["in_proj_bias"], 3)
        for part, bias in zip(("query", "key", "value"), biases, strict=True):
            found[f"{part}.bias"] = bias.reshape(heads, -1)
        found["out.bias"] = tensors["out_proj.bias"]
    return found


def transposed_convolution(layer: _ConvTransposeNd, tensors: Arrays) -> Arrays:
    """As in `nnx.ConvTranspose`, which slides its kernel over the pixels; PyTorch adds the kernel
    up at each, and so has it flipped: IOHW to HWIO."""
    axes = tuple(range(2, tensors["weight"].ndim))
    kernel = np.flip(tensors["weight"], axes).transpose(*axes, 0, 1)
    return {"kernel": kernel} | {name: tensors[name] for name in tensors if name != "weight"}


def recurrent(layer: nn.RNNBase | nn.RNNCellBase, tensors: Arrays) -> Arrays:
    """As in the cells of `nnx` that compute all gates at once, in PyTorch's order: `dense_i` for the
    input, `dense_h` for the hidden state. Of several layers with the place of each, and of two
    directions as in `nnx.Bidirectional`."""
    found, several = {}, getattr(layer, "num_layers", 1) > 1
    for name, tensor in tensors.items():
        role, part, *where = name.split("_")  # weight_ih, or weight_ih_l0_reverse
        if part not in ("ih", "hh"):
            raise ValueError(f"{name}: projections have no cell in Flax")
        path = [where[0].removeprefix("l")] if several else []
        if getattr(layer, "bidirectional", False):
            path.append("backward_rnn" if where[1:] else "forward_rnn")
        path.append("dense_i" if part == "ih" else "dense_h")
        path.append("kernel" if role == "weight" else "bias")
        found[".".join(path)] = tensor.T if role == "weight" else tensor
    return found


CONVERTS = (
    (nn.MultiheadAttention, attention),
    (_ConvTransposeNd, transposed_convolution),
    ((nn.RNNBase, nn.RNNCellBase), recurrent),
)


def attach_converts(model: nn.Module, declared: Mapping[str, layouts.Convert]) -> None:
    """Attach a pair's `convert` to its module.

    Raises:
        ConfigError: if it names a layer that the module does not have.
    """
    found: dict[str, layouts.Convert] = {}
    for key, function in declared.items():
        wanted = key.split(".")
        names = [
            name for name, _ in model.named_modules() if pair_names.fits(wanted, name.split("."))
        ]
        if not names:
            raise ConfigError(
                f"the pair's convert names {key}, which PyTorch's module does not have: "
                f"its layers are {shorten(name for name, _ in model.named_modules() if name)}"
            )
        found |= dict.fromkeys(names, function)
    if found:
        vars(model)["converted"] = found


def converts(model: nn.Module) -> dict[str, layouts.Convert]:
    """By PyTorch's name for a layer, the function from its tensors to Flax's: the pair's own, or
    that of its kind."""
    found: dict[str, layouts.Convert] = dict(getattr(model, "converted", {}))
    for name, layer in model.named_modules():
        known = next((function for kind, function in CONVERTS if isinstance(layer, kind)), None)
        if known is not None and not is_converted(model, name):
            found[name] = partial(known, layer)
    return found


def is_converted(model: nn.Module, name: str) -> bool:
    """Whether the pair's `convert` has this layer, or one around it."""
    return any(layouts.is_within(name, layer) for layer in getattr(model, "converted", {}))


def moved_layers(model: nn.Module) -> dict[str, layouts.Moved]:
    """By PyTorch's name for a layer, where its parameters lie in Flax.

    Raises:
        ConfigError: if a pair's `convert` fails, or does more than move numbers.
    """
    functions = converts(model)
    if not functions:
        return {}  # most networks
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    return {
        layer: layouts.find_moved(
            layer, function, {n: s for n, s in shapes.items() if layouts.is_within(n, layer)}
        )
        for layer, function in functions.items()
    }


def activations_to_canonical(model: nn.Module, activations: Mapping[str, Tensor]) -> Arrays:
    """The recorded activations as `forward/<name>`, with canonical names and in the canonical
    layout."""
    layers = pair_names.layer_names(canonical_names(model))
    return {
        pair_names.activation_key(layers, n): activation_to_canonical(model, n, a)
        for n, a in activations.items()
    }


def outputs_to_canonical(outputs: object) -> Arrays:
    """The outputs of a network, with a name for each; those of pixels with the channels last."""
    return {
        name: np.ascontiguousarray(to_numpy(leaf.movedim(1, -1) if leaf.ndim > 3 else leaf))
        for name, leaf in trees.leaves(outputs)
    }


def activation_to_canonical(model: nn.Module, name: str, activation: Tensor) -> np.ndarray:
    """NCHW to NHWC, and a flattened NCHW to a flattened NHWC; `name` is `<layer>` or `input of
    <layer>`."""
    array = to_numpy(activation)
    layer = name.removeprefix(INPUT_PREFIX)
    if layer != name and layer in flattened(model):
        shape = array.shape
        array = np.moveaxis(array.reshape(len(array), *flattened(model)[layer]), 1, -1).reshape(
            shape
        )
    elif has_channels_first(model.get_submodule(layer), array):
        array = np.moveaxis(array, 1, -1)
    return np.ascontiguousarray(array)


def has_channels_first(layer: nn.Module, activation: np.ndarray) -> bool:
    if is_own_norm(layer):
        return channels_axis(layer, activation.shape) == 1
    return isinstance(layer, CHANNELS_FIRST)


def is_own_norm(layer: nn.Module) -> bool:
    """Whether it is a norm that is not of the library."""
    return not isinstance(layer, NORMS) and kind_of_class(layer, ()) == NORM


def channels_axis(layer: nn.Module, shape: tuple[int, ...]) -> int | None:
    """The axis of an activation of a user's own norm that has an entry for each of its parameters:
    1 or the last one; None if both could be it, or neither.

    Args:
        shape: of the activation.
    """
    sizes = {parameter.numel() for parameter in layer.parameters(recurse=False)}
    axes = {axis for axis in (1, len(shape) - 1) if axis > 0 and shape[axis] in sizes}
    return axes.pop() if len(axes) == 1 else None


def exchanged(model: nn.Module) -> dict[str, object]:
    """For the report: the layers of a user's module that were exchanged, if there are any."""
    names = getattr(model, "exchanged", [])
    return {"exchanged": names} if names else {}


def flattened(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The dense layers after a flatten, with the (channels, height, width) that it flattens."""
    return getattr(model, "flattened", {})


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy on the host; bfloat16 as ml_dtypes.bfloat16, which PyTorch does not know."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy().astype(ml_dtypes.bfloat16)
    return tensor.numpy().copy()


def to_tensor(array: np.ndarray) -> Tensor:
    """A copy as a tensor of the same dtype."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.array(array, np.float32, order="C")).bfloat16()
    # A transposed array with an axis of size 1 counts as contiguous, but has other strides than a
    # new one, which a compiled loop takes for another tensor.
    return torch.from_numpy(np.array(array, order="C"))
