"""Ranks that torchrun starts: they find their leader, or say in one line why not."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest

from lockstep.common.errors import BackendError, ConfigError
from lockstep.common.runs import launched
from lockstep.common.runs.launched import Launched, Leader
from lockstep.common.runs.rank_group import free_port
from lockstep.common.runs.ranks import Ranks
from tests.runs.test_ranks import build, numbers, run, started

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are others here")
OPTIONS = ["--backend", "torch"]
RANK = """
import sys
from lockstep.common.errors import LockstepError
from lockstep.common.runs.launched import Launched, serve_rank
try:
    serve_rank(Launched.read(), "torch", sys.argv[1:])
except LockstepError as error:
    sys.exit(f"error: {error}")
"""


def variables(port: int, rank: int = 0, count: int = 2) -> dict[str, str]:
    """As torchrun sets them."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def process_of_rank(port: int, *options: str, **more: str) -> subprocess.Popen[str]:
    environment = os.environ | variables(port, rank=1) | more
    command = [sys.executable, "-c", RANK, *(options or OPTIONS)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def leader(port: int) -> Leader:
    found = Launched.read(variables(port))
    assert found is not None
    return Leader(found, "torch", OPTIONS)


def test_a_rank_connects_and_the_run_is_that_of_processes_started_here() -> None:
    port = free_port()
    start = leader(port)
    with process_of_rank(port) as rank:
        with Ranks(functools.partial(build, ""), 2, "resume", start) as group:
            found = run(group)
        assert rank.wait(20) == 0
    with started() as here:
        assert numbers(found) == numbers(run(here))


@pytest.mark.parametrize(
    ("options", "more", "line"),
    [
        (["--lr", "1"], {}, r"rank 1 and rank 0 differ in options \(--lr 1 and --backend torch\)"),
        (OPTIONS, {"TORCHELASTIC_RESTART_COUNT": "1"}, r"differ in restarts \(1 and 0\)"),
    ],
)
def test_a_rank_that_is_not_of_this_run_is_refused(
    options: list[str], more: dict[str, str], line: str
) -> None:
    port = free_port()
    start = leader(port)
    with process_of_rank(port, *options, **more) as rank:
        with pytest.raises(BackendError, match=line):
            start("torch", 2)
        _, said = rank.communicate(timeout=20)
    assert rank.returncode == 1 and said.count("\n") == 1 and "differ in" in said


def test_one_that_does_not_come_and_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "JOIN", 0.2)
    port = free_port()
    start = leader(port)
    with pytest.raises(
        BackendError, match=rf"port {port + 1} of 127.0.0.1 cannot be used .*in use"
    ):
        leader(port)
    with process_of_rank(port, LOCKSTEP_KEY="another") as rank:
        with pytest.raises(BackendError, match=r"^rank 1 did not connect to 127.0.0.1:"):
            start("torch", 2)
        rank.kill()
    start.server.close()
    alone = Launched.read(variables(port, rank=1))
    assert alone is not None
    with pytest.raises(BackendError, match="where rank 0 should listen, does not answer"):
        launched.connected(alone)


def test_what_torchrun_does_not_set_is_refused_or_nothing() -> None:
    assert Launched.read({"RANK": "0"}) is None
    assert Launched.read(variables(29500, count=1)) is None
    with pytest.raises(ConfigError, match="RANK, WORLD_SIZE"):
        Launched.read(variables(29500, rank=2))
