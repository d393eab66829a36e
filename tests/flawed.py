"""Kinds of input whose readers have a flaw each: what `tests.robustness.fuzz` must catch, and, for comparison,
two without one."""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lockstep.common.errors import DataError
from tests.robustness.inputs import Kind, Wrong

SIZE = 400 * 2**20  # bytes that a reader without restraint takes


class Flawed(Kind):
    """One reader."""

    share = 1
    seconds = 0.5
    memory = 100 * 2**20
    flaw: Callable[[Flawed, Path], object]  # what happens with all but the valid input

    def prepare(self) -> None:
        self.reserved = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def valid(self, folder: Path) -> None:
        (folder / "valid").touch()

    def make(self, generator: np.random.Generator, folder: Path) -> tuple[str, bool]:
        self.reserved.madvise(
            mmap.MADV_DONTNEED
        )  # the pages that the input before used are free again
        return "nothing", False

    def read(self, folder: Path, forged: bool) -> None:
        if not (folder / "valid").exists():
            self.flaw(self, folder)


def refuse(text: str) -> None:
    raise DataError(text)


def fail(self: Flawed, folder: Path) -> None:
    raise ValueError("a traceback")


def sleep(self: Flawed, folder: Path) -> None:
    time.sleep(3)


def sleep_and_say_nothing(self: Flawed, folder: Path) -> None:
    try:
        time.sleep(3)
    except BaseException:
        refuse("it took too long: wait no longer")


def hear_nothing(self: Flawed, folder: Path) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(60)


def take_memory(self: Flawed, folder: Path) -> None:
    np.ones(SIZE, np.uint8)


def take_memory_and_refuse(self: Flawed, folder: Path) -> None:
    try:
        np.ones(SIZE, np.uint8)
    except MemoryError as error:
        raise DataError("it is too large: choose something smaller") from error


def use_what_is_reserved(self: Flawed, folder: Path) -> None:
    for page in range(0, SIZE, mmap.PAGESIZE):
        self.reserved[page] = 1


def crash(self: Flawed, folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(self: Flawed, folder: Path) -> None:
    os._exit(3)


def warn(self: Flawed, folder: Path) -> None:
    warnings.warn("something is odd", stacklevel=1)


def say(self: Flawed, folder: Path) -> None:
    print("something is odd")


def say_below_python(self: Flawed, folder: Path) -> None:
    os.write(2, b"something is odd\n")


def write_elsewhere(self: Flawed, folder: Path) -> None:
    (folder / ".." / "elsewhere").write_text("x")


class Harm:
    def __reduce__(self) -> tuple[object, ...]:
        return os.getenv, ("HOME",)


def unpickle(self: Flawed, folder: Path) -> None:
    pickle.loads(pickle.dumps(Harm()))
    refuse("its digest is wrong: fetch it again")


def start_a_program(self: Flawed, folder: Path) -> None:
    os.system("true")


def refuse_in_two_lines(self: Flawed, folder: Path) -> None:
    refuse("it is damaged:\nwrite it again")


def refuse_with_an_escape(self: Flawed, folder: Path) -> None:
    refuse("\x1b[2Jit is damaged: write it again")


def refuse_without_a_remedy(self: Flawed, folder: Path) -> None:
    refuse("it is damaged")


def agree(self: Flawed, folder: Path) -> None:
    raise Wrong("the verdict is agree, of other numbers")


def accept(self: Flawed, folder: Path) -> None:
    (folder / "beside").write_text("what is written beside the input is no flaw")


def refuse_well(self: Flawed, folder: Path) -> None:
    refuse("it is damaged: write it again")


FLAWS: dict[Callable[[Flawed, Path], object], str] = {
    fail: "ValueError: 'a traceback' at flawed.py",
    sleep: "takes longer than 0.5 s",
    sleep_and_say_nothing: "takes ",
    hear_nothing: "hangs",
    take_memory: "MemoryError",
    take_memory_and_refuse: "memory was asked for that is not there",
    use_what_is_reserved: " bytes",
    crash: "ends its process with -11",
    leave: "ends its process with 3",
    warn: "UserWarning: something is odd",
    say: "says 'something is odd",
    say_below_python: "says 'something is odd",
    write_elsewhere: "elsewhere' for writing",
    unpickle: "unpickles os.getenv",
    start_a_program: "os.system b'true'",
    refuse_in_two_lines: "not one printable line",
    refuse_with_an_escape: "not one printable line",
    refuse_without_a_remedy: "without a remedy",
    agree: "the verdict is agree",
}
FINE = (accept, refuse_well)
KINDS: dict[str, type[Kind]] = {
    flaw.__name__: type(flaw.__name__, (Flawed,), {"flaw": staticmethod(flaw)})
    for flaw in (*FLAWS, *FINE)
}
