"""Both backends at once, by a real `python compare.py`: the same runs, whoever stops or fails."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lockstep import backends
from lockstep.common import data
from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.errors import RecordError
from lockstep.common.protocol import Backend
from lockstep.common.report import write_pictures
from lockstep.common.runs import checkpoint, parallel, record
from lockstep.common.runs.trainer import Build, Trainer
from lockstep.common.system import environment
from lockstep.common.system.interrupt import SignalHandler
from tests.robustness import kills
from tests.system.test_interrupt import (
    PLAIN,
    PROGRAM,
    REPOSITORY,
    RUN,
    SECONDS,
    TRAINING,
    Started,
    complete,
    sane,
    started,
)

QUIET = parallel.RemoteProgress(print)
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="looks for processes in /proc"
)

AT_ONCE = (
    "from lockstep.common.runs import parallel; from lockstep.common.system import environment; "
    "parallel.MIN_IMAGES = 0; environment.cores = lambda: 2"
)
BOTH = f"{AT_ONCE}; {TRAINING.format('torch')}"  # both processes are there then
# The worker gets ready.
READING = f"{AT_ONCE}; from lockstep.common import data; before(data, 'load', 0, 0.5)"
# The worker is asked to train.
STARTING = f"{AT_ONCE}; before(parallel.ParallelTraining, 'train', 0)"
# PyTorch's run is finished, and this process waits for Flax's.
WAITING = f"{AT_ONCE}; before(parallel.ParallelTraining, 'train', 1)"


def children(pid: int) -> list[int]:
    """The processes that it has started, and that are still there."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for each in lists for child in each]


def trainer_of(pid: int) -> int:
    """The one of them that trains."""
    return next(
        child
        for child in children(pid)
        if b"lockstep.common.system.process" in Path(f"/proc/{child}/cmdline").read_bytes()
    )


def there(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def gone(pid: int) -> bool:
    """Soon."""
    deadline = time.monotonic() + SECONDS
    while there(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not there(pid)


def said_in_one_line(run: Started) -> str:
    assert "Traceback" not in run.said + run.output.read_text()
    return run.said.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both runs, one after the other."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    complete(*RUN, "--out", str(folder))
    return folder


def same_bits(folder: Path, whole: Path) -> bool:
    found, expected = kills.digests_in(folder), kills.digests_in(whole)
    return set(found) == set(expected) and all(found[name] == expected[name] for name in found)


@pytest.mark.slow
def test_both_at_once_are_the_runs_of_one_after_the_other(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", PROGRAM, f"{PLAIN}; {AT_ONCE}", *RUN, "--out", str(folder)]
    run = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=True
    )
    assert all(
        run.stdout.count(f"Training {name} float64: 300 steps on cpu") == 1 for name in BACKENDS
    )
    assert "The two runs agree" in run.stdout
    assert same_bits(folder, whole)
    shutil.copy(folder / "torch-float64.safetensors", folder / "flax-float64.safetensors")
    assert not same_bits(folder, whole), "the control"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "number"),
    [(STARTING, signal.SIGINT), (BOTH, signal.SIGINT), (WAITING, signal.SIGTERM)],
)
def test_both_are_stopped_and_resumed(whole: Path, tmp_path: Path, hook: str, number: int) -> None:
    folder = tmp_path / "run"
    with started(hook, folder) as run:
        trainer = trainer_of(run.process.pid)
        run.send(number, group=number == signal.SIGINT)
        assert run.ended() == 128 + number
        assert not there(trainer)
    last = said_in_one_line(run)
    assert (
        last.startswith("interrupted")
        and f"resume with: python compare.py --resume {folder}" in last
    )
    sane(folder)
    assert (folder / "torch-float64.safetensors").exists() == (hook == WAITING)
    complete("--resume", str(folder))
    assert same_bits(folder, whole)


@pytest.mark.slow
def test_what_stops_one_process_with_force_ends_the_other(whole: Path, tmp_path: Path) -> None:
    with started(BOTH, tmp_path / "run") as run:
        trainer = trainer_of(run.process.pid)
        run.send(signal.SIGKILL)
        assert run.ended() == -signal.SIGKILL
        assert gone(trainer)
    sane(tmp_path / "run")
    complete("--resume", str(tmp_path / "run"))
    assert same_bits(tmp_path / "run", whole)

    with started(BOTH, tmp_path / "other") as run:
        os.kill(trainer_of(run.process.pid), signal.SIGKILL)
        assert run.ended() == 2
    assert said_in_one_line(run).startswith(
        "error: flax cannot train here (its process was ended by signal 9)"
    )


