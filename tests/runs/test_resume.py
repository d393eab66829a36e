"""A run that is stopped and resumed, by the same backend or the other one, is the run that was
never stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep import cli as compare
from lockstep.common.config import BACKENDS, SCHEDULES, Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.errors import RecordError
from lockstep.common.evidence.handover import GRID_BOUND, OPTIONS
from lockstep.common.evidence.handover import measure as hand_over
from lockstep.common.protocol import Arrays, Snapshot
from lockstep.common.runs import checkpoint, record, request, training
from lockstep.common.runs.record import Record
from lockstep.common.runs.trainer import TerminalObserver
from tests.conftest import SilentObserver, build_once, draw_nothing
from tests.marks import slow_except

STEPS = 200  # in float64 calls of train_steps end after 1, 2, 68, 134 and 200 steps
RUN = [
    "--data",
    "digits",
    "--steps",
    str(STEPS),
    "--batch-size",
    "4",
    "--lr",
    "0.005",
    "--momentum",
    "0.9",
    "--quiet",
]
pytestmark = pytest.mark.usefixtures("undrawn", "built_once")
STATE = ("loss", "gradient_norm", "lr", "predictions", "weights", "parameter_history", "final")


def lockstep(*arguments: str | Path) -> int:
    return compare.main([str(argument) for argument in arguments])


def stop_at(
    monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGINT, run: int = 1
) -> None:
    """Send this process a signal once `step` steps are done, in the first run or a later one."""
    complete, seen = TerminalObserver.advance, []

    def advance(self: Any, steps: int, loss: float) -> None:
        complete(self, steps, loss)
        if self.steps >= step and self not in seen:
            seen.append(self)
            if len(seen) == run:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(TerminalObserver, "advance", advance)


def differences(one: Record, other: Record) -> list[str]:
    """What is not the same to the bit."""
    found = [
        name for name in STATE[:4] if getattr(one, name).tobytes() != getattr(other, name).tobytes()
    ]
    for group in STATE[4:]:
        ours, theirs = getattr(one, group), getattr(other, group)
        found += [
            f"{group}/{name}"
            for name in ours | theirs
            if ours[name].tobytes() != theirs[name].tobytes()
        ]
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of both backends that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        build_once(patch)
        assert lockstep(*RUN, "--twins", "1", "--out", folder) == 0
    return folder


# --- Stop and resume


@pytest.mark.parametrize(
    "number",
    slow_except([signal.SIGINT, signal.SIGTERM], signal.SIGINT),
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_run_that_is_stopped_resumes_where_it_was(
    whole: Path,
    tmp_path: Path,
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 68, number)
        assert lockstep(*RUN, "--dtype", "float64", "--out", tmp_path) == 128 + number
    said = capsys.readouterr().err
    assert (
        f"torch float64 was interrupted at step 68 of 200; resume with: lockstep --resume {tmp_path}"
        in said
    )
    kept = checkpoint.found(tmp_path, "torch-float64")
    assert [checkpoint.read(path).step for path in kept] == [68]
    assert lockstep("--resume", tmp_path, "--quiet") == 0
    assert "agree" in capsys.readouterr().out
    for name in BACKENDS:
        file = f"{name}-float64.safetensors"
        assert differences(record.read(tmp_path / file), record.read(whole / file)) == []
    assert checkpoint.found(tmp_path, "torch-float64") == [], (
        "a record takes the place of its checkpoints"
    )


def test_a_twin_resumes_with_its_own_perturbations(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*RUN, "--dtype", "float32", "--backend", "flax", "--twins", "1", "--out", tmp_path]
    with monkeypatch.context() as patch:
        stop_at(patch, 90, run=2)
        assert lockstep(*options) == 130
    assert [path.name[:18] for path in (tmp_path / checkpoint.FOLDER).iterdir()] == [
        "flax-float32-twin1"
    ]
    trained: list[Any] = []
    complete = training.train
    monkeypatch.setattr(
        training, "train", lambda *a, **more: (trained.append(a[5]), complete(*a, **more))[1]
    )
    assert lockstep("--resume", tmp_path, "--quiet") == 0
    assert trained == [1], "the run itself was finished"
    for stem in ("flax-float32", "flax-float32-twin1"):
        file = f"{stem}.safetensors"
        assert differences(record.read(tmp_path / file), record.read(whole / file)) == []


def test_a_twin_that_begins_its_rounding_again_is_seen(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*RUN, "--dtype", "float32", "--backend", "flax", "--twins", "1", "--out", tmp_path]
    with monkeypatch.context() as patch:
        stop_at(patch, 90, run=2)
        assert lockstep(*options) == 130
    complete = checkpoint.read

    def forgetful(path: Path) -> checkpoint.Checkpoint:
        beginning = dict(training.image_perturbation_rng(0, 1).bit_generator.state)
        return dataclasses.replace(complete(path), perturbation_rng_state=beginning)

    monkeypatch.setattr(checkpoint, "read", forgetful)
    assert lockstep("--resume", tmp_path, "--quiet") == 0
    file = "flax-float32-twin1.safetensors"
    assert differences(record.read(tmp_path / file), record.read(whole / file)) != []


# --- The other backend resumes


@pytest.mark.parametrize(
    ("first", "second"),
    slow_except([("torch", "flax"), ("flax", "torch")], "torch"),
    ids=["to flax", "to torch"],
)
def test_the_other_backend_resumes_where_one_stopped(
    whole: Path, tmp_path: Path, first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 68)
        assert lockstep(*RUN, "--dtype", "float64", "--backend", first, "--out", tmp_path) == 130
    assert lockstep("--resume", tmp_path, "--backend", second, "--quiet") == 0
    joined = record.read(tmp_path / f"{second}-float64.safetensors")
    assert joined.segments == [{"backend": first, "stop": 68}, {"backend": second, "stop": 200}]
    uninterrupted = record.read(whole / f"{second}-float64.safetensors")
    assert np.max(np.abs(joined.loss - uninterrupted.loss)) <= GRID_BOUND  # 9e-16 measured
    assert differences(joined, uninterrupted) != [], "rounding shows who took the first steps"
    assert lockstep("--resume", tmp_path, "--backend", first, "--quiet") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["verdict"], report["lenses"][0]["legs"][second]) == ("agree", joined.segments)


@pytest.mark.parametrize("lost", slow_except(["slots", "parameters"]))
def test_a_handover_that_loses_something_disagrees(
    tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 68)
        assert lockstep(*RUN, "--dtype", "float64", "--backend", "torch", "--out", tmp_path) == 130
    complete = checkpoint.for_backend

    def forgetful(state: checkpoint.Checkpoint, *rest: Any) -> checkpoint.Checkpoint:
        state = complete(state, *rest)

        def less(arrays: Arrays) -> Arrays:
            return {name: 0.99 * array for name, array in arrays.items()}

        snapshot = state.snapshot
        changed = {
            "parameters": less(snapshot.parameters),
            "slots": {slot: less(arrays) for slot, arrays in snapshot.slots.items()},
        }
        return dataclasses.replace(state, snapshot=snapshot._replace(**{lost: changed[lost]}))

    monkeypatch.setattr(checkpoint, "for_backend", forgetful)
    assert lockstep("--resume", tmp_path, "--backend", "flax", "--quiet") == 0
    assert lockstep("--resume", tmp_path, "--backend", "torch", "--quiet") == 1


def test_a_backend_that_was_finished_hands_nothing_over(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "flax-float64.safetensors").unlink()
    checkpoint.write(ended(whole), tmp_path / "run")
    assert lockstep("--resume", tmp_path / "run", "--backend", "flax", "--quiet") == 0
    assert record.read(tmp_path / "run" / "flax-float64.safetensors").segments == [
        {"backend": "flax", "stop": STEPS}
    ]


def ended(folder: Path) -> checkpoint.Checkpoint:
    """A checkpoint of PyTorch's float64 run after two steps, of what its record has."""
    r = record.read(folder / "torch-float64.safetensors")
    schedule = {"lr": float(r.lr[2])}
    momentum = {name: np.zeros_like(array) for name, array in r.final.items()}
    return checkpoint.Checkpoint(
        **{
            name: getattr(r, name)
            for name in ("backend", "dtype", "twin", "config", "data", "source", "layers")
        },
        segments=[{"backend": "torch", "stop": 2}],
        perturbation_rng_state=None,
        seconds=1.0,
        **{name: getattr(r, name)[:2] for name in ("loss", "gradient_norm", "lr", "batch_digests")},
        **{name: getattr(r, name) for name in ("weights", "first_steps", "parameter_history")},
        snapshot=Snapshot(r.final, {}, {"momentum": momentum}, schedule, 2, {}),
    )


