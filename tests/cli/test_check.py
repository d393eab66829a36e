"""`check`, `record` and `diff` from end to end, over two training scripts; what cannot be compared.

A script of these tests imports JAX alone, which takes a second; slow tests run PyTorch's, too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lockstep
from lockstep import cli
from lockstep.common.errors import LockstepError, ScriptError
from lockstep.common.recorder import recording
from lockstep.common.recorder.recording import Recording
from lockstep.common.system import storage

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
TORCH, JAX = str(SCRIPTS / "mlp_torch.py"), str(SCRIPTS / "mlp_jax.py")

TRAIN = """
import sys
import numpy as np
import jax, jax.numpy as jnp
import lockstep

draws = np.random.default_rng(0)
params = {"kernel": jnp.asarray(draws.standard_normal((4, 3))), "bias": jnp.ones(3)}

def mean_loss(params, x, y):
    return jnp.square(jnp.tanh(x @ params["kernel"]) + params["bias"] - y).mean()

run = lockstep.Run()
params = run.begin(params)
for step in range(6):
    x, y = draws.standard_normal((5, 4)), draws.standard_normal((5, 3))
    x, y = run.batch(jnp.asarray(x), jnp.asarray(y))
    loss, grads = jax.value_and_grad(mean_loss)(params, x, y)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    run.step(loss, params=params, grads=grads)
