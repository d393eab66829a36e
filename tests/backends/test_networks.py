"""The networks of both frameworks, compared: logits, gradients and running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F

from lockstep.backends.flax_backend.models import convnext as flax_convnext
from lockstep.backends.flax_backend.models import mlp as flax_mlp
from lockstep.backends.flax_backend.models import net as flax_model
from lockstep.backends.flax_backend.models import resnet20 as flax_resnet20
from lockstep.backends.flax_backend.models import vit as flax_vit
from lockstep.backends.torch_backend.layers import Dropout
from lockstep.backends.torch_backend.models import convnext as torch_convnext
from lockstep.backends.torch_backend.models import mlp as torch_mlp
from lockstep.backends.torch_backend.models import net as torch_model
from lockstep.backends.torch_backend.models import resnet20 as torch_resnet20
from lockstep.backends.torch_backend.models import vit as torch_vit
from tests.marks import slow_except

CLASSES = 10
NETWORKS: dict[str, tuple[Any, Any]] = {
    "net": (torch_model.Net, flax_model.Net),
    "mlp": (torch_mlp.MLP, flax_mlp.MLP),
    "resnet20": (torch_resnet20.ResNet20, flax_resnet20.ResNet20),
    "convnext": (torch_convnext.ConvNeXt, flax_convnext.ConvNeXt),
    "vit": (torch_vit.ViT, flax_vit.ViT),
}
BOUND = 1e-12  # measured 1.1e-14; of the mistakes below the least shows by 5.9e-06
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Outcome(NamedTuple):
    """What a network computes, by what it is and its canonical name."""

    train: dict[str, np.ndarray]  # logits and gradients of the loss, in training mode
    statistics: dict[
        str, np.ndarray
    ]  # running mean and variance after three forward passes in training mode
    eval: dict[str, np.ndarray]  # logits and gradients with these statistics


@pytest.fixture(autouse=True)
def float64() -> None:
    jax.config.update("jax_enable_x64", True)


# --- The same numbers into both


def drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def images_and_labels(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Eight images (8, 32, 32, 3) and their labels (8,)."""
    return drawn((8, 32, 32, 3), seed), np.random.default_rng(seed).integers(0, CLASSES, 8)


def to_canonical(model: nn.Module, name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """PyTorch's name and layout as Flax's, by the kind of the layer that it belongs to."""
    layer_name, _, role = name.rpartition(".")
    layer = model.get_submodule(layer_name)
    if isinstance(layer, nn.Conv2d) and role == "weight":
        role, array = "kernel", array.transpose(2, 3, 1, 0)
    elif isinstance(layer, nn.Linear) and role == "weight":
        role, array = "kernel", array.T
        if layer_name in (unrolled := getattr(model, "flattened", {})):
            array = (
                array.reshape(*unrolled[layer_name], -1).transpose(1, 2, 0, 3).reshape(array.shape)
            )
    elif isinstance(layer, nn.BatchNorm2d | nn.LayerNorm):
        role = {"weight": "scale", "running_mean": "mean", "running_var": "var"}.get(role, role)
    return f"{layer_name}.{role}".removeprefix("."), array


def fill(model: nn.Module) -> dict[str, np.ndarray]:
    """Put random numbers into all of a network's tensors, and return them in Flax's layout and
    names."""
    arrays = {}
    for seed, (name, tensor) in enumerate(tensors_of(model).items()):
        role, array = name.rpartition(".")[2], drawn(tuple(tensor.shape), seed)
        if tensor.ndim in (2, 4):  # kernels: what comes out is as large as what goes in
            array /= np.sqrt(tensor[0].numel())
        elif role in ("weight", "running_var"):  # near 1
            array = np.exp(0.2 * array)
        tensor.data.copy_(torch.from_numpy(array))
        canonical, array = to_canonical(model, name, array)
        arrays[canonical] = array
    for name, layer in model.named_modules():
        if isinstance(layer, Dropout):
            arrays[f"{name}.mask"] = kept = (
                drawn((8, *layer.mask.shape[1:]), len(arrays)) > -1
            )  # five of six units
            layer.mask = torch.from_numpy(kept)
    return arrays


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in found.items() if is_state(name)}


def is_state(name: str) -> bool:
    return not name.endswith(("num_batches_tracked", "mask"))


def filled(model: nnx.Module, arrays: dict[str, np.ndarray], dtype: str) -> Any:
    graph, state = nnx.split(model)
    values = {
        name: array if array.dtype == bool else array.astype(dtype)
        for name, array in arrays.items()
    }
    flat = {
        path: v.replace(jnp.asarray(values[dotted(path)])) for path, v in nnx.to_flat_state(state)
    }
    assert {dotted(path) for path in flat} == set(arrays), "the same names on both sides"
    return nnx.merge(graph, nnx.from_flat_state(flat))


def dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def by_name(state: Any) -> dict[str, Any]:
    return {
        dotted(path): variable[...]
        for path, variable in nnx.to_flat_state(state)
        if is_state(dotted(path))
    }


# --- What both compute