@pytest.mark.slow
def test_adamw_with_cosine_can_be_handed_over(
    tmp_path: Path, digits: Dataset, build: Callable
) -> None:
    config = Config(
        optimizer="adamw", weight_decay=0.01, steps=300, batch_size=4, schedule=Schedule("cosine")
    ).resolve(len(digits.train_images))
    few = dataclasses.replace(
        digits, test_images=digits.test_images[:9], test_labels=digits.test_labels[:9]
    )
    row = hand_over(config, few, build, tmp_path, every=150)
    assert row.places == [150] and row.agrees, row


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_option_and_schedule_can_be_handed_over(
    tmp_path: Path, digits: Dataset, build: Callable, kind: str
) -> None:
    options = OPTIONS[
        2 + list(SCHEDULES).index(kind) % 2
    ]  # dampening and decay, or nesterov and maximize
    schedule = Schedule(kind, patience=0, window=5) if kind == "plateau" else Schedule(kind)
    config = Config(**{"steps": 300, "batch_size": 4, "lr": 0.01, "schedule": schedule} | options)
    config = config.resolve(len(digits.train_images))
    few = dataclasses.replace(
        digits, test_images=digits.test_images[:9], test_labels=digits.test_labels[:9]
    )
    row = hand_over(config, few, build, tmp_path, every=150)
    assert row.places == [150]  # calls of train_steps end after 2, 76, 150, 224 and 298 steps
    assert row.agrees, row
    if kind in ("plateau", "step"):
        assert row.last_lr < config.lr


