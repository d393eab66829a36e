"""Evidence that other processes make: the same rows, in the same order, whoever makes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lockstep.common.api.cli import PACKAGE
from lockstep.common.cli.evidence import EvidenceCommand, run_piece
from lockstep.common.cli.parser import Invocation, parse
from lockstep.common.errors import ConfigError, DataError
from lockstep.common.system import executors
from lockstep.common.system.interrupt import SignalHandler

ROOT = Path(__file__).resolve().parents[2]
ITEMS = [*range(24)]


def squares(command: EvidenceCommand, items: Sequence[int]) -> Iterator[int]:
    """Takes long enough that a worker can be killed in the middle."""
    for item in items:
        time.sleep(0.25 if command.options.cluster else 0.0)
        yield item * item


def evidence(folder: Path, *more: str) -> EvidenceCommand:
    arguments = ["grid", "--out", str(folder), *more]
    return EvidenceCommand(
        parse(arguments), Invocation(arguments, PACKAGE, SignalHandler(), sys.stdout), ""
    )


def started(*command: str) -> subprocess.Popen[str]:
    """A command of Dask in a session of its own; its workers can import this module."""
    return subprocess.Popen(
        [sys.executable, "-m", "distributed.cli." + command[0], *command[1:], "--no-dashboard"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / ".package")])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE if command[0] == "dask_scheduler" else subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def scheduler() -> Iterator[str]:
    """The address of a scheduler without workers."""
    process = started("dask_scheduler", "--host", "127.0.0.1", "--port", "0")
    assert process.stderr is not None
    with process.stderr as log:
        address = next(line for line in log if "Scheduler at:" in line).split()[-1]
        reader = threading.Thread(target=log.read, daemon=True)  # so that it never waits
        reader.start()
        yield address
        kill(process)
        reader.join()


def kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_a_worker_that_is_killed_changes_no_row(scheduler: str, tmp_path: Path) -> None:
    workers = [started("dask_worker", scheduler, "--nthreads", "1", "--no-nanny") for _ in range(2)]
    command = evidence(tmp_path, "--cluster", scheduler)
    rows = []
    try:
        for row in command.rows(squares, ITEMS, together=2):
            rows.append(row)
            if row == 9:
                kill(workers[0])
        assert workers[0].poll() == -signal.SIGKILL
    finally:
        for worker in workers:
            kill(worker)
    assert rows == [*evidence(tmp_path).rows(squares, ITEMS)]
    assert command.cost is not None and command.cost.peak_megabytes > 0


@pytest.mark.slow
def test_rows_of_local_processes_are_those_of_this_one(tmp_path: Path) -> None:
    found = evidence(tmp_path).rows(squares, ITEMS, workers=2, together=5)
    assert [*found] == [*evidence(tmp_path).rows(squares, ITEMS)] == [n * n for n in ITEMS]


def test_a_worker_with_other_data_is_refused(tmp_path: Path) -> None:
    command = evidence(tmp_path)
    with pytest.raises(DataError, match="other data called digits"):
        run_piece(command.options, PACKAGE, 1, {"digits": "another"}, with_data, [1])
    rows, _ = run_piece(command.options, PACKAGE, 1, {}, with_data, [1])
    assert rows == [1]


def with_data(command: EvidenceCommand, items: Sequence[int]) -> Iterator[int]:
    command.load("digits")
    yield from items


@pytest.mark.parametrize(
    ("address", "message"),
    [("nowhere", "missing port number"), ("tcp://127.0.0.1:9", "no Dask scheduler answers")],
)
def test_an_address_where_nothing_answers_is_refused(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "CONNECT_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=message), executors.cluster(address):
        pass


@pytest.mark.parametrize(("theirs", "refused"), [({}, False), ({"torch": "1.0"}, True)])
def test_a_worker_with_other_versions_is_refused(theirs: dict[str, str], refused: bool) -> None:
    client = cast(
        Any,
        SimpleNamespace(
            wait_for_workers=lambda *given, **options: None,
            run=lambda function: {"tcp://worker": function() | theirs},
        ),
    )
    expected = pytest.raises(ConfigError, match="the worker tcp") if refused else nullcontext()
    with expected:
        executors.check_workers(client, "tcp://here")
