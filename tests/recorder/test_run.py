"""`lockstep.Run` in a script: what is recorded of PyTorch, of JAX and of the libraries built on
it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from torch import nn

import lockstep
from lockstep.common.errors import ConfigError
from lockstep.common.recorder.recording import Recording, read
from lockstep.common.recorder.settings import VARIABLE, Settings

Start = Callable[..., lockstep.Run]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts a Run that records to `recording.safetensors`."""

    def start(**settings: Any) -> lockstep.Run:
        path = tmp_path / "settings.json"
        Settings(out=str(tmp_path / "recording.safetensors"), name="a.py", **settings).write(path)
        monkeypatch.setenv(VARIABLE, f"{os.getpid()}:{path}")
        return lockstep.Run()

    return start


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[], Recording]:
    return lambda: read(tmp_path / "recording.safetensors")


def batches(steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    draws = np.random.default_rng(0)
    return [
        (draws.standard_normal((4, 3)).astype("f4"), draws.integers(0, 2, 4)) for _ in range(steps)
    ]


def train_torch(run: lockstep.Run, steps: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run.begin(model, optimizer)
    for x, y in batches(steps):
        inputs, labels = run.batch(torch.tensor(x), torch.tensor(y))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        run.step(loss)
    run.finish(accuracy=0.5)
    return model


class Classifier(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.LayerNorm(epsilon=1e-5)(linen.Dense(5)(x))
        return linen.Dense(2)(linen.gelu(x, approximate=False))


def train_linen(run: lockstep.Run, steps: int = 3) -> None:
    model = Classifier()
    params: Any = run.begin(model.init(jax.random.key(0), jnp.zeros((1, 3))))
    optimizer = optax.adamw(0.1)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        def loss_of(params: Any) -> jax.Array:
            logits: Any = model.apply(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss, grads

    for x, y in batches(steps):
        x, y = run.batch(x, y)
        params, state, loss, grads = step(params, state, x, y)
        run.step(loss, params=params, grads=grads, opt_state=state)
    run.finish(predictions=np.arange(3))


# --- Outside a command of Lockstep


def test_outside_a_command_every_call_gives_back_what_it_was_given() -> None:
    run, model, x = lockstep.Run(), nn.Linear(2, 1), np.ones(3)
    assert run.begin(model) is model
    assert run.begin(model, x) == (model, x)
    assert run.batch(x) is x
    assert run.batch(x, x) == (x, x)
    assert run.tap("x", x) is x
    run.step(1.0)
    run.finish(accuracy=0.5)


def test_outside_a_command_a_call_takes_less_than_a_microsecond() -> None:
    run, x = lockstep.Run(), np.ones(3)
    run.begin(x)
    fastest = 1.0
    for _ in range(20):
        before = time.perf_counter()
        for _ in range(1000):
            run.batch(x, x)
            run.tap("x", x)
            run.step(x)
        fastest = min(fastest, time.perf_counter() - before)
    assert fastest / 3000 < 1e-6


def test_a_process_that_the_script_starts_records_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(VARIABLE, f"{os.getpid() + 1}:{tmp_path / 'settings.json'}")
    train_torch(lockstep.Run())
    assert not (tmp_path / "recording.safetensors").exists()


# --- PyTorch


def test_a_module_its_gradients_and_its_optimizer_are_recorded(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    model = train_torch(start())
    found = recorded()
    assert (found.framework, found.dtype, found.steps, found.complete) == ("torch", "float32", 3, 1)
    assert found.parameters == [name for name, _ in model.named_parameters()]
    assert found.layers == ["0", "1", "2", "3", "output"]
    first = found.first_steps
    assert first["0/forward/0"].shape == (4, 5)
    assert {"0/update/first moment of 0.weight", "1/update/second moment of 3.bias"} <= set(first)
    assert "2/backward/0.weight" not in first
    now = model.get_parameter("0.weight").detach()
    np.testing.assert_array_equal(found.final["0.weight"], now)
    assert found.series["loss"][0] == first["0/loss/loss"]
    assert found.series["lr"].tolist() == [0.1] * 3
    assert found.results["accuracy"] == 0.5
    assert set(found.parameter_history) == {f"3/{name}" for name in found.weights}


def test_gradients_are_those_before_clipping(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    train_torch(start())
    found = recorded().first_steps
    norm = np.sqrt(sum((g**2).sum() for key, g in found.items() if key.startswith("0/backward")))
    assert norm > 0.1  # clipped to 1e-3
    moment = found["0/update/first moment of 3.weight"]
    assert np.abs(moment).max() < 1e-3  # made of the clipped ones


def test_a_float64_run_is_float64_everywhere(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    train_torch(start(dtype="float64"))
    found = recorded()
    assert found.dtype == "float64"
    assert {a.dtype for a in found.first_steps.values() if a.dtype.kind == "f"} <= {
        np.dtype("f8"),
        np.dtype("f4"),  # the batch, as the script gave it
    }
    assert found.pinned == []


def test_what_is_float32_in_a_float64_run_is_named(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    class Pinned(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).float()

    model = Pinned(3, 2)
    run = start(dtype="float64")
    run.begin(model)
    x = run.batch(np.ones((4, 3), "f4"))
    model(torch.tensor(x)).sum().backward()
    run.step(1.0)
    run.finish()
    assert recorded().pinned == ["forward/output"]


def test_a_twin_starts_an_ulp_away_and_sees_other_batches(
    start: Start, recorded: Callable[[], Recording], tmp_path: Path
) -> None:
    train_torch(start())
    run = recorded()
    (tmp_path / "recording.safetensors.run").unlink()
    train_torch(start(twin=1))
    twin = recorded()
    moved = [np.abs(run.weights[n] - twin.weights[n]).max() for n in ("0.weight", "3.weight")]
    assert all(0 < distance < 1e-6 for distance in moved)
    # Digests are those of the batches as the script gave them.
    np.testing.assert_array_equal(run.batch_digests["batch[0]"], twin.batch_digests["batch[0]"])
    assert 0 < np.abs(run.series["loss"] - twin.series["loss"]).max() < 1e-5


def test_two_models_with_an_optimizer_each_keep_their_names_apart(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    one, two = nn.Linear(2, 1), nn.Linear(2, 1)
    first, second = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (one, two))
    run = start()
    run.begin(one, first, two, second)
    for _ in range(2):
        x = torch.ones(3, 2)
        for optimizer, loss in ((first, one(x).sum()), (second, (one(x) + two(x)).sum())):
            one.zero_grad()
            two.zero_grad()
            loss.backward()
            optimizer.step()
        run.step({"one": 1.0, "two": 2.0})
    run.finish()
    found = recorded()
    assert found.parameters == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert found.losses == ["one", "two"]
    assert "1/update/momentum of 1.weight" in found.first_steps


# --- JAX


def test_a_linen_script_is_recorded_down_to_its_layers(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    train_linen(start())
    found = recorded()
    assert found.framework == "jax"
    assert found.layers == ["Dense_0", "LayerNorm_0", "Dense_1", "output"]
    assert found.first_steps["1/forward/LayerNorm_0"].shape == (4, 5)
    assert "0/update/first moment of params.Dense_0.kernel" in found.first_steps
    assert set(found.final) == set(found.weights)
    assert found.results["predictions"].tolist() == [0, 1, 2]


def test_taps_record_under_jit_grad_and_scan(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    run = start()
    params = run.begin({"w": jnp.ones(3)})

    @jax.jit
    def step(params: Any, xs: jax.Array) -> Any:
        def loss_of(params: Any) -> jax.Array:
            def body(carry: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
                return run.tap("carry", carry + params["w"] @ x), None

            total, _ = jax.lax.scan(body, jnp.zeros(()), xs)
            return run.tap("total", total * 2)

        return jax.value_and_grad(loss_of)(params)

    for i in range(3):
        loss, grads = step(params, jnp.full((4, 3), i + 1.0))
        run.step(loss, grads=grads)
    run.finish()
    found = recorded().first_steps
    assert [found[f"{i}/forward/total"].item() for i in range(2)] == [24.0, 48.0]
    assert found["0/forward/carry"].item() == 12.0  # of the last call


def test_of_two_taps_in_one_program_the_later_counts_whichever_arrives_first(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    """XLA computes what does not depend on each other in any order: here the second is sooner."""
    run = start()
    run.begin({"w": jnp.ones(3)})

    @jax.jit
    def step(x: jax.Array) -> jax.Array:
        slow = jax.lax.fori_loop(0, 200, lambda _, m: jnp.tanh(m @ m), jnp.eye(200) * x)
        return run.tap("x", slow.sum() * 0 + 1.0) + run.tap("x", x + 1.0)

    for i in range(2):
        run.step(step(jnp.float32(1.0 + i)))
    run.finish()
    found = recorded().first_steps
    assert [found[f"{i}/forward/x"].item() for i in range(2)] == [2.0, 3.0]


def test_a_tap_inside_vmap_says_why_it_records_nothing(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    run = start()
    run.begin({"w": jnp.ones(3)})
    jax.vmap(lambda x: run.tap("inside", x * 2))(jnp.ones((4, 3)))
    run.step(1.0)
    run.finish()
    assert recorded().notes == ["'inside' is inside jax.vmap and is not recorded: tap it outside"]


def test_nnx_objects_are_recorded_without_further_arguments(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    run = start(twin=1)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    before = np.array(model.kernel[...])
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)
    run.begin(model, optimizer)
    assert 0 < np.abs(before - np.array(model.kernel[...])).max() < 1e-6

    @nnx.jit
    def step(model: nnx.Linear, optimizer: nnx.Optimizer, x: jax.Array) -> Any:
        loss, grads = nnx.value_and_grad(lambda m: (m(x) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss, grads

    for x, _ in batches(2):
        loss, grads = step(model, optimizer, run.batch(x))
        run.step(loss, grads=grads)
    run.finish()
    found = recorded()
    assert sorted(found.parameters) == ["bias", "kernel"]
    assert {"0/backward/kernel", "0/update/first moment of kernel", "1/update/bias"} <= set(
        found.first_steps
    )
    assert np.abs(found.first_steps["0/update/kernel"] - before).max() > 0.05


def test_an_embedding_of_nnx_computes_in_the_precision_of_its_weights(start: Start) -> None:
    """Left alone it would round float64 weights to the precision of its construction."""
    free = nnx.Embed(5, 3, rngs=nnx.Rngs(0))
    pinned = nnx.Embed(5, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    with jax.enable_x64(True):
        start(dtype="float64").begin(free, pinned)
        assert free.embedding.dtype == free(jnp.arange(5)).dtype == jnp.float64
        assert pinned(jnp.arange(5)).dtype == jnp.bfloat16


def test_each_optimizer_of_nnx_belongs_to_its_own_module(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    """Modules alike but for a width, and their optimizers in another order."""
    run = start()
    models = [nnx.Linear(3, width, rngs=nnx.Rngs(0)) for width in (2, 3)]
    one, two = (nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param) for model in models)
    run.begin(*models, two, one)
    loss, grads = nnx.value_and_grad(lambda a, b: (a.bias[...] * 2).sum(), argnums=(0, 1))(*models)
    one.update(models[0], grads[0])
    two.update(models[1], grads[1])
    run.step(loss, grads=grads)
    run.finish()
    found = recorded().first_steps
    assert found["0/backward/0.bias"].tolist() == [2, 2]
    assert found["0/update/first moment of 0.bias"] == pytest.approx([0.2, 0.2])
    assert found["0/update/first moment of 1.bias"].tolist() == [0, 0, 0]


def test_each_optax_state_belongs_to_its_own_parameters(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    run = start()
    params = run.begin({"w": jnp.ones(3)}, {"w": jnp.ones(3)})
    adam = optax.chain(optax.clip(9.0), optax.adam(0.1))
    grads = ({"w": jnp.ones(3)}, {"w": 2 * jnp.ones(3)})
    states = [adam.update(g, adam.init(p))[1] for g, p in zip(grads, params, strict=True)]
    run.step(1.0, params=params, grads=grads, opt_state=tuple(states))
    run.finish()
    found = recorded().first_steps
    assert found["0/update/first moment of 0.w"] == pytest.approx(0.1 * np.ones(3))
    assert found["0/update/first moment of 1.w"] == pytest.approx(0.2 * np.ones(3))


# --- The scalars of an optimizer in a twin


def adam_in_torch(run: lockstep.Run) -> np.ndarray:
    """A bias of 0 after one update: it has no ulp to be moved by."""
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    run.begin(model, optimizer)
    model.bias.grad = torch.ones(1)
    optimizer.step()
    run.step(0.0)
    run.finish()
    assert optimizer.param_groups[0]["lr"] == 1.0
    return model.bias.detach().double().numpy()


def adam_in_jax(run: lockstep.Run) -> np.ndarray:
    params = run.begin({"bias": jnp.zeros(1, jnp.float32)})
    adam = optax.adam(1.0)
    updates: Any = adam.update({"bias": jnp.ones(1, jnp.float32)}, adam.init(params))[0]
    run.step(0.0)
    run.finish()
    return np.asarray(updates["bias"], np.float64)


@pytest.mark.parametrize("adam", [adam_in_torch, adam_in_jax])
def test_a_twin_moves_adams_scalars_by_what_float32_rounds_of_them(
    start: Start, adam: Callable[[lockstep.Run], np.ndarray], tmp_path: Path
) -> None:
    """1 - 0.999 is off by up to 6e-5 of it in float32, which moves an update by half of that."""
    moved = []
    for twin in (None, 1, 2, 3, None):
        moved.append(adam(start(twin=twin)).item() + 1)
        (tmp_path / "recording.safetensors.run").unlink()
    gaps = np.array(moved[1:]) - moved[0]
    assert np.all((np.abs(gaps[:3]) > 1e-6) & (np.abs(gaps[:3]) < 3.5e-5)), gaps
    assert len({*gaps[:3]}) == 3
    assert gaps[3] == 0, "a run that is no twin moves nothing"


# --- Random numbers


def test_random_numbers_are_a_function_of_seed_step_and_name(start: Start) -> None:
    plain, recording = lockstep.Run(), start()
    for run in (plain, recording):
        run.begin(nn.Linear(2, 1))
    draws = [[run.random("noise", (2, 3)) for _ in range(2)] for run in (plain, recording)]
    assert all(isinstance(numbers, torch.Tensor) for numbers in draws[0])
    assert torch.equal(draws[0][0], draws[1][0])
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not torch.equal(draws[0][0], plain.random("other", (2, 3)))
    plain.step(1.0)
    assert not torch.equal(draws[0][0], plain.random("noise", (2, 3)))
    uniform = plain.random("u", (1000,), kind="uniform")
    assert 0 <= uniform.min() < uniform.max() < 1


def test_random_numbers_in_jit_are_refused() -> None:
    run = lockstep.Run()
    run.begin({"w": jnp.ones(2)})
    with pytest.raises(ConfigError, match=r"inside jax\.jit would give the same numbers"):
        jax.jit(lambda x: x + run.random("noise", (2,)))(jnp.ones(2))


# --- Limits, and wrong use


def test_beyond_the_limit_fingerprints_are_kept(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    run = start(limit=10**6)
    run.begin({"w": np.arange(60_000.0, dtype="f4"), "v": jnp.arange(400_000.0)})
    run.step(1.0)
    run.finish()
    found = recorded()
    assert found.fingerprints == ["weights/v"]
    assert found.weights["w"].shape == (60_000,)
    np.testing.assert_allclose(found.weights["v"][[0, 5]], [400_000, 399_999])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda run: run.step(1.0), "run.step was called before run.begin"),
        (lambda run: run.batch(np.ones(3)), "run.batch was called before run.begin"),
        (lambda run: run.begin(), "was given nothing"),
        (lambda run: [run.begin(nn.Linear(1, 1)) for _ in "ab"], "called twice"),
        (lambda run: run.begin(nn.ReLU()), "found no parameters"),
        (lambda run: lockstep.Run(), r"lockstep.Run\(\) was called twice"),
        (
            lambda run: [run.begin(nn.Linear(1, 1)), run.step(torch.ones(3))],
            r"loss has the shape \(3,\): give it a scalar",
        ),
    ],
    ids=["step first", "batch first", "nothing", "twice", "no parameters", "two runs", "a vector"],
)
def test_wrong_calls_say_what_to_do(
    start: Start, wrong: Callable[[lockstep.Run], object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        wrong(start())


def test_the_script_ends_after_the_steps_that_were_asked_for(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    with pytest.raises(SystemExit):
        train_torch(start(steps=2))
    assert (recorded().steps, recorded().complete) == (2, True)


def test_a_script_without_finish_is_recorded_at_its_end(
    start: Start, recorded: Callable[[], Recording]
) -> None:
    run = start()
    run.begin(nn.Linear(2, 1))
    run.step(1.0)
    assert run._recorder is not None
    run._recorder.close()  # as at exit
    assert (recorded().steps, recorded().complete) == (1, False)


class Pair(NamedTuple):
    left: Any
    right: Any


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_the_arrays_of_a_batch_have_one_name_in_both_frameworks(
    framework: str, start: Start, recorded: Callable[[], Recording]
) -> None:
    run = start()
    array = torch.tensor if framework == "torch" else jnp.asarray
    run.begin(nn.Linear(1, 1) if framework == "torch" else {"kernel": jnp.ones((1, 1))})
    ones, twos = array([1.0]), array([2.0])
    run.batch(ones, {"image": ones, "views": [ones, twos]}, Pair(ones, twos))
    run.step(ones.sum())
    run.finish(scores={"first": twos})
    found = recorded()
    assert set(found.batch_digests) == {
        "batch[0]", "batch[1].image", "batch[1].views[0]", "batch[1].views[1]", "batch[2].left",
        "batch[2].right",
    }  # fmt: skip
    assert list(found.results) == ["scores.first"]
