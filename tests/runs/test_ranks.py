"""One run by several processes: what the leader records, and what becomes of a rank that fails."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lockstep.common.config import Config
from lockstep.common.errors import DataError, LockstepError, RankFailed
from lockstep.common.protocol import Arrays, Backend, Metrics, Rank, Snapshot
from lockstep.common.runs import checkpoint, rank_group, record, training
from lockstep.common.runs.checkpoint import CheckpointManager
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.ranks import Kept, Ranks
from lockstep.common.runs.record import Record
from lockstep.common.system.interrupt import SignalHandler
from lockstep.common.system.process import WorkerProcess
from lockstep.common.verdict.compare import compare
from tests.conftest import SilentObserver
from tests.marks import slow_except
from tests.runs.test_training import Notebook, State, dataset

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are others here")
CONFIG = Config(steps=40, batch_size=2, momentum=0.9)
IMAGES = 10
FAULT_STEP = 5  # the step in which a rank fails


class RankedNotebook(Notebook):
    """In each rank: a Notebook that resumes, and does something wrong."""

    def __init__(self, dtype: str, rank: Rank | None, fault: str) -> None:
        super().__init__(dtype)
        self.rank, self.fault = rank, fault

    def init(self, snapshot: Snapshot) -> State:
        step = np.asarray(snapshot.step, self.dtype)
        start = {name: array - step for name, array in snapshot.parameters.items()}
        if self.fault == "weights" and self.rank is not None and self.rank.number == 1:
            start["fc1.bias"] = start["fc1.bias"] + np.asarray(0.5, self.dtype)
        return State(start, snapshot.step)

    def export(self, state: State) -> Snapshot:
        found = super().export(state)
        if self.fault == "drift" and state.step > 1 and self.rank is not None:
            found.parameters["fc1.kernel"][1, 1] += 0.25 * self.rank.number
        return found._replace(schedule={"lr": 0.25} if state.step else {})

    def last_gradients(self, state: State) -> Arrays:
        wrong = self.fault == "gradients" and state.step == 1
        return {"fc1.bias": np.full(2, self.rank.number if wrong and self.rank else 0)}

    def train_steps(
        self, state: State, images: np.ndarray, labels: np.ndarray
    ) -> tuple[State, Metrics]:
        if state.step + len(images) > FAULT_STEP and self.rank is not None:
            self.fail(self.rank.number)
        return super().train_steps(state, images, labels)

    def fail(self, rank: int) -> None:
        if self.fault in ("killed", "stopped", "out of memory") and rank != 1:
            time.sleep(60)  # in a collective, for the rank that fails
        if self.fault == "killed after its answer":
            if rank != 1:  # which cannot do without the other
                time.sleep(1)
                os.abort()
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        if self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.fault == "out of memory":
            raise MemoryError("cannot allocate 3 GB")
        if self.fault == "refused":
            raise DataError("no data: get some")
        if self.fault == "terminated" and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2.5)  # until the leader knows


def build(
    fault: str, name: str, dtype: str, concurrent_processes: int = 1, rank: Rank | None = None
) -> Backend:
    del name, concurrent_processes
    return RankedNotebook(dtype, rank, fault)


def started(fault: str = "", count: int = 2) -> Ranks:
    return Ranks(functools.partial(build, fault), count, "resume with: compare")


def run(
    group: Ranks, folder: Path | None = None, start: Path | None = None, signals: bool = False
) -> Record:
    checkpoints = None
    with SignalHandler(announce=False) as handler, handler.deferred():
        if folder is not None:
            checkpoints = CheckpointManager(folder, 0, handler if signals else None)
        return training.train(
            group.build("torch", "float64"),
            CONFIG.resolve(IMAGES),
            dataset(IMAGES),
            "float64",
            SilentObserver(),
            checkpoints=checkpoints,
            start=None if start is None else checkpoint.read(start),
        )


def numbers(found: Record) -> dict[str, object]:
    """All that does not depend on how long it took, or on who did it."""
    arrays: Arrays = {name: getattr(found, name) for name in record.SERIES}
    for group in record.ARRAY_GROUPS:
        arrays |= {f"{group}/{name}": array for name, array in getattr(found, group).items()}
    plain: dict[str, object] = {name: array.tobytes() for name, array in arrays.items()}
    return plain | {"layers": found.layers, "differences": found.rank_differences}


def ended(group: Ranks) -> bool:
    """Whether no process of the ranks is left."""
    workers = [caller.worker for each in group.groups.values() for caller in each.callers]
    pids = [worker.pid for worker in workers if isinstance(worker, WorkerProcess)]
    return len(pids) == len(workers) and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_record_is_that_of_one_process(tmp_path: Path) -> None:
    with started(count=1) as alone, started() as both:
        one, two = run(alone), run(both)
        again = run(both)  # by the same processes
    assert numbers(one) == numbers(two) == numbers(again)
    assert (one.processes, two.processes) == (1, 2)
    assert ended(both)
    record.write(two, tmp_path)
    assert record.read(tmp_path / "torch-float64.safetensors").processes == 2


@pytest.mark.parametrize(
    ("fault", "step", "stage", "tensor", "gap"),
    slow_except(
        [
            ("weights", 0, "weights", "fc1.bias", 0.5),
            ("drift", 1, "update", "fc1.kernel", 0.25),
            ("gradients", 0, "backward", "fc1.bias", 1.0),
        ],
        "drift",
        "gradients",
    ),
)
def test_a_rank_with_another_state_is_named(
    fault: str, step: int, stage: str, tensor: str, gap: float, tmp_path: Path
) -> None:
    with started(fault, 3) as group:
        found = run(group)
    first = found.rank_differences[0]
    recorded = f"gradient of {tensor}" if stage == "backward" else tensor
    assert (first["rank"], first["tensor"], first["gap"]) == (1, recorded, gap)
    assert {each["rank"] for each in found.rank_differences} == (
        {1} if stage == "weights" else {1, 2}
    )
    record.write(found, tmp_path)
    assert record.read(tmp_path / "torch-float64.safetensors").rank_differences
    alone = compare({"torch": Ensemble(found)}, np.zeros(7, np.int64))
    assert alone.verdict == "disagree" and alone.first_divergence is not None
    place = alone.first_divergence
    assert (place.step, place.stage) == (step, stage)
    assert place.message == (
        f"{stage}: step {step}: {tensor}, rank 1 of PyTorch: gap {gap:.1e} > 0.0e+00"
    )
    assert alone.location is not None and alone.location.causes


@pytest.mark.parametrize(
    ("fault", "message"),
    slow_except(
        [
            (
                "killed",
                r"rank 1 of 2 of PyTorch was ended by signal 9 \(SIGKILL; .*\): resume with",
            ),
            (
                "killed after its answer",
                r"rank 1 of 2 of PyTorch was ended by signal 9 \(SIGKILL; .*\): resume with",
            ),
            ("stopped", r"rank 1 of 2 of PyTorch has not answered for 2 s .*: resume with"),
            (
                "out of memory",
                r"rank 1 of 2 of PyTorch failed \(MemoryError: .* 3 GB\): resume with",
            ),
        ],
        "killed",
    ),
)
def test_a_rank_that_fails_is_named_and_the_run_goes_on_from_a_checkpoint(
    fault: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SNAPSHOT_SECONDS", 0.0)
    monkeypatch.setattr(rank_group, "SILENCE", 2)
    with started(fault) as group:
        with pytest.raises(RankFailed, match=message):
            run(group, tmp_path)
        assert ended(group), "none is left in a collective"
    [path, *_] = checkpoint.found(tmp_path, "torch-float64")
    assert checkpoint.read(path).step >= 2
    with started(count=1) as alone:
        expected = numbers(run(alone))
    for count in (2, 1) if fault == "killed" else ():  # whoever goes on
        with started(count=count) as others:
            assert numbers(run(others, start=path)) == expected


@pytest.mark.slow
def test_an_error_of_the_user_is_passed_on() -> None:
    with started("refused") as group, pytest.raises(LockstepError, match=r"^no data: get some$"):
        run(group)
    assert ended(group)


@pytest.mark.slow
def test_a_signal_to_a_rank_stops_the_run(tmp_path: Path) -> None:
    with started("terminated") as group, pytest.raises(KeyboardInterrupt):
        run(group, tmp_path, signals=True)
    assert checkpoint.found(tmp_path, "torch-float64")
    assert ended(group)


def test_what_is_not_wanted_any_more_is_forgotten() -> None:
    with started() as group:
        backend = group.build("torch", "float64")
        state: Kept = backend.init(Snapshot.start({"fc1.bias": np.zeros(2)}))
        number = state.number
        images = backend.upload(np.zeros((4, 32, 32, 3), np.uint8), np.arange(4))
        batches = backend.batches(images, np.array([[0, 1], [2, 3]]))
        assert batches[1][1].shape == (2,)
        assert backend.download(*batches)[1][1].tolist() == [2, 3]
        worker = group.groups["torch"]
        assert number not in worker.unwanted()
        del state
        assert worker.unwanted() == {number}
