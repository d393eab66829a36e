"""A pair's own optimizer: both frameworks train with it, compare its state, save it, and resume
from it; where one cannot, a message says why."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep import backends
from lockstep import cli as compare
from lockstep.common import data
from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.errors import RecordError
from lockstep.common.protocol import Arrays, Backend, Snapshot

FILE = Path(__file__).with_name("own_optimizers.py")
BOUND = 1e-12  # as for the optimizers that have a name; seen: 9e-16
STEPS, HALF = 6, 3


@functools.cache
def dataset() -> Dataset:
    return data.load("auto", model=f"{FILE}:ADAMAX")


@functools.cache
def built(name: str, side: str) -> Backend:
    config = Config(model=f"{FILE}:{name}", optimizer="pair", lr=0.05, batch_size=8, steps=STEPS)
    config = config.resolve(len(dataset().train_images))
    return backends.build(config, dataset().task, "cpu", "auto", side, "float64")


def trained(backend: Backend, snapshot: Snapshot, steps: int) -> Snapshot:
    """The snapshot so many steps later."""
    state = backend.init(snapshot)
    for number in range(snapshot.step, snapshot.step + steps):
        rows = np.arange(8 * number, 8 * number + 8) % len(dataset().train_images)
        images = dataset().train_images[rows].astype(np.float64)
        state, _ = backend.train_step(state, images, dataset().train_labels[rows])
    return backend.export(state)


def start(backend: Backend) -> Snapshot:
    draws = np.random.default_rng(3)
    shapes = backend.shapes()
    return Snapshot.start({name: draws.normal(size=shapes[name]) for name in sorted(shapes)})


def arrays(snapshot: Snapshot) -> Arrays:
    return snapshot.tensors | snapshot.optimizer_tensors


def gap(one: Snapshot, other: Snapshot) -> float:
    ours, theirs = arrays(one), arrays(other)
    return max(float(np.abs(array - theirs[name]).max()) for name, array in ours.items())


# --- Two runs


def run(tmp_path: Path, name: str, *options: str) -> tuple[int, dict[str, Any]]:
    arguments = ["--model", f"{FILE}:{name}", "--steps", "12", "--batch-size", "8", "--quiet"]
    status = compare.main([*arguments, "--dtype", "float64", "--out", str(tmp_path), *options])
    return status, json.loads((tmp_path / "report.json").read_text())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("ADAMAX", ["--lr", "0.02"], id="Adamax"),
        pytest.param(
            "WARM",
            ["--schedule", "cosine", "--clip-norm", "1"],
            id="one of the user's, with a schedule and clipping",
            marks=pytest.mark.slow,
        ),
        pytest.param("ADADELTA", ["--lr", "0.5"], id="Adadelta", marks=pytest.mark.slow),
    ],
)
def test_two_runs_with_the_optimizer_of_a_pair_agree(
    name: str, options: list[str], tmp_path: Path
) -> None:
    status, report = run(tmp_path, name, *options)
    assert (status, report["verdict"]) == (0, "agree")
    assert report["config"]["optimizer"] == "pair"
    assert report["lenses"][0]["max_abs_loss_gap"] < BOUND


def test_two_optimizers_that_differ_are_found(tmp_path: Path) -> None:
    status, report = run(tmp_path, "NADAM", "--lr", "0.02")
    place = report["lenses"][0]["first_divergence"]
    assert (status, place["step"], place["stage"]) == (1, 0, "update")


def test_another_optimizer_is_used_where_one_is_named(tmp_path: Path) -> None:
    status, report = run(tmp_path, "NADAM", "--optimizer", "adamw")
    assert (status, report["config"]["optimizer"]) == (0, "adamw")


def test_slots_that_only_one_side_has_are_listed(tmp_path: Path) -> None:
    status, report = run(tmp_path, "RENAMED")
    assert (status, report["verdict"]) == (0, "agree")
    slots = report["lenses"][0]["unmatched_slots"]
    assert slots == {"torch": ["mean"], "flax": ["average"]}
    shown = (tmp_path / "report.html").read_text()
    assert "only the optimizer in torch has the slots mean: they were not compared" in shown


# --- All of its state


@pytest.mark.parametrize("side", BACKENDS)
@pytest.mark.parametrize("name", ["ADAMAX", "WARM"])
def test_a_run_that_goes_on_from_a_snapshot_is_the_run_to_the_bit(name: str, side: str) -> None:
    backend = built(name, side)
    half, whole = (trained(backend, start(backend), steps) for steps in (HALF, STEPS))
    assert half.extra and all(key.startswith(f"{side}/") for key in half.extra)
    resumed = trained(backend, half, STEPS - HALF)
    assert arrays(resumed).keys() == arrays(whole).keys() > whole.tensors.keys()
    for key, array in (arrays(whole) | whole.extra).items():
        np.testing.assert_array_equal((arrays(resumed) | resumed.extra)[key], array, err_msg=key)
    # Controls: another number, and other slots, give other steps.
    others = {key: np.array(array + 1) for key, array in half.extra.items()}
    slots = {slot: {n: 2 * a for n, a in own.items()} for slot, own in half.slots.items()}
    for changed in (half._replace(extra=others), half._replace(slots=slots)):
        assert gap(whole, trained(backend, changed, STEPS - HALF)) > 1e-6


@pytest.mark.parametrize(("first", "second"), [BACKENDS, BACKENDS[::-1]])
def test_the_other_framework_resumes_from_a_state_that_it_has_too(first: str, second: str) -> None:
    one, other = built("ADAMAX", first), built("ADAMAX", second)
    half, whole = (trained(one, start(one), steps) for steps in (HALF, STEPS))
    assert gap(whole, trained(other, half, STEPS - HALF)) < BOUND
    # The control: the moments of the first framework are those that the second goes on with.
    slots = {slot: {n: 2 * a for n, a in own.items()} for slot, own in half.slots.items()}
    assert gap(whole, trained(other, half._replace(slots=slots), STEPS - HALF)) > 1e-6


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            "torch",
            "flax",
            r"the Flax optimizer of .* has the state \".*left\", which the PyTorch one lacks",
        ),
        (
            "flax",
            "torch",
            r"the PyTorch optimizer of .* has the state \"left of conv.weight\", which the Flax one lacks",
        ),
    ],
)
def test_state_that_only_one_framework_has_is_not_handed_over(
    first: str, second: str, message: str
) -> None:
    half = trained(built("WARM", first), start(built("WARM", first)), HALF)
    with pytest.raises(RecordError, match=message):
        built("WARM", second).init(half)


# --- What is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TEXT", "optimizer must be two functions, PyTorch's and optax's"),
        (
            "DEAF",
            "has the learning rate 0.5 in place of 0.001: use the one that its function is given",
        ),
        ("NONE", "returns a NoneType: let it return a torch.optim.Optimizer"),
        ("NOT_OPTAX", "let it return an optax.GradientTransformation"),
        ("FAILING", "flax cannot build its optimizer (TypeError: unsupported operand"),
        ("CLOSING", "torch cannot take a step of its optimizer (TypeError: Closing.step() missing"),
        ("NAMING", "flax cannot take a step of its optimizer (KeyError"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused_in_one_line(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", "2", "--batch-size", "8", "--quiet", "--out", str(tmp_path / "run")]
    assert compare.main(["--model", f"{FILE}:{name}", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error


def test_a_plateau_is_a_schedule_of_it(tmp_path: Path) -> None:
    status, report = run(tmp_path, "ADAMAX", "--schedule", "plateau:patience=1")
    [lens] = report["lenses"]
    assert status == 0 and lens["max_abs_loss_gap"] < BOUND


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer", "pair"], "--optimizer pair is the optimizer of your own pair"),
        (
            ["--model", f"{FILE}:ADAMAX", "--momentum", "0.9"],
            "the optimizer of the pair takes no --momentum: set it in the pair",
        ),
        (
            ["--model", f"{FILE}:ADAMAX", "--weight-decay", "0.1"],
            "the optimizer of the pair takes no --weight-decay: set it in the pair",
        ),
        (
            [
                "--model",
                f"{FILE.with_name('examples.py')}:TEXT",
                "--optimizer",
                "pair",
                "--batch-size",
                "8",
            ],
            "has no optimizer: write optimizer=(PyTorch's, optax's) in its Pair",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([*options, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