@pytest.mark.slow
def test_an_error_in_the_other_process_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run" / "flax-float64.safetensors" / "in the way").mkdir(parents=True)
    with started(BOTH, tmp_path / "run") as run:
        assert run.ended() == 2
    assert said_in_one_line(run).startswith(
        f"error: cannot write {tmp_path / 'run' / 'flax-float64.safetensors'}"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_has_nothing_to_train_yet_ends_with_its_parent(
    tmp_path: Path, number: int
) -> None:
    with started(READING, tmp_path / "run") as run:
        other = trainer_of(run.process.pid)
        assert there(other)
        run.send(number)
        assert run.ended() == (130 if number == signal.SIGINT else -number)
        assert gone(other)
    assert run.said.split() in ([], ["interrupted"])


def test_a_process_that_is_not_needed_is_ended_at_once(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(steps=1, batch_size=4).resolve(len(digits.train_images))
    trainer = Trainer(
        tmp_path,
        config,
        digits,
        functools.partial(backends.build, config, 10, "cpu", "auto"),
        QUIET,
    )
    with parallel.TrainingWorker(True, backends.load, "net") as worker:
        process = worker.process
        assert process is not None and there(process.pid)
        with parallel.ParallelTraining(trainer, worker, None, {}) as training:
            assert not process.alive() and training.name is worker.process is None
    with (
        parallel.TrainingWorker(False, backends.load, "net") as worker,
        parallel.ParallelTraining(trainer, worker, "flax", {}) as training,
    ):
        assert worker.process is training.name is None

    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refused)
    with parallel.TrainingWorker(True, backends.load, "net") as worker:
        assert worker.process is None


def test_the_worker_describes_a_network_as_this_process_does(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def build(classes: int = 7, device: str = "cpu") -> Build:
        return functools.partial(backends.build, Config(model="vit"), classes, device, "off")

    here = parallel.describe_model(build(), "flax")
    assert here.device == "cpu" and here != parallel.describe_model(build(classes=8), "flax")
    with parallel.TrainingWorker(True, backends.load, "net") as worker:
        assert worker.model_info(build(), "flax")() == here
        with pytest.raises(RuntimeError, match="absent"):  # here
            worker.model_info(build(device="absent"), "flax")()
        assert worker.model_info(build(), "flax")() == here
        assert worker.process is not None
        os.kill(worker.process.pid, signal.SIGKILL)
        assert worker.model_info(build(), "flax")() == here
    assert capfd.readouterr().err == ""


# This process leaves a trace if it writes the images; and the worker may fail to.
HERE = (
    "import lockstep.common.report as r; r.write_report_page = print; "
    "r.write_pictures = lambda folder, *_: (folder / 'here').touch()"
)
LOST = (
    "worker = parallel.WorkerProcess; send = worker.send; worker.send = "
    "lambda self, method, *more: send(self, method.replace('write_images', 'lost'), *more)"
)


@pytest.mark.slow
@pytest.mark.parametrize(("hook", "here"), [("", False), (LOST, True)])
def test_the_pictures_are_drawn_by_the_other_process_if_it_can(
    tmp_path: Path, hook: str, here: bool
) -> None:
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        f"{AT_ONCE}; {HERE}; {hook}",
        *RUN,
        "--out",
        str(folder),
    ]
    subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=300, check=True)
    assert (folder / "here").exists() == here
    if here:
        return
    report = json.loads((folder / "report.json").read_text())
    runs = {
        "float64": {name: record.read(folder / f"{name}-float64.safetensors") for name in BACKENDS}
    }
    digits = data.load("digits")
    config = Config(steps=1, batch_size=32).resolve(len(digits.train_images))
    sample = next(data.batch_indices(config, len(digits.train_images)))
    twins = {"float64": {name: [] for name in BACKENDS}}
    pictures = write_pictures(tmp_path / "again", report, runs, digits, twins, sample)
    assert all(picture.read_bytes() == (folder / picture.name).read_bytes() for picture in pictures)
    assert {picture.name for picture in pictures} >= {"samples.png", "losses.svg"}

    build = functools.partial(backends.build, config, 10, "cpu", "auto")
    commands = parallel.WorkerCommands(print, SignalHandler())
    commands.trainer, commands.twins = (
        Trainer(folder, config, digits, build, QUIET),
        {"float64": [None]},
    )
    (folder / "losses.png").unlink()
    commands.write_images(report, sample)
    assert (folder / "losses.png").exists()
    (folder / "flax-float64.safetensors").unlink()
    with pytest.raises(RecordError, match="there is no record"):  # whoever asked writes them then
        commands.write_images(report, sample)


