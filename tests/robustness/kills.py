"""Runs killed with SIGKILL and resumed: each must end in the numbers of the run that nobody
touched, bit for bit.

    python -m tests.robustness.kills [--runs 200] [--seed 0] [--out results/kills] [--quick]

Four parts: runs killed at random moments; a run killed just before and just after each call by
which a checkpoint, a record or run.json is written, flushed, renamed or removed; runs stopped by
SIGINT and SIGTERM in all that they do, and that must say how to resume and end within 20 s; and k +
(N - k) steps compared with N for every k. After each kill every file that bears its final name must
be whole, the newest checkpoint must be the last one that was finished or one after it, and the next
start must resume from there.

A run is a child forked from a process that has imported everything and started neither framework,
so that most of its time goes to what is tested. Exit status: 0 all are equal, 1 some are not.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockstep import backends
from lockstep import cli as compare
from lockstep.common import data, report
from lockstep.common.config import BACKENDS, DTYPES, Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.runs import checkpoint, chunks, prepare, record, request, training
from lockstep.common.runs.checkpoint import Checkpoint, CheckpointManager
from lockstep.common.runs.record import Record
from lockstep.common.system import environment, storage

MODULES = (  # imported before the first fork; JAX reads its settings then
    "torch", "torch._dynamo", "torch._inductor.compile_fx", "jax", "flax", "optax", "sklearn.datasets", "scipy.stats",
    "safetensors.numpy", "filelock", "jinja2", "rich.progress", "PIL.Image", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "lockstep.common.verdict.compare", "lockstep.common.verdict.locate", "lockstep.common.runs.trainer",
    "lockstep.backends.torch_backend.backend", "lockstep.backends.flax_backend.backend",
)  # fmt: skip
AT_ONCE = 2  # processes
PATIENCE = 600  # seconds for one run; an uninterrupted one takes a few
TIMES = ("seconds", "steps_per_second")  # what two equal runs differ in


# --- What two runs are compared by


def bits(value: Any) -> str:
    """A digest of a record's field: dtype, shape and every bit of an array."""
    if isinstance(value, dict):
        text = repr([(name, bits(value[name])) for name in sorted(value)])
    elif isinstance(value, np.ndarray):
        text = f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    else:
        text = repr(value)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digests(found: Record) -> dict[str, str]:
    """Each field of a record but the times."""
    return {name: bits(value) for name, value in vars(found).items() if name not in TIMES}


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def digests_in(folder: Path) -> dict[str, str]:
    """`digests` of every record in a run's folder, as "<stem> <field>"."""
    found = {path.stem: digests(record.read(path)) for path in sorted(folder.glob("*.safetensors"))}
    return {
        f"{stem} {name}": digest
        for stem, fields in found.items()
        for name, digest in fields.items()
    }


# --- One run in a process of its own


@dataclass(frozen=True)
class Cell:
    """A run to kill."""

    backend: str
    dtype: str
    batch_size: int
    steps: int
    every: int  # steps between checkpoints
    chunk: int = 20  # steps in one call of train_steps at most
    compile: str = "auto"
    schedule: str = "plateau:window=3,patience=0,gamma=0.9,threshold=0.5,cooldown=1,min_lr=0.0001"

    @property
    def options(self) -> list[str]:
        named = {
            "backend": self.backend, "dtype": self.dtype, "batch-size": self.batch_size, "steps": self.steps,
            "checkpoint-every": self.every, "compile": self.compile, "data": "digits", "lr": 0.01, "momentum": 0.9,
            "weight-decay": 0.001, "twins": 1, "device": "cpu", "schedule": self.schedule,
        }  # fmt: skip
        return ["--quiet", *(f"--{name}={value}" for name, value in named.items())]

    def __str__(self) -> str:
        compiled = "" if self.compile == "auto" else ", compiled"
        return f"{self.backend} {self.dtype}, batch {self.batch_size}{compiled}"


@dataclass(frozen=True)
class Death:
    """Where a run kills itself: just before or after a call, or in the middle of writing."""

    call: int  # its number, from 0
    moment: str  # "before", "half", "after"


@dataclass(frozen=True)
class Stop:
    """A signal from outside, once the run has reached a phase, in which it then stays for a
    moment."""

    phase: str
    number: int
    twice: bool = False  # a second one follows at once