# --- What cannot be resumed


def assert_refused(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    for word in words:
        assert word in said


@pytest.fixture
def stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """The folder of a run that was stopped after 68 steps of PyTorch."""
    with monkeypatch.context() as patch:
        stop_at(patch, 68)
        assert lockstep(*RUN, "--dtype", "float64", "--out", tmp_path) == 130
    capsys.readouterr()
    return tmp_path


def test_a_stopped_run_is_not_overwritten(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in (stopped / checkpoint.FOLDER).iterdir()}
    assert lockstep(*RUN, "--dtype", "float64", "--out", stopped) == 2
    assert_refused(capsys, f"--resume {stopped}", f"delete {stopped / checkpoint.FOLDER}")
    assert {
        path.name: path.read_bytes() for path in (stopped / checkpoint.FOLDER).iterdir()
    } == before


@pytest.mark.parametrize(
    ("options", "word"),
    [
        pytest.param(["--lr", "0.1"], "--lr", id="lr"),
        pytest.param(["--steps", "400"], "--steps", id="steps"),
        pytest.param(["--dtype", "float32"], "--dtype", id="dtype"),
        pytest.param(["--recipe", "tutorial"], "--recipe", id="recipe"),
        pytest.param(["--out", "elsewhere"], "--out", id="out"),
        pytest.param(["--checkpoint-every", "-1"], "--checkpoint-every", id="negative"),
    ],
)
def test_a_run_cannot_be_changed_on_its_way(
    stopped: Path, options: list[str], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lockstep("--resume", stopped, *options) == 2
    assert_refused(capsys, word)


def test_other_data_is_refused(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.zeros((20, 32, 32, 3), np.uint8)
    labels = np.arange(20) % 10
    np.savez(tmp_path / "other.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    assert lockstep("--resume", stopped, "--data", tmp_path / "other.npz", "--quiet") == 2
    assert_refused(capsys, "was trained on other data than", "--data")


def test_a_folder_without_a_run_and_a_damaged_run_json_are_refused(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lockstep("--resume", tmp_path / "nowhere") == 2
    assert_refused(capsys, "holds no run", "nowhere")
    assert not (tmp_path / "nowhere").exists()
    path = stopped / request.FILE
    path.write_text(path.read_text().replace('"lr": 0.005', '"lr": 0.006'))
    assert lockstep("--resume", stopped) == 2
    assert_refused(capsys, "damaged")


def test_a_damaged_checkpoint_is_an_error_and_is_left_alone(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint.found(stopped, "torch-float64")[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert lockstep("--resume", stopped, "--quiet") == 2
    assert_refused(capsys, str(path), "delete it")
    assert path.read_bytes() == content
    path.unlink()
    assert lockstep("--resume", stopped, "--quiet") == 0, "without it the run begins again"


# --- A loss that is not finite


def test_a_loss_that_is_not_finite_ends_both_runs_at_the_same_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--lr", "100", "--dtype", "float64", "--out", tmp_path]
    assert lockstep(*RUN[:-1], *options) == 1
    said = capsys.readouterr()
    assert (
        "Both runs blow up at the same step: the loss is not finite, or so large that rounding decides"
        in " ".join(said.out.split())
    )
    records = [record.read(tmp_path / f"{name}-float64.safetensors") for name in BACKENDS]
    steps = {r.nonfinite_step for r in records}
    assert len(steps) == 1
    step = steps.pop()
    assert step is not None and step > 1
    for r in records:
        assert np.isfinite(r.loss[:step]).all()
        assert not np.isfinite(r.loss[step])
        assert np.isnan(r.loss[step + 1 :]).all() and len(r.loss) == STEPS
        assert all(np.isfinite(array).all() for array in r.final.values())
        [path] = checkpoint.found(tmp_path, r.stem)
        kept = checkpoint.read(path)
        assert step - 1 <= kept.step <= step
        assert kept.snapshot.parameters.keys() == r.final.keys()
        assert all(
            kept.snapshot.parameters[name].tobytes() == r.final[name].tobytes() for name in r.final
        )


@pytest.mark.slow
def test_the_last_good_state_is_that_of_as_many_steps(
    digits: Dataset, build: Callable, name: str
) -> None:
    options: dict[str, Any] = {"batch_size": 4, "lr": 100.0, "momentum": 0.9}
    config = Config(steps=60, **options).resolve(len(digits.train_images))
    broken = training.train(
        build(name, config), config, digits, "float64", SilentObserver(), log_every=0
    )
    assert broken.nonfinite_step is not None
    done = broken.segments[-1]["stop"]
    shorter = Config(steps=done, **options).resolve(len(digits.train_images))
    whole = training.train(
        build(name, shorter), shorter, digits, "float64", SilentObserver(), log_every=0
    )
    for tensor, array in whole.final.items():
        np.testing.assert_allclose(broken.final[tensor], array, rtol=1e-9)
    assert differences(broken, whole) != []  # the control: lengths differ


def test_a_gradient_norm_may_overflow_where_the_loss_is_finite(whole: Path, tmp_path: Path) -> None:
    state = dataclasses.replace(ended(whole), gradient_norm=np.array([1.0, np.inf]))
    assert checkpoint.read(checkpoint.write(state, tmp_path)).gradient_norm.tolist() == [
        1.0,
        np.inf,
    ]
    for wrong in (np.nan, -1.0):
        path = checkpoint.write(
            dataclasses.replace(state, gradient_norm=np.array([1.0, wrong])), tmp_path
        )
        with pytest.raises(RecordError, match="gradient_norm"):
            checkpoint.read(path)


def test_a_stopped_twin_is_not_overwritten_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*RUN, "--dtype", "float32", "--backend", "torch", "--twins", "1", "--out", tmp_path]
    with monkeypatch.context() as patch:
        stop_at(patch, 90, run=2)
        assert lockstep(*options) == 130
    capsys.readouterr()
    assert lockstep(*options) == 2
    assert_refused(capsys, "torch-float32-twin1", f"--resume {tmp_path}")
