"""`diff` of two runs that Lockstep trained: of one framework, and what cannot be compared."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep import cli
from lockstep.common import run_diff
from lockstep.common.runs import record
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record

OPTIONS = ["--data", "digits", "--model", "mlp", "--steps", "6", "--batch-size", "4", "--quiet"]
Change = Callable[[Record], Record]
FILE = "torch-float64.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of PyTorch in float64."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    options = ["--backend", "torch", "--dtype", "float64", "--out", str(folder)]
    assert cli.main([*OPTIONS, *options]) == 0
    return folder


@pytest.fixture
def changed(run: Path, tmp_path: Path) -> Callable[[Change], Path]:
    def changed(change: Change) -> Path:
        """A copy of the run, whose record is changed so."""
        folder = tmp_path / "other"
        shutil.copytree(run, folder)
        record.write(change(record.read(folder / FILE)), folder)
        return folder

    return changed


def by_two(found: Record) -> Record:
    return dataclasses.replace(found, environment=found.environment | {"processes": 2})


def with_another_gradient(found: Record) -> Record:
    arrays = {name: array.copy() for name, array in found.first_steps.items()}
    arrays["0/backward/fc1.bias"][1] += 1e-3
    return dataclasses.replace(by_two(found), first_steps=arrays)


def with_another_loss(found: Record) -> Record:
    loss = found.loss.copy()
    loss[4:] += 1e-3
    return dataclasses.replace(found, loss=loss)


def with_ranks_that_differ(found: Record) -> Record:
    difference = {"step": 1, "rank": 1, "tensor": "gradient of fc1.bias", "gap": 0.5}
    return dataclasses.replace(by_two(found), rank_differences=[difference])


def test_runs_of_one_framework_by_one_process_and_by_two_agree(
    run: Path, changed: Callable[[Change], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["diff", str(run), str(changed(by_two)), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "The two runs agree: float64 within 0 over 6 steps" in said
    report = json.loads((tmp_path / "out/report.json").read_text())
    [compared] = report["lenses"]
    assert list(compared["accuracy"]) == ["torch", "torch (2 processes)"]
    assert {"torch", "torch (2 processes)", "machine"} == report["environment"].keys()
    page = (tmp_path / "out/report.html").read_text()
    assert "torch (2 processes)" in page and ">flax<" not in page


@pytest.mark.parametrize(
    ("change", "place", "said"),
    [
        pytest.param(
            with_another_gradient,
            "backward: step 0: fc1.bias: torch=",
            "The two runs disagree in float64.",
            id="gradient",
        ),
        pytest.param(
            with_ranks_that_differ,
            "backward: step 0: fc1.bias, rank 1 of PyTorch",
            "The two runs disagree in float64.",
            id="ranks",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            with_another_loss,
            None,
            "float64: not decided. The runs differ from step 4 on",
            id="late",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_record_with_a_fault_does_not_agree(
    change: Change,
    place: str | None,
    said: str,
    run: Path,
    changed: Callable[[Change], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert cli.main(["diff", str(run), str(changed(change)), "--out", str(out)]) == 1
    assert said in " ".join(capsys.readouterr().out.split())
    [compared] = json.loads((out / "report.json").read_text())["lenses"]
    found = compared.get("located", {}).get("message", "")
    assert found.startswith(place or "")
    if change is with_another_gradient:
        assert " torch (2 processes)=" in found


def test_two_runs_that_are_called_alike_are_named_by_their_folders(run: Path) -> None:
    same = Ensemble(record.read(run / FILE))
    two = Ensemble(by_two(same.run))
    for sides, paths, names in (
        ((same, two), (run, run), ["torch", "torch (2 processes)"]),
        ((same, same), (run, run / "other"), ["torch (one)", "torch (other)"]),
        ((same, same), (run, run), ["torch (A)", "torch (B)"]),
    ):
        assert run_diff.side_names(sides, paths) == names


def other_rate(other: Path) -> None:
    found = record.read(other / FILE)
    record.write(dataclasses.replace(found, config=found.config | {"lr": 0.5}), other)


def other_data(other: Path) -> None:
    found = record.read(other / FILE)
    record.write(dataclasses.replace(found, data=found.data | {"digest": "0" * 64}), other)


def by_local_norms(other: Path) -> None:
    for folder in (other, other.parent / "one"):
        found = record.read(folder / FILE)
        found = dataclasses.replace(found, config=found.config | {"batch_norm": "local"})
        record.write(by_two(found) if folder == other else found, folder)


def of_scripts(other: Path) -> None:
    shutil.rmtree(other)
    other.mkdir()


def of_both(other: Path) -> None:
    for folder in (other, other.parent / "one"):
        shutil.copy(folder / FILE, folder / "flax-float64.safetensors")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        pytest.param(
            other_rate,
            "the torch records are of different runs (configuration, lr: ",
            id="another learning rate",
        ),
        pytest.param(
            other_data, "the torch records are of different runs (data, digest: ", id="other data"
        ),
        pytest.param(
            by_local_norms,
            "--batch-norm local is another network in 1 processes than in 2: run both",
            id="local batch norms",
        ),
        pytest.param(of_scripts, "other holds none: give two folders of runs", id="recordings"),
        pytest.param(shutil.rmtree, "other is not there: give two folders of runs", id="none"),
        pytest.param(
            lambda other: (other / FILE).unlink(),
            "other is not finished (torch float64 is missing): finish it with",
            id="unfinished",
        ),
        pytest.param(
            lambda other: shutil.copy(other / FILE, other / "torch-float32.safetensors"),
            "one in float32, too, with the same --out",
            id="another precision",
        ),
        pytest.param(
            of_both, "hold runs of torch and flax: say whose to compare with --backend", id="both"
        ),
        pytest.param(
            lambda other: (other / FILE).write_bytes(b"damaged"),
            "other/torch-float64",
            id="damaged",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    change: Callable[[Path], object],
    line: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("one", "other"):
        shutil.copytree(run, tmp_path / name)
    change(tmp_path / "other")
    words = ["diff", str(tmp_path / "one"), str(tmp_path / "other"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
    assert not (tmp_path / "out/report.json").exists()


@pytest.mark.parametrize(
    "option", [["--names", __file__], ["--backend", "flax"], ["--out", "RUN"]], ids=lambda o: o[0]
)
def test_an_option_that_does_not_apply_is_refused(
    option: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run) if word == "RUN" else word for word in option]
    before = (run / "report.json").read_bytes()
    assert cli.main(["diff", str(run), str(run), *words]) == 2
    assert (run / "report.json").read_bytes() == before
    assert option[0] in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_by_two_processes_agrees_and_one_with_another_rate_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*OPTIONS, "--backend", "torch"]
    for name, more in (("one", []), ("two", ["--processes", "2"]), ("fast", ["--lr", "0.3"])):
        assert cli.main([*options, *more, "--out", str(tmp_path / name)]) == 0
    one, two, fast = (str(tmp_path / name) for name in ("one", "two", "fast"))
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["diff", one, two, *out]) == 0
    assert "The two runs agree: float64 within" in capsys.readouterr().out
    assert cli.main(["diff", one, fast, *out]) == 2
    assert "configuration, lr: " in capsys.readouterr().err
