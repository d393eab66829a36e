"""Where pieces of evidence are computed: in local processes, or by the workers of a Dask scheduler.

A piece is a call of a function of a module with plain arguments; its result does not depend on who
computes it, or when: each process computes one piece at a time.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import multiprocessing
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lockstep.common.config import BACKENDS
from lockstep.common.errors import BackendError, ConfigError, reason
from lockstep.common.system import environment

if TYPE_CHECKING:
    from distributed import Client

CONNECT_SECONDS = 10  # for the scheduler to answer
JOIN_SECONDS = 60  # for a first worker to join it
RETRIES = 3  # of a piece whose worker failed; the scheduler repeats those of a worker that died
PACKAGES = ("torch", "jax", "flax", "optax", "numpy")
ONE_AT_A_TIME = threading.Lock()  # threads of a process share the frameworks' settings


@contextlib.contextmanager
def local(workers: int) -> Iterator[Executor]:
    """New processes of this machine."""
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield pool


@contextlib.contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """The workers of the Dask scheduler at `address`, such as tcp://10.0.0.1:8786.

    Raises:
        ConfigError: if Dask is not installed, nothing answers there, no worker joins, or a worker
            has other versions or another Lockstep.
    """
    try:
        from distributed import CancelledError, Client, KilledWorker
        from distributed.comm.core import CommClosedError
    except ImportError:
        raise ConfigError("--cluster needs Dask: pip install 'lockstep[cluster]'") from None
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"--cluster {address}: no Dask scheduler answers there ({reason(error)}): start one with "
            "dask scheduler, and give its address"
        ) from None
    with client:
        check_workers(client, address)
        try:
            yield client.get_executor(retries=RETRIES)
        except (KilledWorker, CommClosedError, CancelledError) as error:
            raise BackendError(
                f"--cluster {address}: the work was lost ({reason(error)}): see what the scheduler "
                "and its workers printed, then call the command again"
            ) from error


def check_workers(client: Client, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=JOIN_SECONDS)
        found = cast(dict[str, dict[str, str]], client.run(facts))
    except (OSError, ImportError, AttributeError) as error:
        raise ConfigError(
            f"--cluster {address}: no worker there can compute ({reason(error)}): start one where "
            f"Lockstep is installed, with dask worker {address}"
        ) from None
    for worker, theirs in found.items():
        for name, here in facts().items():
            if theirs.get(name) != here:
                raise ConfigError(
                    f"--cluster {address}: the worker {worker} has {name} {theirs.get(name)}, and "
                    f"this machine {here}: install the same there"
                )


def facts() -> dict[str, str]:
    """What must be the same on every worker: versions, and the code that runs depend on."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    sources = {f"the code of {name}": environment.source_digest(name)[:12] for name in BACKENDS}
    return versions | sources


def alone(function: Callable[..., Any], *arguments: object) -> Any:
    """Call the function when nothing else that was called so computes in this process."""
    with ONE_AT_A_TIME:
        return function(*arguments)


class Cost(NamedTuple):
    """What pieces took, all workers together."""

    cpu_seconds: float
    peak_megabytes: int  # the most that one process held

    def and_of(self, other: Cost) -> Cost:
        seconds = self.cpu_seconds + other.cpu_seconds
        return Cost(seconds, max(self.peak_megabytes, other.peak_megabytes))

    @classmethod
    def since(cls, cpu_seconds: float) -> Cost:
        """This process's, since it had used so much processor time."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
        return cls(time.process_time() - cpu_seconds, peak // unit)
