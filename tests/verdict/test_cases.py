"""Correct pairs that were called different, and a pair next to each that is."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from torch import nn

from lockstep import backends, same_run
from lockstep.backends.faults import inject, named
from lockstep.backends.flax_backend import losses
from lockstep.backends.torch_backend import convert
from lockstep.backends.torch_backend.user_module import own_start
from lockstep.cli import main
from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.evidence import faults, judge, pair_check, train_ensemble
from lockstep.common.evidence.initialisation import compare_starts
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.model.pair import source_digest
from lockstep.common.protocol import Arrays, Backend, Snapshot
from lockstep.common.verdict import arithmetic


def case(name: str) -> str:
    return f"{Path(__file__).with_name(name)}:PAIR"


def resolved(digits: Dataset, name: str = "scale_before_norm.py") -> Config:
    model = case(name)
    config = Config(model=model, pair=source_digest(model), steps=4, batch_size=16, lr=0.01)
    return config.resolve(len(digits.train_images))


def both(config: Config) -> dict[str, Backend]:
    return {name: backends.load(name)(config, 10, "float64", "cpu", "off") for name in BACKENDS}


@pytest.fixture(scope="module")
def sides(digits: Dataset) -> dict[str, Backend]:
    return both(resolved(digits))


@pytest.mark.slow
def test_a_gradient_that_cancels_is_judged_by_twins_in_the_first_step(
    digits: Dataset, sides: dict[str, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, (torch, flax) = resolved(digits), sides.values()
    assert pair_check.measure(torch, flax, config, digits).first_difference is None
    ensembles = {
        name: train_ensemble(side, config, digits, "float64", 0) for name, side in sides.items()
    }
    found = judge(ensembles, sides, config, digits)
    assert found.verdict == "agree", found
    # The control: the same small share of a gradient that does not cancel.
    probe: Callable = flax.probe

    def wrong(state: object, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        tensors = dict(probe(state, images, labels))
        tensors["backward/head.kernel"] = tensors["backward/head.kernel"] * (1 + 1e-11)
        return tensors

    monkeypatch.setattr(flax, "probe", wrong)
    first = pair_check.measure(torch, flax, config, digits).first_difference
    assert first is not None and first.divergence.stage == "backward"
    assert first.divergence.tensor == "head.kernel"


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [False, True])
def test_an_embedding_computes_in_the_precision_of_its_parameters(
    pinned: bool, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`nnx.Embed` keeps the dtype of its parameters at the start, float32, for its outputs."""
    if pinned:  # the control: what a user's network asks for by itself

        class Pinned(nnx.Embed):
            def __call__(self, inputs: jax.Array) -> jax.Array:
                return super().__call__(inputs).astype(np.float32)

        monkeypatch.setattr(nnx, "Embed", Pinned)
    config = resolved(digits, "positions.py")
    torch, flax = both(config).values()
    found = same_run(torch, flax, digits, config)
    assert bool(found) is not pinned, found
    if pinned:
        assert found.location is not None and found.location.divergence.stage == "forward"
        assert found.location.divergence.tensor == "places"
        assert found.location.causes[0].startswith("float32 inside")


@pytest.mark.slow
def test_a_norm_of_the_users_own_is_named(digits: Dataset) -> None:
    config = resolved(digits, "running_norm.py")
    torch, flax = both(config).values()
    first = pair_check.measure(torch, flax, config, digits).first_difference
    assert first is not None
    assert (first.divergence.stage, first.divergence.tensor) == ("forward", "bn")
    assert first.causes[0].startswith("epsilon, the variance's formula, axes, train mode")
    # The control: what precedes it agrees, and is compared.
    assert {"input of bn", "conv1"} <= {
        key.removeprefix("forward/")
        for key in flax.probe(
            flax.init(Snapshot.start(initial_weights(flax.shapes(), 0, "float64"))),
            np.zeros((2, 32, 32, 3)),
            np.zeros(2, np.int64),
        )
    }


