"""From a pair to a `flax.nnx.Module`. Reads next to backends/torch_backend/user_module.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from lockstep.backends.adapters import modules as adapters
from lockstep.backends.flax_backend import convert, tuning
from lockstep.backends.flax_backend.inputs import Inputs
from lockstep.backends.flax_backend.layers import (
    Conv,
    Dropout,
    LayerNorm,
    Linear,
    Mask,
    attention,
    convolution,
    promote_bias,
)
from lockstep.backends.flax_backend.losses import Loss, cross_entropy_of_each, of_pair
from lockstep.common import protocol
from lockstep.common.config import MODELS, Config
from lockstep.common.data import normalise
from lockstep.common.data.of_pair import task as task_of
from lockstep.common.errors import ConfigError, shorten
from lockstep.common.model import pair, trees
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.model.layers import (
    ATTENTION,
    CONVOLUTION,
    DENSE,
    EMBEDDING,
    NORM,
    kind_of_class,
    kinds_by_layer,
)

KINDS = (
    ((nnx.Conv, nnx.ConvTranspose), CONVOLUTION),
    ((nnx.Linear, nnx.LinearGeneral), DENSE),
    ((nnx.BatchNorm, nnx.InstanceNorm, nnx.LayerNorm, nnx.GroupNorm, nnx.RMSNorm), NORM),
    (nnx.Embed, EMBEDDING),
    (nnx.MultiHeadAttention, ATTENTION),
)


class Network(NamedTuple):
    """A module split as by `nnx.split`: its structure, and its variables by kind."""

    training: nnx.GraphDef[nnx.Module]  # as `model.train()` leaves the module
    evaluation: nnx.GraphDef[nnx.Module]  # as `model.eval()` does
    # canonical names of all parameters, statistics and masks of dropout, by Flax's own
    names: dict[str, str]
    parameters: dict[str, jax.ShapeDtypeStruct]  # by canonical name
    statistics: dict[str, jax.ShapeDtypeStruct]  # by canonical name
    kinds: dict[str, str]  # of the layers, by canonical name
    classes: tuple[type, ...]  # of the module and the modules in it
    masks: dict[str, jax.Array]  # by canonical name; with these, dropout keeps everything
    dropout_layers: dict[str, protocol.Dropout]  # by the canonical names of their masks
    constants: nnx.State  # what else the module holds
    exchanged: Sequence[str] = ()  # the user's layers that compute otherwise, by Flax's names


Kinds = Mapping[type[nnx.Module], type[nnx.Module]]  # of layers, by those that they replace
LIBRARY_ATTENTION = nnx.dot_product_attention
EXACT: Kinds = {nnx.Linear: Linear, nnx.Conv: Conv, nnx.LayerNorm: LayerNorm}


class Exchange(NamedTuple):
    """Which layers of a user's module compute otherwise than they do themselves."""

    kinds: Kinds
    fast: bool  # see `exchanged`


EXACT_SUMS = Exchange(EXACT, fast=True)


def exchanges(config: Config, dtype: str) -> Exchange:
    """None in the precisions of production, unless it is asked for. In float64 those whose softmax
    is not float64, and convolutions, which are slow there."""
    return EXACT_SUMS if config.exact_sums else Exchange({}, fast=dtype == "float64")


def build(
    model: str, classes: int | protocol.Task, device: str, exchange: Exchange = EXACT_SUMS
) -> Network:
    """The network that `--model` names, without weights.

    Args:
        classes: or what the network is built for.
        exchange: of `exchanges`, for a user's module.

    Raises:
        ConfigError: if the user's network cannot be built, or cannot be compared.
    """
    network, task = pair.network(model, "flax"), task_of(model, classes)
    if model in MODELS:
        # shapes only: no weight is drawn
        module = nnx.eval_shape(lambda: network(task.classes, device, rngs=nnx.Rngs(0)))
        return split_module(module, {})
    module, declared = build_module(model, task, seed=0), declared_names(model)
    names = exchanged(module, device, *exchange)
    return split_module(module, declared, exchange.kinds)._replace(exchanged=names)


