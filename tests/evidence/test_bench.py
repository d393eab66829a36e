"""The measurement of speed: its plan, the order of its turns, and one short run."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lockstep import cli as compare
from lockstep.backends.benchmark import loops
from lockstep.backends.benchmark import worker as workers
from lockstep.common.evidence import bench
from lockstep.common.evidence.bench import PATHS, PRODUCTS, Plan, Row
from tests.evidence.bench_helpers import FLOPS, line_of

# --- The plan and its order


class FakeWorker:
    """Writes down who was asked what, and when it was closed."""

    def __init__(
        self, log: list[tuple[Any, ...]], path: str, size: int, images: int, cache: str | None
    ) -> None:
        self.log, self.name, self.seconds = log, (path, size, images), 1.0
        log.append(("start", *self.name, cache))

    def call(self, method: str, *arguments: Any) -> dict[str, Any]:
        self.log.append((method, *self.name))
        if method == "run":
            return {"steps": 10, "images": 40, "seconds": arguments[0]}
        if method == "describe":
            return {"memory": 1, "loader": None, "flops_per_image": FLOPS, "environment": {}}
        return {"steps": 3, "seconds": 0.1}

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *error: object) -> None:
        self.log.append(("close", *self.name))


def measured(
    plan: Plan, worker: type[FakeWorker] = FakeWorker
) -> tuple[list[Row], list[tuple[Any, ...]]]:
    log: list[tuple[Any, ...]] = []
    return bench.measure(plan, lambda *cell: worker(log, *cell)), log


TINY = Plan((4,), 1437, 4, (1000,), 0.5, 3, ("cold", "warm"), (bench.WARMUP, "warm"))


def test_all_take_turns_and_every_other_round_goes_backwards() -> None:
    asked = [entry[1] for entry in measured(TINY)[1] if entry[0] == "run"]
    there = [*PATHS, *PRODUCTS]
    fused = list(bench.FUSED)
    assert asked == [*there, *there[::-1], *there, *fused, *fused[::-1], *fused]
    assert len(asked) == TINY.turns
    assert list(bench.round_robin("ab", 1)) == ["a", "b"]


def test_a_cold_start_has_ended_before_the_warm_one_finds_what_it_compiled() -> None:
    rows, log = measured(TINY)
    cell = ("flax fused", 4, 1437)
    mine = [entry for entry in log if entry[1:4] == cell]
    start = ("start", *cell, "flax-fused-4")
    compiling, closing, kept = (
        ("compile", *cell),
        ("close", *cell),
        [("run", *cell)] * 3 + [("describe", *cell)],
    )
    assert mine == [start, compiling, closing, start, compiling, *kept, closing]
    caches = [entry[4] for entry in log if entry[0] == "start" and entry[1] not in PRODUCTS]
    assert len(set(caches)) == len(PATHS), "each compiles for itself"
    assert list(rows[0]["starts"]) == ["cold", "warm"]
    kept = measured(bench.make_plan(1437, 4, quick=True))[1]
    assert {entry[4] for entry in kept if entry[0] == "start"} == {None}, (
        "a quick one finds what this machine has"
    )
    scaling = [row for row in rows if row["table"] == "growth"]
    assert [list(row["starts"]) for row in scaling] == [["warm"]] * 2
    assert [row["path"] for row in rows] == [*PATHS, *PRODUCTS, *bench.FUSED]


def test_whatever_happens_all_workers_are_closed() -> None:
    class Stopped(FakeWorker):
        def call(self, method: str, *arguments: Any) -> dict[str, Any]:
            if method == "run" and self.name[0] == "torch":
                raise KeyboardInterrupt
            return super().call(method, *arguments)

    log: list[tuple[Any, ...]] = []
    with pytest.raises(KeyboardInterrupt):
        bench.measure(TINY, lambda *cell: Stopped(log, *cell))
    happened = Counter(entry[0] for entry in log)
    assert happened["start"] == happened["close"] > len(PATHS)


def test_the_plan_fits_the_data_and_what_was_asked_for() -> None:
    plan = bench.make_plan(50000, None, quick=False)
    assert (plan.batch_sizes, plan.scaling, plan.scaling_batch) == (
        (4, 32, 128, 512),
        (1000, 10000, 50000),
        32,
    )
    plan = bench.make_plan(1437, None, quick=False)
    assert plan.scaling == (1000, 1437)
    plan = bench.make_plan(300, None, quick=False)
    assert (plan.batch_sizes, plan.scaling) == ((4, 32, 128), (300,))
    plan = bench.make_plan(1437, 8, quick=True)
    assert (plan.batch_sizes, plan.scaling, plan.scaling_batch) == ((8,), (), 8)
    assert plan.turns * plan.seconds < 10


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("Intel(R) Xeon(R) Processor, 2 cores", "intel-xeon-processor-2-cores"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("../../etc", "etc"),
        ("()", "unknown"),
    ],
)
def test_a_processors_name_becomes_that_of_a_folder(name: str, folder: str) -> None:
    assert bench.slug(name) == folder


# --- The command

SHORT = ["bench", "--quick", "--data", "digits", "--device", "cpu"]


def lockstep(*arguments: str | Path) -> int:
    try:
        return compare.main([str(argument) for argument in arguments])
    except SystemExit as error:  # argparse
        assert isinstance(error.code, int)
        return error.code


@pytest.mark.slow
def test_the_command_measures_every_loop_and_reports_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lockstep(*SHORT, "--batch-size", "4", "--json", "--out", tmp_path) == 0
    printed = capfd.readouterr()
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(printed.out) == report
    assert (report["dtype"], report["device"]) == ("float32", "cpu")
    assert [row["path"] for row in report["rows"]] == [*PATHS, *PRODUCTS]
    for row in report["rows"]:
        assert len(row["runs"]) == 3
        assert all(run["steps"] > 0 and run["seconds"] > 0 for run in row["runs"])
        assert row["facts"]["memory"] > 50e6
    assert report["rows"][0]["facts"]["loader"]["processes"] == 2
    for line in report["summary"]:
        assert line["flops_per_image"] == FLOPS
        assert line["images_per_second"]["median"] > 0
        assert all(found["first_step"] > 0 for found in line["starts"].values())
    assert line_of(report["summary"], "tutorial")["to_tutorial"]["median"] == 1
    assert 0 < line_of(report["summary"], "flax fused")["arithmetic"]["median"] < 1
    assert line_of(report["summary"], "flax fused")["starts"]["kept"]["compile"] > 0
    assert (tmp_path / "bench.png").exists() and (tmp_path / "bench.svg").exists()
    assert "as multiples of the tutorial's loop: at batch 4 torch fused" in printed.err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--steps", "5"], "--steps"),
        (["--backend", "torch"], "--backend"),
        (["--compile", "on"], "--compile"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "1438"], "1437"),
        (["--seed", "-1"], "--seed"),
        (["--dtype", "int8"], "float64"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else None,
)
def test_wrong_options_give_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], word: str
) -> None:
    assert lockstep(*SHORT, "--out", tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and word in error, error
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_dies_gives_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(job: loops.BenchmarkJob, cache: str | None) -> workers.Worker:
        worker = workers.Worker(job.path, {}, functools.partial, os.getpid)
        os.kill(worker.call("__call__"), signal.SIGKILL)
        return worker

    monkeypatch.setattr(workers, "start", dying)
    assert lockstep(*SHORT, "--batch-size", "4", "--quiet", "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: tutorial cannot be measured here (its process was ended by signal 9): "
    ), error
    assert error.count("\n") == 1 and "--batch-size" in error
    assert list(tmp_path.iterdir()) == []