def test_short_runs_and_one_backend_are_trained_in_one_process(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(
        steps: int = 10_000, names: tuple = BACKENDS, device: str = "cpu", there: tuple = ()
    ) -> str | None:
        config = Config(steps=steps, batch_size=4).resolve(len(digits.train_images))
        build = functools.partial(backends.build, config, 10, device, "auto")
        trainer = Trainer(tmp_path, config, digits, build, QUIET)
        return parallel.choose_worker_backend(trainer, names, device, there)

    def may_use_worker(
        steps: int | None = 10_000, names: tuple = BACKENDS, device: str = "auto"
    ) -> bool:
        return parallel.may_use_worker(Config(steps=steps, batch_size=4), names, device)

    monkeypatch.setattr(environment, "cores", lambda: 2)
    assert may_use_worker() and may_use_worker(steps=None) and may_use_worker(steps=2_000)
    assert not any(
        [
            may_use_worker(steps=1_000),
            may_use_worker(names=("torch",)),
            may_use_worker(device="cuda"),
        ]
    )
    assert chosen() == chosen(steps=2_000) == "flax"
    assert (
        chosen(steps=1_000)
        is chosen(names=("torch",))
        is chosen(device="cuda")
        is chosen(there=("flax",))
        is None
    )
    monkeypatch.setattr(environment, "cores", lambda: 1)
    assert chosen() is None and not may_use_worker()


def test_the_folder_of_checkpoints_stays_while_two_processes_write(
    tmp_path: Path,
) -> None:
    (tmp_path / checkpoint.FOLDER).mkdir()
    checkpoint.remove(tmp_path, "torch-float64", shared=True)
    assert (tmp_path / checkpoint.FOLDER).exists()
    checkpoint.remove(tmp_path, "torch-float64")
    assert not (tmp_path / checkpoint.FOLDER).exists()


def test_two_processes_that_train_at_once_share_the_cores(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lockstep.backends.flax_backend import tuning as flax
    from lockstep.backends.torch_backend import tuning as torch

    monkeypatch.setattr(environment, "cores", lambda: 4)
    monkeypatch.setattr(torch, "ALL_THREADS", 4)
    monkeypatch.delenv("NPROC", raising=False)
    set_threads: list[int] = []
    monkeypatch.setattr(torch.torch, "set_num_threads", set_threads.append)
    nproc: list[str | None] = []
    for batch_size, processes in ((32, 1), (32, 2), (32, 8), (4, 2)):
        torch.limit_threads(batch_size, processes)
        with flax.limit_threads(batch_size, processes):
            nproc.append(os.environ.get("NPROC"))
    assert set_threads == [4, 2, 1, 1]
    assert nproc == [None, "2", "1", "1"], "None: XLA takes all cores"
    assert "NPROC" not in os.environ

    built: list[tuple[str, str, int]] = []

    def build(name: str, dtype: str, concurrent_processes: int = 1) -> Backend:
        built.append((name, dtype, concurrent_processes))
        return backends.build(config, 10, "cpu", "off", name, dtype)

    config = Config(steps=1, batch_size=4).resolve(len(digits.train_images))
    trainer = Trainer(tmp_path, config, digits, build, QUIET)
    trainer.backend("torch", "float64")
    with parallel.TrainingWorker(True, backends.load, "net") as worker:
        training = parallel.ParallelTraining(trainer, worker, "flax", {})
        training.trainer.backend("torch", "float64")
    assert built == [("torch", "float64", 1), ("torch", "float64", 2)]
