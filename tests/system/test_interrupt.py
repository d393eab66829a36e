"""Ctrl-C and SIGTERM, sent to a real `python compare.py`: what it says, how it ends, and what can
be resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lockstep import cli as compare
from lockstep.common.errors import RecordError
from lockstep.common.runs import checkpoint, record
from lockstep.common.system import interrupt, storage
from tests.robustness import kills

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are others here")

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 300  # four calls of train_steps after those of the first steps
RUN = [
    "--data",
    "digits",
    "--steps",
    str(STEPS),
    "--batch-size",
    "4",
    "--lr",
    "0.001",
    "--dtype",
    "float64",
    "--device",
    "cpu",
]
SOON = "--checkpoint-every=2"
SECONDS = 20.0  # that a run may take to stop

# Runs compare.py as it is, after what comes first on the command line has been carried out: where
# the run reaches the moment that a test waits for, it says so with a file.
PROGRAM = """
import importlib.abc, os, pathlib, runpy, sys, time

def reached(seconds=0.0):
    pathlib.Path(os.environ["REACHED"]).touch()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)

def before(owner, name, number=0, seconds=0.0):
    complete, calls = getattr(owner, name), []
    def call(*arguments, **options):
        calls.append(None)
        if len(calls) > number:
            reached(seconds)
        return complete(*arguments, **options)
    setattr(owner, name, call)

exec(sys.argv[1])
sys.argv = ["compare.py", *sys.argv[2:]]
sys.path.insert(0, os.getcwd())
runpy.run_path("compare.py", run_name="__main__")
"""
IMPORTING = """
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            reached(0.5)
sys.meta_path.insert(0, Finder())
"""
# The first two calls are those of the first steps.
COMPILING = "from lockstep import backends; before(backends.load({0!r}), 'train_steps', 2)"
TRAINING = "from lockstep import backends; before(backends.load({0!r}), 'train_steps', 4, 0.5)"
# The first call follows the first steps.
EVALUATING = "from lockstep.common.runs import training; before(training, 'evaluate', 1, 0.2)"
SAVING = """
def replace(aside, path, complete=os.replace):
    if "checkpoints" in str(path):
        reached({0})
    complete(aside, path)
os.replace = replace
"""
# Without what takes longest.
PLAIN = (
    "import lockstep.common.report as r; r.write_pictures = r.write_report_page = lambda *_: None"
)
DRAWING = "import lockstep.common.report; before(lockstep.common.report, 'write_pictures', 0, 0.2)"


class Started:
    """A run under way."""

    def __init__(self, process: subprocess.Popen, errors: Path, output: Path) -> None:
        self.process, self.errors, self.output = process, errors, output

    def send(self, number: int, group: bool = False) -> float:
        """Send it a signal, as `kill` does, or to its `group`, as a terminal does; when."""
        (os.killpg if group else os.kill)(self.process.pid, number)
        return time.monotonic()

    def ended(self, seconds: float = SECONDS) -> int:
        return self.process.wait(seconds)

    @property
    def said(self) -> str:
        return self.errors.read_text()


@contextmanager
def started(hook: str, folder: Path, *options: str, **settings: str) -> Iterator[Started]:
    """compare.py on `folder`, once it has reached what `hook` waits for."""
    place = folder.with_name(f"{folder.name}-process")
    place.mkdir()
    marker, errors, output = place / "reached", place / "errors", place / "output"
    command = [sys.executable, "-c", PROGRAM, hook, *RUN, "--out", str(folder), *options]
    environment = os.environ | {"REACHED": str(marker)} | settings
    with errors.open("wb") as err, output.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=out, stderr=err, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while not marker.exists():
            assert process.poll() is None, errors.read_text()
            assert time.monotonic() < deadline, "it never got there"
            time.sleep(0.01)
        yield Started(process, errors, output)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def sane(folder: Path) -> None:
    """Every file in it that bears its final name is whole, and nothing else is left."""
    for path in (
        path for path in folder.rglob("*") if path.is_file() and path.name != storage.LOCK
    ):
        kills.whole(path)


def complete(*arguments: str) -> None:
    """compare.py to its end, in a process of its own: in this one, an earlier test may have started
    JAX with other threads, and with them it sums in another order."""
    command = [sys.executable, "-c", PROGRAM, PLAIN, *arguments, "--quiet"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both runs, which nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    complete(*RUN, "--out", str(folder))
    return folder


def resumes_to_the_same_bits(folder: Path, whole: Path) -> bool:
    """Whether the run, resumed, ends in the numbers of the one that nobody stopped."""
    complete("--resume", str(folder))
    found, expected = kills.digests_in(folder), kills.digests_in(whole)
    return bool(found) and not [name for name in found if found[name] != expected[name]]


STOPS = {  # what it was at, by whom: hook, signal, status, options, what is there afterwards
    "training, torch": (TRAINING.format("torch"), signal.SIGTERM, 143, ["--backend", "torch"], "checkpoint"),
    "compiling, flax": (COMPILING.format("flax"), signal.SIGINT, 130, ["--backend", "flax"], "checkpoint"),
    "evaluating, torch": (EVALUATING, signal.SIGINT, 130, ["--backend", "torch"], "record"),
    "drawing, torch": (DRAWING, signal.SIGTERM, 143, ["--backend", "torch"], "record"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("moment", STOPS)
def test_a_signal_stops_a_run_that_can_be_resumed(whole: Path, tmp_path: Path, moment: str) -> None:
    hook, number, status, options, left = STOPS[moment]
    folder, backend = tmp_path / "run", moment.rpartition(" ")[2]
    with started(hook, folder, *options, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax")) as run:
        began = run.send(number, group=number == signal.SIGINT)
        assert run.ended() == status
    assert time.monotonic() - began < SECONDS
    last = run.said.strip().splitlines()[-1]
    assert (
        last.startswith("interrupted")
        and f"resume with: python compare.py --resume {folder}" in last
    )
    assert "Traceback" not in run.said + run.output.read_text()
    sane(folder)
    kept = checkpoint.found(folder, record.file_stem(backend, "float64"))
    assert bool(kept) == (left == "checkpoint")
    assert (folder / f"{backend}-float64.safetensors").exists() == (left == "record")
    assert resumes_to_the_same_bits(folder, whole)


def test_a_signal_before_anything_was_begun_leaves_nothing(tmp_path: Path) -> None:
    with started(IMPORTING, tmp_path / "run", "--backend", "torch") as run:
        run.send(signal.SIGINT, group=True)
        assert run.ended() == 130
    assert run.said.startswith("interrupted") and len(run.said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiler_that_takes_longer_is_stopped(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--backend", "torch", "--compile", "on"]
    with started(
        COMPILING.format("torch"),
        folder,
        *options,
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    ) as run:
        time.sleep(1)
        run.send(
            signal.SIGINT, group=True
        )  # as a terminal does: the compiler's own processes get it, too
        assert run.ended() == 130, run.said
    assert run.said.split("\n") == [
        "",
        "Stopping after this chunk and saving a checkpoint; press Ctrl-C again to stop now.",
        f"interrupted: torch float64 was interrupted at step 2 of {STEPS}; resume with: "
        f"python compare.py --resume {folder}",
        "",
    ]
    sane(folder)
    assert checkpoint.read(checkpoint.found(folder, "torch-float64")[0]).step <= 2


# A signal in a backward pass that PyTorch traces in its anomaly mode, as its compiler does.
TRACING = """
import contextlib, os, signal, torch, warnings
from lockstep.common.system import interrupt

