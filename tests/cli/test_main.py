"""The command line end to end: verdicts, exit statuses, broken ports, wrong input."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lockstep import cli as compare
from lockstep.backends import faults
from lockstep.common import data
from lockstep.common.cli import learn, parser, run
from lockstep.common.cli.parser import COMMANDS
from lockstep.common.data import Dataset, cifar10
from lockstep.common.optimizers import OPTIMIZERS
from lockstep.common.runs import record, training
from tests.conftest import build_once
from tests.marks import slow_except

REPOSITORY = Path(__file__).resolve().parents[2]
SHORT = [
    "--data",
    "TINTED",
    "--steps",
    "24",
    "--batch-size",
    "4",
    "--lr",
    "0.01",
    "--momentum",
    "0.9",
    "--quiet",
]


def lockstep(*arguments: str | Path) -> int:
    try:
        return compare.main([os.environ["TINTED"] if a == "TINTED" else str(a) for a in arguments])
    except SystemExit as error:  # argparse
        assert isinstance(error.code, int)
        return error.code


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def broken(
    monkeypatch: pytest.MonkeyPatch, fault: str, dataset: Dataset, *options: str | Path
) -> None:
    """Put a known fault into the Flax side, for the run of these options and this data."""
    wanted = run.new_request(parser.parse([str(option) for option in options]))
    config = wanted.config.resolve(len(dataset.train_images))
    faults.named(fault).apply(monkeypatch.setattr, config, dataset)


# --- Verdicts


@pytest.fixture(scope="module", autouse=True)
def tinted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in colour, since on grey ones BGR is RGB; the command lines of this file call them
    `TINTED`."""
    digits = data.load("digits")
    images = {"x_train": digits.train_images, "x_test": digits.test_images}
    images = {name: (array * [1.0, 0.7, 0.4]).astype(np.uint8) for name, array in images.items()}
    path = tmp_path_factory.mktemp("tinted") / "tinted.npz"
    np.savez(
        path, allow_pickle=False, y_train=digits.train_labels, y_test=digits.test_labels, **images
    )
    os.environ["TINTED"] = str(path)
    return path


