"""Processes that torchrun has started, on one machine or several: rank 0's leads, the others connect.

A process that connects can run code here, so both sides prove that they know a key. By default the
key is derived from torchrun's variables; LOCKSTEP_KEY makes it a secret.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import NamedTuple, NoReturn

from lockstep.common.errors import BackendError, ConfigError
from lockstep.common.protocol import Rank
from lockstep.common.runs.rank_process import start_rank
from lockstep.common.system import environment
from lockstep.common.system.process import Worker, WorkerProcess, serve

JOIN = 60.0  # seconds that processes wait for each other
ANSWER = 10  # seconds that a rank has to answer at the start ...
PATIENCE = 600  # ... and the leader, which may read data first
PACKAGES = {"torch": ("torch", "numpy"), "flax": ("jax", "jaxlib", "flax", "optax", "numpy")}
MAX_MESSAGE = 2**20  # bytes


class Launched(NamedTuple):
    """What torchrun says of this process."""

    number: int
    count: int
    here: int  # how many of them run on this machine
    host: str  # of rank 0
    port: int  # where the leader listens; the frameworks take the next one
    restarts: int  # how often torchrun has started them again

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> Launched | None:
        """None outside of torchrun, and where it has started one process only.

        Raises:
            ConfigError: if a variable is not a number in its range.
        """
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if not all(variables.get(name) for name in names) or variables["WORLD_SIZE"] == "1":
            return None
        try:
            number, count = int(variables["RANK"]), int(variables["WORLD_SIZE"])
            port = int(variables.get("LOCKSTEP_PORT") or int(variables["MASTER_PORT"]) + 1)
            found = cls(
                number,
                count,
                int(variables.get("LOCAL_WORLD_SIZE", "1")),
                variables["MASTER_ADDR"],
                port,
                int(variables.get("TORCHELASTIC_RESTART_COUNT", "0")),
            )
            if not (0 <= number < count and 0 < port < 2**16 - 1):
                raise ValueError
        except ValueError:
            raise ConfigError(
                "RANK, WORLD_SIZE, MASTER_PORT or LOCKSTEP_PORT is not what torchrun sets: start "
                "it by torchrun, or unset RANK"
            ) from None
        return found

    @property
    def key(self) -> bytes:
        public = f"{self.port} {os.environ.get('TORCHELASTIC_RUN_ID', '')}"
        return hashlib.sha256(os.environ.get("LOCKSTEP_KEY", public).encode()).digest()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def facts(launched: Launched, name: str, arguments: Sequence[str]) -> dict[str, object]:
    """What must be the same in all processes."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES[name]}
    return {
        "processes": launched.count,
        "restarts": launched.restarts,
        "options": list(arguments),
        "code": environment.source_digest(name),
        "python": platform.python_version(),
        **versions,
    }


class RemoteWorker(Worker):
    """A rank that torchrun has started."""

    def __init__(self, link: socket.socket, rank: Rank) -> None:
        self._link = link
        super().__init__(link.makefile("wb"), link.makefile("rb"), start_rank, rank)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)  # then no thread waits for it any more
        super().stop()
        self._link.close()


