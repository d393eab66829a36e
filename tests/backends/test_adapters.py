"""Modules of linen and Equinox as a pair's second side, and recurrent layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

from lockstep.backends.adapters import modules as adapters
from lockstep.backends.flax_backend import convert as flax_convert
from lockstep.backends.flax_backend import user_module
from lockstep.backends.flax_backend.activations import record_activations
from lockstep.backends.flax_backend.backend import configure_determinism
from lockstep.backends.flax_backend.layers import GRUCell, LSTMCell
from lockstep.backends.torch_backend import convert
from lockstep.common.data.of_pair import task as task_of
from lockstep.common.model.checks import check_same

BOUND = 1e-12  # measured 2e-15; the mistakes below 0.0018 and more


@pytest.fixture(scope="module", autouse=True)
def float64_in_jax() -> None:
    configure_determinism("cpu")


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def network(build: Callable[..., object], inputs: Any) -> user_module.Network:
    module = adapters.adapted(adapters.built(build, 4, 0), lambda: jnp.asarray(inputs), 0)
    assert isinstance(module, nnx.Module)
    return user_module.split_module(module, {}, {})


def filled(model: nn.Module, port: user_module.Network, training: bool = False) -> Any:
    """The second side with PyTorch's tensors."""
    tensors = dict(model.named_parameters()) | convert.statistics(model)
    arrays = flax_convert.from_canonical(convert.to_canonical(model, tensors))
    shapes = {name: leaf.shape for name, leaf in (port.parameters | port.statistics).items()}
    own = {side: dict.fromkeys(shapes, "") | {n: n for n in arrays} for side in ("torch", "flax")}
    check_same({name: array.shape for name, array in arrays.items()}, shapes, own)
    graph = port.training if training else port.evaluation
    return nnx.merge(graph, flax_convert.nest(arrays, port.names), port.constants)


# --- linen


class LinenNet(linen.Module):
    classes: int
    rate: float = 0.0

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = linen.Conv(5, (3, 3), padding=1, name="conv")(x)
        x = linen.BatchNorm(use_running_average=not train, epsilon=1e-5, name="norm")(x)
        x = linen.Dropout(self.rate, deterministic=not train)(linen.relu(x))
        return linen.Dense(self.classes, name="head")(x.mean((1, 2)))


class TorchNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_a_linen_module_has_its_own_names_its_layers_are_recorded_and_it_knows_when_it_trains() -> (
    None
):
    x = drawn(2, 6, 6, 3)
    port = network(LinenNet, x)
    assert list(port.parameters) == [
        "conv.bias",
        "conv.kernel",
        "norm.bias",
        "norm.scale",
        "head.bias",
        "head.kernel",
    ]
    assert list(port.statistics) == ["norm.mean", "norm.var"]
    assert port.kinds == {"conv": "convolution", "norm": "norm", "head": "dense"}
    assert {"LinenNet", "Conv", "Dense"} <= {each.__name__ for each in port.classes}
    torch.manual_seed(0)
    model = TorchNet().double()
    images = torch.from_numpy(x).movedim(-1, 1)
    for training in (True, False):
        module = filled(model, port, training)
        model.train(training)
        before = np.asarray(nnx.state(module, nnx.BatchStat)["norm"]["mean"][...])
        with record_activations(module) as seen:
            ours = module(jnp.asarray(x))
        after = np.asarray(nnx.state(module, nnx.BatchStat)["norm"]["mean"][...])
        assert np.array_equal(before, after) != training
        assert list(seen) == [
            "input of conv",
            "conv",
            "input of norm",
            "norm",
            "input of head",
            "head",
        ]
        theirs = model(images).detach().numpy()
        assert np.abs(theirs - np.asarray(ours)).max() < BOUND
        assert (
            np.abs(model.conv(images).movedim(1, -1).detach().numpy() - seen["conv"]).max() < BOUND
        )
    wrong = filled(model, port, training=True)  # the control: statistics of the batch in evaluation
    assert np.abs(theirs - np.asarray(wrong(jnp.asarray(x)))).max() > 1e-2


