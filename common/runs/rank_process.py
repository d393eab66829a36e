"""In one of the processes that train a run together: its backends, and what they hold."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple, NoReturn, Protocol, SupportsFloat, runtime_checkable

import numpy as np

from lockstep.common.protocol import GRADIENT_OF, Arrays, Backend, Metrics, Rank, Snapshot
from lockstep.common.system import environment
from lockstep.common.system.process import Report

BEAT = 1.0  # seconds between two signs of life
KEPT = ("init", "upload", "batches")  # methods whose result stays here


class BuildRank(Protocol):
    """`lockstep.backends.build`, given all but these."""

    def __call__(
        self, name: str, dtype: str, concurrent_processes: int, rank: Rank | None = None
    ) -> Backend: ...


@runtime_checkable
class KeepsGradients(Protocol):
    """A backend of a rank whose state holds the gradients of its last step."""

    def last_gradients(self, state: Any) -> Arrays:
        """As all ranks should have them, in the canonical layout; empty if the state has none."""
        ...


class Reference(NamedTuple):
    """What stands for something that the ranks keep, in the arguments of a call."""

    number: int
    path: tuple[int, ...]  # of the entry within it, such as the images of step 3 of some batches


def start_rank(report: Report, rank: Rank) -> RankProcess:
    """Make the commands of a rank. It lives as long as its leader wants: a signal is passed on."""
    environment.relax_gc()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # gloo says there who is connected to whom
    process = RankProcess(rank)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, process.on_signal)
    threading.Thread(target=process.beat, args=(report,), daemon=True).start()
    return process


class RankProcess:
    """The commands of a rank; all ranks are given the same, at the same time."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.kept: dict[int, Any] = {}  # backends, states, data sets and batches
        self._signal: int | None = None

    def beat(self, report: Report) -> None:
        """Show that this process is alive, and which signal it got."""
        while True:
            number, self._signal = self._signal, None
            report(number)
            threading.Event().wait(BEAT)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signal = number

    def build(
        self, build: BuildRank, name: str, dtype: str, concurrent_processes: int, keep: int
    ) -> None:
        self.kept[keep] = build(name, dtype, concurrent_processes, self.rank)

    def call(
        self, backend: int, method: str, arguments: Sequence[object], keep: int, forget: set[int]
    ) -> Any:
        """Call a method of a backend. Rank 0 answers with its result, and the others with none, but
        for `export`: all answer with the digests of their state and gradients, too.

        Args:
            backend: its number.
            arguments: with References to what is kept here.
            keep: the number of what is kept of the result.
            forget: numbers of what is not wanted any more.
        """
        for number in forget:
            self.kept.pop(number, None)
        given = [self._resolved(argument) for argument in arguments]
        found = getattr(self.kept[backend], method)(*given)
        if method in KEPT:
            self.kept[keep] = found
            return None
        if method in ("train_step", "train_steps"):
            self.kept[keep], metrics = found
            return Metrics(*map(in_numpy, metrics)) if self.rank.number == 0 else None
        if method == "export":
            # Gradients first: they are why a state differs.
            self.exported = gradients_of(self.kept[backend], given[0]) | tensors_of(found)
            return found if self.rank.number == 0 else None, digests(self.exported)
        return found if self.rank.number == 0 else None

    def leave(self) -> NoReturn:
        """End this process, without waiting for any other."""
        os._exit(0)

    def tensor(self, name: str) -> np.ndarray | None:
        """A tensor of the last export; None if there is none of that name."""
        return self.exported.get(name)

    def _resolved(self, argument: object) -> object:
        if not isinstance(argument, Reference):
            return argument
        found = self.kept[argument.number]
        for index in argument.path:
            found = found[index]
        return found


def in_numpy(metric: np.ndarray | SupportsFloat) -> np.ndarray | float:
    """A metric of many steps, or a framework's scalar, as plain numbers."""
    return metric if isinstance(metric, np.ndarray) else float(metric)


def tensors_of(snapshot: Snapshot) -> Arrays:
    """All that a state consists of, the optimizer's tensors and the schedule's numbers too."""
    schedule = {f"{name} of the schedule": np.array(n) for name, n in snapshot.schedule.items()}
    return snapshot.tensors | snapshot.optimizer_tensors | schedule


def gradients_of(backend: Backend, state: object) -> Arrays:
    """The gradients that the last step was taken with, of a backend that keeps them (PyTorch's)."""
    found: Arrays = backend.last_gradients(state) if isinstance(backend, KeepsGradients) else {}
    return {f"{GRADIENT_OF}{name}": array for name, array in found.items()}


def digests(arrays: Arrays) -> dict[str, bytes]:
    """SHA-256 of the bytes of each array."""
    return {name: hashlib.sha256(array.tobytes()).digest() for name, array in arrays.items()}
