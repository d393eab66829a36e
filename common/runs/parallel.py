"""Both backends at once: Flax trains in a process of its own, and each has half of the cores.

That process starts with the command, and imports JAX while the data are read; in the end it draws
the pictures, while this one draws the page. The quick recipe took 25.3 s with a process for
training only, and takes 23.5 (means of five).

What goes through the pipe is to hold plain values: one string of a class of PyTorch's had the other
process import PyTorch, for 1.3 s. Reading CIFAR-10 while PyTorch is imported gained nothing: 3.3 s
for the two either way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np

from lockstep.common.config import BACKENDS, Config
from lockstep.common.errors import BackendError, LockstepError
from lockstep.common.protocol import Backend, Dropout
from lockstep.common.runs import checkpoint
from lockstep.common.runs.record import Record
from lockstep.common.runs.trainer import Interrupted, Trainer, resume_hint, runs_and_twins
from lockstep.common.system import environment, interrupt

# Training images from which on it pays: the other process takes some seconds to be there. Seconds
# for the whole command on two cores, one after the other and at once: the quick recipe, 16,000
# images, 48 and 32 (means of three runs, in turns); the tutorial's in float64 132 and 88 (1.6 and
# 2.1 GB); 260 float32 steps of ResNet-20 with one twin a side 190 and 164, of ViT 122 and 101. With
# threads in one process, each would wait for the other one's Python.
MIN_IMAGES = 8_000
STOP_TIMEOUT = 30.0  # seconds that the other process has to keep a checkpoint, before it is ended
# Not by `multiprocessing`, which would run the caller's own script again, and waits for ever where
# the process dies while it starts.
WORKER_SOURCE = "import ast, sys; sys.path[:] = ast.literal_eval(sys.argv.pop(1)); sys.argv = sys.argv[1:]; from lockstep.common.runs.parallel import worker_main; worker_main()"
WORKER_BACKEND = BACKENDS[-1]  # whom the other process trains
TwinNumbers = Mapping[str, Sequence[int | None]]  # by lens: the run itself (None) and its twins
Build = Callable[[str, str], Backend]  # by name and dtype
Send = Callable[[str, Any], None]  # tells the process that waits: of what kind, and what


class ModelInfo(NamedTuple):
    """What has to be known of a backend before it trains; by canonical name, as
    `lockstep.common.protocol.Backend` has it."""

    device: str
    shapes: dict[str, tuple[int, ...]]
    native_names: dict[str, str]
    dropout_layers: dict[str, Dropout]


def view(build: Build, name: str) -> ModelInfo:
    backend = build(name, "float32")
    return ModelInfo(
        backend.device, backend.shapes(), backend.native_names(), backend.dropout_layers()
    )


class WorkerProcess:
    """Another process: it gets ready while this one reads the data, and does what it is told to
    until the context ends.

    What cannot be done there is to be done here, so that nothing depends on it: there may be no
    such process.

    Args:
        load: called there at once with the name of the backend that it is to train.
    """

    def __init__(self, wanted: bool, load: Callable[[str], object]) -> None:
        self.wanted, self.load = wanted, load
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self.wanted:
            command = [
                sys.executable,
                "-c",
                WORKER_SOURCE,
                repr(sys.path),
                sys.argv[0],
            ]  # for hints
            with contextlib.suppress(OSError):  # the system has no room for it
                # In a session of its own, which a terminal's Ctrl-C does not reach: it is stopped
                # by this process.
                self.process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
                )
        self.tell("prepare", self.load)
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """At once."""
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError):  # what it was still to be told
                self.process.communicate()
            self.process = None

    def tell(self, what: str, *arguments: Any) -> None:
        """Have it do what the method of `WorkerCommands` does."""
        if self.process is not None:
            pipe: Any = self.process.stdin
            with contextlib.suppress(OSError, ValueError):  # it has ended, or is being ended
                pickle.dump(
                    (what, arguments), pipe, pickle.HIGHEST_PROTOCOL
                )  # without a copy of the images
                pipe.flush()

    def view(self, build: Build, name: str) -> Callable[[], ModelInfo]:
        """Waits for what the function gives, which this begins."""
        self.tell("look", build, name)
        return lambda: self.told()[1] or view(build, name)

    def told(self) -> tuple[str, Any]:
        """What it tells: of what kind, and what. "ended", None where it has."""
        process: Any = self.process  # which another thread may end
        if process is None:
            return "ended", None
        try:
            return pickle.load(process.stdout)
        except (
            EOFError,
            OSError,
            ValueError,
            pickle.UnpicklingError,
        ):  # it has ended, or is being ended
            process.wait()
            return "ended", None


class ParallelTraining:
    """Trains `name` through all lenses in another process, within the context, and every other
    backend in this one.

    Args:
        name: None: every backend is trained in this process, and the other one is ended.
        members: of each lens.
    """

    def __init__(
        self, trainer: Trainer, other: WorkerProcess, name: str | None, members: TwinNumbers
    ) -> None:
        self.trainer, self.other, self.members = trainer, other, members
        self.name = name if other.process is not None else None
        self._changed = threading.Condition()
        self._finished: list[str] = []  # lenses
        self._failure: LockstepError | Interrupted | None = None
        self._done = False
        self._stopped = False
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        if self.name is None:
            self.other.end()
            return self
        environment.sharing = 2
        try:
            interrupt.forward_to(self._stop)
            self._listener.start()
        except BaseException as error:
            self.__exit__(error)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self.name is None:
            return
        if any(error):
            self._stop()
        try:
            if self._listener.is_alive():
                self._listener.join(STOP_TIMEOUT)
        finally:
            if any(error) or self._listener.is_alive():
                self.other.end()
            if self._listener.is_alive():
                self._listener.join()  # what it has finished is known then
            interrupt.forward_to(None)
            environment.sharing = 1
        checkpoint.remove_folder(self.trainer.folder)

    def _stop(self) -> None:
        """Have it keep a checkpoint and end. Once: told again it ends at once."""
        if not self._stopped and self.other.process is not None:
            self._stopped = True
            self.other.process.terminate()

    def train(self, name: str, dtype: str) -> list[Record]:
        """The records of one backend through one lens, as `Trainer.train`'s.

        Raises:
            KeyboardInterrupt: where it was stopped.
            LockstepError: what went wrong in the other process.
        """
        if name != self.name:
            return self.trainer.train(name, dtype, self.members[dtype])
        try:
            with self._changed:
                self._changed.wait_for(lambda: dtype in self._finished or self._done)
        except KeyboardInterrupt:
            raise Interrupted(f"{name} {dtype} was interrupted") from None
        if dtype not in self._finished:
            if self._failure is None and interrupt.requested():
                raise Interrupted(f"{name} {dtype} was interrupted")
            raise self._failure or self._worker_died()
        return self.trainer.read_records(name, dtype, self.members[dtype])

    def finished(self, dtype: str) -> dict[str, list[Record]]:
        """What the other process has trained through one lens; empty if it did not finish that."""
        if self.name is None or dtype not in self._finished:
            return {}
        return {self.name: self.trainer.read_records(self.name, dtype, self.members[dtype])}

    def _worker_died(self) -> BackendError:
        code = self.other.process.returncode if self.other.process is not None else None
        how = (
            f"was ended by signal {-code}"
            if code is not None and code < 0
            else f"ended with status {code}"
        )
        remedy = f"free some memory, then {resume_hint(self.trainer.folder)}"
        return BackendError(f"{self.name} cannot train here (its process {how}): {remedy}")

    def _listen(self) -> None:
        """Say what there is to train, and listen until all of it is."""
        self.other.tell(
            "train", dataclasses.replace(self.trainer, terminal=None), self.name, self.members
        )
        kind = ""
        while kind not in ("trained", "failed", "ended"):
            kind, told = self.other.told()
            if kind == "line":
                with contextlib.suppress(Exception):  # such as a full disk below it
                    self.trainer.terminal.line(told)
            elif kind == "failed":
                self._failure = told
            with self._changed:
                self._finished += [told] if kind == "finished" else []
                self._done = kind in ("trained", "failed", "ended")
                self._changed.notify_all()


def may_use_worker(config: Config, names: Sequence[str], device: str) -> bool:
    """Whether `choose_worker_backend` may well say so of this configuration, which need not be resolved; `device`
    may be "auto"."""
    short = config.steps is not None and config.steps * config.batch_size < MIN_IMAGES
    return (
        len(names) == len(BACKENDS) and device != "cuda" and environment.cores() >= 2 and not short
    )


def choose_worker_backend(
    trainer: Trainer, names: Sequence[str], device: str, there: Iterable[str]
) -> str | None:
    """The backend to train beside the other one; None where it does not pay, or there are not two
    to train.

    Args:
        there: backends whose records need not be trained.
    """
    config = trainer.config
    pays = config.total_steps * config.batch_size >= MIN_IMAGES and environment.cores() >= 2
    both = len({*names} - {*there}) == len(BACKENDS)
    return WORKER_BACKEND if pays and both and device == "cpu" else None


class RemoteProgress:
    """A terminal elsewhere."""

    def __init__(self, tell: Send) -> None:
        self._tell = tell

    def line(self, text: str) -> None:
        self._tell("line", text)

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, float], None]]:
        del title, total  # there is one bar, that of the process that started this one
        yield lambda steps, loss: None


def worker_main() -> None:
    """The other process: do what standard input says, and tell standard output."""
    environment.relax_gc()
    environment.sharing = 2
    # Patient all the time: in the middle of an import, KeyboardInterrupt may end up where it is
    # printed and forgotten.
    with (
        interrupt.handle_signals(aloud=False),
        interrupt.deferred(),
        os.fdopen(os.dup(1), "wb") as out,
    ):
        os.dup2(2, 1)  # for what else may be printed
        work, commands = WorkerCommands(functools.partial(_tell, out)), queue.SimpleQueue()
        threading.Thread(target=_listen, args=(commands,), daemon=True).start()
        try:
            while True:
                what, arguments = commands.get()
                getattr(work, what)(*arguments)
        except KeyboardInterrupt:
            sys.stderr.flush()
            os._exit(interrupt.status())  # at once: nothing is left to be done


def _tell(out: BinaryIO, kind: str, what: Any) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more: this process ends, too
        pickle.dump((kind, what), out)
        out.flush()


def _listen(commands: queue.SimpleQueue[Any]) -> None:
    """Until who started this process has gone: the folder may be another run's from then on."""
    try:
        with open(0, "rb", closefd=False) as given:
            while True:
                commands.put(pickle.load(given))
    finally:
        os._exit(1)