def test_linen_refuses_what_draws_and_nothing_else() -> None:
    x = jnp.asarray(drawn(2, 6, 6, 3))
    port = network(lambda classes: LinenNet(classes, rate=0.5), x)
    with pytest.raises(Exception, match='needs PRNG for "dropout"'):
        filled(TorchNet().double(), port, training=True)(x)
    filled(TorchNet().double(), port)(x)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_bridged_layer_in_a_module_of_nnx_draws_only_if_its_linen_does(
    rate: float, tmp_path: Path
) -> None:
    """`ToNNX` draws a key for each call, whether linen wants it or not."""
    path = tmp_path / "bridged.py"
    path.write_text(
        "import jax.numpy as jnp, torch\n"
        "from flax import linen, nnx\n"
        "from lockstep import Pair\n"
        "def port(classes, rngs):\n"
        f"    layers = [linen.Dense(classes), linen.Dropout({rate}, deterministic=False)]\n"
        "    inner = nnx.bridge.ToNNX(linen.Sequential(layers), rngs=rngs)\n"
        "    return nnx.Sequential(lambda x: x.reshape(len(x), -1), inner.lazy_init(jnp.ones((1, 3072))))\n"
        "PAIR = Pair(torch.nn.Identity, port)\n"
    )
    built = user_module.build(f"{path}:PAIR", 4, "cpu", user_module.Exchange({}, False))
    if rate:
        with pytest.raises(Exception, match="needs PRNG"):
            user_module.validate_module(f"{path}:PAIR", built, task_of(f"{path}:PAIR", 4), None)
    else:
        user_module.validate_module(f"{path}:PAIR", built, task_of(f"{path}:PAIR", 4), None)


# --- Equinox


class EquinoxNet(eqx.Module):
    conv: eqx.nn.Conv2d
    up: eqx.nn.ConvTranspose2d
    norm: eqx.nn.GroupNorm
    attention: eqx.nn.MultiheadAttention
    blocks: list[eqx.nn.Linear]
    head: eqx.nn.Linear

    def __init__(self, classes: int, *, key: jax.Array) -> None:
        self.conv = eqx.nn.Conv2d(3, 6, 3, padding=1, key=key)
        self.up = eqx.nn.ConvTranspose2d(6, 6, 2, stride=2, key=key)
        self.norm = eqx.nn.GroupNorm(2, 6)
        biases = {f"use_{name}_bias": True for name in ("query", "key", "value", "output")}
        self.attention = eqx.nn.MultiheadAttention(2, 6, **biases, key=key)
        self.blocks = [eqx.nn.Linear(6, 6, key=key), eqx.nn.Linear(6, 6, key=key)]
        self.head = eqx.nn.Linear(6, classes, key=key)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(self.up(self.conv(x)))
        x = x.reshape(len(x), -1).T
        x = self.attention(x, x, x)
        for block in self.blocks:
            x = jax.vmap(block)(x)
        return self.head(x[0])


class TorchOfEquinox(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 6, 3, padding=1), nn.ConvTranspose2d(6, 6, 2, 2)
        self.norm = nn.GroupNorm(2, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.up(self.conv(x))).flatten(2).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@pytest.mark.slow
def test_an_equinox_module_takes_one_input_channels_first_and_its_tensors_lie_as_in_flax() -> None:
    x = drawn(2, 5, 4, 3)
    port = network(EquinoxNet, x)
    assert port.kinds["attention"] == "attention" and port.kinds["blocks.1"] == "dense"
    assert EquinoxNet in port.classes
    torch.manual_seed(0)
    model = TorchOfEquinox().double()
    images = torch.from_numpy(x).movedim(-1, 1)
    module = filled(model, port)
    with record_activations(module) as seen:
        ours = module(jnp.asarray(x))
    theirs = model(images).detach().numpy()
    assert np.abs(theirs - np.asarray(ours)).max() < BOUND
    convolved = model.conv(images).movedim(1, -1).detach().numpy()
    assert np.abs(convolved - np.asarray(seen["conv"])).max() < BOUND
    # not what the module's own vmap computes, whose values cannot leave it
    layers = ("conv", "up", "norm", "attention", "head")
    assert list(seen) == [name for layer in layers for name in (f"input of {layer}", layer)]
    convert_unflipped = {
        "up": lambda t: {"kernel": t["weight"].transpose(2, 3, 0, 1)} | {"bias": t["bias"]}
    }
    convert.attach_converts(model, convert_unflipped)  # the control
    assert np.abs(theirs - np.asarray(filled(model, port)(jnp.asarray(x)))).max() > 1e-4


