"""The processes in which speed is measured."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lockstep import backends
from lockstep.backends.benchmark import loops
from lockstep.backends.benchmark import worker as workers
from lockstep.common.data import Dataset
from lockstep.common.errors import BackendError
from lockstep.common.evidence.bench import PATHS, PRODUCTS


@pytest.fixture
def job(digits: Dataset, tmp_path: Path) -> loops.BenchmarkJob:
    loops.write_images(digits.train_images, digits.train_labels, tmp_path)
    return loops.BenchmarkJob("eager", 16, 100, 10, "float32", "cpu", seed=3, folder=tmp_path)


def test_a_worker_answers_with_the_settings_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_TEST_GONE", "here")
    settings = {"LOCKSTEP_TEST_GONE": None, "LOCKSTEP_TEST_NEW": "new"}
    with workers.Worker("settings", settings, functools.partial, os.getenv) as worker:
        assert worker.call("__call__", "LOCKSTEP_TEST_GONE") is None
        assert worker.call("__call__", "LOCKSTEP_TEST_NEW") == "new"
        assert worker.seconds > 0
    assert os.environ["LOCKSTEP_TEST_GONE"] == "here"


def test_a_loader_in_a_worker_starts_its_processes_as_anywhere() -> None:
    """Python hands on how a process was started to the processes that it starts; a loader's would
    import all anew."""
    with workers.Worker(
        "a loader's", {}, eval, "__import__('multiprocessing').get_start_method"
    ) as worker:
        assert (
            worker.call("__call__") == multiprocessing.get_all_start_methods()[0]
        )  # the system's default


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere there is rusage only")
def test_a_worker_does_not_inherit_the_peak_memory_of_who_started_it() -> None:
    with workers.Worker("memory", {}, functools.partial, loops.peak_memory) as worker:
        assert worker.call("__call__") < loops.peak_memory() / 2


def test_what_goes_wrong_in_a_worker_is_raised_by_who_asked() -> None:
    with pytest.raises(
        BackendError, match=r"^an integer cannot be measured here \(ValueError: invalid .*\): free"
    ):
        workers.Worker("an integer", {}, int, "no number")
    with pytest.raises(BackendError, match=r"^unknown backend 'keras'"):
        workers.Worker("keras", {}, loops.smallest_backend, "keras", "cpu")
    with workers.Worker("a list", {}, list) as worker:
        with pytest.raises(BackendError, match=r"^a list cannot be measured here \(IndexError"):
            worker.call("pop")
        assert worker.call("append", 1) is None and worker.call("pop") == 1, "it is still there"


def test_no_process_outlives_its_worker() -> None:
    with (
        contextlib.suppress(KeyboardInterrupt),
        workers.Worker("sleeping", {}, functools.partial, os.getpid) as worker,
    ):
        number = worker.call("__call__")
        os.kill(number, 0)
        raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_only_what_is_not_lockstep_runs_without_its_settings(
    job: loops.BenchmarkJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(
        workers, "Worker", lambda title, settings, *_: made.setdefault(title, settings)
    )
    for path in (*PATHS, *PRODUCTS):
        workers.start(dataclasses.replace(job, path=path), "a-cache")
    foreign = {path for path, settings in made.items() if "GOMP_SPINCOUNT" in settings}
    assert foreign == {"tutorial", "eager", *PRODUCTS}
    assert all(made[path]["GOMP_SPINCOUNT"] == backends.ORIGINAL_SPIN_COUNT for path in foreign)
    caches = ("TORCHINDUCTOR_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR")
    for settings in made.values():
        assert all(
            str(settings[name]).startswith(str(job.folder / "caches" / "a-cache"))
            for name in caches
        )
    made.clear()
    workers.start(dataclasses.replace(job, path="flax"), None)
    assert made == {"flax": {}}


@pytest.mark.parametrize(
    ("users", "count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
    ids=["nothing set", "a count", "a policy"],
)
def test_threads_wait_a_little_unless_the_user_has_said_how(
    users: dict[str, str], count: str
) -> None:
    theirs = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    program = "import os, lockstep.backends; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=theirs | users,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == count