class Notes:
    """What a run tells of itself, in a file that outlives it: one line per event."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, *words: object) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(" ".join(map(str, words)) + "\n")

    def read(self) -> list[list[str]]:
        return (
            [line.split() for line in self.path.read_text().splitlines()]
            if self.path.exists()
            else []
        )

    def phase(self) -> str:
        """What the run was at when it died."""
        phases = [words[1:] for words in self.read() if words[0] == "phase"]
        return " ".join(phases[-1]) if phases else "starting"


class Watch:
    """Notes what the run in this process is at, and ends it where `death` says."""

    def __init__(
        self, notes: Notes, death: Death | None, count: bool, stop: Stop | None = None
    ) -> None:
        self.notes, self.death, self.count = notes, death, count
        self.linger = stop.phase if stop is not None else None
        self.phases = ["starting"]
        self.writing: str | None = None  # what is being written, if anything that counts
        self.calls = 0
        self.first_calls = 0  # of train_steps, some of which compile

    def install(self, pictures: bool) -> None:
        """Never undone: the process ends with the run."""
        self._named(data, "load", "loading the data")
        self._named(prepare, "choose_device", "building")
        self._named(training, "evaluate", "evaluating")
        self._named(importlib.import_module("lockstep.common.verdict.judge"), "judge", "comparing")
        for name in ("write_json", "write_pictures", "write_report_page"):
            self._named(report, name, "reporting")
        if not pictures:
            report.write_pictures = report.write_report_page = lambda *_: None
        for name in BACKENDS:
            self._named(backends.load(name), "__init__", "building")
            self._steps(backends.load(name))
        self._train()
        self._named(request, "write", "writing run.json", lambda *_: "run.json")
        self._named(
            checkpoint, "write", "writing a checkpoint", lambda c, _: f"checkpoint {c.step}"
        )
        self._named(
            checkpoint, "remove", "removing checkpoints", lambda *_, **__: self.writing or "removal"
        )
        self._named(record, "write", "writing the record", lambda *_: "record")
        if self.count or self.death is not None:
            self._counted()

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.phases.append(name)
        self.notes("phase", name)
        try:
            if name == self.linger:
                self.linger, end = None, time.monotonic() + LINGER
                while time.monotonic() < end:
                    time.sleep(0.01)
            yield
        finally:
            self.phases.pop()
            self.notes("phase", self.phases[-1])

    def _named(
        self, owner: Any, name: str, phase: str, what: Callable[..., str] | None = None
    ) -> None:
        complete = getattr(owner, name)

        @functools.wraps(complete)
        def noted(*arguments: Any, **options: Any) -> Any:
            before = self.writing
            self.writing = what(*arguments, **options) if what else None
            with self._phase(phase):
                made = complete(*arguments, **options)
            self.writing = before
            if name == "write" and owner is not request:
                done = (arguments[0].step,) if isinstance(arguments[0], Checkpoint) else ()
                self.notes("kept" if done else "recorded", arguments[0].stem, *done)
            return made

        setattr(owner, name, noted)

    def _steps(self, backend: Any) -> None:
        complete = backend.train_steps

        def noted(*arguments: Any) -> Any:
            self.first_calls += 1
            with self._phase(
                "training" if self.first_calls > 3 else "compiling, and the first steps"
            ):
                return complete(*arguments)

        backend.train_steps = noted

    def _train(self) -> None:
        complete = training.train

        def noted(
            backend: Any,
            config: Any,
            dataset: Any,
            dtype: str,
            observer: Any,
            twin: Any,
            *rest: Any,
            **options,
        ):
            start = options.get("start")
            self.notes(
                "start", record.file_stem(backend.name, dtype, twin), start.step if start else 0
            )
            with self._phase("training"):
                return complete(backend, config, dataset, dtype, observer, twin, *rest, **options)

        training.train = noted

    # Calls that change a disk

    def _counted(self) -> None:
        for owner, name in (
            (tempfile, "mkstemp"),
            *((os, n) for n in ("fsync", "chmod", "replace", "unlink", "rmdir")),
        ):
            setattr(owner, name, functools.partial(self._call, name, getattr(owner, name)))
        complete, watch = os.fdopen, self

        class File:
            """A file whose calls count."""

            def __init__(self, *arguments: Any, **options: Any) -> None:
                self.file = complete(*arguments, **options)

            def write(self, content: bytes) -> int:
                def half() -> None:
                    self.file.write(content[: len(content) // 2])
                    self.file.flush()

                return watch._call("write", self.file.write, content, half=half)

            def flush(self) -> None:
                watch._call("flush", self.file.flush)

            def __enter__(self) -> File:
                return self

            def __exit__(self, *_: object) -> None:
                self.file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

        def fdopen(*arguments: Any, **options: Any) -> Any:
            return File(*arguments, **options) if self.writing else complete(*arguments, **options)

        os.fdopen = fdopen

    def _call(
        self,
        name: str,
        call: Callable,
        *arguments: Any,
        half: Callable | None = None,
        **options: Any,
    ) -> Any:
        if self.writing is None:
            return call(*arguments, **options)
        number, self.calls = self.calls, self.calls + 1
        self.notes("call", number, name, "of", self.writing)
        here = self.death.moment if self.death is not None and self.death.call == number else None
        if here == "half" and half is not None:
            half()
        if here in ("before", "half"):
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call(*arguments, **options)
        finally:  # what is not there cannot be removed
            if here == "after":
                os.kill(os.getpid(), signal.SIGKILL)


def fork(task: Callable[[], int], output: Path) -> int:
    """The number of a process of its own that carries out `task` and ends with its status."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # JAX warns of forks, since it has threads once it has started: it has not
        child = os.fork()
    if child:
        return child
    status = 99
    try:
        os.setsid()  # so that its own children can be ended with it
        with open(output, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = task()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def wait(child: int, seconds: float) -> int | None:
    """The exit status, negative for a signal; None if it was still running after `seconds`, and was
    killed."""
    deadline, killed = time.monotonic() + seconds, False
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline and not killed:
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # a compiler's workers
    status = os.waitstatus_to_exitcode(found[1])
    return None if killed and status == -signal.SIGKILL else status


def signalled(child: int, notes: Notes, stop: Stop) -> tuple[int | None, float]:
    """The exit status of a run that is sent a signal, and the seconds from the last signal to its
    end."""
    deadline = time.monotonic() + PATIENCE
    while notes.phase() != stop.phase and time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.002)
    for _ in range(1 + stop.twice):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, stop.number)
        began = time.monotonic()
        time.sleep(0.05)
    return wait(child, AT_MOST), time.monotonic() - began