def build_module(model: str, task: protocol.Task, seed: int) -> nnx.Module:
    """The user's module, with the weights that it draws with this seed."""
    network = pair.network(model, "flax")
    with pair.user_code_errors(model, "flax", "build"):
        module = adapters.built(network, task.classes, seed)
        module = adapters.adapted(module, lambda: trial(task)[0], seed)
    if not isinstance(module, nnx.Module):
        raise ConfigError(
            f"--model {model}: flax builds a {type(module).__name__}: "
            "let it build a module of flax.nnx, flax.linen or Equinox"
        )
    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.bridge.ToNNX):
            layer.to_nnx__rngs = None  # linen refuses by itself what draws; the rest needs none
        if isinstance(layer, nnx.ConvTranspose) and layer.transpose_kernel:
            raise ConfigError(
                f"--model {model}: flax's {'.'.join(map(str, path))} has transpose_kernel=True, a "
                "layout that is not known: leave that out"
            )
        if isinstance(layer, nnx.Embed) and layer.dtype == layer.embedding[...].dtype:
            # Flax takes the parameters' dtype at the start for the one to compute in, and keeps
            # it; other layers compute in the dtype that their parameters have then.
            layer.dtype = None
    return module


def exchanged(module: nnx.Module, device: str, kinds: Kinds, fast: bool) -> list[str]:
    """Exchange, in place, how the layers of a user's module compute, and return their names; those
    of `kinds` are replaced in `split_module`.

    Args:
        fast: convolve by a matrix product where that is faster, and take the softmax of float64 in
            float64.
    """
    found = []
    for path, layer in nnx.iter_modules(module):
        replaced = exact_layer(layer, kinds) is not None
        convolve = getattr(layer, "conv_general_dilated", None)
        if fast and isinstance(layer, nnx.Conv) and convolve is jax.lax.conv_general_dilated:
            layer.conv_general_dilated, replaced = convolution(device), True
        attend = getattr(layer, "attention_fn", None)
        if fast and isinstance(layer, nnx.MultiHeadAttention) and attend is LIBRARY_ATTENTION:
            layer.attention_fn, replaced = attention, True
        found += [".".join(map(str, path))] if replaced else []
    return found


def declared_names(model: str) -> dict[str, str]:
    return {name: name for name in pair.load(model).names.values()}


def own_start(model: str, classes: int | protocol.Task, device: str, seed: int) -> protocol.Arrays:
    """The initial tensors that the user's module draws with this seed, by canonical name."""
    module = build_module(model, task_of(model, classes), seed)
    names = canonical_names(module, declared_names(model))
    parameters, statistics = nnx.state(module, nnx.Param, nnx.BatchStat)
    tensors = convert.flatten(parameters, names) | convert.flatten(statistics, names)
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def split_module(module: nnx.Module, declared: dict[str, str], kinds: Kinds = EXACT) -> Network:
    module = use_exact_sums(module, kinds)
    module.eval()
    evaluation = nnx.graphdef(module)
    module.train()
    training, parameters, statistics, _, constants = nnx.split(
        module, nnx.Param, nnx.BatchStat, Mask, ...
    )
    names, dropout_modules = canonical_names(module, declared), dropouts(module)

    def shapes(state: nnx.State) -> dict[str, jax.ShapeDtypeStruct]:
        leaves = convert.flatten(state, names)
        ordered = [name for name in names.values() if name in leaves]
        return {
            name: jax.ShapeDtypeStruct(leaves[name].shape, leaves[name].dtype) for name in ordered
        }

    dropout_layers = {
        names[native]: protocol.Dropout(layer.rate, layer.mask.shape[1:])
        for native, layer in dropout_modules.items()
    }
    masks = {name: jnp.ones((1, *dropout.shape), bool) for name, dropout in dropout_layers.items()}
    return Network(
        training,
        evaluation,
        names,
        shapes(parameters),
        shapes(statistics),
        layer_kinds(module, names),
        module_classes(module),
        masks,
        dropout_layers,
        constants,
    )


def canonical_names(module: nnx.Module, declared: dict[str, str]) -> dict[str, str]:
    """Canonical names of all parameters, statistics and masks of dropout, by Flax's own, in the
    order of their definition."""
    parameters, statistics = nnx.state(module, nnx.Param, nnx.BatchStat)
    native = [*convert.flatten(parameters), *convert.flatten(statistics), *dropouts(module)]
    return convert.canonical_names(
        sorted(native, key=lambda name: definition_order(module, name)), declared
    )