@pytest.fixture(scope="module")
def both(tinted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A run of both backends through both lenses."""
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        build_once(patch)
        return lockstep(*SHORT, "--out", folder), folder


def test_two_correct_ports_agree_in_both_lenses(both: tuple[int, Path]) -> None:
    status, folder = both
    report = report_of(folder)
    assert (status, report["verdict"]) == (0, "agree")
    assert [(lens["dtype"], lens["verdict"]) for lens in report["lenses"]] == [
        ("float64", "agree"),
        ("float32", "agree"),
    ]
    proof = report["lenses"][0]
    assert proof["max_abs_loss_gap"] <= 1e-13  # 9e-16 measured over 500 steps of CIFAR-10
    assert proof["predictions_equal"] == proof["predictions_total"] == 360
    assert proof["per_class_accuracy"]["torch"] == proof["per_class_accuracy"]["flax"]


def test_a_run_leaves_its_report_pictures_and_records(both: tuple[int, Path]) -> None:
    names = {path.name for path in both[1].iterdir()}
    pictures = {"samples.png", "predictions.png"}
    pictures |= {
        f"{chart}.{kind}"
        for chart in ("losses", "course", "classes", "confusion")
        for kind in ("png", "svg")
    }
    records = {f"{backend}-float64.safetensors" for backend in ("torch", "flax")}
    for twin in ("", "-twin1", "-twin2"):
        records |= {f"{backend}-float32{twin}.safetensors" for backend in ("torch", "flax")}
    assert names == {"report.json", "report.html", "run.json", ".lock"} | pictures | records
    assert (both[1] / "report.html").stat().st_size < 3_000_000


def test_the_report_follows_its_contract(both: tuple[int, Path]) -> None:
    report = report_of(both[1])
    assert report["schema"] == 1
    assert {"verdict", "command", "config", "environment", "data", "lenses"} <= report.keys()
    lens = {
        "dtype", "steps", "verdict", "max_abs_loss_gap", "bound", "first_divergence", "final_loss", "accuracy",
        "per_class_accuracy", "predictions_equal", "predictions_total", "steps_per_second",
    }  # fmt: skip
    assert all(lens <= found.keys() for found in report["lenses"])


@pytest.mark.usefixtures("built_once")
@pytest.mark.parametrize(("finished", "said"), [(1, "single"), (3, "agree")])
def test_a_run_that_is_interrupted_reports_what_was_finished(
    finished: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    complete, done = training.train, []

    def interrupted(
        backend: Any, config: Any, dataset: Any, dtype: str, observer: Any, *rest: Any, **more: Any
    ) -> Any:
        if len(done) == finished:
            observer.advance(7, 2.0)
            raise KeyboardInterrupt
        done.append((backend.name, dtype))
        return complete(backend, config, dataset, dtype, observer, *rest, **more)

    monkeypatch.setattr(training, "train", interrupted)
    options = [*SHORT, "--twins", "1", "--steps", "3", "--out", tmp_path]
    assert lockstep(*options) == 130
    report = report_of(tmp_path)
    where = {1: "flax float64", 3: "torch float32, twin 1"}[finished]
    assert (report["verdict"], report["cut_short"]) == (
        said,
        f"{where} was interrupted at step 7 of 3",
    )
    assert len(report["lenses"]) == 1, "a backend whose twins were not all trained is not reported"
    assert capsys.readouterr().out.startswith(
        f"The run was cut short: {where} was interrupted at step 7"
    )
    assert "The run was cut short" in (tmp_path / "report.html").read_text()


def test_a_run_that_is_interrupted_before_anything_is_finished_leaves_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    assert lockstep(*SHORT, "--out", tmp_path) == 130
    said = capsys.readouterr().err
    assert said.startswith("interrupted: torch float64 was interrupted at step 0 of 24; ")
    assert said.endswith(f"resume with: lockstep --resume {tmp_path}\n")
    assert not (tmp_path / "report.json").exists()


@pytest.mark.usefixtures("undrawn")
def test_with_json_the_report_is_all_of_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loud = [option for option in SHORT if option != "--quiet"]
    assert (
        lockstep(*loud, "--dtype", "float64", "--backend", "torch", "--out", tmp_path, "--json")
        == 0
    )
    printed = capsys.readouterr()
    assert json.loads(printed.out) == report_of(tmp_path)
    assert "Trained torch alone" in printed.err


@pytest.mark.parametrize("name, status", [("absent", 2), ("lockstep.absent", None)])
def test_a_library_that_is_not_installed_is_named_and_a_mistake_of_ours_is_not_hidden(
    name: str,
    status: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def missing(*arguments: object) -> int:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(run, "execute", missing)
    if status is None:
        with pytest.raises(ModuleNotFoundError):
            lockstep(*SHORT)
    else:
        assert lockstep(*SHORT) == status
        assert capsys.readouterr().err == "error: absent is not installed: pip install -e .\n"


@pytest.mark.usefixtures("undrawn")
def test_what_tensorboard_is_to_show_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    options = [*SHORT, "--dtype", "float64", "--backend", "torch", "--out", tmp_path / "run"]
    assert lockstep(*options, "--tensorboard", tmp_path / "events") == 0
    assert list((tmp_path / "events").rglob("events.out.*"))
    assert not list((tmp_path / "run").rglob("events.out.*"))


def test_without_tensorboard_nothing_is_trained_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ["tensorboard", *(name for name in sys.modules if name.startswith("tensorboard."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert lockstep(*SHORT, "--out", tmp_path / "run", "--tensorboard", tmp_path / "events") == 2
    assert "pip install" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("undrawn", "built_once")
def test_one_backend_after_the_other_gives_the_verdict_of_both(
    both: tuple[int, Path], tmp_path: Path
) -> None:
    assert lockstep(*SHORT, "--out", tmp_path, "--backend", "torch") == 0
    assert report_of(tmp_path)["verdict"] == "single"
    assert lockstep(*SHORT, "--out", tmp_path, "--backend", "flax") == 0
    one_by_one, together = report_of(tmp_path), report_of(both[1])
    assert one_by_one["verdict"] == together["verdict"] == "agree"
    for lens, expected in zip(one_by_one["lenses"], together["lenses"], strict=True):
        for key in (
            "verdict",
            "max_abs_loss_gap",
            "ladder",
            "stretches",
            "predictions_equal",
            "accuracy",
        ):
            assert lens[key] == expected[key], key


@pytest.mark.usefixtures("undrawn", "built_once")
def test_a_record_of_another_lr_is_not_compared(
    both: tuple[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(both[1] / "flax-float64.safetensors", tmp_path)
    loud = [option for option in SHORT if option != "--quiet"]
    options = [*loud, "--dtype", "float64", "--out", tmp_path, "--backend", "torch"]
    assert lockstep(*options, "--lr", "0.02") == 0
    assert report_of(tmp_path)["verdict"] == "single"
    assert "Not compared" in capsys.readouterr().out
    assert lockstep(*options) == 0  # the control: with its own lr it is
    assert report_of(tmp_path)["verdict"] == "agree"


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])]
)
def test_a_damaged_record_is_refused_before_training(
    both: tuple[int, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[bytes], bytes],
) -> None:
    path = tmp_path / "torch-float64.safetensors"
    path.write_bytes(damage((both[1] / path.name).read_bytes()))
    assert lockstep(*SHORT, "--dtype", "float64", "--out", tmp_path, "--backend", "flax") == 2
    assert_one_line(capsys, "delete it")
    assert {found.name for found in tmp_path.iterdir()} == {path.name, ".lock"}


def rewritten(path: Path, target: Path, **changes: object) -> None:
    """Keep the record in `path`, changed, under the name of `target`."""
    written = record.write(dataclasses.replace(record.read(path), **changes), target.parent)
    written.rename(target)


@pytest.mark.parametrize(
    ("source", "changes", "word"),
    [
        pytest.param("flax-float64", {}, "not what its name says", id="the-same-backend"),
        pytest.param("torch-float64", {"twin": 1}, "not what its name says", id="a-twin"),
        pytest.param("torch-float32", {}, "not what its name says", id="another-precision"),
        pytest.param("torch-float64", {"source": "older"}, "stale", id="of-older-code"),
    ],
)
def test_a_record_that_is_not_what_it_is_taken_for_is_refused(
    both: tuple[int, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    changes: dict,
    word: str,
) -> None:
    rewritten(both[1] / f"{source}.safetensors", tmp_path / "torch-float64.safetensors", **changes)
    assert lockstep(*SHORT, "--dtype", "float64", "--out", tmp_path, "--backend", "flax") == 2
    assert_one_line(capsys, word)


@pytest.mark.usefixtures("undrawn", "built_once")
def test_precisions_without_a_partner_are_named_next_to_those_that_agree(
    both: tuple[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(both[1] / "torch-float64.safetensors", tmp_path)
    assert lockstep(*SHORT, "--out", tmp_path, "--backend", "flax", "--twins", "1") == 0
    assert [lens["verdict"] for lens in report_of(tmp_path)["lenses"]] == ["agree", "single"]
    assert "float32 not compared, flax alone" in " ".join(capsys.readouterr().out.split())


# --- Broken ports: (what is broken, further options, step, stage, tensor)

PORTS = [
    ("bgr", [], 0, "data", "images"),
    ("other-shuffle", [], 0, "data", "images"),
    ("labels-from-one", [], 0, "data", "labels"),
    ("own-weights", [], 0, "weights", "fc2.kernel"),
    ("flatten-order", [], 0, "forward", "input of fc1"),
    ("same-padding", [], 0, "forward", "conv1"),
    ("float32-inside", [], 0, "forward", "logits"),
    ("sum-for-mean", [], 0, "loss", "loss"),
    ("stopped-gradient", [], 0, "backward", "fc3.bias"),
    ("momentum-089", [], 1, "update", "momentum of conv1.bias"),
    ("dampening-on-the-first-step", ["--dampening", "0.5"], 0, "update", None),
    ("decoupled-weight-decay", ["--weight-decay", "0.01"], 0, "update", None),
    ("schedule-off-by-one", ["--schedule", "exponential"], 0, "update", None),
    ("last-batch-not-evaluated", [], 24, "evaluate", None),
    ("classes-moved", [], 24, "evaluate", "predictions"),
]

FAST = ("bgr", "flatten-order", "classes-moved")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("fault", "options", "step", "stage", "tensor"),
    slow_except(PORTS, *FAST),
    ids=[port[0] for port in PORTS],
)
def test_a_broken_port_disagrees_and_its_check_is_named(
    both: tuple[int, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tinted: Path,
    fault: str,
    options: list[str],
    step: int,
    stage: str,
    tensor: str | None,
) -> None:
    proof = [*SHORT, "--dtype", "float64", "--out", tmp_path, *options]
    if options:
        assert lockstep(*proof, "--backend", "torch") == 0
    else:
        shutil.copy(both[1] / "torch-float64.safetensors", tmp_path)
    broken(monkeypatch, fault, data.load(str(tinted)), *proof)
    assert lockstep(*proof, "--backend", "flax") == 1
    divergence = report_of(tmp_path)["lenses"][0]["first_divergence"]
    assert (divergence["step"], divergence["stage"]) == (step, stage)
    assert tensor is None or divergence["tensor"] == tensor
    assert divergence["gap"] is None or divergence["gap"] > divergence["bound"]
    said = " ".join(capsys.readouterr().out.split())
    assert "The two runs disagree." in said
    assert f"{stage}: step {step}:" in said


UNSTABLE = [
    *SHORT,
    "--data",
    "digits",
    "--steps",
    "200",
    "--batch-size",
    "32",
    "--lr",
    "0.05",
    "--dtype",
    "float64",
]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_float64_runs_that_amplify_rounding_are_held_against_twins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lockstep(*UNSTABLE, "--out", tmp_path) == 0
    assert "which this run amplifies" in " ".join(capsys.readouterr().out.split())
    lens = report_of(tmp_path)["lenses"][0]
    assert (
        lens["max_abs_loss_gap"] > 1e-11
    )  # 4e-12 at step 85, 0.7 by step 300; the twins are twice as far apart
    assert [len(lens["twins"][name]) for name in ("torch", "flax")] == [2, 2]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
def test_a_late_fault_is_not_taken_for_chaos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tinted: Path
) -> None:
    options = [
        *SHORT,
        "--dtype",
        "float64",
        "--schedule",
        "multistep:milestones=12,gamma=0.5",
        "--out",
        tmp_path,
    ]
    assert lockstep(*options, "--backend", "torch") == 0
    broken(monkeypatch, "schedule-off-by-one", data.load(str(tinted)), *options)
    assert lockstep(*options, "--backend", "flax") == 1
    divergence = report_of(tmp_path)["lenses"][0]["first_divergence"]
    assert (divergence["step"], divergence["stage"], divergence["tensor"]) == (11, "update", "lr")
    assert (
        tmp_path / "flax-float64-twin1.safetensors"
    ).exists()  # twins were asked, and could not explain it


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "stage"),
    [("flatten-order", "forward"), ("momentum-089", "update"), ("classes-moved", "evaluate")],
)
def test_a_broken_port_disagrees_in_the_precision_it_trains_in_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tinted: Path, fault: str, stage: str
) -> None:
    options = [*SHORT, "--dtype", "float32", "--twins", "1", "--steps", "100", "--out", tmp_path]
    assert lockstep(*options, "--backend", "torch") == 0
    broken(monkeypatch, fault, data.load(str(tinted)), *options)
    assert lockstep(*options, "--backend", "flax") == 1
    assert report_of(tmp_path)["lenses"][0]["first_divergence"]["stage"] == stage


@pytest.mark.usefixtures("undrawn")
def test_locate_says_from_the_records_where_two_runs_part(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tinted: Path,
) -> None:
    options = [*SHORT, "--dtype", "float64", "--out", tmp_path]
    with monkeypatch.context() as patch:
        broken(patch, "flatten-order", data.load(str(tinted)), *options)
        assert lockstep(*options) == 1
    by_itself = report_of(tmp_path)["lenses"][0]["located"]
    capsys.readouterr()
    assert lockstep("locate", *(option for option in options if option != "--quiet")) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "Training" not in said
    assert "Where they differ first: forward: step 0: input of fc1" in said
    assert "In input of fc1: the same numbers in another order." in said
    assert (
        "A likely cause: flatten: PyTorch unrolls (C, H, W), Flax (H, W, C); see `flattened`."
        in said
    )
    located = report_of(tmp_path)["lenses"][0]["located"]
    assert located == by_itself
    assert len(located["offenders"]) == 5


@pytest.mark.usefixtures("undrawn")
def test_locate_has_nothing_to_say_of_runs_that_agree(
    both: tuple[int, Path], tmp_path: Path
) -> None:
    for file in both[1].glob("*.safetensors"):
        shutil.copy(file, tmp_path)
    assert lockstep("locate", *SHORT, "--out", tmp_path) == 0
    assert all("located" not in lens for lens in report_of(tmp_path)["lenses"])


# --- The evidence


@pytest.mark.slow
def test_a_known_fault_can_be_run_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--only",
        "classes-moved",
        "bgr",
        "--data",
        "digits",
        "--dtype",
        "float64",
        "--out",
        tmp_path,
    ]
    assert lockstep("faults", *options) == 0
    said = capsys.readouterr().out
    assert "Skipped, since digits has no colours: bgr" in said
    assert "float64: evaluate: step 60: predictions: gap" in said
    [row] = report_of(tmp_path)["rows"]
    found = row["lenses"]["float64"]
    assert (found["caught"], found["stage"], found["trajectory_agrees"]) == (True, "evaluate", True)
    assert (
        found["peers"]["assert_close, losses"] is False
    )  # the losses are equal: only the evaluation is wrong
    assert (tmp_path / "faults.png").exists()


@pytest.mark.parametrize(
    ("fault", "word"), [("nope", "faults --list names all"), ("bgr", "--data cifar10")]
)
def test_a_fault_that_is_unknown_or_cannot_show_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, word: str
) -> None:
    assert (
        lockstep("faults", "--only", fault, "--data", "digits", "--quiet", "--out", tmp_path) == 2
    )
    assert_one_line(capsys, word)


@pytest.mark.slow
@pytest.mark.parametrize("cifar10", [True, False], ids=["with CIFAR-10", "without"])
def test_clean_pairs_raise_no_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cifar10: bool
) -> None:
    if not cifar10:
        monkeypatch.setenv("LOCKSTEP_DATA", str(tmp_path))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert lockstep("alarms", "--pairs", "1", "--dtype", "float64", "--out", tmp_path) == 0
    report = report_of(tmp_path)
    assert [row["lenses"]["float64"]["verdict"] for row in report["rows"]] == ["agree"]
    assert report["summary"][0]["rule"] == "Lockstep"
    assert report["first_seed"] == report["rows"][0]["seed"] == 21000
    assert (tmp_path / "alarms.png").exists()


# --- Wrong input


def assert_one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """One line on standard error, no traceback, and the words that name the remedy."""
    error = capsys.readouterr().err
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("options", "word"),
    [
        pytest.param(["--dtype", "float16"], "float64", id="unknown-dtype"),
        pytest.param(["--backend", "keras"], "torch", id="unknown-backend"),
        pytest.param(["--recipe", "nothing"], "tutorial", id="unknown-recipe"),
        pytest.param(["--frobnicate"], "--help", id="unknown-option"),
        pytest.param(["sleep"], "run", id="unknown-command"),
        pytest.param(["--lr", "fast"], "--lr", id="lr-not-a-number"),
        pytest.param(["--lr", "-1"], "--lr", id="negative-lr"),
        pytest.param(["--lr", "nan"], "--lr", id="lr-nan"),
        pytest.param(["--clip-norm", "0"], "--clip-norm", id="clip-norm-zero"),
        pytest.param(["--augment", "mixup"], "crop-flip", id="unknown-augmentation"),
        pytest.param(
            ["--label-smoothing", "1"], "--label-smoothing", id="nothing-left-of-the-labels"
        ),
        pytest.param(["--schedule", "sawtooth"], "cosine", id="unknown-schedule"),
        pytest.param(["--schedule", "step:speed=1"], "period", id="unknown-schedule-option"),
        pytest.param(
            ["--nesterov", "--momentum", "0"], "--momentum", id="nesterov-without-momentum"
        ),
        pytest.param(
            ["--nesterov", "--dampening", "0.5"], "--dampening", id="nesterov-with-dampening"
        ),
        pytest.param(["--batch-size", "1438"], "1437", id="batch-larger-than-data"),
        pytest.param(["--steps", "0"], "--steps", id="zero-steps"),
        pytest.param(["--epochs", "2"], "--steps", id="epochs-and-steps"),
        pytest.param(["--lr", "1e39"], "--lr", id="lr-beyond-float32"),
        pytest.param(
            ["--schedule", "step:period=99999999999999999999"], "period", id="period-beyond-int32"
        ),
        pytest.param(["--schedule", "exponential:gamma=nan"], "gamma", id="gamma-nan"),
        pytest.param(["--frob\nnicate\x1b[31m"], "--help", id="option-with-control-characters"),
        pytest.param(
            ["grid"], "grid takes no --batch-size", id="grid-with-options-it-does-not-use"
        ),
        pytest.param(
            ["faults"], "faults takes no --steps", id="faults-with-options-it-does-not-use"
        ),
        pytest.param(
            ["sensitivity"],
            "sensitivity takes no --batch-size",
            id="sensitivity-with-options-it-does-not-use",
        ),
        pytest.param(["--twins", "0", "--dtype", "float32"], "--twins", id="no-twins"),
        pytest.param(
            ["--device", "cuda", "--backend", "torch"], "--device cpu", id="no-cuda-in-torch"
        ),
        pytest.param(
            ["--device", "cuda", "--backend", "flax"], "--device cpu", id="no-cuda-in-jax"
        ),
        pytest.param(["--data", "/no/such/place"], "cifar10", id="no-such-data"),
        pytest.param(["--out", "/proc/nothing"], "--out", id="unwritable-out"),
        pytest.param(["--out", "/dev/null"], "--out", id="out-is-a-file"),
        pytest.param(
            ["--tensorboard", "/proc/nothing"], "--tensorboard", id="unwritable-tensorboard"
        ),
        pytest.param(["learn"], "learn takes no --steps", id="learn-with-options-it-does-not-use"),
    ],
)
def test_wrong_options_give_one_line_and_status_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    word: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("jax.devices", only_cpu)
    command = options if options[0] in COMMANDS else []  # a command comes first
    assert lockstep(*command, *SHORT, "--out", tmp_path, *(options if not command else [])) == 2
    assert_one_line(capsys, word)
    assert list(tmp_path.iterdir()) == []


def test_pages_to_learn_from_are_made_where_they_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walked = []  # the walk itself has tests of its own, and takes a minute
    monkeypatch.setattr(
        "lockstep.common.learn.walk_through", lambda *given: walked.append(given) or "walked"
    )
    monkeypatch.setattr(
        "lockstep.common.learn.write_walk_page", lambda path, walk: path.write_text(walk)
    )
    assert lockstep("learn", "--out", tmp_path, "--quiet") == 0
    assert "The two backends side by side" in (tmp_path / "read.html").read_text()
    assert "From PyTorch to JAX" in (tmp_path / "lesson.html").read_text()
    assert "From PyTorch to JAX" in (tmp_path / "lesson.ipynb").read_text()
    assert (tmp_path / "walk.html").read_text() == "walked"
    [(_, dataset, sources, _)] = walked
    assert (dataset.name, sources) == ("digits", REPOSITORY)


@pytest.mark.parametrize("own", [True, False], ids=["their own place", "elsewhere"])
def test_in_their_own_place_the_pages_come_with_the_index_of_all_results(
    own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for made in ("lesson_page", "lesson_notebook", "read_page", "walk_page"):
        monkeypatch.setattr(f"lockstep.common.learn.write_{made}", lambda *given: None)
    monkeypatch.setattr("lockstep.common.learn.walk_through", lambda *given: None)
    monkeypatch.setattr(learn, "ROOT", tmp_path)
    (tmp_path / "compare.py").touch()
    for name in ("faults", "quick"):
        (tmp_path / "results" / name).mkdir(parents=True)
        report = REPOSITORY / "results" / name / "report.json"
        (tmp_path / "results" / name / "report.json").symlink_to(report)
    out = tmp_path / "results" / "read" if own else tmp_path / "read"
    assert lockstep("learn", "--out", out, "--quiet") == 0
    index = tmp_path / "results" / "index.html"
    assert index.exists() == own
    assert not own or "quick/report.html" in index.read_text()


@pytest.mark.parametrize(
    "content", [None, "{", "[]", "{}"], ids=["missing", "damaged", "a list", "empty"]
)
def test_pages_to_learn_from_without_the_faults_report_give_one_line_and_status_2(
    content: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learn, "ROOT", tmp_path)
    (tmp_path / "compare.py").touch()
    (tmp_path / "results" / "faults").mkdir(parents=True)
    if content is not None:
        (tmp_path / "results" / "faults" / "report.json").write_text(content)
    assert lockstep("learn", "--out", tmp_path / "pages") == 2
    assert_one_line(capsys, "python compare.py faults")
    assert list((tmp_path / "pages").iterdir()) == []


def only_cpu(*_: str) -> list:
    import jax

    return jax.local_devices(backend="cpu")


def bad_npz(folder: Path, digits: Dataset, **changes: np.ndarray | None) -> Path:
    arrays = {"x_train": digits.train_images[:40], "y_train": digits.train_labels[:40]}
    arrays |= {"x_test": digits.test_images[:20], "y_test": digits.test_labels[:20]}
    kept = {name: array for name, array in (arrays | changes).items() if array is not None}
    np.savez(folder / "data.npz", allow_pickle=False, **kept)
    return folder / "data.npz"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        pytest.param({"y_train": None}, "y_train", id="missing-array"),
        pytest.param({"x_train": np.zeros((40, 8, 8), np.uint8)}, "x_train", id="wrong-shape"),
        pytest.param({"y_train": np.full(40, -1)}, "labels", id="negative-label"),
    ],
)
def test_a_bad_archive_gives_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], digits: Dataset, changes: dict, word: str
) -> None:
    path = bad_npz(tmp_path, digits, **changes)
    assert lockstep(*SHORT, "--data", path, "--out", tmp_path / "out") == 2
    assert_one_line(capsys, word)


def test_an_empty_folder_gives_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures").mkdir()
    assert lockstep(*SHORT, "--data", tmp_path / "pictures", "--out", tmp_path / "out") == 2
    assert_one_line(capsys)


def test_an_altered_cifar10_file_gives_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / cifar10.CIFAR10_FOLDER).mkdir()
    for name in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
    ):
        (tmp_path / cifar10.CIFAR10_FOLDER / name).write_bytes(b"not a batch")
    (tmp_path / cifar10.CIFAR10_FOLDER / "batches.meta").write_bytes(b"not the names")
    assert (
        lockstep(*SHORT, "--data", "cifar10", "--data-dir", tmp_path, "--out", tmp_path / "out")
        == 2
    )
    assert_one_line(capsys)


@pytest.mark.slow
def test_a_folder_of_pictures_with_odd_names_is_trained_on(
    tmp_path: Path, digits: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["<script>alert(1)</script>".replace("/", "_"), "\x1b[31mred", "$x_1$"]
    for label, name in enumerate(names):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, image in enumerate(digits.train_images[digits.train_labels == label][:10]):
            Image.fromarray(image).save(tmp_path / "data" / name / f"{i}.png")
    options = [
        "--data",
        tmp_path / "data",
        "--steps",
        "4",
        "--dtype",
        "float64",
        "--out",
        tmp_path / "out",
    ]
    assert lockstep("--backend", "flax", "--batch-size", "4", *options) == 0
    said = capsys.readouterr()
    assert said.err == "" and "\x1b" not in said.out
    assert sorted(report_of(tmp_path / "out")["data"]["classes"]) == sorted(names)


@pytest.mark.slow
def test_the_grid_command_compares_every_combination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lockstep.common.evidence import optimizer_grid

    few = [
        config for i, config in enumerate(optimizer_grid.combinations(40)) if i in (0, 58, 119, 200)
    ]
    monkeypatch.setattr(optimizer_grid, "combinations", lambda steps: few)
    assert lockstep("grid", "--data", "digits", "--quiet", "--out", tmp_path) == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert len(rows) == 4
    assert max(row["loss_gap"] for row in rows) <= 1e-14  # 9e-16 measured
    monkeypatch.setattr(
        optimizer_grid,
        "combinations",
        lambda steps: [config for config in few if config.momentum][:1],
    )
    broken(monkeypatch, "momentum-089", data.load("digits"))
    assert lockstep("grid", "--data", "digits", "--quiet", "--out", tmp_path) == 1


def test_the_grid_holds_every_legal_combination() -> None:
    from lockstep.common.evidence import optimizer_grid

    configs = list(optimizer_grid.combinations())
    assert (
        len(configs) == len(set(configs)) == 7 * (20 + 8 + 12 + 16 + 16 + 4)
    )  # schedules; of SGD 5 of momentum, dampening, nesterov, and 2 x 2
    assert {config.optimizer for config in configs} == {*OPTIMIZERS}


# Python takes apart what is in a module when it ends.
ENDING = """
import atexit, sys
from lockstep.common.system import environment
class Part:
    def __del__(self): print("taken apart", file=sys.stderr)
part = Part()
atexit.register(print, "registered")
print("said")
{end}(3)
"""


@pytest.mark.parametrize(
    ("end", "left"), [("environment.exit_fast", ""), ("sys.exit", "taken apart\n")]
)
def test_a_command_that_ends_says_all_but_takes_nothing_apart(end: str, left: str) -> None:
    command = [sys.executable, "-c", ENDING.format(end=end)]
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (3, "said\nregistered\n", left)
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            command, cwd=REPOSITORY, env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert run.returncode == 120 and "No space left on device" in run.stderr


def test_records_of_a_run_can_be_read(both: tuple[int, Path]) -> None:
    for path in both[1].glob("*.safetensors"):
        assert record.read(path).steps == 24