class Run:
    """One run's folder, started as often as it takes."""

    def __init__(self, cell: Cell, place: Path, cache: Path, pictures: bool = False) -> None:
        self.cell, self.place, self.cache, self.pictures = cell, place, cache, pictures
        self.folder = place / "run"
        self.starts = 0
        self.problems: list[str] = []
        place.mkdir(parents=True)

    @property
    def begun(self) -> bool:
        return (self.folder / request.FILE).exists()

    @property
    def output(self) -> Path:
        return self.place / "output"

    def start(
        self,
        seconds: float = PATIENCE,
        death: Death | None = None,
        count: bool = False,
        stop: Stop | None = None,
    ) -> int | None:
        """Start it, or resume it, as a user does; the exit status, None if it was killed."""
        expected = self.newest()
        command = ["--resume", str(self.folder), "--quiet"]
        if not self.begun:
            command = [*self.cell.options, "--out", str(self.folder)]
        self.notes = Notes(self.place / f"notes{self.starts}")
        self.starts += 1

        def task() -> int:
            import jax

            chunks.CHUNK_STEPS = self.cell.chunk
            jax.config.update("jax_compilation_cache_dir", str(self.cache))
            Watch(self.notes, death, count, stop).install(self.pictures)
            return compare.main(command)

        child = fork(task, self.output)
        if stop is not None:
            status, self.took = signalled(child, self.notes, stop)
        else:
            status = wait(child, seconds)
        if status == -signal.SIGKILL:
            status = None
        for stem, step in (
            (words[1], int(words[2])) for words in self.notes.read() if words[0] == "start"
        ):
            if step != expected.get(stem, 0):
                self.problems.append(
                    f"{stem} went on from step {step}, not {expected.get(stem, 0)}"
                )
        if stop is None and status not in (0, None):
            said = self.output.read_text(errors="replace").strip().splitlines()[-1:]
            self.problems.append(f"exit status {status}: {' '.join(said)}")
        self.problems += self.damage()
        return status

    def newest(self) -> dict[str, int]:
        """The step of each unfinished run's newest checkpoint."""
        steps: dict[str, int] = {}
        for path in (self.folder / checkpoint.FOLDER).glob("*.safetensors"):
            stem, _, step = path.stem.rpartition("-")
            if not path.name.startswith("."):
                steps[stem] = max(int(step), steps.get(stem, 0))
        return steps

    def found(self) -> str:
        """How far it had come, by what lies in its folder."""
        done = {path.stem for path in self.folder.glob("*.safetensors")}
        stem = record.file_stem(self.cell.backend, self.cell.dtype)
        stems = [stem] if self.cell.dtype == "float64" else [stem, f"{stem}-twin1"]
        if not self.begun:
            return "before run.json"
        if (self.folder / "report.json").exists():
            return "after report.json"
        left = [stem for stem in stems if stem not in done]
        if not left:
            return "after the record"
        which = "the twin: " if left[0] != stem else ""
        kept = self.newest().get(left[0])
        number = (
            f"after the checkpoint of step {kept}"
            if kept is not None
            else "before the first checkpoint"
        )
        return f"{which}{number}"

    def damage(self) -> list[str]:
        """What is wrong in its folder."""
        problems = []
        for path in (
            path
            for path in self.folder.rglob("*")
            if path.is_file() and not path.name.startswith(".")
        ):
            try:
                whole(path)
            except Exception as error:  # whatever a reader says of a file that should be whole
                problems.append(f"{path.relative_to(self.folder)} is damaged: {error}")
        steps, recorded = self.newest(), {path.stem for path in self.folder.glob("*.safetensors")}
        for kind, stem, *step in (
            words for words in self.notes.read() if words[0] in ("kept", "recorded")
        ):
            if kind == "recorded" and stem not in recorded:
                problems.append(f"the record of {stem}, which was finished, is lost")
            if kind == "kept" and stem not in recorded and steps.get(stem, -1) < int(step[0]):
                problems.append(
                    f"the checkpoint of {stem} after step {step[0]}, which was finished, is lost"
                )
        counts = collections.Counter(
            path.stem.rpartition("-")[0]
            for path in (self.folder / checkpoint.FOLDER).glob("[!.]*.safetensors")
        )
        return problems + [
            f"{n} checkpoints of {s}" for s, n in counts.items() if n > checkpoint.KEEP_LAST + 1
        ]

    def leftovers(self) -> list[str]:
        """What a finished run should not have left."""
        names = [
            str(p.relative_to(self.folder))
            for p in self.folder.rglob("*")
            if p.name.endswith(storage.TEMP_SUFFIX)
        ]
        return names + [checkpoint.FOLDER] * (self.folder / checkpoint.FOLDER).exists()

    def outcome(self, expected: dict[str, str]) -> list[str]:
        """What is wrong with the finished run."""
        unlike = [f"{name} differs" for name in differences(digests_in(self.folder), expected)]
        left = [f"{name} is left over" for name in self.leftovers()]
        return [*dict.fromkeys(self.problems), *unlike, *left]


