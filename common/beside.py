"""Both backends at once: Flax trains in a process of its own, and each has half of the cores."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, Self

from common import checkpoint, interrupt, machine
from common.config import BACKENDS
from common.errors import BackendError, LockstepError
from common.record import Record
from common.trainer import Interrupted, Trainer, how_to_go_on

# Training images from which on it pays: the other process is there after some four seconds. Seconds for the whole
# command on two cores, one after the other and at once: the quick recipe, 16,000 images, 48 and 32 (means of three
# runs, in turns); the tutorial's in float64 132 and 88 (1.6 and 2.1 GB); 260 float32 steps of ResNet-20 with one twin a
# side 190 and 164, of ViT 122 and 101. With threads in one process, each would wait for the other one's Python.
LEAST_IMAGES = 8_000
PATIENCE = 30.0  # seconds that the other process has to keep a checkpoint, before it is ended
# Not by `multiprocessing`, which would run the caller's own script again, and waits for ever where the process dies
# while it starts.
PROGRAM = "import ast, sys; sys.path[:] = ast.literal_eval(sys.argv[1]); from common.beside import serve; serve()"
Members = Mapping[str, Sequence[int | None]]  # by lens: the run itself (None) and its twins


class Beside:
    """Trains `name` through all lenses beside this process, within the context, and every other backend in it.

    Args:
        name: None: every backend is trained in this process.
        members: of each lens.
    """

    def __init__(self, trainer: Trainer, name: str | None, members: Members) -> None:
        self.trainer, self.name, self.members = trainer, name, members
        self._changed = threading.Condition()
        self._finished: list[str] = []  # lenses
        self._failure: LockstepError | Interrupted | None = None
        self._over = False
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._listener = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Self:
        if self.name is None:
            return self
        command = [sys.executable, "-c", PROGRAM, repr(sys.path)]
        try:
            # In a session of its own, which a terminal's Ctrl-C does not reach: it is stopped by this process.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError:  # the system has no room for it
            self.name = None
            return self
        machine.sharing = 2
        try:
            interrupt.pass_on(self._stop)
            self._listener.start()
        except BaseException as error:
            self.__exit__(error)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is None:
            return
        if any(error):
            self._stop()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
        finally:
            self._process.kill()
            if self._listener.is_alive():
                self._listener.join()  # what it has finished is known then
            interrupt.pass_on(None)
            machine.sharing = 1
        checkpoint.remove_folder(self.trainer.folder)

    def _stop(self) -> None:
        """Have it keep a checkpoint and end. Once: told again it ends at once."""
        if not self._stopped and self._process is not None:
            self._stopped = True
            self._process.terminate()

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
                self._changed.wait_for(lambda: dtype in self._finished or self._over)
        except KeyboardInterrupt:
            raise Interrupted(f"{name} {dtype} was interrupted") from None
        if dtype not in self._finished:
            if self._failure is None and interrupt.requested():
                raise Interrupted(f"{name} {dtype} was interrupted")
            raise self._failure or self._ended()
        return self.trainer.written(name, dtype, self.members[dtype])

    def finished(self, dtype: str) -> dict[str, list[Record]]:
        """What the other process has trained through one lens; empty if it did not finish that."""
        if self.name is None or dtype not in self._finished:
            return {}
        return {self.name: self.trainer.written(self.name, dtype, self.members[dtype])}

    def _ended(self) -> BackendError:
        code = self._process.returncode if self._process is not None else None
        how = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        remedy = f"free some memory, then {how_to_go_on(self.trainer.folder)}"
        return BackendError(f"{self.name} cannot train here (its process {how}): {remedy}")

    def _listen(self) -> None:
        """Say what there is to do, and listen to the other process until it has ended."""
        process: Any = self._process
        try:
            work = dataclasses.replace(self.trainer, terminal=None), self.name, self.members
            pickle.dump(work, process.stdin, pickle.HIGHEST_PROTOCOL)  # without a copy of the images
            process.stdin.flush()
            while True:
                kind, told = pickle.load(process.stdout)
                if kind == "line":
                    with contextlib.suppress(Exception):  # such as a full disk below it
                        self.trainer.terminal.line(told)
                elif kind == "finished":
                    with self._changed:
                        self._finished.append(told)
                        self._changed.notify_all()
                else:
                    self._failure = told
        except (EOFError, OSError, pickle.UnpicklingError):
            process.wait()
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()


def choose(trainer: Trainer, names: Sequence[str], device: str, there: Iterable[str]) -> str | None:
    """The backend to train beside the other one; None where it does not pay, or there are not two to train.

    Args:
        there: backends whose records need not be trained.
    """
    config = trainer.config
    pays = config.total_steps * config.batch_size >= LEAST_IMAGES and machine.cores() >= 2
    both = len({*names} - {*there}) == len(BACKENDS)
    return BACKENDS[-1] if pays and both and device == "cpu" else None


class _Remote:
    """A terminal elsewhere."""

    def __init__(self, tell: Callable[[str, Any], None]) -> None:
        self._tell = tell

    def line(self, text: str) -> None:
        self._tell("line", text)

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, float], None]]:
        del title, total  # there is one bar, that of the process that started this one
        yield lambda steps, loss: None


def serve() -> None:
    """The other process: train what standard input says, and tell standard output."""
    machine.collect_seldom()
    # Patient all the time: in the middle of an import, KeyboardInterrupt may end up where it is printed and forgotten.
    with interrupt.listening(aloud=False), interrupt.patient(), os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # for what else may be printed
        status = _serve(out)
    sys.stderr.flush()
    os._exit(status)  # at once: nothing is left to be done


def _serve(out: BinaryIO) -> int:
    def tell(kind: str, what: Any) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more: this process ends, too
            pickle.dump((kind, what), out)
            out.flush()

    try:
        with open(0, "rb", closefd=False) as given:
            trainer, name, members = pickle.load(given)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        machine.sharing = 2
        trainer = dataclasses.replace(trainer, terminal=_Remote(tell))
        for dtype in members:
            trainer.train(name, dtype, members[dtype])
            tell("finished", dtype)
    except (LockstepError, Interrupted) as error:
        tell("failed", error)
        return 1
    except KeyboardInterrupt:
        return interrupt.status()
    return 0


def _end_with_parent() -> None:
    """Wait until whoever started this process has gone: the folder may be another run's from then on."""
    os.read(0, 1)
    os._exit(1)