run.finish(kernel=params["kernel"])
"""
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, *changes: tuple[str, str], source: str = TRAIN) -> str:
        """Write a script, changed so, and return its path."""
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        (tmp_path / name).write_text(source)
        return str(tmp_path / name)

    return write


@pytest.fixture
def pair(write: Write) -> tuple[str, str]:
    """A script and its port, which names things otherwise and stores the kernel transposed."""
    port = write(
        "b.py",
        ('"kernel": jnp.asarray(draws.standard_normal((4, 3)))', '"w": jnp.asarray(draws.standard_normal((4, 3)).T)'),
        ('x @ params["kernel"]', 'x @ params["w"].T'),
        ('"bias"', '"b"'),
        ('kernel=params["kernel"]', 'kernel=params["w"].T'),
    )  # fmt: skip
    return write("a.py"), port


class Said:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def error(self) -> str:
        """The one line with which a request is refused."""
        assert self.status == 2, self.out + self.err
        assert self.err.startswith("error: ") and self.err.count("\n") == 1, self.err
        return self.err.removeprefix("error: ").rstrip()


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def said(*arguments: str | Path) -> Said:
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Said(status, captured.out, captured.err)

    return said


FLOAT64 = ("--precision", "float64")


def check(a: str, b: str, folder: Path, **options: Any) -> Any:
    """In float64 alone, which is the quicker half."""
    settings: dict[str, Any] = {"precision": "float64", **options}
    return lockstep.check(a, b, out=folder, **settings)


# --- Verdicts


def test_a_script_and_its_port_agree_and_their_recordings_can_be_compared_again(
    pair: tuple[str, str], tmp_path: Path, said: Callable[..., Said]
) -> None:
    found = said("check", *pair, *FLOAT64, "--out", tmp_path / "out", "--json", "--", "--lr", "1")
    assert found.status == 0
    report = json.loads(found.out)
    assert report["verdict"] == "agree"
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    for name in ("a", "b"):
        kept = recording.read(tmp_path / "out" / name / "float64.safetensors")
        assert kept.arguments == ["--lr", "1"] and kept.steps == 6
    again = said("diff", tmp_path / "out" / "a", tmp_path / "out" / "b", "--out", tmp_path / "d")
    assert again.status == 0 and "agree" in again.out


def test_two_scripts_whose_first_steps_differ_are_ended_there_and_the_exit_status_is_1(
    write: Write, tmp_path: Path, said: Callable[..., Said]
) -> None:
    long = ("run.finish(", "import time; time.sleep(1000)\nrun.finish(")
    a, b = write("a.py", long), write("b.py", long, ("0.1 * g", "0.11 * g"))
    found = said("check", a, b, *FLOAT64, "--out", tmp_path / "out")
    assert found.status == 1 and found.err == ""
    assert "The first steps differ: the scripts are ended there" in found.out
    assert "update: step 0" in " ".join(found.out.split())
    assert found.out.splitlines()[-1].startswith("Report: ")
    kept = sorted(path.name for path in (tmp_path / "out" / "a").glob("*.safetensors"))
    assert kept == ["float64-again-short.safetensors", "float64.safetensors"]


@pytest.mark.slow
def test_an_assertion_shows_the_place(pair: tuple[str, str], write: Write, tmp_path: Path) -> None:
    found = check(pair[0], write("c.py", ("jnp.ones(3)", "jnp.ones(3) + 1e-6")), tmp_path / "out")
    assert not found
    assert "step 0" in repr(found) and "bias" in repr(found)
    assert check(*pair, tmp_path / "out", steps=2)


@pytest.mark.slow
def test_a_script_agrees_with_itself(pair: tuple[str, str], tmp_path: Path) -> None:
    assert check(pair[0], pair[0], tmp_path, steps=3)
    assert {path.name for path in tmp_path.iterdir()} >= {"a-a", "a-b", "report.json"}


@pytest.mark.slow
def test_the_pair_of_torch_and_jax_agrees_in_both_precisions(tmp_path: Path) -> None:
    found = lockstep.check(TORCH, JAX, out=tmp_path)
    assert found, repr(found)
    assert [each["dtype"] for each in found.report["precisions"]] == ["float64", "float32"]
    names = {path.name for path in (tmp_path / "mlp_torch").iterdir()}
    assert {"float64.safetensors", "own.safetensors", "own-twin2.safetensors"} <= names


@pytest.mark.slow
def test_a_mistake_in_the_port_is_found_before_float32_is_tried(
    write: Write, tmp_path: Path
) -> None:
    port = write("port.py", ("momentum=0.9", "momentum=0.8"), source=Path(JAX).read_text())
    found = lockstep.check(TORCH, port, out=tmp_path / "out")
    assert not found and [each["dtype"] for each in found.report["precisions"]] == ["float64"]
    assert "update: step 1" in repr(found)


# --- What scripts do


@pytest.mark.slow
def test_a_script_that_draws_its_own_numbers_is_found_by_running_it_again(
    pair: tuple[str, str], write: Write, tmp_path: Path
) -> None:
    noisy = write("noisy.py", ("default_rng(0)", "default_rng()"))
    with pytest.raises(ScriptError) as caught:
        check(pair[0], noisy, tmp_path / "out")
    line = str(caught.value)
    assert line.startswith("noisy.py is not reproducible") and "seed it" in line


@pytest.mark.slow
def test_other_numbers_of_steps_are_said(
    pair: tuple[str, str], write: Write, tmp_path: Path
) -> None:
    early = write("early.py", ("range(6)", "range(4)"))
    found = check(pair[0], early, tmp_path / "out")
    assert not found
    assert "a.py took 6 steps and early.py 4" in repr(found)
    assert check(pair[0], early, tmp_path / "out", steps=4)


@pytest.mark.slow
def test_two_calls_of_step_for_one_batch_do_not_agree(
    pair: tuple[str, str], write: Write, tmp_path: Path
) -> None:
    line = "    run.step(loss, params=params, grads=grads)\n"
    twice = write("twice.py", (line, line + line))
    assert not check(pair[0], twice, tmp_path / "out", steps=6)


@pytest.mark.slow
def test_a_script_that_computes_in_float32_all_the_same_is_told_where(
    pair: tuple[str, str], write: Write, tmp_path: Path
) -> None:
    pinned = write("pinned.py", ("- y).mean()", '- y).mean().astype("float32")'))
    found = check(pair[0], pinned, tmp_path / "out")
    assert not found
    (compared,) = found.report["precisions"]
    assert any("pinned.py computes in float32" in note for note in compared["notes"])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_does_not_agree(
    pair: tuple[str, str], write: Write, tmp_path: Path
) -> None:
    nan = write("nan.py", ("run.step(loss,", 'run.step(loss if step < 3 else float("nan"),'))
    found = check(pair[0], nan, tmp_path / "out")
    assert not found and "step 3" in repr(found)


def test_what_a_script_prints_does_not_mix_with_the_report(
    pair: tuple[str, str], write: Write, tmp_path: Path, said: Callable[..., Said]
) -> None:
    chatty = write("chatty.py", ("run.step(loss,", 'print("of the script"); run.step(loss,'))
    found = said("check", pair[0], chatty, *FLOAT64, "--json", "--out", tmp_path / "out")
    assert found.status == 0 and json.loads(found.out)["verdict"] == "agree"
    assert "of the script" not in found.err
    log = (tmp_path / "out" / "chatty" / "float64.log").read_text()
    assert log == 6 * "of the script\n"


@pytest.mark.slow
def test_a_script_starts_from_the_weights_of_the_other(
    pair: tuple[str, str], write: Write, tmp_path: Path
) -> None:
    source = Path(pair[1]).read_text()
    other = write(
        "other.py",
        ("draws.standard_normal((4, 3)).T", "np.random.default_rng(7).standard_normal((3, 4))"),
        ("run = lockstep.Run()", "draws.standard_normal((4, 3))\nrun = lockstep.Run()"),
        source=source,
    )
    assert not check(pair[0], other, tmp_path / "out")
    assert check(pair[0], other, tmp_path / "out", start_from="A")
    assert check(pair[0], other, tmp_path / "out", start_from="B")


# --- Wrong requests


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "0"], ["--steps must be 1 or more"]),
        (["--timeout", "0"], ["--timeout must be more than 0"]),
        (["--twins", "-1"], ["--twins must be 0 or more"]),
        (["--precision", "flaot64"], ["did you mean float64?"]),
        (["--start-from", "C"], ["--start-from", "'C'"]),
        (["--record-limit", "much"], ["'much' is no number of bytes"]),
        (["--lr", "1"], ["check takes no --lr"]),
        (["--names", "missing"], ["there is no names file missing"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_option_is_one_line(
    options: list[str], words: list[str], pair: tuple[str, str], said: Callable[..., Said]
) -> None:
    line = said("check", *pair, *options).error
    for word in words:
        assert word in line


def test_scripts_that_do_not_exist_or_fail_are_one_line(
    pair: tuple[str, str], write: Write, tmp_path: Path, said: Callable[..., Said]
) -> None:
    assert "there is no script missing.py" in said("check", pair[0], "missing.py").error
    assert said("check", pair[0]).error == "check needs more: lockstep check A B"
    failing = write("failing.py", ("run.begin(params)", "run.begin(params).no_such_thing"))
    found = said("check", pair[0], failing, "--out", tmp_path / "out", "--quiet")
    assert found.status == 2 and found.out == ""
    *traceback, line = found.err.splitlines()
    assert (
        line == "error: failing.py failed in its float64 run (exit status 1): fix the script first"
    )
    assert traceback[0] == "Traceback (most recent call last):" and "failing.py" in traceback[1]
    assert traceback[-1].startswith("AttributeError: ")


# --- Folders of recordings


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recording in float64."""
    folder = tmp_path_factory.mktemp("golden")
    (folder / "train.py").write_text(TRAIN)
    assert cli.main(["record", str(folder / "train.py"), "--out", str(folder / "kept")]) == 0
    return folder / "kept"