def whole(path: Path) -> None:
    """Raise whatever there is to raise unless the file is whole."""
    if path.name == request.FILE:
        request.read(path.parent)
    elif path.suffix == ".safetensors":
        checkpoint.read(path) if path.parent.name == checkpoint.FOLDER else record.read(path)
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".svg":
        xml.etree.ElementTree.parse(path)
    elif path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            image.load()
    elif path.suffix == ".html":
        assert path.read_text().rstrip().endswith("</html>"), "no end"
    else:
        raise AssertionError("no file of a run")


# --- At random moments


@dataclass(frozen=True)
class Reference:
    """The run that nobody touched."""

    seconds: float
    expected: dict[str, str]
    problems: list[str]


def measure(cell: Cell, place: Path) -> Reference:
    """Run it twice; the first time everything is compiled."""
    seconds, found, problems = 0.0, [], []
    for turn in ("cold", "warm"):
        run, began = Run(cell, place / turn, place.parent / "jax"), time.monotonic()
        run.start()
        seconds = time.monotonic() - began
        found.append(digests_in(run.folder))
        problems += run.outcome(found[0])
    return Reference(seconds, found[0], problems)


def kill(cell: Cell, reference: Reference, place: Path, number: int, seed: int) -> dict[str, Any]:
    """One run, killed at random moments until it is let finish."""
    generator = np.random.default_rng([seed, number])
    wanted = int(generator.choice([1, 2, 4], p=[0.6, 0.25, 0.15]))
    own_cache, pictures = number % 5 == 0, number % 8 == 7
    latest = reference.seconds + 2.5 * pictures + 4.0 * (own_cache and cell.backend == "flax")
    kills: list[dict[str, str]] = []
    resumed = again = missed = 0
    run: Run | None = None
    while True:
        if run is None:
            run = Run(
                cell,
                place / f"{missed}",
                place / "jax" if own_cache else place.parent / "jax",
                pictures,
            )
        elif run.begun:
            resumed += 1
        else:
            again += 1
        status = run.start(generator.uniform(0, latest) if len(kills) < wanted else PATIENCE)
        if status is None and len(kills) < wanted:
            kills.append({"phase": run.notes.phase(), "found": run.found()})
        elif status == 0 and not kills:  # it was faster than we were
            latest, missed, run = 0.8 * latest, missed + 1, None
        else:
            break
    problems = run.outcome(reference.expected)
    if not problems:
        shutil.rmtree(place)
    return {
        "cell": str(cell),
        "kills": kills,
        "resumed": resumed,
        "again": again,
        "problems": problems,
    }