def in_torch(network: str, dtype: str = "float64") -> tuple[Outcome, dict[str, np.ndarray]]:
    """The outcome, and the numbers that it came from, in Flax's layout."""
    model = NETWORKS[network][0](CLASSES).double()
    arrays = fill(model)
    model.to(DTYPES[dtype])

    def forward(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = images_and_labels(seed)
        logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(DTYPES[dtype]))
        assert logits.dtype == DTYPES[dtype]
        return logits, F.cross_entropy(logits, torch.from_numpy(labels))

    def computed() -> dict[str, np.ndarray]:
        logits, loss = forward(0)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = zip(names, torch.autograd.grad(loss, parameters), strict=True)
        return {
            "logits": to_numpy(logits),
            **dict(to_canonical(model, name, to_numpy(g)) for name, g in gradients),
        }

    model.train()
    train = computed()
    for seed in (1, 2):
        forward(seed)
    buffers = {name: to_numpy(b) for name, b in model.named_buffers() if is_state(name)}
    statistics = dict(to_canonical(model, name, buffer) for name, buffer in buffers.items())
    model.eval()
    return Outcome(train, statistics, computed()), arrays


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def in_flax(
    network: str,
    arrays: dict[str, np.ndarray],
    dtype: str = "float64",
    change: Callable[[Any], None] | None = None,
    train_only: bool = False,
) -> Outcome:
    """The outcome, after `change` has been made to the network; `train_only` saves a
    compilation."""
    model = filled(NETWORKS[network][1](CLASSES, "cpu", rngs=nnx.Rngs(0)), arrays, dtype)
    if change:
        change(model)

    @jax.jit
    def computed(graph: Any, parameters: Any, statistics: Any, images: Any, labels: Any) -> Any:
        def loss_of(parameters: Any) -> Any:
            model = nnx.merge(graph, parameters, statistics, copy=True)
            logits = model(images)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)
            return -chosen.mean(), (logits, nnx.split(model, nnx.Param, ...)[2])

        (_, (logits, after)), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        return {"logits": logits, **by_name(gradients)}, after

    def run(statistics: Any, seed: int) -> tuple[dict[str, np.ndarray], Any]:
        graph, parameters, _ = nnx.split(model, nnx.Param, ...)
        images, labels = images_and_labels(seed)
        found, after = computed(
            graph, parameters, statistics, jnp.asarray(images, dtype), jnp.asarray(labels)
        )
        assert {array.dtype for array in [*found.values(), *by_name(after).values()]} == {
            jnp.dtype(dtype)
        }
        return {name: np.asarray(array, np.float64) for name, array in found.items()}, after

    model.train()
    statistics = nnx.split(model, nnx.Param, ...)[2]
    train, statistics = run(statistics, 0)
    for seed in (1, 2):
        statistics = run(statistics, seed)[1]
    model.eval()
    after = {name: np.asarray(array, np.float64) for name, array in by_name(statistics).items()}
    return Outcome(train, after, {} if train_only else run(statistics, 0)[0])