@pytest.fixture
def copied(golden: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(golden, tmp_path / "copied"))


def test_a_recording_agrees_with_its_copy(
    golden: Path, copied: Path, tmp_path: Path, said: Callable[..., Said]
) -> None:
    found = said("diff", golden, copied, "--out", tmp_path / "out")
    assert found.status == 0, found.err


def changed(path: Path, change: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> None:
    """Change a recording, and keep its digest right."""
    facts, arrays = storage.read_tensors(path, recording.SCHEMA, "recording", "", 2**30)
    facts["schema"] = recording.SCHEMA
    change(facts, arrays)
    storage.write_tensors(path, facts, arrays)


def damage(name: str, folder: Path) -> None:
    path = folder / "float64.safetensors"
    content = bytearray(path.read_bytes())
    if name == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif name == "altered":
        content[-3] ^= 1
        path.write_bytes(content)
    elif name == "schema":
        changed(path, lambda facts, arrays: facts.update(schema=99))
    elif name == "two versions":
        shutil.copy(path, folder / "float64-twin1.safetensors")
        changed(folder / "float64-twin1.safetensors", lambda f, a: f.update(twin=1, source="0"))
    elif name == "empty":
        path.unlink()
    elif name == "missing":
        shutil.rmtree(folder)
    else:
        path.write_text("no recording")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncated", "cannot be read"),
        ("altered", "is damaged (its digest does not match): record the script again"),
        ("schema", "is of another version of Lockstep: record the script again"),
        ("two versions", "two versions of train.py"),
        ("empty", "holds no recording: make one with record SCRIPT --out"),
        ("missing", "there is no folder"),
        ("text", "recording"),
    ],
)
def test_a_folder_that_cannot_be_compared_is_one_line(
    name: str, words: str, golden: Path, copied: Path, said: Callable[..., Said]
) -> None:
    damage(name, copied)
    assert words in said("diff", golden, copied).error


