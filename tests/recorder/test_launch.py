"""Scripts in processes of their own: what a script sees, and every way in which it may end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lockstep.common.errors import RecordError, ScriptError
from lockstep.common.recorder import launch, script
from lockstep.common.recorder.launch import Start, run_script, run_scripts
from lockstep.common.recorder.recording import Recording
from lockstep.common.recorder.settings import OWN, VARIABLE, Settings

REPOSITORY = Path(__file__).resolve().parents[2]
Write = Callable[..., str]

TRAIN = """
import numpy as np
import jax, jax.numpy as jnp
import lockstep

run = lockstep.Run()
params = run.begin({"w": jnp.ones(3)})
for step in range(4):
    x = run.batch(np.arange(3.0, dtype="f4") + step)
    grads = {"w": x}
    params = {"w": params["w"] - 0.1 * grads["w"]}
    run.step((params["w"] * x).sum(), params=params, grads=grads)
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a script and return its path."""

    def write(source: str, name: str = "train.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return str(path)

    return write


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(str(tmp_path / "out" / "float64.safetensors"), "train.py", "float64")


def run(text: str, settings: Settings, *arguments: str, **options: Any) -> Recording:
    return run_script(script.find(text), arguments, settings, **options)


def refused(text: str, settings: Settings, *arguments: str, **options: Any) -> str:
    """The one line with which a run is refused."""
    with pytest.raises(ScriptError) as caught:
        run(text, settings, *arguments, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


# --- What a script sees

LOOK = """
import json, os, sys, threading
seen = {
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__,
    "x64": os.environ.get("JAX_ENABLE_X64"), "threads": os.environ.get("OMP_NUM_THREADS"),
    "stdin": sys.stdin.read(), "torch": "torch" in sys.modules, "jax": "jax" in sys.modules,
    "main": sys.modules["__main__"].__dict__ is globals(),
    "recorded": os.environ["LOCKSTEP_RECORD"].partition(":")[0] == str(os.getpid()),
    "numpy": "numpy" in sys.modules, "package": os.path.isdir(os.environ["PYTHONPATH"].split(":")[0]),
}
open(sys.argv[1], "w").write(json.dumps(seen))
"""


def seen(text: str, settings: Settings, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "seen.json"
    assert "did not call lockstep.Run()" in refused(text, settings, str(path), *arguments)
    return json.loads(path.read_text())


def test_a_script_sees_what_it_sees_without_lockstep(
    write: Write, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    write(LOOK, "own/train.py")
    found = seen("own/train.py", settings, tmp_path, "--lr", "0.1")
    plain = tmp_path / "plain.json"
    environ = os.environ | {VARIABLE: "0:"}
    subprocess.run(
        [sys.executable, "own/train.py", str(plain), "--lr", "0.1"],
        check=True,
        input=b"",
        env=environ,
    )
    without = json.loads(plain.read_text())
    for key in ("path", "name", "file", "stdin", "main", "torch", "jax", "numpy"):
        assert found[key] == without[key], key
    assert [found["argv"][0], *found["argv"][2:]] == ["own/train.py", "--lr", "0.1"]
    assert found["x64"] == "1" and found["recorded"] and found["package"]
    assert found["threads"] is not None and without["threads"] is None


def test_in_its_own_precision_a_script_is_left_alone(
    write: Write, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    own = Settings(settings.out, settings.name, OWN)
    found = seen(write(LOOK), own, tmp_path)
    assert found["x64"] is None and found["threads"] == "3"


def test_torch_makes_float64_tensors_as_soon_as_the_script_imports_it(
    write: Write, settings: Settings
) -> None:
    path = write("""
        import sys
        assert "torch" not in sys.modules
        import torch
        print(torch.zeros(1).dtype, torch.nn.Linear(1, 1).weight.dtype)
    """)
    assert "did not call lockstep.Run()" in refused(path, settings)
    log = Path(settings.out).with_suffix(".log")
    assert log.read_text() == "torch.float64 torch.float64\n"


def test_a_script_that_does_not_finish_is_recorded_to_its_end(
    write: Write, settings: Settings
) -> None:
    lines: list[str] = []
    found = run(write(TRAIN), settings, "--lr", "1", say=lines.append)
    assert (found.steps, found.dtype, found.complete) == (4, "float64", False)
    assert found.arguments == ["--lr", "1"]
    (line,) = lines
    assert line.startswith("train.py, float64: ") and line.endswith(" s, 4 steps")
    left = sorted(path.name for path in Path(settings.out).parent.iterdir())
    assert left == ["float64.log", "float64.safetensors"]


def test_steps_end_a_script_and_two_run_at_once(write: Write, tmp_path: Path) -> None:
    path = write("import time\nbegan = time.time()\n" + TRAIN + "print(began, time.time())")
    found = [Settings(str(tmp_path / f"{n}.safetensors"), "train.py", OWN, steps=n) for n in (2, 9)]
    two, all_of_it = run_scripts([Start(script.find(path), settings) for settings in found])
    assert (two.steps, two.complete, all_of_it.steps) == (2, True, 4)
    assert two.dtype == all_of_it.dtype == "float32"
    assert (tmp_path / "2.log").read_text() == ""  # ended by run.step
    assert (tmp_path / "9.log").read_text() != ""


# --- How it may end

CRASH = """
def inner():
    raise ValueError("of the user")