def test_an_equinox_module_with_state_is_refused() -> None:
    with pytest.raises(ValueError, match="StateIndex: keep nothing from step to step"):
        adapters.adapted(eqx.nn.BatchNorm(3, "batch", mode="ema"), lambda: jnp.ones(1), 0)


# --- Recurrent layers


class Recurrent(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


class Port(nnx.Module):
    """Of each layer, `nnx.RNN`, or `nnx.Bidirectional` of two; under the names of PyTorch."""

    def __init__(self, kind: Any, layers: int, ways: int) -> None:
        cells = [
            [kind(3 if i == 0 else 4 * ways, 4, rngs=nnx.Rngs(0)) for _ in range(ways)]
            for i in range(layers)
        ]
        self.rnn = nnx.data(
            {i: {"forward_rnn": c[0], "backward_rnn": c[-1]} for i, c in enumerate(cells)}
        )
        self.ways, self.layers = ways, layers

    def __call__(self, x: Any) -> Any:
        for i in range(self.layers):
            cells: Any = self.rnn[i]
            one: Any = nnx.RNN(cells["forward_rnn"])(x)
            if self.ways == 2:
                other: Any = nnx.RNN(cells["backward_rnn"], reverse=True, keep_order=True)(x)
                one = jnp.concatenate([one, other], -1)
            x = one
        return x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        pytest.param(nn.LSTM, LSTMCell, id="LSTM"),
        pytest.param(nn.GRU, GRUCell, id="GRU"),
    ],
)
def test_a_recurrent_layer_is_followed_through_its_layers_and_directions(
    layer: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = Recurrent(layer(3, 4, num_layers=2, bidirectional=True, batch_first=True)).double()
    back = convert.to_canonical(model, dict(model.named_parameters()))
    tensors = convert.from_canonical(model, back)
    assert all(torch.equal(tensors[own], tensor) for own, tensor in model.named_parameters())
    x = drawn(2, 3, 3)
    port = network(lambda classes: Port(kind, 2, 2), x)
    theirs = model(torch.from_numpy(x)).detach().numpy()
    ours = filled(model, port)(jnp.asarray(x))
    assert ours.dtype == jnp.float64 and np.abs(theirs - np.asarray(ours)).max() < BOUND

    def other_gates(layer: Any, tensors: Any) -> Any:  # the control: the second gate first
        found = convert.recurrent(layer, tensors)
        swapped = np.r_[4:8, 0:4, 8 : 4 * found["0.forward_rnn.dense_i.kernel"].shape[-1] // 4]
        return {name: array[..., swapped] for name, array in found.items()}

    monkeypatch.setattr(convert, "CONVERTS", ((nn.RNNBase, other_gates),))
    wrong = np.asarray(filled(model, port)(jnp.asarray(x)))
    assert np.abs(theirs - wrong).max() > 1e-2


class OneBias(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.OptimizedLSTMCell(3, 4, rngs=rngs)


def test_the_one_bias_of_flaxs_cells_is_said() -> None:
    model = Recurrent(nn.LSTM(3, 4, batch_first=True)).double()
    port = network(lambda classes, rngs: OneBias(rngs), drawn(2, 3, 3))
    with pytest.raises(Exception, match="two biases, which train as one with twice the learning"):
        filled(model, port)
