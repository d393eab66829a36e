"""What `lockstep.common.protocol.Backend` promises, of each backend and of the two together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from lockstep import backends
from lockstep.backends.flax_backend import backend as flax_module
from lockstep.backends.flax_backend import tuning as flax_tuning
from lockstep.backends.torch_backend import backend as torch_module
from lockstep.common import data
from lockstep.common.config import BACKENDS, DTYPES, Config, Schedule
from lockstep.common.dtypes import compute_dtype, numpy_dtype
from lockstep.common.errors import BackendError
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.protocol import Arrays, Evaluation, Snapshot
from tests.marks import slow_except

CLASSES, STEPS, BATCH = 10, 6, 4
PLAIN = Config(lr=0.05)
CALLS_FROM_C = torch.__version__ >= "2.14"  # whether PyTorch's compiled loop does
RICH = Config(
    lr=0.05,
    momentum=0.9,
    dampening=0.1,
    weight_decay=1e-3,
    schedule=Schedule("step", period=2, gamma=0.5),
)
MODULES = {"torch": torch_module, "flax": flax_module}
dtypes = pytest.mark.parametrize("dtype", DTYPES)
two_dtypes = pytest.mark.parametrize("dtype", slow_except(DTYPES, "float64", "mixed_bfloat16"))


@pytest.fixture(scope="module")
def backend(build: Callable) -> Callable:
    """Each backend, configuration and dtype is built, and so compiled, once for all tests."""
    built = {}

    def backend(name: str, config: Config = RICH, dtype: str = "float64") -> Any:
        key = name, config, dtype
        if key not in built:
            built[key] = build(name, config, dtype)
        return built[key]

    return backend


def batches(dtype: str = "float64", steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(1)
    images = generator.standard_normal((steps, BATCH, 32, 32, 3)).astype(compute_dtype(dtype))
    return images, generator.integers(0, CLASSES, (steps, BATCH))


def start(backend: Any, dtype: str = "float64") -> Snapshot:
    return Snapshot.start(initial_weights(backend.shapes(), 0, dtype))


def train(
    backend: Any, state: Any, images: np.ndarray, labels: np.ndarray
) -> tuple[Any, np.ndarray]:
    """Step by step; the metrics as an array (3, steps)."""
    history = []
    for batch, truth in zip(images, labels, strict=True):
        state, metrics = backend.train_step(state, batch, truth)
        history.append([float(value) for value in metrics])
    return state, np.array(history).T


def same(first: Arrays, second: Arrays) -> bool:
    def equal(a: np.ndarray, b: np.ndarray) -> bool:
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()

    return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)


def same_snapshot(first: Snapshot, second: Snapshot) -> bool:
    arrays = ("parameters", "model_state", "optimizer_tensors")
    rest = (first.schedule, first.step) == (second.schedule, second.step)
    return rest and all(same(getattr(first, field), getattr(second, field)) for field in arrays)


def copied(snapshot: Snapshot) -> Snapshot:
    def copy(arrays: Arrays) -> Arrays:
        return {name: array.copy() for name, array in arrays.items()}

    slots = {slot: copy(arrays) for slot, arrays in snapshot.slots.items()}
    return snapshot._replace(
        parameters=copy(snapshot.parameters), slots=slots, schedule=dict(snapshot.schedule)
    )


def gap(first: Arrays, second: Arrays) -> float:
    assert first.keys() == second.keys()
    return max(
        float(np.abs(np.subtract(first[n], second[n], dtype=np.float64)).max()) for n in first
    )


# Loading


@pytest.mark.parametrize("unknown", ["x", "", "Torch"])
def test_an_unknown_backend_is_refused_with_the_known_ones(unknown: str) -> None:
    with pytest.raises(BackendError, match="choose one of torch, flax"):
        backends.load(unknown)


def test_a_framework_that_is_not_installed_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str) -> Any:
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    with pytest.raises(
        BackendError, match=f"the {name} backend needs absent, which is not installed: pip install"
    ):
        backends.load(name)


def test_cuda_where_there_is_none_is_refused_with_the_remedy(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = flax_module.jax.devices("cpu")
    monkeypatch.setattr(flax_module.jax, "devices", lambda *_: cpu)
    with pytest.raises(BackendError, match="--device cpu"):
        backends.load(name)(PLAIN, CLASSES, "float32", "cuda")
    assert MODULES[name].choose_device("auto") == "cpu"
    assert MODULES[name].choose_device("cpu") == "cpu"


def test_auto_takes_cuda_where_there_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        platform = "gpu"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flax_module.jax, "devices", lambda *_: [Gpu()])
    assert MODULES[name].choose_device("auto") == MODULES[name].choose_device("cuda") == "cuda"
    assert MODULES[name].choose_device("cpu") == "cpu"


def test_both_backends_have_the_same_shapes(backend: Callable) -> None:
    assert backend("torch").shapes() == backend("flax").shapes()
    assert backend("torch").shapes()["conv2.kernel"] == (5, 5, 6, 16)
    assert sum(np.prod(shape) for shape in backend("torch").shapes().values()) == 62006


def test_a_backend_describes_itself(name: str, backend: Callable) -> None:
    description = backend(name).describe()
    assert description["device"] == "cpu" and name in description
    assert {type(value) for value in description.values()} <= {str, bool, int}, (
        "who reads it imports no framework"
    )
    assert backend(name).name == name and backend(name).device == "cpu"


# In and out


@two_dtypes
def test_what_is_put_in_comes_out_bit_for_bit(name: str, dtype: str, backend: Callable) -> None:
    side = backend(name, RICH, dtype)
    initial = start(side, dtype)
    assert same_snapshot(side.export(side.init(initial)), initial)
    images, labels = batches(dtype)
    trained = side.export(side.train_steps(side.init(initial), images, labels)[0])
    assert trained.step == STEPS and trained.slots["momentum"].keys() == trained.parameters.keys()
    assert same_snapshot(side.export(side.init(trained)), trained)
    assert not same_snapshot(trained, initial)  # control


def test_neither_the_states_nor_the_snapshots_share_memory(name: str, backend: Callable) -> None:
    side = backend(name)
    images, labels = batches()
    trained = side.export(train(side, side.init(start(side)), images, labels)[0])
    kept = copied(trained)
    first, second = side.init(trained), side.init(trained)
    first, _ = train(side, first, images, labels)
    assert same_snapshot(
        trained, kept
    )  # training a state does not change the snapshot it came from
    assert same_snapshot(side.export(second), kept)  # nor another state of it
    exported = side.export(second)
    for arrays in (trained.parameters, trained.slots["momentum"]):
        for array in arrays.values():
            array[...] = 0
    assert same_snapshot(
        side.export(second), kept
    )  # nor does writing into the snapshot change a state
    train(side, second, images, labels)
    assert same_snapshot(exported, kept)  # nor training a state what was exported before
    assert not same_snapshot(side.export(first), kept)  # control: training changes something


def test_without_momentum_nothing_but_the_parameters_is_kept(name: str, backend: Callable) -> None:
    side = backend(name, PLAIN)
    snapshot = side.export(train(side, side.init(start(side)), *batches(steps=1))[0])
    assert snapshot.slots == {} and snapshot.model_state == {}
    assert snapshot.schedule == {"lr": 0.05}


# Many steps

# Measured 0 everywhere; another order of the batches: 0.09. PyTorch loops over the same kernels, so
# 0 is what must be; XLA may fuse a step in a scan otherwise than alone, so some rounding is allowed
# for.
MANY_STEPS_BOUND = {
    "torch": dict.fromkeys(DTYPES, 0.0),
    "flax": {"float64": 1e-14, "float32": 1e-6, "bfloat16": 1e-2, "mixed_bfloat16": 1e-4},
}


@two_dtypes
def test_many_steps_in_one_call_are_as_many_single_steps(
    name: str, dtype: str, backend: Callable
) -> None:
    side = backend(name, RICH, dtype)
    images, labels = batches(dtype)
    one_by_one, history = train(side, side.init(start(side, dtype)), images, labels)
    at_once, metrics = side.train_steps(side.init(start(side, dtype)), images, labels)
    one_by_one, at_once = side.export(one_by_one), side.export(at_once)
    assert all(series.shape == (STEPS,) and series.dtype == np.float64 for series in metrics)
    bound = MANY_STEPS_BOUND[name][dtype]
    assert gap(one_by_one.parameters, at_once.parameters) <= bound
    assert gap(one_by_one.slots["momentum"], at_once.slots["momentum"]) <= 10 * bound
    assert np.abs(history - np.array(metrics)).max() <= 10 * bound
    assert one_by_one.schedule == at_once.schedule and one_by_one.step == at_once.step == STEPS
    other, _ = side.train_steps(
        side.init(start(side, dtype)), images[::-1].copy(), labels[::-1].copy()
    )
    assert gap(one_by_one.parameters, side.export(other).parameters) > max(bound, 1e-3)  # control


@pytest.mark.slow
def test_on_the_cpu_a_network_that_xla_convolves_takes_one_step_after_the_other(
    backend: Callable,
) -> None:
    """In a loop, XLA's convolutions are slow; the same program runs, so that the numbers are the
    same to the bit."""
    images, labels = batches("float32", steps=3)
    for model, loops in (("net", True), ("resnet20", False)):
        side = backend("flax", Config(model=model, lr=0.05, momentum=0.9), "float32")
        one_by_one, history = train(side, side.init(start(side, "float32")), images, labels)
        at_once, metrics = side.train_steps(side.init(start(side, "float32")), images, labels)
        assert (
            side._many_steps.scan_is_faster(
                at_once, (side._inputs.images(images), side._inputs.labels(labels), {})
            )
            is loops
        )
        assert np.abs(history - np.array(metrics)).max() <= (1e-5 if loops else 0)
        assert loops or same_snapshot(side.export(one_by_one), side.export(at_once))


def test_the_programs_of_a_backend_that_is_gone_are_freed(build: Callable) -> None:
    def programs() -> int:
        return len(jax.devices("cpu")[0].client.live_executables())

    side = build("flax", RICH, "float32")
    before = programs()
    side.train_step(side.init(start(side, "float32")), *(a[0] for a in batches("float32")))
    assert programs() > before  # control
    flax_tuning.free_programs()
    assert programs() < before


@pytest.mark.slow
def test_a_loop_that_copies_no_weights_is_the_same_to_the_bit(
    build: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = batches("float32")
    ends, copies = [], []
    for options in (flax_tuning.XLA, {}, {"xla_cpu_no_such_option": True}):
        monkeypatch.setattr(flax_tuning, "XLA", options)
        side = build("flax", RICH, "float32")
        loop = (
            side._many_steps._compiled_scan.lower(
                side.init(start(side, "float32")), images, labels, {}
            )
            .compile()
            .as_text()
        )
        copies.append(loop.count(" = f32[400,120]{1,0} copy("))  # the weight of `fc1`
        ends.append(
            side.export(side.train_steps(side.init(start(side, "float32")), images, labels)[0])
        )
    assert copies[0] == 0 and copies[1] == copies[2]  # of which jax 0.10 without the option has one
    assert all(same_snapshot(ends[0], end) for end in ends)
    assert (
        ends[0].step == STEPS and gap(ends[0].parameters, start(side, "float32").parameters) > 1e-3
    )  # control


def test_training_in_two_calls_is_training_in_one(name: str, backend: Callable) -> None:
    side = backend(name)
    images, labels = batches()
    half = STEPS // 2
    state, _ = side.train_steps(side.init(start(side)), images[:half], labels[:half])
    state, _ = side.train_steps(state, images[half:], labels[half:])
    whole, _ = side.train_steps(side.init(start(side)), images, labels)
    # measured 0 in both; another order of the batches: 0.09
    assert gap(side.export(state).parameters, side.export(whole).parameters) <= 1e-14


def test_bfloat16_states_stay_bfloat16(name: str, backend: Callable) -> None:
    side = backend(name, RICH, "bfloat16")
    for method in (side.train_steps, lambda *given: train(side, *given)):
        snapshot = side.export(method(side.init(start(side, "bfloat16")), *batches("bfloat16"))[0])
        for array in (snapshot.parameters | snapshot.optimizer_tensors).values():
            assert array.dtype == ml_dtypes.bfloat16


def test_mixed_precision_keeps_what_is_too_small_for_bfloat16(name: str, backend: Callable) -> None:
    config = Config(lr=1e-4, momentum=0.9)
    moved = {}
    for dtype in ("mixed_bfloat16", "bfloat16"):
        side = backend(name, config, dtype)
        before = start(side, dtype).parameters["conv1.kernel"]
        for method in (side.train_steps, lambda *given, side=side: train(side, *given)):
            snapshot = side.export(method(side.init(start(side, dtype)), *batches(dtype))[0])
            moved[dtype] = np.mean(snapshot.parameters["conv1.kernel"] != before)
            assert {
                array.dtype for array in (snapshot.parameters | snapshot.optimizer_tensors).values()
            } == {before.dtype}
    assert moved["mixed_bfloat16"] == 1
    assert moved["bfloat16"] < 0.1  # control


@pytest.mark.parametrize("model", slow_except(["net", "resnet20"], "net"))
def test_mixed_precision_computes_in_bfloat16_and_differentiates_to_float32(
    name: str, model: str, backend: Callable
) -> None:
    images, labels = (array[0] for array in batches("bfloat16"))
    found = {}
    for dtype in ("mixed_bfloat16", "bfloat16", "float32"):
        side = backend(name, Config(model=model), dtype)
        found[dtype] = side.probe(
            side.init(start(side, dtype)), images.astype(compute_dtype(dtype)), labels
        )
    mixed, half, full = (
        {key: array for key, array in arrays.items() if key.startswith(("forward/", "backward/"))}
        for arrays in found.values()
    )
    assert {array.dtype.name for key, array in mixed.items() if key.startswith("forward/")} == {
        "bfloat16"
    }
    assert {array.dtype.name for key, array in mixed.items() if key.startswith("backward/")} == {
        "float32"
    }
    # all start from the same weights, so that bfloat16's are those that mixed precision rounds for
    # its pass
    far = {key: gap({key: half[key]}, {key: full[key]}) for key in full}
    # ResNet-20's batch norms keep float32 weights, and PyTorch has another kernel for these
    for key in {"net": ("forward/conv1", "forward/logits"), "resnet20": ("forward/conv",)}[model]:
        assert gap({key: mixed[key]}, {key: half[key]}) <= 0.2 * far[key], key
        assert far[key] > 0  # control


def test_the_metrics_hold_the_learning_rate_that_each_step_used(
    name: str, backend: Callable
) -> None:
    side = backend(name)
    _, metrics = side.train_steps(side.init(start(side)), *batches())
    assert metrics.lr.tolist() == [
        0.05,
        0.05,
        0.025,
        0.025,
        0.0125,
        0.0125,
    ]  # a schedule one step late: 0.025 off
    _, history = train(side, side.init(start(side)), *batches())
    assert history[2].tolist() == metrics.lr.tolist()


def test_both_backends_train_alike(backend: Callable) -> None:
    snapshots, metrics = [], []
    for name in BACKENDS:
        side = backend(name)
        state, history = side.train_steps(side.init(start(side)), *batches())
        snapshots.append(side.export(state))
        metrics.append(np.array(history))
    # measured 2.8e-17 and 4.4e-16; without weight decay: 7.4e-05
    assert gap(snapshots[0].parameters, snapshots[1].parameters) <= 1e-13
    assert np.abs(metrics[0] - metrics[1]).max() <= 1e-13
    side = backend("torch", replace(RICH, weight_decay=0.0))
    other = side.export(side.train_steps(side.init(start(side)), *batches())[0])
    assert gap(other.parameters, snapshots[1].parameters) > 1e-9


# Measured, after six steps: parameters 2.8e-17, 1.5e-08, 2.4e-03; momentum 6.9e-17, 3.0e-08,
# 9.0e-03; metrics 4.4e-16, 2.4e-07, 5.0e-03. The compiled loop convolves as a matrix product, and
# sums in another order. The batches in another order: 0.09.
COMPILED_BOUND = {"float64": 1e-15, "float32": 1e-6, "bfloat16": 1e-2, "mixed_bfloat16": 1e-2}


# Slow: torch.compile takes half a minute for each.
@pytest.mark.slow
@dtypes
def test_a_compiled_loop_in_pytorch_is_as_many_single_steps(dtype: str, build: Callable) -> None:
    images, labels = batches(dtype)
    # With momentum and a schedule, and in one precision without.
    config = PLAIN if dtype == "float32" else replace(RICH, clip_norm=0.5, label_smoothing=0.1)
    eager, compiled = (build("torch", config, dtype, compile) for compile in ("off", "on"))
    assert compiled.describe()["compiled"] and not eager.describe()["compiled"]
    one_by_one, history = train(eager, eager.init(start(eager, dtype)), images, labels)
    torch._dynamo.utils.counters.clear()
    at_once, metrics = compiled.train_steps(compiled.init(start(compiled, dtype)), images, labels)
    # it was compiled, and a new learning rate did not compile it again
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    one_by_one, at_once, bound = (
        eager.export(one_by_one),
        compiled.export(at_once),
        COMPILED_BOUND[dtype],
    )
    assert gap(one_by_one.parameters, at_once.parameters) <= bound
    assert (
        gap(one_by_one.slots["momentum"], at_once.slots["momentum"]) <= 4 * bound
        if config.momentum
        else not at_once.slots
    )
    assert np.abs(history - np.array(metrics)).max() <= 4 * bound
    assert (one_by_one.schedule, one_by_one.step) == (at_once.schedule, at_once.step)
    other, _ = compiled.train_steps(
        compiled.init(start(compiled, dtype)), images[::-1].copy(), labels[::-1].copy()
    )
    assert gap(one_by_one.parameters, compiled.export(other).parameters) > max(
        bound, 1e-3
    )  # control


LINEAR = """
import torch
from lockstep import Pair