def outer():
    try:
        inner()
    except ValueError as error:
        raise RuntimeError("on top") from error

outer()
"""


def test_a_crash_prints_the_traceback_that_python_prints(
    write: Write, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(CRASH)
    line = refused(path, settings)
    assert line == "train.py failed in its float64 run (exit status 1): fix the script first"
    plain = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert capfd.readouterr().err == plain.stderr
    assert "RuntimeError: on top" in plain.stderr


ENDS = {  # what it does, and what the line says
    "exit status": ("import sys; sys.exit(3)", ["failed in its float64 run (exit status 3)"]),
    "exit message": ("import sys; sys.exit('no data')", ["(exit status 1)"]),
    "signal": ("import os; os.kill(os.getpid(), 11)", ["was ended by SIGSEGV", "0 steps"]),
    "os._exit": ("import os; os._exit(0)", ["os._exit", "nothing was recorded"]),
    "input": ("input('which?')", ["(exit status 1)"]),
    "no Run": ("import lockstep", ["did not call lockstep.Run()", "add run = lockstep.Run()"]),
    "no begin": (
        "import lockstep; lockstep.Run()",
        ["did not call run.begin", "run.begin(model, optimizer)"],
    ),
    "step before begin": (
        "import lockstep; run = lockstep.Run()\nrun.step(1.0)",
        ["run.step was called before run.begin", "(train.py:2)"],
    ),
    "two Runs": (
        "import lockstep; lockstep.Run()\nlockstep.Run()",
        ["lockstep.Run() was called twice", "(train.py:2)"],
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_script_that_cannot_be_recorded_is_one_line(
    name: str, write: Write, settings: Settings
) -> None:
    source, words = ENDS[name]
    line = refused(write(source), settings)
    assert line.startswith("train.py")
    for word in words:
        assert word in line


def test_a_script_without_steps_is_told_so(write: Write, settings: Settings) -> None:
    path = write(TRAIN.replace("range(4)", "range(0)"))
    assert "did not call run.step: add run.step(loss)" in refused(path, settings)


def test_what_a_script_printed_is_shown_where_it_left_no_traceback(
    write: Write, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    refused(write("import sys; print('of the user'); sys.exit('no data')"), settings)
    shown = capfd.readouterr()
    assert shown.err == "of the user\nno data\n" and shown.out == ""


def test_a_full_disk_is_one_line(write: Write, settings: Settings) -> None:
    path = write(TRAIN + "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))")
    with pytest.raises(ScriptError, match=r"cannot write .*\(File too large\)"):
        run(path, settings)
    assert not Path(settings.out).exists()


def test_a_folder_that_cannot_be_written_is_one_line(write: Write, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = Settings(str(tmp_path / "file" / "a.safetensors"), "train.py")
    with pytest.raises(RecordError, match=r"cannot start train\.py"):
        run(write("pass"), settings)


# --- Names of scripts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("missing.py", ["there is no script missing.py"]),
        ("folder", ["folder is a folder"]),
        ("text.py", ["text.py is not Python (line 1: invalid syntax)"]),
        ("binary.py", ["binary.py is not Python ("]),
        ("train:", ["names no function"]),
        ("a b:main", ["names no module"]),
        ("missing.py:main", ["there is no script missing.py"]),
    ],
)
def test_a_name_of_no_script_is_refused_before_anything_starts(
    text: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.py").write_text("this text\n")
    (tmp_path / "binary.py").write_bytes(b"\x00\x01")
    with pytest.raises(ScriptError) as caught:
        script.find(text)
    for word in words:
        assert word in str(caught.value)


def test_a_function_is_called_with_its_own_arguments(
    write: Write, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "def main():\n    import sys\n    open('seen', 'w').write(sys.argv[1] + __name__)\n"
    write(source, "package/train.py")
    for text, name in (("package.train:main", "package.train"), ("package/train.py:main", "train")):
        assert "did not call lockstep.Run()" in refused(text, settings, "--lr")
        assert (tmp_path / "seen").read_text() == f"--lr{name}"
    assert "there is no module pakage" in refused("pakage.train:main", settings)
    assert "did you mean main?" in refused("package.train:mian", settings)
    assert script.find("package.train:main").name == "train:main"


# --- No process stays


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):  # a zombie has ended
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


HANG = """
import os, subprocess, sys, time
other = subprocess.Popen(["sleep", "100"])
open(sys.argv[1] + ".part", "w").write(f"{os.getpid()} {other.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(100)
"""


def pids_in(path: Path) -> list[int]:
    assert wait_until(path.exists)
    return [int(word) for word in path.read_text().split()]


def test_a_script_that_hangs_is_ended_with_all_that_it_started(
    write: Write, settings: Settings, tmp_path: Path
) -> None:
    line = refused(write(HANG), settings, str(tmp_path / "pids"), timeout=1)
    assert "its float64 run had not ended after 1 s and 0 steps" in line and "--timeout" in line
    assert wait_until(lambda: not any(map(is_alive, pids_in(tmp_path / "pids"))))


def test_what_a_script_leaves_running_is_ended(
    write: Write, settings: Settings, tmp_path: Path
) -> None:
    refused(write(HANG.replace("time.sleep(100)", "")), settings, str(tmp_path / "pids"))
    assert wait_until(lambda: not any(map(is_alive, pids_in(tmp_path / "pids"))))


def test_a_script_that_hangs_is_announced(
    write: Write, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "QUIET", 0.3)
    lines: list[str] = []
    refused(write("import time; time.sleep(1)"), settings, say=lines.append)
    assert "0.3 s without a step (--timeout S ends a script that hangs)" in lines[0]


def test_if_one_fails_the_other_is_ended(write: Write, settings: Settings, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    failing = write(
        f"import os, time\nwhile not os.path.exists({str(pids)!r}): time.sleep(0.01)\n1/0"
    )
    starts = [
        Start(script.find(write(HANG, "hang.py")), settings, [str(pids)]),
        Start(script.find(failing), Settings(f"{settings.out}2", "b.py", OWN)),
    ]
    with pytest.raises(ScriptError, match=r"b\.py failed in its run in its own precision"):
        run_scripts(starts)
    assert wait_until(lambda: not any(map(is_alive, pids_in(pids))))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_stopped_leaves_no_process(
    number: signal.Signals, write: Write, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    command = ["compare.py", "record", write(HANG), "--out", str(tmp_path / "out"), "--", str(pids)]
    started = subprocess.Popen(
        [sys.executable, *command], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    try:
        found = pids_in(pids)
        started.send_signal(number)
        _, said = started.communicate(timeout=30)
    finally:
        started.kill()
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    assert started.returncode == expected[number]
    assert said == ("" if number == signal.SIGKILL else "interrupted\n")
    assert wait_until(lambda: not any(map(is_alive, found)))