def test_a_folder_of_the_other_precision_has_nothing_in_common(
    golden: Path, copied: Path, said: Callable[..., Said]
) -> None:
    (copied / "float64.safetensors").rename(copied / "own.safetensors")
    line = said("diff", golden, copied).error
    assert "float64" in line and "own" in line


def test_runs_that_have_nothing_in_common_are_one_line(
    golden: Path, tmp_path: Path, said: Callable[..., Said]
) -> None:
    other = Recording(
        name="other.py", framework="torch", dtype="float64", twin=None, script="other.py",
        arguments=[], source="", environment={}, complete=True,
        weights={"table": np.zeros((7, 2))}, parameters=["table"],
        series={name: np.zeros(6) for name in ("real", "fake")},
    )  # fmt: skip
    recording.write(other, tmp_path / "other" / "float64.safetensors")
    line = said("diff", golden, tmp_path / "other").error
    assert line.startswith("train.py and other.py have nothing in common to compare")


def test_a_changed_number_in_a_golden_record_does_not_agree(
    golden: Path, copied: Path, tmp_path: Path
) -> None:
    def change(facts: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        arrays["series/loss"] = arrays["series/loss"] * (1 + 1e-6)

    changed(copied / "float64.safetensors", change)
    assert not lockstep.diff(golden, copied, out=tmp_path / "out")


def test_names_that_are_not_there_are_one_line(
    golden: Path, copied: Path, tmp_path: Path, said: Callable[..., Said]
) -> None:
    (tmp_path / "names").write_text("kernle kernel\n")
    line = said("diff", golden, copied, "--names", tmp_path / "names").error
    assert "line 1" in line and "kernle" in line


@pytest.mark.slow
def test_a_recording_is_replaced_as_a_whole(golden: Path, tmp_path: Path) -> None:
    path, folder = golden.parent / "train.py", tmp_path / "out"
    lockstep.record(path, folder, twins=1, steps=2)
    names = {path.name for path in folder.iterdir() if path.suffix == ".safetensors"}
    assert names == {"float64.safetensors", "float64-twin1.safetensors"}
    made = lockstep.record(path, folder, steps=2)
    names = {path.name for path in folder.iterdir() if path.suffix == ".safetensors"}
    assert names == {"float64.safetensors"} and made["float64"].run.steps == 2


def test_a_folder_that_cannot_be_written_is_one_line(
    pair: tuple[str, str], tmp_path: Path, said: Callable[..., Said]
) -> None:
    (tmp_path / "file").write_text("")
    assert "choose another folder with --out" in said(
        "check", *pair, "--out", tmp_path / "file"
    ).error  # fmt: skip
    with pytest.raises(LockstepError, match="--out"):
        lockstep.record(pair[0], tmp_path / "file")


def test_two_scripts_that_blow_up_in_their_first_step_are_said_to(
    write: Write, said: Callable[..., Said], tmp_path: Path
) -> None:
    scripts = [
        write(name, ('params["bias"] - y).mean()', 'params["bias"] - y).mean() * jnp.nan'))
        for name in ("a.py", "b.py")
    ]
    found = said("check", *scripts, *FLOAT64, "--out", tmp_path / "out")
    text = " ".join(found.out.split())
    assert found.status == 1 and found.err == ""
    assert "a loss that is not finite at the same step (float64: step 0)" in text


def test_a_file_is_no_folder_of_recordings(write: Write, said: Callable[..., Said]) -> None:
    script = write("a.py")
    assert f"{script} is a file: give the folder of its" in said("diff", script, script).error