PAIR = Pair(torch=lambda n: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, n)), flax="-")
"""
COMPILED_AND_EAGER = """
import sys
import numpy as np
from torch._dynamo.utils import counters
from lockstep.backends.torch_backend.backend import TorchBackend
from lockstep.common.config import Config
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.protocol import Snapshot

numbers = np.random.default_rng(0)
images, labels = numbers.normal(size=(8, 2, 32, 32, 3)), numbers.integers(10, size=(8, 2))
for momentum in map(float, sys.argv[1:]):
    options = dict(steps=8, batch_size=2, lr=0.1, momentum=momentum)
    config = Config(**options, model="linear.py:PAIR", pair="").resolve(16)
    losses = []
    for compile in ("on", "off"):
        backend = TorchBackend(config, 10, "float64", "cpu", compile)
        state = backend.init(Snapshot.start(initial_weights(backend.shapes(), 0, "float64")))
        losses.append(backend.train_steps(state, images, labels)[1].loss)
    assert np.abs(losses[0] - losses[1]).max() < 1e-13  # measured: 0
    print(*(counters["inductor"].pop(f"fxgraph_cache_{found}", 0) for found in ("hit", "miss")))
"""


@pytest.mark.slow
def test_a_compiled_loop_is_found_on_disk_by_a_later_process_and_no_other_one_is(
    tmp_path: Path,
) -> None:
    (tmp_path / "linear.py").write_text(LINEAR)

    def hits_and_misses(*momenta: str) -> bytes:
        command = [sys.executable, "-c", COMPILED_AND_EAGER, *momenta]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE
        ).stdout

    assert hits_and_misses("0.9") == b"0 1\n"
    assert hits_and_misses("0.9", "0.5") == b"1 0\n0 1\n"  # the control: a loop that differs


@pytest.mark.parametrize(
    ("config", "compile", "compiled"),
    [
        pytest.param(replace(PLAIN, steps=19_999), "auto", False, id="short"),
        pytest.param(replace(PLAIN, steps=20_000), "auto", True, id="long"),
        pytest.param(
            replace(PLAIN, steps=20_000, batch_size=128),
            "auto",
            CALLS_FROM_C,
            id="long, of larger batches",
        ),
        pytest.param(
            replace(PLAIN, steps=20_000, batch_size=129), "auto", False, id="long, of large batches"
        ),
        pytest.param(
            replace(PLAIN, steps=20_000, batch_size=32, model="mlp"),
            "auto",
            False,
            id="another network",
        ),
        pytest.param(replace(PLAIN, steps=20_000), "off", False, id="long, but not wanted"),
        pytest.param(replace(PLAIN, steps=1), "on", True, id="short, but wanted"),
        pytest.param(
            replace(PLAIN, steps=20_000, schedule=Schedule("plateau")), "on", False, id="plateau"
        ),
    ],
)
def test_pytorch_compiles_long_runs_where_that_pays(
    config: Config, compile: str, compiled: bool, build: Callable
) -> None:
    assert build("torch", config, compile=compile).describe()["compiled"] is compiled


# Clipping

# Measured: 1.4e-17, 7.5e-09, 2.4e-04; without clipping: 0.11
CLIPPED_BOUND = {"float64": 1e-15, "float32": 1e-6, "bfloat16": 1e-2, "mixed_bfloat16": 1e-2}


@two_dtypes
def test_clipping_bounds_the_step_and_not_the_norm_that_is_reported(
    name: str, dtype: str, backend: Callable
) -> None:
    config, images, labels = replace(PLAIN, clip_norm=0.1), *batches(dtype)
    runs = {}
    for key, side in {
        "clipped": backend(name, config, dtype),
        "free": backend(name, PLAIN, dtype),
    }.items():
        state, metrics = side.train_steps(side.init(start(side, dtype)), images[:1], labels[:1])
        before, after = start(side, dtype).parameters, side.export(state).parameters
        moves = [
            (after[n].astype(np.float64) - before[n].astype(np.float64)) / config.lr for n in before
        ]
        runs[key] = metrics.gradient_norm[0], np.sqrt(sum(np.square(move).sum() for move in moves))
    assert runs["clipped"][0] == runs["free"][0] > 0.5
    within = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.5, "mixed_bfloat16": 1e-5}[
        dtype
    ]  # a step of few ulp
    expected = 0.1 * runs["free"][0] / (runs["free"][0] + 1e-6)
    assert runs["clipped"][1] == pytest.approx(expected, rel=within)
    assert runs["free"][1] == pytest.approx(runs["free"][0], rel=within)  # control


@two_dtypes
def test_both_backends_clip_alike(dtype: str, backend: Callable) -> None:
    images, labels = batches(dtype)
    ends = []
    for name in BACKENDS:
        side = backend(name, replace(RICH, clip_norm=0.1), dtype)
        ends.append(
            side.export(
                side.train_steps(side.init(start(side, dtype)), images, labels)[0]
            ).parameters
        )
    assert gap(*ends) <= CLIPPED_BOUND[dtype]
    side = backend("flax", RICH, dtype)
    free = side.export(
        side.train_steps(side.init(start(side, dtype)), images, labels)[0]
    ).parameters
    assert gap(ends[0], free) > 5 * CLIPPED_BOUND[dtype]  # control


# Label smoothing

# Measured: parameters 2.8e-17, losses 4.4e-16; without smoothing in one of them, 0.012 of the
# parameters
SMOOTHED_BOUND = 1e-14


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_labels_are_smoothed_by_pytorchs_formula(name: str, smoothing: float) -> None:
    generator = np.random.default_rng(0)
    logits, labels = 3 * generator.standard_normal((7, CLASSES)), generator.integers(0, CLASSES, 7)
    logarithms = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def expected(spread: float) -> float:
        return -np.mean(
            (1 - spread) * logarithms[np.arange(7), labels] + spread * logarithms.mean(axis=1)
        )

    MODULES[name].configure_determinism("cpu")
    given = (
        (torch.tensor(logits), torch.tensor(labels))
        if name == "torch"
        else (jnp.array(logits), jnp.array(labels))
    )
    assert float(MODULES[name].cross_entropy(*given, smoothing)) == pytest.approx(
        expected(smoothing), abs=1e-14
    )
    if smoothing:  # control: spread over the other classes only
        assert expected(smoothing) != pytest.approx(
            expected(smoothing * CLASSES / (CLASSES - 1)), abs=1e-3
        )


def test_both_backends_smooth_labels_alike_in_training_and_not_in_evaluation(
    backend: Callable, exam: Any
) -> None:
    smoothed, images, labels = replace(RICH, label_smoothing=0.1), *batches()
    ends, evaluations = [], []
    for name in BACKENDS:
        side, plain = backend(name, smoothed), backend(name, RICH)
        probed = side.probe(side.init(start(side)), images[0], labels[0])["loss/loss"]
        state, metrics = side.train_steps(side.init(start(side)), images, labels)
        assert metrics.loss[0] == pytest.approx(probed, abs=1e-14)
        ends.append((side.export(state).parameters, metrics.loss))
        evaluations.append(side.evaluate(state, *exam).loss)
        same = plain.init(side.export(state))  # the same weights in a run that smooths nothing
        assert evaluations[-1] == plain.evaluate(same, *exam).loss
        assert plain.probe(same, *exam)["loss/loss"] == pytest.approx(evaluations[-1], abs=1e-14)
        assert side.probe(state, *exam)["loss/loss"] != pytest.approx(
            evaluations[-1], abs=1e-4
        )  # control
    assert gap(ends[0][0], ends[1][0]) <= SMOOTHED_BOUND
    assert np.abs(ends[0][1] - ends[1][1]).max() <= SMOOTHED_BOUND
    assert abs(evaluations[0] - evaluations[1]) <= SMOOTHED_BOUND
    side = backend("flax", RICH)
    other = side.export(side.train_steps(side.init(start(side)), images, labels)[0])
    assert gap(ends[0][0], other.parameters) > 1e-4  # control


# What is on the device


@dtypes
def test_gathered_batches_are_the_normalised_images_bit_for_bit(
    name: str, dtype: str, backend: Callable
) -> None:
    side = backend(name, RICH, dtype)
    images = (
        np.resize(np.arange(256, dtype=np.uint8), (9, 32, 32, 3))
        + np.arange(9, dtype=np.uint8)[:, None, None, None]
    )
    labels, indices = np.arange(9) % CLASSES, np.array([[8, 1, 1, 4], [0, 7, 2, 3]])
    got, truth = side.batches(side.upload(images, labels), indices)
    got = side.probe(side.init(start(side, dtype)), got[1], truth[1])
    expected = data.normalise(images, compute_dtype(dtype))
    assert got["data/images"].tobytes() == expected[indices[1]].tobytes()
    assert got["data/labels"].tolist() == labels[indices[1]].tolist()
    assert got["data/images"].tobytes() != expected[indices[0]].tobytes()  # control


@dtypes
def test_gathered_batches_train_as_those_from_the_host(
    name: str, dtype: str, backend: Callable
) -> None:
    side, generator = backend(name, RICH, dtype), np.random.default_rng(3)
    images = generator.integers(0, 256, (20, 32, 32, 3), np.uint8)
    labels, indices = generator.integers(0, CLASSES, 20), generator.integers(0, 20, (STEPS, BATCH))

    def after(indices: np.ndarray, gathered: bool) -> Snapshot:
        host = data.normalise(images[indices], compute_dtype(dtype)), labels[indices]
        given = side.batches(side.upload(images, labels), indices) if gathered else host
        return side.export(side.train_steps(side.init(start(side, dtype)), *given)[0])

    assert same_snapshot(after(indices, True), after(indices, False))
    assert not same_snapshot(after(indices[::-1].copy(), True), after(indices, False))  # control


# Looking without touching


@pytest.fixture(scope="module")
def exam() -> tuple[np.ndarray, np.ndarray]:
    """Twenty images: two batches of 7 and one of 6, if a batch is 7."""
    generator = np.random.default_rng(2)
    return generator.standard_normal((20, 32, 32, 3)), generator.integers(0, CLASSES, 20)


def trained(side: Any) -> Any:
    return train(side, side.init(start(side)), *batches())[0]


def test_evaluation_is_a_mean_over_images_not_over_batches(
    name: str, backend: Callable, exam: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    side, (images, labels) = backend(name), exam
    state = trained(side)
    whole = side.evaluate(state, images, labels)
    monkeypatch.setattr(MODULES[name].tuning, "EVALUATION_BATCH", 7)
    parts = side.evaluate(state, images, labels)
    assert whole.predictions.dtype == parts.predictions.dtype == np.int64
    assert whole.predictions.shape == (20,) and np.array_equal(whole.predictions, parts.predictions)
    assert isinstance(whole.loss, float)
    assert (
        abs(whole.loss - parts.loss) <= 1e-14
    )  # measured 4.4e-16; the mean of batch means, below: 1.0e-03
    means = [side.evaluate(state, images[i : i + 7], labels[i : i + 7]).loss for i in (0, 7, 14)]
    assert abs(np.mean(means) - whole.loss) > 1e-4


def test_evaluation_is_the_argmax_and_the_cross_entropy_of_the_logits(
    name: str, backend: Callable, exam: Any
) -> None:
    side, (images, labels) = backend(name), exam
    weights = start(side)
    # without what all images have in common, their predictions differ
    weights.parameters["fc3.bias"] -= side.probe(side.init(weights), images, labels)[
        "forward/logits"
    ].mean(axis=0)
    state = side.init(weights)
    evaluation: Evaluation = side.evaluate(state, images, labels)
    logits = side.probe(state, images, labels)["forward/logits"]
    assert np.array_equal(evaluation.predictions, logits.argmax(axis=1))
    assert len(set(evaluation.predictions)) > 1
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(20), labels]
    assert (
        abs(evaluation.loss - losses.mean()) <= 1e-14
    )  # measured 4.4e-16; the sum for the mean: 44
    assert abs(evaluation.loss - losses[:-1].mean()) > 1e-4  # control: one image left out


@pytest.mark.parametrize("look", ["evaluate", "probe", "export"])
def test_looking_leaves_the_state_as_it_was(look: str, name: str, backend: Callable) -> None:
    side = backend(name)
    images, labels = batches()
    state, untouched = trained(side), trained(side)
    before = side.export(state)
    getattr(side, look)(state, *(() if look == "export" else (images[0], labels[0])))
    assert same_snapshot(side.export(state), before)
    after = side.export(train(side, state, images, labels)[0])
    assert same_snapshot(after, side.export(train(side, untouched, images, labels)[0]))
    assert not same_snapshot(after, before)  # control


def test_a_probe_foretells_the_step_that_follows(name: str, backend: Callable) -> None:
    side = backend(name, PLAIN)
    images, labels = batches()
    state = trained(side)
    before, probe = side.export(state).parameters, side.probe(state, images[0], labels[0])
    state, metrics = side.train_step(state, images[0], labels[0])
    gradients = {
        key.removeprefix("backward/"): probe[key] for key in probe if key.startswith("backward/")
    }
    assert gradients.keys() == before.keys()
    assert probe["loss/loss"].shape == ()
    # measured 0; the loss after the step: 4.2e-02
    assert abs(float(probe["loss/loss"]) - float(metrics.loss)) <= 1e-14
    later = side.probe(state, images[0], labels[0])["loss/loss"]
    assert abs(float(later) - float(metrics.loss)) > 1e-4
    moved = {key: before[key] - PLAIN.lr * gradients[key] for key in before}
    after = side.export(state).parameters
    assert gap(after, moved) <= 1e-15  # measured 1.4e-17; no step at all: 1.9e-02
    assert gap(after, before) > 1e-4
    norm = np.sqrt(sum(np.square(gradient).sum() for gradient in gradients.values()))
    largest = max(np.linalg.norm(gradient) for gradient in gradients.values())
    # measured 3.3e-16; the norm of the largest gradient alone: 4.2e-01
    assert abs(float(metrics.gradient_norm) - norm) <= 1e-14
    assert abs(largest - norm) > 1e-3


@dtypes
def test_a_probes_data_are_the_images_it_was_given(
    name: str, dtype: str, backend: Callable
) -> None:
    side = backend(name, RICH, dtype)
    images, labels = batches(dtype)
    probe = side.probe(side.init(start(side, dtype)), images[0], labels[0])
    data = {"images": images[0], "labels": labels[0]}
    assert same({key: probe[f"data/{key}"] for key in data}, data)
    flipped = {"images": images[0].swapaxes(1, 2).copy(), "labels": labels[0]}
    assert not same(
        {key: probe[f"data/{key}"] for key in data}, flipped
    )  # control: height and width exchanged


def test_both_backends_probe_alike(backend: Callable) -> None:
    images, labels = batches()
    torch_side, flax_side = backend("torch"), backend("flax")
    snapshot = torch_side.export(
        trained(torch_side)
    )  # the control: one weight of 62,006 moved by 1e-6
    first = torch_side.probe(torch_side.init(snapshot), images[0], labels[0])
    second = flax_side.probe(flax_side.init(snapshot), images[0], labels[0])
    assert [first[key].shape for key in first] == [second[key].shape for key in first]
    assert gap(first, second) <= 1e-13  # measured 1.1e-16; the control: 3.6e-08
    snapshot.parameters["conv1.kernel"][0, 0, 0, 0] += 1e-6
    other = flax_side.probe(flax_side.init(snapshot), images[0], labels[0])
    assert gap(first, other) > 1e-9


LAYERS = ("conv1", "conv2", "fc1", "fc2", "fc3")


@pytest.fixture(scope="module")
def probes(backend: Callable) -> tuple[Arrays, Arrays]:
    """Of both backends, from the same weights and for the same batch."""
    images, labels = batches()
    snapshot = backend("torch").export(trained(backend("torch")))
    sides = [backend(name) for name in BACKENDS]
    first, second = (side.probe(side.init(snapshot), images[0], labels[0]) for side in sides)
    return first, second


def activations_gap(first: Arrays, second: Arrays) -> float:
    """The largest difference of an activation relative to the largest magnitude of its layer."""
    names = [name for name in first if name.startswith("forward/")]
    assert names == [name for name in second if name.startswith("forward/")]
    return max(gap({n: first[n]}, {n: second[n]}) / np.abs(first[n]).max() for n in names)


def test_a_probe_shows_what_goes_into_and_out_of_each_layer_in_the_order_of_computation(
    probes: Any,
) -> None:
    forward = [f"forward/{what}{layer}" for layer in LAYERS for what in ("input of ", "")]
    stages = ["data/images", "data/labels", *forward, "forward/logits", "loss/loss"]
    first, second = probes
    assert list(first)[: len(stages)] == list(second)[: len(stages)] == stages
    gradients = {f"backward/{layer}.{role}" for layer in LAYERS for role in ("kernel", "bias")}
    assert set(list(first)[len(stages) :]) == set(list(second)[len(stages) :]) == gradients
    for probe in probes:
        np.testing.assert_array_equal(probe["forward/input of conv1"], probe["data/images"])
        np.testing.assert_array_equal(probe["forward/fc3"], probe["forward/logits"])
        assert probe["forward/conv2"].shape == (BATCH, 10, 10, 16)  # NHWC
        assert probe["forward/input of fc1"].shape == (BATCH, 400)


def test_both_backends_have_the_same_activations_in_the_canonical_layout(probes: Any) -> None:
    first, second = probes
    assert activations_gap(first, second) <= 1e-12  # measured 9.2e-16
    for name in first:  # the control: each activation is held to it
        if name.startswith("forward/"):
            changed = second[name].copy()
            changed.flat[-1] += 1e-9 * np.abs(changed).max()
            assert activations_gap(first, second | {name: changed}) > 1e-12


def test_what_lies_between_two_layers_is_what_the_network_says(probes: Any) -> None:
    """Rectifiers and pooling, in NumPy; the flatten in the order (height, width, channels)."""

    def pooled(x: np.ndarray) -> np.ndarray:
        n, height, width, channels = x.shape
        return np.maximum(x, 0).reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))

    for probe in probes:
        forward = {name.removeprefix("forward/"): array for name, array in probe.items()}
        np.testing.assert_array_equal(forward["input of conv2"], pooled(forward["conv1"]))
        np.testing.assert_array_equal(
            forward["input of fc1"], pooled(forward["conv2"]).reshape(BATCH, -1)
        )
        np.testing.assert_array_equal(forward["input of fc2"], np.maximum(forward["fc1"], 0))
        np.testing.assert_array_equal(forward["input of fc3"], np.maximum(forward["fc2"], 0))
        other = (
            pooled(forward["conv2"]).transpose(0, 3, 1, 2).reshape(BATCH, -1)
        )  # control: (channels, height, width)
        assert not np.array_equal(forward["input of fc1"], other)


def test_without_its_own_order_of_the_flatten_pytorchs_activations_differ(
    probes: Any, backend: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = backend("torch")
    state = trained(side)
    images, labels = batches()
    monkeypatch.setattr(torch_module.convert, "flattened", lambda model: {})
    wrong = side.probe(state, images[0], labels[0])
    differing = [
        name
        for name in wrong
        if name.startswith("forward/") and gap({name: wrong[name]}, {name: probes[1][name]}) > 1e-6
    ]
    assert differing == ["forward/input of fc1"]


def test_probing_leaves_neither_hooks_nor_wrappers_behind(name: str, backend: Callable) -> None:
    side = backend(name)
    images, labels = batches()
    state = trained(side)
    if name == "torch":
        model, record_activations = state.model, torch_module.record_activations

        def clean() -> bool:
            return not any(module._forward_hooks for module in model.modules())
    else:
        model, record_activations = (
            side._model(state.parameters, state.model_state),
            flax_module.record_activations,
        )

        def clean() -> bool:
            return all(
                isinstance(getattr(model, layer), flax_module.nnx.Module) for layer in LAYERS
            )

    side.probe(state, images[0], labels[0])
    assert clean()
    with record_activations(model):
        assert not clean()  # control: this sees them
    assert clean()
    with pytest.raises(ZeroDivisionError), record_activations(model):
        raise ZeroDivisionError
    assert clean()


def test_a_layer_that_is_called_twice_keeps_its_last_call_and_nested_layers_their_path() -> None:
    nn, nnx, jnp = torch.nn, flax_module.nnx, flax_module.jnp

    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
            self.last = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.last(self.block(x)))

    class Flax(nnx.Module):
        def __init__(self) -> None:
            self.block = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])
            self.last = nnx.Linear(2, 2, rngs=nnx.Rngs(1))

        def __call__(self, x: Any) -> Any:
            return self.last(self.last(nnx.relu(self.block[0](x))))

    for model, x, record_activations in (
        (Torch(), torch.ones(1, 2), torch_module.record_activations),
        (Flax(), jnp.ones((1, 2)), flax_module.record_activations),
    ):
        with record_activations(model) as seen:  # pyright: ignore[reportArgumentType]
            output = model(x)
        assert list(seen) == ["input of block.0", "block.0", "input of last", "last"]
        values = {what: array.tolist() for what, array in seen.items()}
        assert values["last"] == output.tolist() == model(x).tolist()
        assert values["input of last"] not in (values["block.0"], values["last"])


@two_dtypes
def test_a_network_of_zeros_has_the_loss_of_guessing(
    name: str, dtype: str, backend: Callable, exam: Any
) -> None:
    side, (images, labels) = backend(name, RICH, dtype), exam
    zeros = {key: np.zeros(shape, numpy_dtype(dtype)) for key, shape in side.shapes().items()}
    state = side.init(Snapshot.start(zeros))
    evaluation = side.evaluate(state, images.astype(compute_dtype(dtype)), labels)
    # measured 4.4e-16 in float64, 2.7e-07 in the others, whose loss is float32; log(9): 0.1
    assert abs(evaluation.loss - np.log(CLASSES)) <= (1e-14 if dtype == "float64" else 1e-6)
    assert abs(evaluation.loss - np.log(CLASSES - 1)) > 1e-2
    assert not evaluation.predictions.any()  # of equal logits the first


def test_a_backend_draws_no_random_numbers(name: str, build: Callable) -> None:
    generator, (_, words, *rest) = torch.get_rng_state(), np.random.get_state()
    side = build(name, PLAIN)
    images, labels = batches()
    state, _ = train(side, side.init(start(side)), images, labels)
    side.evaluate(state, images[0], labels[0])
    side.probe(state, images[0], labels[0])
    assert torch.equal(torch.get_rng_state(), generator)
    _, words_after, *rest_after = np.random.get_state()
    assert np.array_equal(words_after, words) and rest_after == rest
    with torch.random.fork_rng(devices=[]):
        torch.rand(1)
        assert not torch.equal(torch.get_rng_state(), generator)  # control
