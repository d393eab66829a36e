"""The processes of one framework that train a run together, as their leader sees them: it starts
them, gives each call to all of them at once, and says which one failed first."""

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
from typing import Any, NoReturn, Protocol

from lockstep.common.errors import BackendError, LockstepError, RankFailed
from lockstep.common.protocol import Rank
from lockstep.common.runs.rank_process import start_rank
from lockstep.common.system.process import Worker, WorkerDied, WorkerFailed, WorkerProcess

HOST = "127.0.0.1"
# Seconds without a sign of life after which a rank counts as hung. It shows one each second, from a
# thread of its own: a long compilation does not stop that.
SILENCE = 20
LEAVING = 5.0  # seconds that a rank has to end by itself
GATHERING = 1.0  # seconds in which others may say why a rank failed: one that died comes first


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