def run_pair(name: str, out: Path) -> tuple[int, dict[str, Any]]:
    """The exit status of `pair` on a case, and its report."""
    status = main(["pair", case(name), "--data", "digits", "--out", str(out)])
    return status, json.loads((out / "report.json").read_text())


@pytest.mark.slow
def test_the_same_network_that_starts_otherwise_is_the_same_and_its_start_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = run_pair("own_start.py", tmp_path)
    assert status == 0 and report["first_difference"] is None
    said = {start["name"]: (start["torch"], start["flax"]) for start in report["starts"]}
    assert set(said) == {"conv1.kernel", "conv2.kernel", "bn.scale", "fc.kernel"}
    assert said["bn.scale"] == ("all 0", "all 1") and said["fc.kernel"][1] == "all 1e+03"
    assert report["exchanged"] == {"torch": ["bn"], "flax": ["conv1", "conv2"]}
    printed = " ".join(capsys.readouterr().out.split())
    assert "different initial values for 4 of 8 tensors" in printed
    assert "more exact: bn in PyTorch; conv1, conv2 in Flax." in printed
    # The control: one module against itself, with other seeds.
    start = functools.partial(own_start, case("own_start.py"), 10, "cpu")
    assert compare_starts({"torch": start, "flax": lambda seed: start(100 + seed)}) == ()