# --- At every boundary


def calls_of(cell: Cell, place: Path) -> tuple[list[tuple[int, str, str]], dict[str, str]]:
    """Every call by which an uninterrupted run changes its folder: number, name, what it writes;
    and its record."""
    run = Run(cell, place, place.parent / "jax")
    assert run.start(count=True) == 0, run.problems
    words = [words for words in run.notes.read() if words[0] == "call"]
    return [(int(number), name, " ".join(what)) for _, number, name, _, *what in words], digests_in(
        run.folder
    )


def boundaries_of(calls: list[tuple[int, str, str]]) -> list[tuple[Death, str, str]]:
    """Before and after each call for run.json, the last two checkpoints, the record, and the
    removal of the rest."""
    kept = list(dict.fromkeys(what for _, _, what in calls if what.startswith("checkpoint")))[-2:]
    looked_at = ("run.json", "record", "removal", *kept)
    found = []
    for number, name, what in calls:
        for moment in ("before", "half", "after") if name == "write" else ("before", "after"):
            if what in looked_at:
                found.append((Death(number, moment), name, what))
    return found


def kill_at(
    cell: Cell, expected: dict[str, str], place: Path, death: Death, call: str, what: str
) -> dict[str, Any]:
    """One run, killed at one boundary."""
    run = Run(cell, place, place.parent / "jax")
    status = run.start(death=death)
    if status is not None:
        run.problems.append("it was not killed")
    found = run.found()
    if what.startswith("checkpoint"):
        found = (
            "new"
            if run.newest().get(record.file_stem(cell.backend, cell.dtype)) == int(what.split()[1])
            else "old"
        )
    run.start()
    problems = run.outcome(expected)
    if not problems:
        shutil.rmtree(place)
    return {
        "cell": str(cell), "writing": what, "call": call, "moment": death.moment, "found": found, "problems": problems,
    }  # fmt: skip


# --- Ctrl-C and SIGTERM

LINGER = 0.3  # seconds that a run stays where it is to be stopped
AT_MOST = 20.0  # seconds from a signal to the end
AT_ONCE_SECONDS = 2.0  # from a second one
PHASES = (
    "loading the data", "building", "writing run.json", "compiling, and the first steps", "training",
    "writing a checkpoint", "evaluating", "writing the record", "comparing", "reporting",
)  # fmt: skip
TWICE = ("compiling, and the first steps", "training", "writing a checkpoint", "evaluating")


def stop_at(cell: Cell, expected: dict[str, str], place: Path, stop: Stop) -> dict[str, Any]:
    """One run, stopped by a signal, and resumed."""
    run = Run(
        cell, place, place / "jax" if stop.phase.startswith("compiling") else place.parent / "jax"
    )
    status = run.start(stop=stop)
    said = run.output.read_text(errors="replace")
    wanted = -stop.number if stop.twice else 128 + stop.number
    if status != wanted:
        run.problems.append(f"exit status {status}, not {wanted}")
    if run.took > (AT_ONCE_SECONDS if stop.twice else AT_MOST):
        run.problems.append(f"it took {run.took:.1f} s")
    if "Traceback" in said:
        run.problems.append("a traceback")
    if run.begun and not stop.twice and f"lockstep --resume {run.folder}" not in said:
        run.problems.append("it does not say how to resume")
    found = run.found()
    run.start()
    problems = run.outcome(expected)
    if not problems:
        shutil.rmtree(place)
    return {
        "cell": str(cell), "phase": stop.phase, "signal": signal.Signals(stop.number).name, "twice": stop.twice,
        "status": status, "seconds": round(run.took, 2), "found": found, "problems": problems,
    }  # fmt: skip