def gap(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference within a tensor, over the largest number in it; of all tensors the
    largest."""
    assert one.keys() == other.keys()
    assert all(one[name].shape == other[name].shape for name in one)
    return max(
        (float(np.abs(one[name] - other[name]).max() / np.abs(one[name]).max()) for name in one),
        default=0.0,
    )


# --- The networks


@pytest.fixture(scope="module")
def originals() -> dict[str, tuple[Outcome, dict[str, np.ndarray]]]:
    return {network: in_torch(network) for network in NETWORKS}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_both_compute_the_same_network(network: str, originals: dict[str, Any]) -> None:
    original, arrays = originals[network]
    port = in_flax(network, arrays)
    assert gap(original.train, port.train) <= BOUND
    assert gap(original.statistics, port.statistics) <= BOUND
    assert gap(original.eval, port.eval) <= BOUND
    assert bool(original.statistics) == (network == "resnet20")


@pytest.mark.parametrize("network", slow_except(NETWORKS, "net", "mlp"))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_goes_in_in_a_precision_comes_out_in_it(
    network: str, dtype: str, originals: dict[str, Any]
) -> None:
    """`in_torch` and `in_flax` look at the dtypes; the logits are as near to float64's as that
    precision lets them."""
    original, arrays = originals[network]
    least, most = {"float32": (1e-8, 1e-5), "bfloat16": (1e-4, 0.1)}[
        dtype
    ]  # measured: at most 3.8e-07 and 7.3e-03
    port = in_flax(network, arrays, dtype, train_only=not original.statistics)
    for outcome in (in_torch(network, dtype)[0], port):
        assert least < gap(logits_of(original.train), logits_of(outcome.train)) <= most
        if outcome.eval:
            assert least < gap(logits_of(original.eval), logits_of(outcome.eval)) <= most


def logits_of(outcome: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"logits": outcome["logits"]}


PARAMETERS = {
    "net": 62_006,  # of PyTorch's tutorial
    "mlp": 3073 * 256 + 257 * 128 + 129 * 10,
    "resnet20": 269_722,  # the paper's table 6: 0.27 million
    # stem and its norm; blocks; norms and convolutions between stages; norm and dense layer
    "convnext": 3 * 16 * 32 + 3 * 32
    + sum(2 * (50 * c + 2 * c + 4 * c * (c + 1) + (4 * c + 1) * c + c) for c in (32, 64, 128))
    + sum(2 * c + (4 * c + 1) * 2 * c for c in (32, 64))
    + 2 * 128 + 129 * 10,
    # patches; token and positions; blocks (of the attention, three biases of four); norm and dense
    # layer
    "vit": 49 * 64 + 66 * 64 + 4 * (4 * 64 + 4 * 64 * 64 + 3 * 64 + 65 * 256 + 257 * 64) + 2 * 64 + 65 * 10,
}  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_has_the_parameters_that_its_source_states(network: str) -> None:
    original, port = NETWORKS[network]
    abstract = nnx.eval_shape(lambda: port(CLASSES, "cpu", rngs=nnx.Rngs(0)))
    sizes = [int(np.prod(v.shape)) for _, v in nnx.to_flat_state(nnx.state(abstract, nnx.Param))]
    assert (
        sum(p.numel() for p in original(CLASSES).parameters()) == sum(sizes) == PARAMETERS[network]
    )


# --- Controls: the Flax side with a mistake in it


def with_values(kind: type, **values: Any) -> Callable[[Any], None]:
    """Set attributes of every layer of a kind."""

    def change(model: Any) -> None:
        for _, module in nnx.iter_modules(model):
            if isinstance(module, kind):
                for name, value in values.items():
                    assert getattr(module, name) != value
                    setattr(module, name, value)

    return change


def same_padding(model: Any) -> None:
    """Flax's own, where it differs: with two strides it pads on one side only."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv) and module.strides == 2:
            module.padding = "SAME"


def keys_for_queries(model: Any) -> None:
    for block in model.blocks:
        query, key = block.attention.query.kernel, block.attention.key.kernel
        query[...], key[...] = key[...], query[...]


@contextmanager
def biased_running_variance() -> Iterator[None]:
    """Flax's own layer, but for its quick variance."""

    def plain(features: int, **options: Any) -> nnx.BatchNorm:
        return nnx.BatchNorm(features, use_fast_variance=False, **options)

    with mock.patch.object(flax_resnet20, "BatchNorm", plain):
        yield


def tanh_gelu() -> Any:
    gelu = nnx.gelu
    return mock.patch.object(nnx, "gelu", lambda x, approximate: gelu(x, approximate=True))


def scores_not_divided() -> Any:
    softmax = nnx.softmax
    return mock.patch.object(
        nnx, "softmax", lambda scores, axis: softmax(scores * 16**0.5, axis=axis)
    )


def softmax_over_queries() -> Any:
    softmax = nnx.softmax
    return mock.patch.object(nnx, "softmax", lambda scores, axis: softmax(scores, axis=-2))


def flattened_as_in_pytorch() -> Any:
    call = flax_mlp.MLP.__call__
    return mock.patch.object(
        flax_mlp.MLP, "__call__", lambda model, x: call(model, x.transpose(0, 3, 1, 2))
    )


# the network, what is wrong (of its layers, or around it), where it shows first, and the gap
# measured there
CONTROLS: dict[str, tuple[str, Callable | None, Callable, str, float]] = {
    "flatten": ("mlp", None, flattened_as_in_pytorch, "train", 1.4),
    "momentum swapped": (
        "resnet20",
        with_values(nnx.BatchNorm, momentum=0.1),
        nullcontext,
        "statistics",
        2.6,
    ),
    "biased running variance": ("resnet20", None, biased_running_variance, "statistics", 0.0015),
    "epsilon of batch norm": (
        "resnet20",
        with_values(nnx.BatchNorm, epsilon=1e-6),
        nullcontext,
        "train",
        0.0084,
    ),
    "padding with strides": ("resnet20", same_padding, nullcontext, "train", 2.0),
    "epsilon of layer norm": (
        "convnext",
        with_values(nnx.LayerNorm, epsilon=1e-5),
        nullcontext,
        "train",
        5.9e-06,
    ),
    "tanh gelu": ("convnext", None, tanh_gelu, "train", 0.0011),
    "tanh gelu of vit": ("vit", None, tanh_gelu, "train", 0.00077),
    "epsilon of layer norm of vit": (
        "vit",
        with_values(nnx.LayerNorm, epsilon=1e-5),
        nullcontext,
        "train",
        9e-06,
    ),
    "scores not divided": ("vit", None, scores_not_divided, "train", 5.7),
    "softmax over queries": ("vit", None, softmax_over_queries, "train", 85),
    "keys for queries": ("vit", keys_for_queries, nullcontext, "train", 1.8),
}


@pytest.mark.parametrize(
    "mistake",
    slow_except(
        CONTROLS,
        "flatten",
        "keys for queries",
    ),
)
def test_a_mistake_is_seen(mistake: str, originals: dict[str, Any]) -> None:
    network, change, around, part, measured = CONTROLS[mistake]
    original, arrays = originals[network]
    with around():
        port = in_flax(network, arrays, change=change, train_only=True)
    found = gap(getattr(original, part), getattr(port, part))
    assert found > measured / 2 > 1000 * BOUND