def dropouts(module: nnx.Module) -> dict[str, Dropout]:
    """The layers of dropout, by Flax's names of their masks."""
    return {
        ".".join(map(str, (*path, "mask"))): m
        for path, m in nnx.iter_modules(module)
        if isinstance(m, Dropout)
    }


def cast_constants(network: Network, dtype: np.dtype) -> Network:
    """Cast floating-point constants to this dtype, as `torch.nn.Module.to` does with buffers."""

    def cast(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return network._replace(constants=jax.tree.map(cast, network.constants))


def use_exact_sums(module: nnx.Module, kinds: Kinds = EXACT) -> nnx.Module:
    """Replace, in place, the library's layers whose gradients JAX sums in bfloat16 by those of
    `layers`, which sum in float32 and share the layers' variables. Returns the module, or its
    replacement."""
    return exchange(module, lambda layer: exact_layer(layer, kinds))


def exchange(
    module: nnx.Module, replacement: Callable[[nnx.Module], nnx.Module | None]
) -> nnx.Module:
    """Put, in place, the replacements of some layers into the module. Returns the module, or its
    replacement."""
    found = {id(layer): replacement(layer) for _, layer in nnx.iter_modules(module)}
    found = {key: layer for key, layer in found.items() if layer is not None}

    def swap(child: object) -> object:
        return tuple(map(swap, child)) if type(child) is tuple else found.get(id(child), child)

    for _, node in list(nnx.iter_graph(module)):
        children = vars(node) if isinstance(node, nnx.Module) else node
        if isinstance(children, dict):  # the attributes of a module, or a dictionary in one
            children.update({key: swap(child) for key, child in children.items()})
        elif isinstance(children, list):
            children[:] = map(swap, children)
    return found.get(id(module), module)


def exact_layer(layer: nnx.Module, kinds: Kinds) -> nnx.Module | None:
    """The replacement for a layer, with all its attributes; None for other layers, and for one with
    a dtype to compute in."""
    kind = kinds.get(type(layer))
    dtypes = [getattr(layer, name, None) for name in ("dtype", "preferred_element_type")]
    promotes = getattr(layer, "promote_dtype", None) is promote_dtype
    if kind is None or dtypes != [None, None] or not promotes:
        return None
    exact = object.__new__(kind)
    vars(exact).update(vars(layer))
    if kind is not LayerNorm:
        vars(exact)["promote_dtype"] = promote_bias
    return exact


def module_classes(module: nnx.Module) -> tuple[type, ...]:
    """The module's own class first."""
    parts = adapters.parts_of(module)
    inner = (type(each) for _, each in nnx.iter_modules(module))
    return tuple(dict.fromkeys([type(module), *inner])) if parts is None else parts.classes


def layer_kinds(module: nnx.Module, names: dict[str, str]) -> dict[str, str]:
    """What each layer is, by the class of its module and by canonical name.

    Args:
        names: of the tensors, canonical by Flax's own.
    """
    layers = {".".join(map(str, path)): layer for path, layer in nnx.iter_modules(module)}
    parts = adapters.parts_of(module)
    if parts is not None:
        return kinds_by_layer(names, lambda layer: parts.kinds.get(layer, ""))
    return kinds_by_layer(names, lambda layer: kind_of_class(layers.get(layer), KINDS))


def definition_order(module: nnx.Module, name: str) -> list[int]:
    """A key to sort variables in the order of their definition; `nnx` sorts them by name."""
    parts = adapters.parts_of(module)
    if parts is not None:
        layer = name.rpartition(".")[0]
        return [list(parts.kinds).index(layer) if layer in parts.kinds else 0]
    places, node = [], vars(module)
    for part in name.split("."):
        places.append(list(node).index(part) if part in node else 0)
        node = getattr(node.get(part), "__dict__", {})
    return places


def own_loss(config: Config, task: protocol.Task) -> Loss | None:
    """The loss of a user's pair; None if that is the cross entropy of one class per image.

    Raises:
        ConfigError: if label smoothing is asked for, and targets are not classes.
    """
    loss = pair.own_loss(config.model, "flax", task.targets)
    if loss is not None and config.label_smoothing:
        raise ConfigError(pair.NO_SMOOTHING)
    return None if loss is None else of_pair(loss)


def trial(task: protocol.Task) -> tuple[jax.Array, jax.Array]:
    """Two inputs and their targets, for a user's network."""
    inputs = Inputs(np.dtype(np.float32))
    return inputs.images(normalise(task.inputs, np.float32)), inputs.labels(task.targets)


def validate_module(model: str, network: Network, task: protocol.Task, loss: Loss | None) -> None:
    """Raise ConfigError unless a user's network can be compared: two trials, in training mode."""
    images, labels = trial(task)
    shapes = {name: leaf.shape for name, leaf in (network.parameters | network.statistics).items()}
    tensors = {
        name: jnp.asarray(array) for name, array in initial_weights(shapes, 0, "float32").items()
    }

    def merged(tensors: Mapping[str, jax.Array], constants: nnx.State) -> nnx.Module:
        nested = convert.nest({**tensors, **network.masks}, network.names)
        return nnx.merge(network.training, nested, constants)

    def forward(
        tensors: Mapping[str, jax.Array], constants: nnx.State, images: jax.Array
    ) -> tuple[object, Sequence[Mapping[str, jax.Array]]]:
        module = merged(tensors, constants)
        return module(images), kept(module)

    what = f"take {pair.named(task.inputs)} {images.shape}"
    with (
        pair.user_code_errors(model, "flax", what, pair.DATA_HINT),
        tuning.few_optimizations(),
    ):
        before = kept(merged(tensors, network.constants))
        # Traced twice, since a module may draw numbers on the host; compiled, since one program is
        # ready sooner than one for each operation.
        trials = [
            jax.jit(lambda *given: forward(*given))(tensors, network.constants, images)
            for _ in range(2)
        ]
    outputs, (after, _) = zip(*trials, strict=True)
    check_outputs(model, outputs[0], labels, task.classes, loss)
    leaves = [[leaf for _, leaf in trees.leaves(output)] for output in outputs]
    if any(bool(jnp.isnan(leaf).any()) for leaf in leaves[0]):
        raise ConfigError(f"--model {model}: flax's module gives NaN: {pair.NAN_HINT}")
    drawn, changed = map(changed_variables, before, after)
    if drawn or not all(map(np.array_equal, *leaves)):
        where = f" ({shorten(drawn)})" if drawn else ""
        raise ConfigError(
            f"--model {model}: flax's module draws its own random numbers{where}: {pair.RNG_HINT}"
        )
    if changed:
        raise ConfigError(
            f"--model {model}: flax's forward pass changes {shorten(changed)}: {pair.STATE_HINT}"
        )


def check_outputs(
    model: str, outputs: object, labels: jax.Array, classes: int, loss: Loss | None
) -> None:
    """Raise ConfigError unless a network's outputs for two inputs have a loss."""
    if loss is None:
        shape = tuple(outputs.shape) if isinstance(outputs, jax.Array) else type(outputs).__name__
        if shape != (len(labels), classes):
            raise ConfigError(
                f"--model {model}: flax gives {shape} for {len(labels)} images: "
                f"{pair.logits_hint(len(labels), classes)}"
            )
        if isinstance(outputs, jax.Array) and not jnp.issubdtype(outputs.dtype, jnp.floating):
            raise ConfigError(f"--model {model}: flax gives {outputs.dtype}: {pair.FLOAT_HINT}")
        return
    remedy = pair.fitting(outputs, labels)
    with pair.user_code_errors(model, "flax", "compute the loss", remedy):
        if loss is cross_entropy_of_each and isinstance(outputs, jax.Array):
            pair.check_logits(outputs.shape[-1], classes)
        pair.check_loss(model, "flax", loss(outputs, labels).shape)


def kept(module: nnx.Module) -> list[dict[str, jax.Array]]:
    """What a forward pass may not change: the states of random numbers, and all else but
    statistics."""
    kinds = nnx.RngState, nnx.Not((nnx.RngState, nnx.BatchStat))
    return [convert.flatten(nnx.state(module, kind)) for kind in kinds]


def changed_variables(before: Mapping[str, jax.Array], after: Mapping[str, jax.Array]) -> list[str]:
    """The names of the variables that differ between the two, or are new."""
    return [
        name
        for name, leaf in after.items()
        if name not in before or not np.array_equal(raw_bits(before[name]), raw_bits(leaf))
    ]


def raw_bits(leaf: jax.Array) -> jax.Array:
    """An array that can be compared: of random keys, their bits."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