def stops_of(cell: Cell) -> list[Stop]:
    if cell.compile == "on":
        return [
            Stop("compiling, and the first steps", number)
            for number in (signal.SIGINT, signal.SIGTERM)
        ]
    once = [Stop(phase, number) for phase in PHASES for number in (signal.SIGINT, signal.SIGTERM)]
    return once + [Stop(phase, signal.SIGINT, twice=True) for phase in TWICE]


# --- k + (N - k)

PIECES = 12  # steps
SGD: dict[str, dict[str, Any]] = {  # each schedule, and each of the optimizer's options
    "constant": {"momentum": 0.9, "nesterov": True},
    "step": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01},
    "multistep": {"maximize": True, "weight_decay": 0.01},
    "exponential": {"momentum": 0.5, "dampening": -0.5},
    "cosine": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "warmup-cosine": {
        "momentum": 0.9,
        "weight_decay": 0.01,
        "clip_norm": 0.5,
        "augment": "crop-flip",
    },
    "plateau": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
}
OPTIONS: dict[str, dict[str, Any]] = {  # so that lr changes several times in so few steps
    "step": {"period": 3, "gamma": 0.5},
    "multistep": {"milestones": (2, 5, 6), "gamma": 0.5},
    "warmup-cosine": {"warmup": 4, "start": 0.1},
    "plateau": {"window": 2, "patience": 0, "gamma": 0.5, "threshold": 0.9, "cooldown": 1},
}


class Silent:
    """Counts the steps."""

    def __init__(self) -> None:
        self.steps = 0

    def line(self, text: str) -> None: ...

    def advance(self, steps: int, loss: float) -> None:
        self.steps += steps


def small(kind: str, batch_size: int = 4) -> Config:
    return Config(
        batch_size=batch_size,
        steps=PIECES,
        lr=0.02,
        seed=1,
        schedule=Schedule(kind, **OPTIONS.get(kind, {})),
        **SGD[kind],
    )


def pieces(
    backend: Any,
    config: Config,
    dataset: Dataset,
    dtype: str,
    folder: Path,
    twin: int | None = None,
    changed: Callable[[Checkpoint], Checkpoint] = lambda found: found,
    stops: range = range(1, PIECES + 1),
) -> dict[int, list[str]]:
    """For each k the fields in which k + (N - k) steps differ from N; those without any are left
    out.

    Args:
        changed: what becomes of a checkpoint before a run resumes from it, for controls.
    """
    config = config.resolve(len(dataset.train_images))
    run = functools.partial(training.train, backend, config, dataset, dtype, twin=twin, log_every=0)
    chunk_steps, chunks.CHUNK_STEPS = chunks.CHUNK_STEPS, 1
    try:
        expected = run(observer=Silent())
        assert config.schedule.kind == "constant" or len(set(expected.lr)) > 2, "lr was to change"
        unlike = {}
        for k in stops:
            observer = Silent()
            checkpoints = CheckpointManager(
                folder, 0, stopping=lambda k=k, observer=observer: observer.steps >= k
            )
            try:
                run(observer=observer, checkpoints=checkpoints)
                raise AssertionError(f"it was not stopped after step {k}")
            except KeyboardInterrupt:
                assert checkpoints.last_path is not None
            start = checkpoint.read(checkpoints.last_path)
            assert start.step == k
            joined = run(observer=Silent(), start=changed(start))
            unlike[k] = differences(digests(joined), digests(expected))
            checkpoint.remove(folder, start.stem)
        return {k: names for k, names in unlike.items() if names}
    finally:
        chunks.CHUNK_STEPS = chunk_steps


def all_pieces(name: str, dtype: str, place: Path) -> list[dict[str, Any]]:
    """Every schedule, with a twin and without, in a process of its own."""
    place.mkdir(parents=True)

    def task() -> int:
        dataset, rows = data.load("digits"), []
        for kind in SGD:
            config = small(kind).resolve(len(dataset.train_images))
            backend = backends.load(name)(config, 10, dtype, "cpu", "off")
            for twin in (None, 1):
                unlike = pieces(backend, config, dataset, dtype, place, twin)
                row = {
                    "backend": name,
                    "dtype": dtype,
                    "schedule": kind,
                    "twin": twin,
                    "steps": PIECES,
                }
                rows.append(
                    row
                    | {
                        "equal": PIECES - len(unlike),
                        "differs": {str(k): v for k, v in unlike.items()},
                    }
                )
        (place / "rows.json").write_text(json.dumps(rows))
        return 0

    status = wait(fork(task, place / "output"), PATIENCE)
    if status != 0:
        said = (place / "output").read_text(errors="replace").strip().splitlines()[-1:]
        return [
            {
                "backend": name,
                "dtype": dtype,
                "equal": 0,
                "differs": {"0": [f"exit status {status}", *said]},
            }
        ]
    return json.loads((place / "rows.json").read_text())