class Leader:
    """Rank 0's process: it listens from the start, so that a port that is taken is told at once.

    Raises:
        BackendError: if it cannot listen there.
    """

    def __init__(self, launched: Launched, name: str, arguments: Sequence[str]) -> None:
        self.launched, self.name = launched, name
        self.facts = facts(launched, name, arguments)
        listen(launched.host, launched.port + 1).close()  # the frameworks' own
        self.server = listen(launched.host, launched.port)

    def __call__(self, name: str, count: int) -> list[Worker]:
        """The ranks, as `lockstep.common.runs.rank_group.StartRanks`.

        Raises:
            BackendError: if one does not come, or is not what it should be.
        """
        del name, count
        launched = self.launched
        links: dict[int, socket.socket] = {}
        try:
            self._accept(links)
        except BaseException:
            for link in links.values():
                link.close()
            raise
        finally:
            self.server.close()
        # Else PyTorch takes torchrun's own store for that of the ranks.
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
        first, *others = (
            Rank(number, launched.count, launched.host, launched.port + 1)
            for number in range(launched.count)
        )
        found: list[Worker] = [WorkerProcess(start_rank, first)]
        return found + [RemoteWorker(links[rank.number], rank) for rank in others]

    def _accept(self, links: dict[int, socket.socket]) -> None:
        """Wait for all other ranks; each is added to `links`."""
        launched = self.launched
        until = time.monotonic() + JOIN
        while len(links) < launched.count - 1:
            self.server.settimeout(max(0.1, until - time.monotonic()))
            try:
                link, _ = self.server.accept()
            except TimeoutError:
                missing = sorted({*range(1, launched.count)} - {*links})
                raise BackendError(
                    f"rank {missing[0]} did not connect to {launched.address} within {JOIN:.0f} s: "
                    "start the same command on all machines, with the same --nnodes"
                ) from None
            try:
                links[self._welcome(link)] = link
            except BackendError:
                link.close()
                raise
            except (OSError, EOFError, AuthenticationError, ValueError):
                link.close()  # no rank of ours

    def _welcome(self, link: socket.socket) -> int:
        """The number of the rank that has connected.

        Raises:
            BackendError: if it is not one of this run.
            OSError, EOFError, AuthenticationError, ValueError: if it is no rank at all.
        """
        with handshake(link, ANSWER) as connection:
            deliver_challenge(connection, self.launched.key)
            answer_challenge(connection, self.launched.key)
            found = json.loads(connection.recv_bytes(MAX_MESSAGE))
            number, theirs = int(found["rank"]), dict(found["facts"])
            if not 0 < number < self.launched.count:
                raise ValueError(number)
            wrong = next((key for key in self.facts if theirs.get(key) != self.facts[key]), None)
            problem = ""
            if wrong is not None:
                problem = (
                    f"rank {number} and rank 0 differ in {wrong} ({short(theirs.get(wrong))} and "
                    f"{short(self.facts[wrong])}): make them the same"
                )
            connection.send_bytes(json.dumps(problem).encode())
        if problem:
            raise BackendError(problem)
        return number


def short(value: object) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."


def listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=1024)
    except OSError as error:
        raise BackendError(
            f"port {port} of {host} cannot be used ({error.strerror or error}): choose others with "
            "LOCKSTEP_PORT, which counts two, or with torchrun's --master-port"
        ) from error


def serve_rank(launched: Launched, name: str, arguments: Sequence[str]) -> NoReturn:
    """Be a rank: connect to the leader, and do what it says until it ends.

    Raises:
        BackendError: if the leader does not answer, or refuses this process.
    """
    link = connected(launched)
    try:
        with handshake(link, PATIENCE) as connection:
            answer_challenge(connection, launched.key)
            deliver_challenge(connection, launched.key)
            hello = {"rank": launched.number, "facts": facts(launched, name, arguments)}
            connection.send_bytes(json.dumps(hello).encode())
            problem = json.loads(connection.recv_bytes(MAX_MESSAGE))
    except (OSError, EOFError, AuthenticationError, ValueError) as error:
        raise BackendError(
            f"rank {launched.number}: {launched.address} does not answer as rank 0 "
            f"({type(error).__name__}): use the same LOCKSTEP_KEY and port, and see rank 0's output"
        ) from error
    if problem:
        link.close()
        raise BackendError(str(problem))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    serve(link.makefile("rb"), link.makefile("wb"), lambda: os._exit(2))


@contextlib.contextmanager
def handshake(link: socket.socket, seconds: int) -> Iterator[Connection]:
    """The messages before the first command; each may take so many seconds."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # the other machine may be gone
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))
    with Connection(os.dup(link.fileno())) as connection:
        yield connection
    link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))


def connected(launched: Launched) -> socket.socket:
    """A connection to the leader, which may start later."""
    until = time.monotonic() + JOIN
    while True:
        try:
            return socket.create_connection((launched.host, launched.port), timeout=ANSWER)
        except OSError as error:
            if time.monotonic() > until:
                raise BackendError(
                    f"rank {launched.number}: {launched.address}, where rank 0 should listen, does "
                    f"not answer ({error.strerror or error}): check MASTER_ADDR, and whether the "
                    "network lets this port through"
                ) from error
            time.sleep(0.5)
