"""`Run.sync`: steps that are taken again from one state tell amplified rounding from a fault that
shows late."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

import lockstep
from lockstep.common.errors import ConfigError
from lockstep.common.protocol import split_slot
from lockstep.common.recorder import replay as replays
from lockstep.common.recorder import transfer
from lockstep.common.recorder.recording import Recording, read
from lockstep.common.recorder.settings import VARIABLE, Settings
from lockstep.common.report.scripts import ScriptResult
from tests.recorder.recordings import recording

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SIDES = ("mlp_torch.py", "mlp_jax.py")
CHAOTIC = ("--lr", "2", "--steps", "400")  # rounding is amplified to 60 in 400 steps
STEP, AFTER = 2, 4  # the step that is replayed, and how many are trained
BATCHES = np.random.default_rng(0).standard_normal((AFTER, 4, 3)).astype("f4")


# --- One script goes on from the state of another


def torch_script(run: lockstep.Run, seed: int, synced: bool = True) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run.begin(model, optimizer)
    for x in BATCHES:
        if synced:
            run.sync()
        optimizer.zero_grad()
        loss = (model(run.batch(torch.tensor(x))) ** 2).mean()
        loss.backward()
        optimizer.step()
        run.step(loss)
    run.finish()


def nnx_script(run: lockstep.Run, seed: int, synced: bool = True) -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)
    run.begin(model, optimizer)
    for x in BATCHES:
        if synced:
            run.sync()
        inputs = run.batch(jnp.asarray(x))
        loss, grads = nnx.value_and_grad(lambda m, i=inputs: (m(i) ** 2).mean())(model)
        optimizer.update(model, grads)
        run.step(loss, grads=grads)
    run.finish()


def tree_script(run: lockstep.Run, seed: int, synced: bool = True) -> None:
    optimizer = optax.adamw(0.1)
    params: Any = {"w": jax.random.normal(jax.random.key(seed), (3, 2))}
    params, state = run.begin(params, optimizer.init(params))
    for x in BATCHES:
        if synced:
            params, state = run.sync(params, state)
        inputs = run.batch(jnp.asarray(x))
        loss, grads = jax.value_and_grad(lambda p, i=inputs: ((i @ p["w"]) ** 2).mean())(params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        run.step(loss, params=params, grads=grads, opt_state=state)
    run.finish()


ALL = [torch_script, nnx_script, tree_script]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recording]:
    """Runs a script with settings, and returns its recording."""
    count = 0

    def record(script: Callable[..., None], *arguments: Any, **settings: Any) -> Recording:
        nonlocal count
        count += 1
        out, path = tmp_path / f"{count}.safetensors", tmp_path / "settings.json"
        Settings(out=str(out), name="a.py", **settings).write(path)
        monkeypatch.setenv(VARIABLE, f"{os.getpid()}:{path}")
        run = lockstep.Run()
        assert run._recorder is not None
        atexit.unregister(run._recorder.close)  # some are left in the middle
        script(run, *arguments)
        return read(out)

    return record


@pytest.mark.parametrize("script", ALL)
def test_a_replay_takes_the_step_of_the_run_whose_state_it_is_given(
    script: Callable[..., None], record: Callable[..., Recording], tmp_path: Path
) -> None:
    whole = record(script, 0)
    one = record(script, 0, replay=STEP)
    assert whole.synced and one.steps == AFTER - STEP
    np.testing.assert_array_equal(one.series["loss"], whole.series["loss"][STEP:])
    assert {split_slot(name)[0] for name in one.optimizer} == {"first moment", "second moment"}

    transfer.write(one.weights | one.optimizer, tmp_path / "state.safetensors")
    state = str(tmp_path / "state.safetensors")
    other = record(script, 1, replay=STEP, state=state)
    assert other.first_steps.keys() == one.first_steps.keys()
    for key, array in one.first_steps.items():
        np.testing.assert_array_equal(other.first_steps[key], array, err_msg=key)
    # Controls: without the state another step is taken; a twin starts an ulp away from it.
    alone = record(script, 1, replay=STEP)
    twin = record(script, 1, replay=STEP, state=state, twin=1)
    for slot in ("first moment of ", "second moment of ", ""):
        keys = [key for key in one.first_steps if key.startswith(f"0/update/{slot}")]
        changes = [np.abs(alone.first_steps[k] - one.first_steps[k]).max() for k in keys]
        assert max(changes) > 1e-4, slot
    gaps = [np.abs(twin.weights[name] - one.weights[name]).max() for name in one.weights]
    assert 0 < max(gaps) < 1e-6


@pytest.mark.parametrize("script", ALL)
def test_sync_changes_nothing_where_nothing_is_replayed(
    script: Callable[..., None], record: Callable[..., Recording]
) -> None:
    without = record(script, 0, False)
    assert not without.synced
    for key, array in record(script, 0).first_steps.items():
        np.testing.assert_array_equal(without.first_steps[key], array, err_msg=key)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda run, model: run.sync(model), "run.sync was called before run.begin"),
        (
            lambda run, model: [run.begin(model, 1), run.sync(model)],
            "was given 1 of the 2 things that run.begin was given",
        ),
        (
            lambda run, model: [run.begin(model), run.batch(np.ones(3)), run.sync()],
            "run.sync was called after run.batch: call it first in each step",
        ),
    ],
    ids=["before begin", "too little", "after batch"],
)
def test_a_wrong_call_says_what_to_do(
    wrong: Callable[[lockstep.Run, nn.Module], object],
    message: str,
    record: Callable[..., Recording],
) -> None:
    with pytest.raises(ConfigError, match=message):
        record(lambda run: wrong(run, nn.Linear(1, 1)))


def test_a_pytree_must_be_given_and_a_replayed_step_be_reached(
    record: Callable[..., Recording],
) -> None:
    def nothing_given(run: lockstep.Run) -> None:
        run.begin({"w": jnp.ones(3)})
        run.sync()

    with pytest.raises(ConfigError, match=r"run.begin a pytree: give it the same"):
        record(nothing_given, replay=0)
    with pytest.raises(ConfigError, match=r"run.sync was not called at step 2: call it in each"):
        record(tree_script, 0, False, replay=STEP)


# --- Which steps are replayed


def losing(losses: list[float]) -> Recording:
    return replace(recording({}), series={"loss": np.array(losses)})


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([0] * 10, (8,)),
        ([0] * 5 + [1e-13, 2e-12, 1, 0, 0], (5, 8)),
        ([0] * 9 + [1], (8,)),
        ([0, 0, 1], (1,)),
    ],
)
def test_the_steps_round_the_first_gap_and_the_last_ones(
    gaps: list[float], expected: tuple[int, ...]
) -> None:
    ones = [1.0] * len(gaps)
    moved = [one + gap for one, gap in zip(ones, gaps, strict=True)]
    assert replays.starts((losing(ones), losing(moved))) == expected


# --- From scripts to a verdict


def check(out: Path, *arguments: str, folder: Path = SCRIPTS) -> ScriptResult:
    return lockstep.check(
        *(folder / side for side in SIDES), arguments=arguments, precision="float64", out=out
    )


@pytest.mark.slow
def test_what_twins_would_excuse_is_found_by_a_replay(tmp_path: Path) -> None:
    fault = "--fault-from", "100"
    found = check(tmp_path / "fault", *CHAOTIC, *fault)
    place = found.report["precisions"][0]["first_divergence"]
    assert found.verdict == "disagree"
    assert place is not None
    assert (place["stage"], place["tensor"].partition(" of ")[0]) == ("update", "momentum")
    assert place["step"] >= 100
    [note] = [n for n in found.report["precisions"][0]["notes"] if "replayed" in n]
    assert f"step {place['step']} was replayed on both sides" in note

    without = tmp_path / "scripts"  # the control: scripts that do not call run.sync
    without.mkdir()
    for side in SIDES:
        lines = (SCRIPTS / side).read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if "run.sync" not in line]
        assert len(kept) == len(lines) - 1
        (without / side).write_text("\n".join(kept), encoding="utf-8")
    assert check(tmp_path / "without", *CHAOTIC, *fault, folder=without).verdict == "agree"


@pytest.mark.slow
def test_rounding_that_training_amplifies_agrees_step_by_step(tmp_path: Path) -> None:
    found = check(tmp_path, *CHAOTIC)
    assert found
    comparison = found.report["precisions"][0]
    assert comparison["max_abs_loss_gap"] is not None
    assert comparison["max_abs_loss_gap"] > 1
    assert any("were replayed on both sides" in note for note in comparison["notes"])


@pytest.mark.slow
def test_a_late_fault_is_named_by_its_tensor(tmp_path: Path) -> None:
    found = check(tmp_path, "--steps", "60", "--fault-from", "30")
    place = found.report["precisions"][0]["first_divergence"]
    assert place is not None
    assert (place["step"], place["stage"]) == (30, "update")
    assert place["tensor"].startswith("momentum of")