class Interrupted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2
    @staticmethod
    def backward(ctx, gradient):
        with warnings.catch_warnings():  # as libraries do: it restores the filters
            os.kill(os.getpid(), signal.SIGINT)
        return gradient * 2

with contextlib.suppress(KeyboardInterrupt), {context}:
    with torch.autograd.detect_anomaly(check_nan=False):
        Interrupted.apply(torch.ones(1, requires_grad=True)).sum().backward()
"""


@pytest.mark.parametrize(
    ("context", "traceback"),
    [("interrupt.SignalHandler()", False), ("contextlib.nullcontext()", True)],
    ids=["handled", "the control"],
)
def test_a_signal_while_the_compiler_traces_prints_no_traceback(
    context: str, traceback: bool
) -> None:
    command = [sys.executable, "-W", "ignore:Anomaly", "-c", TRACING.format(context=context)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0
    assert ("Traceback of forward call that caused the error" in run.stderr) == traceback
    assert traceback or run.stderr == ""


# A signal while an object is deleted: Python prints an exception that is raised there, and goes
# on to the next line.
DELETING = """
from contextlib import nullcontext
import contextlib, os, signal, time
from lockstep.common.system import interrupt

class Deleted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.4)

interrupt.GRACE = 0.2
with {context} as signals:
    with contextlib.suppress(KeyboardInterrupt), signals.deferred():
        Deleted()
        time.sleep(2)
        print("it went on")
"""


def test_a_signal_that_a_library_swallows_comes_again_and_prints_nothing() -> None:
    handled = run_python(DELETING.format(context="interrupt.SignalHandler(announce=False)"))
    assert (handled.returncode, handled.stdout, handled.stderr) == (0, "", "")
    control = run_python(DELETING.format(context="nullcontext(interrupt.SignalHandler())"))
    assert control.stdout == "it went on\n" and "Exception ignored in" in control.stderr


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", source]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_a_second_signal_stops_at_once_and_damages_nothing(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with started(SAVING.format(30), folder, "--backend", "torch", SOON) as run:
        assert compare.main([*RUN, "--quiet", "--out", str(folder)]) == 2, (
            "another run on the same folder"
        )
        run.send(signal.SIGINT)
        while interrupt.ANNOUNCEMENT not in run.said:
            time.sleep(0.01)
        began = run.send(signal.SIGINT)
        assert run.ended() == -signal.SIGINT
    assert time.monotonic() - began < 2
    assert "Traceback" not in run.said
    left = list(folder.rglob(f".*{storage.TEMP_SUFFIX}"))
    assert len(left) == 1, "it was in the middle of writing"
    left[0].unlink()
    sane(folder)
    left[0].write_bytes(b"half")
    assert resumes_to_the_same_bits(folder, whole)
    assert not list(folder.rglob(f".*{storage.TEMP_SUFFIX}")), (
        "what was left half written is removed"
    )


# --- One run at a time


def test_a_second_run_on_the_same_folder_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with storage.lock_folder(tmp_path):
        assert compare.main([*RUN, "--quiet", "--out", str(tmp_path)]) == 2
        with (
            pytest.raises(RecordError, match=r"--tensorboard$"),
            storage.lock_folder(tmp_path, "--tensorboard"),
        ):
            pass
    said = capsys.readouterr().err
    assert (
        said
        == f"error: another run is writing to {tmp_path}: wait for it, or choose another folder "
        "with --out\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [storage.LOCK]
    with storage.lock_folder(tmp_path):  # the control: now it is free
        pass
