"""One run trained by several processes: each is a rank, and this process, their leader, is none.

The leader trains, records and judges as ever: its backend gives each call to all ranks at once, and
returns rank 0's answer. We start the ranks ourselves, as torchrun does, since a parent can then say
which of them died: the others wait for it in a collective, without end.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import queue
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, Self

import numpy as np

from lockstep.common.config import FRAMEWORKS
from lockstep.common.errors import BackendError, LockstepError, RankFailed
from lockstep.common.protocol import (
    Arrays,
    Backend,
    Dropout,
    Evaluation,
    Metrics,
    Rank,
    RankDifference,
    Snapshot,
)
from lockstep.common.runs.rank_process import BuildRank, Reference, digests, start_rank, tensors_of
from lockstep.common.system.interrupt import SignalHandler
from lockstep.common.system.process import Worker, WorkerDied, WorkerFailed, WorkerProcess

HOST = "127.0.0.1"
# Seconds without a sign of life after which a rank counts as hung. It shows one each second, from a
# thread of its own: a long compilation does not stop that.
SILENCE = 20
LEAVING = 5.0  # seconds that a rank has to end by itself
GATHERING = 1.0  # seconds in which others may say why a rank failed: one that died comes first
MAX_DIFFERENCES = 8  # tensors of one state that are recorded


class StartRanks(Protocol):
    """Starts, or finds, the processes of one framework."""

    def __call__(self, name: str, count: int) -> list[Worker]: ...


def start_here(name: str, count: int) -> list[Worker]:
    """Start the ranks as processes of this machine."""
    del name
    port = free_port()
    ranks: list[Worker] = []
    try:
        for number in range(count):
            ranks.append(WorkerProcess(start_rank, Rank(number, count, HOST, port)))
    except WorkerFailed as error:
        for rank in ranks:
            rank.stop()
        raise BackendError(f"{error}: try a smaller --processes") from error
    return ranks


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return server.getsockname()[1]


class _Caller(threading.Thread):
    """Sends calls to one rank, and waits for its answers: a rank that hangs reads nothing, either."""

    def __init__(
        self,
        number: int,
        worker: Worker,
        answers: queue.SimpleQueue[tuple[int, object]],
        signalled: Callable[[int], object],
    ) -> None:
        super().__init__(daemon=True)
        self.signalled = signalled
        self.number, self.worker, self.answers = number, worker, answers
        self.calls: queue.SimpleQueue[tuple[str, tuple[object, ...]] | None] = queue.SimpleQueue()
        self.silence = 0  # seconds of waiting since the last sign of life
        self.start()

    def run(self) -> None:
        while (call := self.calls.get()) is not None:
            method, arguments = call
            try:
                number = self.worker.send(method, *arguments)
                answer = self.worker.receive(number, self._on_beat)
            except (WorkerFailed, LockstepError, KeyboardInterrupt) as error:
                answer = error
            self.answers.put((self.number, answer))

    def _on_beat(self, received: object) -> None:
        self.silence = 0
        if isinstance(received, int):  # a signal to a rank is meant for the run
            self.signalled(received)


class RankGroup:
    """The processes of one framework that train together."""

    def __init__(
        self,
        name: str,
        ranks: Sequence[Worker],
        hint: str,
        signalled: Callable[[int], object],
    ) -> None:
        self.name, self.hint = name, hint
        self._answers: queue.SimpleQueue[tuple[int, object]] = queue.SimpleQueue()
        self.callers = [
            _Caller(i, worker, self._answers, signalled) for i, worker in enumerate(ranks)
        ]
        self.count = len(self.callers)
        self._numbers = itertools.count(1)
        self._unwanted: collections.deque[int] = collections.deque()

    def new_number(self, owner: object) -> int:
        """A number for what the ranks keep until `owner` is deleted here."""
        number = next(self._numbers)
        weakref.finalize(owner, self._unwanted.append, number).atexit = False
        return number

    def unwanted(self) -> set[int]:
        """The numbers of what is not wanted any more since the last call."""
        found: set[int] = set()
        while self._unwanted:
            found.add(self._unwanted.popleft())
        return found

    def call(self, method: str, *arguments: object) -> list[Any]:
        """The answers of all ranks to one call.

        Raises:
            RankFailed: if one dies, hangs, or raises an unexpected error.
            LockstepError: what a rank raised.
        """
        try:
            for caller in self.callers:
                caller.silence = 0
                caller.calls.put((method, arguments))
            return self._wait_for(range(self.count))
        except BaseException:
            self.stop()  # the others may wait for one that will not come
            raise

    def ask(self, rank: int, method: str, *arguments: object) -> Any:
        """The answer of one rank alone, to what needs no other; raises as `call` does."""
        try:
            self.callers[rank].silence = 0
            self.callers[rank].calls.put((method, arguments))
            return self._wait_for([rank])[0]
        except BaseException:
            self.stop()
            raise

    def leave(self) -> None:
        """Let all ranks end by themselves."""
        for caller in self.callers:
            caller.calls.put(("leave", ()))
        with contextlib.suppress(queue.Empty):
            for _ in self.callers:
                self._answers.get(timeout=LEAVING)

    def stop(self) -> None:
        """End all ranks, at once."""
        for caller in self.callers:
            caller.calls.put(None)
            caller.worker.stop()

    def _wait_for(self, ranks: Sequence[int]) -> list[Any]:
        answers: dict[int, object] = {}
        while len(answers) < len(ranks):
            try:
                number, answer = self._answers.get(timeout=1.0)
            except queue.Empty:
                self._check_silence([rank for rank in ranks if rank not in answers])
                continue
            if isinstance(answer, BaseException):
                self._fail(number, answer)
            answers[number] = answer
        return [answers[rank] for rank in ranks]

    def _check_silence(self, waiting: Sequence[int]) -> None:
        """Seconds of waiting are counted, not read from a clock: this process may be stopped, too."""
        for rank in waiting:
            self.callers[rank].silence += 1
            if self.callers[rank].silence > SILENCE:
                self._raise(rank, f"has not answered for {SILENCE} s (is it stopped?)")

    def _fail(self, number: int, error: BaseException) -> NoReturn:
        """Raise for the rank that failed first: its death is an error of the others."""
        failures = {number: error}
        with contextlib.suppress(queue.Empty):
            while len(failures) < self.count:
                other, answer = self._answers.get(timeout=GATHERING)
                if isinstance(answer, BaseException):
                    failures[other] = answer
        for caller in self.callers:  # one that had answered may have died since
            if caller.number not in failures and (death := caller.worker.death()) is not None:
                failures[caller.number] = death
        number, error = min(failures.items(), key=lambda found: severity(found[1]))
        if not isinstance(error, WorkerFailed):
            raise error
        cause = str(error).removeprefix("its process ")
        self._raise(number, cause if isinstance(error, WorkerDied) else f"failed ({cause})")

    def _raise(self, rank: int, cause: str) -> NoReturn:
        cause = cause.replace(
            f"signal {signal.SIGKILL:d}",
            f"signal {signal.SIGKILL:d} (SIGKILL; the system sends it when memory runs out)",
        )
        raise RankFailed(f"rank {rank} of {self.count} of {self.name} {cause}: {self.hint}")


def severity(error: BaseException) -> int:
    """The smaller, the likelier it is the cause of the others."""
    if isinstance(error, WorkerDied):
        return 0 if "signal 9" in str(error) else 1
    return 3 if isinstance(error, WorkerFailed) else 2


class Kept:
    """What the ranks hold for the leader: a state, a data set, or batches.

    Args:
        shape: of batches: that of their labels.
        path: of an entry within `owner`.
    """

    number: int

    def __init__(
        self,
        shape: tuple[int, ...] = (),
        path: tuple[int, ...] = (),
        owner: Kept | None = None,
    ) -> None:
        self.shape, self.path, self.owner = shape, path, owner
        if owner is not None:
            self.number = owner.number

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Kept:
        owner = self if self.owner is None else self.owner
        return Kept(self.shape[1:], (*self.path, index), owner)

    def reference(self) -> Reference:
        return Reference(self.number, self.path)


class RankedBackend:
    """A backend whose steps are taken by all ranks of a group, as `lockstep.common.protocol.Backend`.

    Args:
        local: a backend of one process, which knows the network; it does not train.
    """

    def __init__(self, local: Backend, group: RankGroup, build: BuildRank, dtype: str) -> None:
        self.local, self.group = local, group
        self.name, self.device = local.name, local.device
        self._number = group.new_number(self)
        group.call("build", build, local.name, dtype, group.count, self._number)

    # --- The network

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.local.shapes()

    def native_names(self) -> dict[str, str]:
        return self.local.native_names()

    def layer_kinds(self) -> dict[str, str]:
        return self.local.layer_kinds()

    def module_classes(self) -> tuple[type, ...]:
        return self.local.module_classes()

    def dropout_layers(self) -> dict[str, Dropout]:
        return self.local.dropout_layers()

    # --- Training

    def init(self, snapshot: Snapshot) -> Kept:
        return self._keep("init", snapshot._replace(differences=()))

    def export(self, state: Kept) -> Snapshot:
        """Rank 0's state, and where another rank's is not the same."""
        snapshot, *others = self._call("export", state)
        expected = digests(tensors_of(snapshot))
        found = [
            self._difference(snapshot, rank, tensor)
            for rank, theirs in enumerate(others, 1)
            for tensor in [name for name in expected if theirs.get(name) != expected[name]][
                :MAX_DIFFERENCES
            ]
        ]
        return snapshot._replace(differences=tuple(each for each in found if each["gap"] != 0))

    def train_step(self, state: Kept, images: Any, labels: Any) -> tuple[Kept, Metrics]:
        return state, self._call("train_step", state, images, labels, keep=state.number)[0]

    def train_steps(self, state: Kept, images: Any, labels: Any) -> tuple[Kept, Metrics]:
        return state, self._call("train_steps", state, images, labels, keep=state.number)[0]

    def upload(self, images: np.ndarray, labels: np.ndarray) -> Kept:
        return self._keep("upload", images, labels)

    def batches(self, uploaded: Kept, indices: np.ndarray) -> tuple[Kept, Kept]:
        kept = self._keep("batches", uploaded, indices)
        images, labels = (Kept(indices.shape, (part,), kept) for part in (0, 1))
        return images, labels

    def download(self, images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
        return self._call("download", images, labels)[0]

    def masks(self, state: Kept, shape: Sequence[int]) -> Arrays:
        return self._call("masks", state, tuple(shape))[0]

    # --- Looking without touching

    def evaluate(self, state: Kept, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        return self._call("evaluate", state, images, labels)[0]

    def probe(self, state: Kept, images: Any, labels: Any) -> Arrays:
        return self._call("probe", state, images, labels)[0]

    def describe(self) -> dict[str, object]:
        return self._call("describe")[0] | {"processes": self.group.count}

    # --- Calls

    def _keep(self, method: str, *arguments: object) -> Kept:
        kept = Kept()
        kept.number = self.group.new_number(kept)
        self._call(method, *arguments, keep=kept.number)
        return kept

    def _call(self, method: str, *arguments: object, keep: int = 0) -> list[Any]:
        references = [each.reference() if isinstance(each, Kept) else each for each in arguments]
        forget = self.group.unwanted()
        return self.group.call("call", self._number, method, references, keep, forget)

    def _difference(self, snapshot: Snapshot, rank: int, tensor: str) -> RankDifference:
        ours, theirs = tensors_of(snapshot)[tensor], self.group.ask(rank, "tensor", tensor)
        gap = None
        if theirs is not None and theirs.shape == ours.shape:
            if np.array_equal(ours, theirs, equal_nan=True):  # zeros of either sign
                gap = 0.0
            else:
                found = float(np.max(np.abs(ours.astype(np.float64) - theirs.astype(np.float64))))
                gap = found if np.isfinite(found) else None
        return {"step": snapshot.step, "rank": rank, "tensor": tensor, "gap": gap}


class Ranks:
    """Builds backends of one process or of several, as a context manager that ends these.

    Args:
        build: builds a backend of one process.
        count: processes of each backend.
        hint: how to go on when a rank has failed.
        start: starts the ranks of a framework.
        signals: where a signal to a rank is passed on to.
    """

    def __init__(
        self,
        build: BuildRank,
        count: int,
        hint: str,
        start: StartRanks | None = None,
        signals: SignalHandler | None = None,
    ) -> None:
        self._build, self.count, self.hint = build, count, hint
        self.start = start_here if start is None else start
        self.signals = SignalHandler() if signals is None else signals
        self.counts: dict[str, int] = {}  # by backend, where it is not `count`
        self.groups: dict[str, RankGroup] = {}

    def __reduce__(self) -> tuple[object, ...]:
        """Another process that builds backends has no ranks yet, and handles signals itself."""
        return Ranks, (self._build, self.count, self.hint), {"counts": self.counts}

    def build(self, name: str, dtype: str, concurrent_processes: int = 1) -> Backend:
        """As `lockstep.backends.build`."""
        count = self.counts.get(name, self.count)
        local = self._build(name, dtype, max(concurrent_processes, count))
        if count == 1:
            return local
        if name not in self.groups:
            ranks = self.start(name, count)
            self.groups[name] = RankGroup(
                FRAMEWORKS[name], ranks, self.hint, self.signals.receive_for_a_rank
            )
        return RankedBackend(local, self.groups[name], self._build, dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for group in self.groups.values():
            if not any(error):
                group.leave()
            group.stop()