# --- The command


def cells_of(quick: bool) -> list[Cell]:
    if quick:
        return [Cell(name, "float32", 4, steps=60, every=15) for name in BACKENDS]
    found = []
    for name in BACKENDS:
        for dtype in ("float64", "float32"):
            small = Cell(name, dtype, 4, steps=240, every=30)
            if name == "flax":  # whose steps are quicker
                small = dataclasses.replace(small, steps=1200, every=100, chunk=60)
            found += [small, Cell(name, dtype, 128, steps=24, every=4)]
    return found


def ready() -> None:
    """Import everything, and see that nothing has started."""
    for name in MODULES:
        importlib.import_module(name)
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized(), "JAX has started: a fork of it may hang"


def carried_out(job: tuple[Callable, tuple]) -> Any:
    function, arguments = job
    return function(*arguments)


def study(
    runs: int, seed: int, place: Path, quick: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """All three parts, `AT_ONCE` processes at a time."""
    cells = cells_of(quick)
    compiled = (
        []
        if quick
        else [Cell("torch", "float32", 4, 60, every=15, compile="on", schedule="step:period=7")]
    )
    short = [
        Cell(name, "float64", 4, steps=12, every=2, chunk=2)
        for name in BACKENDS[: 1 if quick else None]
    ]
    with multiprocessing.get_context("fork").Pool(AT_ONCE) as pool:

        def each(jobs: list[tuple[Callable, tuple]], what: str) -> list[Any]:
            began, found = time.monotonic(), []
            for made in pool.imap(carried_out, jobs, chunksize=1):
                found.append(made)
                if len(found) % 20 == 0 or len(found) == len(jobs):
                    say(f"{what}: {len(found)} of {len(jobs)}, {time.monotonic() - began:.0f} s")
            return found

        every = [*cells, *compiled]
        places = [place / f"cell{number}" / "reference" for number in range(len(every))]
        references = each(
            [(measure, (cell, where)) for cell, where in zip(every, places, strict=True)],
            "references",
        )
        jobs: list[tuple[Callable, tuple]] = []
        for number in range(runs):
            index = number % len(cells)
            where = places[index].parent / f"{number}"
            jobs.append((kill, (cells[index], references[index], where, number, seed)))
        for number in range(runs, runs + (6 if compiled else 0)):
            jobs.append(
                (kill, (compiled[0], references[-1], places[-1].parent / f"{number}", number, seed))
            )
        killed = each(jobs, "runs killed at random moments")

        found = each(
            [(calls_of, (cell, place / cell.backend / "whole")) for cell in short], "calls of a run"
        )
        jobs = []
        for cell, (calls, expected) in zip(short, found, strict=True):
            chosen = boundaries_of(calls)
            if quick:
                chosen = [
                    row
                    for row in chosen
                    if (row[1], row[0].moment) in QUICK and row[2] == "checkpoint 10"
                ]
            for number, (death, call, what) in enumerate(chosen):
                jobs.append(
                    (
                        kill_at,
                        (cell, expected, place / cell.backend / f"{number}", death, call, what),
                    )
                )
        boundaries = each(jobs, "runs killed at a boundary")

        jobs = []
        for index, cell in enumerate(every):
            if (cell.dtype, cell.batch_size) == ("float32", 4) and not quick:
                for number, stop in enumerate(stops_of(cell)):
                    where = places[index].parent / f"stop{number}"
                    jobs.append((stop_at, (cell, references[index].expected, where, stop)))
        stopped = each(jobs, "runs stopped by a signal")

        kinds = [] if quick else [(name, dtype) for name in BACKENDS for dtype in DTYPES]
        jobs = [
            (all_pieces, (name, dtype, place / f"pieces-{name}-{dtype}")) for name, dtype in kinds
        ]
        steps = [row for rows in each(jobs, "k + (N - k)") for row in rows]
    return {
        "cells": [
            summary(cell, reference, [row for row in killed if row["cell"] == str(cell)])
            for cell, reference in zip(every, references, strict=True)
        ],
        "boundaries": [row | {"equal": not row["problems"]} for row in boundaries],
        "signals": [row | {"equal": not row["problems"]} for row in stopped],
        "pieces": steps,
    }


QUICK = {
    ("write", "half"),
    ("fsync", "before"),
    ("replace", "before"),
    ("replace", "after"),
    ("unlink", "after"),
}


def summary(cell: Cell, reference: Reference, rows: list[dict[str, Any]]) -> dict[str, Any]:
    kills = [found for row in rows for found in row["kills"]]
    problems = [problem for row in rows for problem in row["problems"]]
    return {
        **dataclasses.asdict(cell),
        "seconds": round(reference.seconds, 2),
        "runs": len(rows),
        "kills": len(kills),
        "phases": dict(sorted(collections.Counter(found["phase"] for found in kills).items())),
        "found": dict(sorted(collections.Counter(found["found"] for found in kills).items())),
        "resumed": sum(row["resumed"] for row in rows),
        "started_again": sum(row["again"] for row in rows),
        "equal": sum(not row["problems"] for row in rows),
        "problems": [*reference.problems, *problems],
    }


def equal(found: dict[str, Any]) -> bool:
    """Whether nothing differs anywhere."""
    cells = all(cell["equal"] == cell["runs"] and not cell["problems"] for cell in found["cells"])
    rest = all(row["equal"] for row in [*found["boundaries"], *found["signals"]])
    return cells and rest and not any(row["differs"] for row in found["pieces"])


def show(found: dict[str, Any]) -> None:
    line = "{:32}{:>6}{:>7}{:>9}{:>15}{:>7}".format
    print(line("", "runs", "kills", "resumed", "started again", "equal"))
    for cell in found["cells"]:
        name = str(Cell(**{f.name: cell[f.name] for f in dataclasses.fields(Cell)}))
        print(
            line(
                name, *(cell[key] for key in ("runs", "kills", "resumed", "started_again", "equal"))
            )
        )
    phases = collections.Counter()
    for cell in found["cells"]:
        phases.update(cell["phases"])
    print("killed while", ", ".join(f"{name}: {number}" for name, number in sorted(phases.items())))
    boundaries, stopped, steps = found["boundaries"], found["signals"], found["pieces"]
    print(f"at a boundary: {len(boundaries)}, equal {sum(row['equal'] for row in boundaries)}")
    if stopped:
        longest = max(row["seconds"] for row in stopped)
        print(
            f"by a signal: {len(stopped)}, equal {sum(row['equal'] for row in stopped)}; at most {longest:.1f} s"
        )
    if steps:
        whole = sum(row.get("steps", 0) for row in steps)
        print(
            f"k + (N - k) steps: {whole} in {len(steps)} runs of {PIECES}, equal {sum(row['equal'] for row in steps)}"
        )
    told = (
        "backend",
        "dtype",
        "batch_size",
        "cell",
        "call",
        "moment",
        "writing",
        "phase",
        "signal",
        "twice",
    )
    for row in [*found["cells"], *boundaries, *stopped]:
        for problem in row["problems"]:
            print(
                "NOT EQUAL", {name: value for name, value in row.items() if name in told}, problem
            )
    for row in steps:
        if row["differs"]:
            print("NOT EQUAL", row)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.robustness.kills", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--runs", type=int, metavar="N", help="at random moments (default: 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("results/kills"), metavar="DIR")
    parser.add_argument(
        "--quick", action="store_true", help="one run of each backend, and a few boundaries"
    )
    options = parser.parse_args(arguments)
    runs = options.runs if options.runs is not None else 2 if options.quick else 200
    options.out.mkdir(parents=True, exist_ok=True)

    began = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="lockstep-kills-"))
    os.environ |= {
        "LOCKSTEP_OFFLINE": "1", "JAX_COMPILATION_CACHE_DIR": str(place / "jax"), "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
    }  # fmt: skip
    ready()
    found = study(
        runs,
        options.seed,
        place,
        options.quick,
        lambda text: print(text, file=sys.stderr, flush=True),
    )
    command = [
        "python",
        "-m",
        "tests.robustness.kills",
        *(sys.argv[1:] if arguments is None else arguments),
    ]
    facts = {
        "schema": 1,
        "command": command,
        "environment": environment.describe(),
        "seed": options.seed,
    }
    facts |= {"seconds": round(time.monotonic() - began), "equal": equal(found)}
    report.write_json(facts | found, options.out)
    show(found)
    if not facts["equal"]:
        print(f"what they left is in {place}")
        return 1
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