@pytest.mark.slow
def test_a_derivative_at_zero_shows_where_biases_start_at_zero(
    tmp_path: Path, digits: Dataset
) -> None:
    status, report = run_pair("maximum.py", tmp_path)
    first = report["first_difference"]
    assert status == 1 and (first["stage"], first["tensor"]) == ("backward", "conv2.bias")
    assert "PyTorch's own initial weights" in first["how"]
    assert "derivative at 0" in first["causes"][0]
    # The control: from weights that are drawn, no input of an activation is zero.
    config = resolved(digits, "maximum.py")
    torch, flax = both(config).values()
    assert pair_check.measure(torch, flax, config, digits).first_difference is None


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_one_matrix_as_embedding_and_as_head(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not tied:  # the control: the head's gradient does not reach the embedding

        class Apart(nnx.Embed):
            def attend(self, query: jax.Array) -> jax.Array:
                return query @ jax.lax.stop_gradient(self.embedding[...]).T

        monkeypatch.setattr(nnx, "Embed", Apart)
    status, report = run_pair("tied_head.py", tmp_path)
    assert status == (0 if tied else 1)
    if not tied:
        first = report["first_difference"]
        assert (first["stage"], first["tensor"]) == ("backward", "table.embedding")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_the_libraries_own_attention(
    wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong:  # the control: the biases of query and key change places, of which no shape tells

        def swapped(layer: nn.MultiheadAttention, tensors: Arrays) -> Arrays:
            found = convert.attention(layer, tensors)
            return found | {"key.bias": found["query.bias"], "query.bias": found["key.bias"]}

        monkeypatch.setattr(convert, "CONVERTS", ((nn.MultiheadAttention, swapped),))
    status, report = run_pair("attention.py", tmp_path)
    assert status == (1 if wrong else 0)
    assert report["exchanged"]["flax"] == ["attention", "patches"] or wrong
    if wrong:
        first = report["first_difference"]
        assert (first["stage"], first["tensor"]) == ("forward", "attention")


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
def test_sums_of_bfloat16_that_are_coarse_are_the_arithmetic_and_not_the_program(
    exact: bool, tmp_path: Path
) -> None:
    options = ["--data", "digits", "--dtype", "bfloat16", "--steps", "4", "--quiet"]
    run = ["--model", case("coarse_sums.py"), *options, "--out", str(tmp_path)]
    assert main([*run, *(["--exact-sums"] if exact else [])]) == (0 if exact else 1)
    [found] = json.loads((tmp_path / "report.json").read_text())["lenses"]
    if exact:
        assert found["exchanged"] == {"torch": ["norm"], "flax": ["conv", "fc1", "fc2", "norm"]}
        assert "conv, fc1, fc2, norm in Flax" in (tmp_path / "report.html").read_text()
        return
    assert "exchanged" not in found
    off = {
        side: [e["tensor"] for e in errors] for side, errors in found["arithmetic"]["off"].items()
    }
    assert set(off["torch"]) == {"norm.scale", "norm.bias"} and "fc1.bias" in off["flax"]
    # measured 0.92 and 0.86; of the largest entry
    assert min(error["share"] for error in found["arithmetic"]["off"]["torch"]) > 0.1
    [cause] = found["located"]["causes"]
    assert cause.startswith("the arithmetic of bfloat16, and not the program: ")
    assert cause in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_a_mistake_of_the_program_is_not_taken_for_arithmetic(
    tmp_path: Path, digits: Dataset
) -> None:
    """The control of the test above."""
    path = tmp_path / "wrong.py"
    text = Path(case("coarse_sums.py").removesuffix(":PAIR")).read_text()
    path.write_text(text.replace("epsilon=1e-5", "epsilon=1e-3"))
    model = f"{path}:PAIR"
    config = Config(model=model, pair=source_digest(model), steps=1, batch_size=8, lr=0.01)
    config = config.resolve(len(digits.train_images))
    low = {name: backends.load(name)(config, 10, "bfloat16", "cpu", "off") for name in BACKENDS}
    runs = {
        name: train_ensemble(side, config, digits, "bfloat16", 0).run for name, side in low.items()
    }
    assert arithmetic.explain(runs, config, digits, lambda name: both(config)[name]) is None


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_one_number_per_image(wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong:  # the control: numbers (n, 1) less targets (n,) are (n, n)

        def spread(outputs: jax.Array, targets: jax.Array) -> jax.Array:
            return ((outputs - targets) ** 2).mean()

        monkeypatch.setitem(losses.LOSSES, "mean squared error", spread)
    status, report = run_pair("regression.py", tmp_path)
    assert status == (1 if wrong else 0)
    if wrong:
        assert report["first_difference"]["stage"] == "loss"


@pytest.mark.slow
def test_two_mistakes_with_one_first_tensor_are_told_apart(
    digits: Dataset, build: Callable
) -> None:
    """Weight decay after momentum, and none on biases: both differ first, with the same numbers,
    in the momentum of the first bias."""
    short = dataclasses.replace(digits, test_images=digits.test_images[:100])
    short = dataclasses.replace(short, test_labels=digits.test_labels[:100])
    common = {}
    for name in ("weight-decay-after-momentum", "biases-not-decayed"):
        fault = dataclasses.replace(named(name))
        options = {**fault.options, "steps": 4, "batch_size": 8}
        fault = dataclasses.replace(fault, options=options)
        row = faults.measure(fault, short, build, inject, faults.Cache(), ("float64",))
        finding = row["lenses"]["float64"]
        assert finding["tensor"] == "momentum of conv1.bias"
        common[name] = finding["common"]
    assert common == {
        "weight-decay-after-momentum": "every parameter; momentum buffers alone",
        "biases-not-decayed": "all biases, no kernel",
    }


@pytest.mark.slow
def test_runs_that_reach_nan_together_have_a_verdict_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--model mlp --data digits --batch-size 16 --lr 0.02 --momentum 0.9 --steps 60"
    rest = f"--seed 201 --dtype float32 --maximize --out {tmp_path / 'run'}"
    assert main([*options.split(), *rest.split()]) == 1
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["verdict"] == "diverged"
    assert report["lenses"][0]["diverged_at"] == 17
    said = " ".join(capsys.readouterr().out.split())
    assert "Both runs blow up at the same step" in said and "disagree" not in said.lower()