class WorkerCommands:
    """What the other process can be told to do; it answers by `tell`."""

    def __init__(self, tell: Send) -> None:
        self.tell = tell

    def prepare(self, load: Callable[[str], object]) -> None:
        with contextlib.suppress(Exception):  # whatever it is, it comes again
            load(WORKER_BACKEND)

    def look(self, build: Build, name: str) -> None:
        seen = None
        with contextlib.suppress(
            Exception
        ):  # who asked then looks by itself, and says what is wrong
            seen = view(build, name)
        self.tell("seen", seen)

    def train(self, trainer: Trainer, name: str, members: TwinNumbers) -> None:
        self.trainer, self.members = (
            dataclasses.replace(trainer, terminal=RemoteProgress(self.tell)),
            members,
        )
        try:
            for dtype in members:
                self.trainer.train(name, dtype, members[dtype])
                self.tell("finished", dtype)
            self.tell("trained", None)
        except (LockstepError, Interrupted) as error:
            self.tell("failed", error)
        importlib.import_module(
            "matplotlib.figure"
        )  # half a second, in which the other backend may be training

    def draw(self, report: dict[str, Any], sample: np.ndarray) -> None:
        """The pictures of what was trained."""
        from lockstep.common.report import write_pictures

        try:
            found = {
                dtype: {name: self.trainer.read_records(name, dtype, members) for name in BACKENDS}
                for dtype, members in self.members.items()
            }
            runs, twins = runs_and_twins(found)
            write_pictures(self.trainer.folder, report, runs, self.trainer.dataset, twins, sample)
            self.tell("drawn", None)
        except Exception:  # who asked then draws by itself, and says what is wrong
            self.tell("not drawn", None)
