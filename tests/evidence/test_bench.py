"""The speed evidence: its arithmetic on made timings, its order, the loops it compares with, and
one short run."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep import backends
from lockstep import cli as compare
from lockstep.backends.benchmark import loops, tutorial
from lockstep.backends.benchmark import worker as workers
from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.errors import BackendError
from lockstep.common.evidence import bench
from lockstep.common.evidence.bench import PATHS, PRODUCT_FLOPS, PRODUCTS, Plan
from lockstep.common.evidence.plots import SPEEDS, draw_bench
from lockstep.common.report import Terminal
from lockstep.common.runs import chunks as chunking

NET = {
    "conv1.kernel": (5, 5, 3, 6),
    "conv1.bias": (6,),
    "conv2.kernel": (5, 5, 6, 16),
    "conv2.bias": (16,),
    "fc1.kernel": (400, 120),
    "fc1.bias": (120,),
    "fc2.kernel": (120, 84),
    "fc2.bias": (84,),
    "fc3.kernel": (84, 10),
    "fc3.bias": (10,),
}
FLOPS = 3_204_720  # by hand, in the test below


# --- The arithmetic


def test_the_operations_of_one_image_are_those_counted_by_hand() -> None:
    conv1 = 28 * 28 * 6 * (5 * 5 * 3)  # outputs, terms of each
    conv2 = 10 * 10 * 16 * (5 * 5 * 6)
    dense = 400 * 120 + 120 * 84 + 84 * 10
    forward, weights, inputs = conv1 + conv2 + dense, conv1 + conv2 + dense, conv2 + dense
    assert (conv1, conv2, dense) == (352_800, 240_000, 58_920)
    assert bench.flops_per_image(NET) == 2 * (forward + weights + inputs) == FLOPS
    assert bench.flops_per_image(NET | {"fc3.kernel": (84, 11)}) == FLOPS + 6 * 84, (
        "another class, another column"
    )


def test_both_backends_have_the_network_whose_operations_are_counted(
    name: str, build: Callable
) -> None:
    assert bench.flops_per_image(build(name, Config(), "float32", "off").shapes()) == FLOPS


SPEED = {
    "tutorial": 1000.0,
    "eager": 2000.0,
    "torch": 2500.0,
    "torch fused": 4000.0,
    "flax": 5000.0,
    "flax fused": 8000.0,
}
PRODUCT = {"torch product": 5.0, "flax product": 10.0}  # per second
SLOWED = (1.0, 0.5, 1.0, 0.25, 1.25)  # what the machine gives, turn by turn


def made_row(path: str, rates: Sequence[float], **other: Any) -> dict[str, Any]:
    """A row of `measure`: turns of two seconds in which so many images a second were trained on, 4
    to a step."""
    product = path in PRODUCTS
    steps, images = (1, 0) if product else (1 / 4, 1)
    runs = [
        {"steps": 2 * rate * steps, "images": 2 * rate * images, "seconds": 2.0} for rate in rates
    ]
    opening = {"steps": 252, "seconds": 3.0}
    starts = {} if product else {"cold": {"first_step": 7.0, "opening": opening}}
    loader = {"processes": 2, "memory": 300e6} if path == "tutorial" else None
    facts = {
        "memory": 500e6,
        "loader": loader,
        "flops_per_image": FLOPS if path == "torch" else None,
    }
    row = {
        "table": "speed",
        "path": path,
        "batch_size": 4,
        "images": 50000,
        "starts": starts,
        "runs": runs,
    }
    return row | {"facts": facts} | other


def made_rows(slowed: Sequence[float] = SLOWED) -> list[dict[str, Any]]:
    """Both tables at one batch size, on a machine that slows down all alike."""
    rows = [
        made_row(path, [rate * share for share in slowed])
        for path, rate in (SPEED | PRODUCT).items()
    ]
    growth = {"table": "growth", "images": 1000}
    return rows + [
        made_row(path, [SPEED[path] * share for share in slowed], **growth) for path in bench.FUSED
    ]


def line_of(lines: list[dict[str, Any]], path: str, table: str = "speed") -> dict[str, Any]:
    [line] = [line for line in lines if (line["path"], line["table"]) == (path, table)]
    return line


def test_the_median_and_the_quartiles_are_those_of_the_turns() -> None:
    line = line_of(bench.summary(made_rows()), "torch fused")
    assert line["images_per_second"] == {
        "median": 4000.0,
        "low": 2000.0,
        "high": 4000.0,
    }  # 1000 2000 4000 4000 5000
    assert line["steps_per_second"] == {"median": 1000.0, "low": 500.0, "high": 1000.0}
    assert (
        line_of(bench.summary(made_rows([1.0])), "torch fused")["images_per_second"]["high"]
        == 4000.0
    )


def test_a_machine_that_slows_all_down_changes_no_ratio() -> None:
    for slowed in (SLOWED, [1.0] * 5):
        lines = bench.summary(made_rows(slowed))
        for path, rate in SPEED.items():
            for reference in ("tutorial", "eager"):
                ratio = line_of(lines, path)[f"to_{reference}"]
                assert ratio == pytest.approx(
                    dict.fromkeys(("median", "low", "high"), rate / SPEED[reference])
                )


def test_a_loop_that_alone_is_slowed_down_changes_its_ratios() -> None:
    rows = made_rows()
    rows[0] = made_row("tutorial", [SPEED["tutorial"]] * 5)
    ratio = line_of(bench.summary(rows), "flax fused")["to_tutorial"]
    assert ratio == {"median": 8.0, "low": 4.0, "high": 8.0}


def test_the_share_of_the_arithmetic_is_taken_of_the_same_frameworks_products() -> None:
    lines = bench.summary(made_rows())
    assert PRODUCT_FLOPS == 17_179_869_184
    assert line_of(lines, "torch fused")["gflops"] == pytest.approx(5 * 17.179869184)
    share = line_of(lines, "torch fused")["arithmetic"]
    assert share == pytest.approx(dict.fromkeys(share, 4000 * FLOPS / (5 * PRODUCT_FLOPS)))
    assert line_of(lines, "flax fused")["arithmetic"] == pytest.approx(share), (
        "twice the speed, twice the limit"
    )
    assert line_of(lines, "flax fused", "growth")["arithmetic"] is None


def test_compilation_is_what_the_opening_took_longer_than_its_steps_do() -> None:
    lines = bench.summary(made_rows())
    assert line_of(lines, "torch fused")["starts"]["cold"] == pytest.approx(
        {"first_step": 7.0, "compile": 3 - 0.252}
    )
    assert line_of(lines, "torch")["starts"]["cold"] == {"first_step": 7.0, "compile": None}, (
        "it compiles nothing"
    )
    at_once = made_rows()
    at_once[3]["starts"]["cold"]["opening"]["seconds"] = 0.2
    assert line_of(bench.summary(at_once), "torch fused")["starts"]["cold"]["compile"] == 0.0


@pytest.mark.parametrize(
    ("table", "row"),
    [
        (bench.speed_table, "4 flax fused 2,000 8,000 50 % 8.00x 4.00x 14.9 %"),
        (bench.start_table, "4 tutorial 7.0 s - 7.0 s - 500 + 2x300"),
        (bench.growth_table, "1,000 flax fused 4 2,000 7.0 s 7.0 s 500"),
    ],
    ids=["speed", "start", "growth"],
)
def test_tables_hold_what_was_measured_and_are_no_wider_than_a_page(
    table: Callable[..., bench.Table], row: str
) -> None:
    rows = made_rows()
    for made in rows:
        if made["starts"]:
            made["starts"]["warm"] = made["starts"]["cold"]
    output = io.StringIO()
    columns, lines = table(bench.summary(rows))
    Terminal(stdout=output).table(columns, lines)
    shown = [" ".join(line.split()) for line in output.getvalue().splitlines()]
    assert row in shown
    assert len(shown) == len(lines) + 3, "no cell takes a second line"


def test_the_sentence_has_the_ratios_of_the_fused_loops() -> None:
    said = bench.sentence(bench.summary(made_rows()))
    assert said.endswith("at batch 4 torch fused 4.00x and flax fused 8.00x.")


def test_the_picture_has_a_line_for_each_loop(tmp_path: Path) -> None:
    lines = bench.summary(made_rows())
    assert set(SPEEDS) == set(PATHS)
    draw_bench(lines, "a machine, 2 cores", tmp_path / "bench.png")
    first = (tmp_path / "bench.svg").read_bytes()
    drawn = first.decode()
    assert all(title in drawn for title in PATHS.values()) and "a machine, 2 cores" in drawn
    assert "172 GFLOP/s" in drawn
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    draw_bench(lines, "a machine, 2 cores", tmp_path / "bench.png")
    assert (tmp_path / "bench.svg").read_bytes() == first


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


# --- The plan and its order


class FakeWorker:
    """Writes down who was asked what, and when it was closed."""

    def __init__(
        self, log: list[tuple[Any, ...]], path: str, size: int, images: int, cache: str | None
    ) -> None:
        self.log, self.name, self.seconds = log, (path, size, images), 1.0
        log.append(("start", *self.name, cache))

    def ask(self, method: str, *arguments: Any) -> dict[str, Any]:
        self.log.append((method, *self.name))
        if method == "run":
            return {"steps": 10, "images": 40, "seconds": arguments[0]}
        if method == "facts":
            return {"memory": 1, "loader": None, "flops_per_image": FLOPS, "environment": {}}
        return {"steps": 3, "seconds": 0.1}

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *error: object) -> None:
        self.log.append(("close", *self.name))


def measured(
    plan: Plan, worker: type[FakeWorker] = FakeWorker
) -> tuple[list[dict[str, Any]], list[tuple[Any, ...]]]:
    log: list[tuple[Any, ...]] = []
    return bench.measure(plan, lambda *cell: worker(log, *cell)), log


TINY = Plan((4,), 1437, 4, (1000,), 0.5, 3, ("cold", "warm"), (bench.UNCOUNTED, "warm"))


def test_all_take_turns_and_every_other_round_goes_backwards() -> None:
    asked = [entry[1] for entry in measured(TINY)[1] if entry[0] == "run"]
    there = [*PATHS, *PRODUCTS]
    growth = list(bench.FUSED)
    assert asked == [*there, *there[::-1], *there, *growth, *growth[::-1], *growth]
    assert len(asked) == TINY.turns
    assert list(bench.round_robin("ab", 1)) == ["a", "b"]


def test_a_cold_start_has_ended_before_the_warm_one_finds_what_it_compiled() -> None:
    rows, log = measured(TINY)
    cell = ("flax fused", 4, 1437)
    mine = [entry for entry in log if entry[1:4] == cell]
    start = ("start", *cell, "flax-fused-4")
    opening, closing, kept = (
        ("opening", *cell),
        ("close", *cell),
        [("run", *cell)] * 3 + [("facts", *cell)],
    )
    assert mine == [start, opening, closing, start, opening, *kept, closing]
    caches = [entry[4] for entry in log if entry[0] == "start" and entry[1] not in PRODUCTS]
    assert len(set(caches)) == len(PATHS), "each compiles for itself"
    assert list(rows[0]["starts"]) == ["cold", "warm"]
    kept = measured(bench.make_plan(1437, 4, quick=True))[1]
    assert {entry[4] for entry in kept if entry[0] == "start"} == {None}, (
        "a quick one finds what this machine has"
    )
    growth = [row for row in rows if row["table"] == "growth"]
    assert [list(row["starts"]) for row in growth] == [["warm"]] * 2
    assert [row["path"] for row in rows] == [*PATHS, *PRODUCTS, *bench.FUSED]


def test_whatever_happens_all_workers_are_closed() -> None:
    class Stopped(FakeWorker):
        def ask(self, method: str, *arguments: Any) -> dict[str, Any]:
            if method == "run" and self.name[0] == "torch":
                raise KeyboardInterrupt
            return super().ask(method, *arguments)

    log: list[tuple[Any, ...]] = []
    with pytest.raises(KeyboardInterrupt):
        bench.measure(TINY, lambda *cell: Stopped(log, *cell))
    happened = Counter(entry[0] for entry in log)
    assert happened["start"] == happened["close"] > len(PATHS)


def test_the_plan_fits_the_data_and_what_was_asked_for() -> None:
    plan = bench.make_plan(50000, None, quick=False)
    assert (plan.batch_sizes, plan.growth, plan.growth_batch) == (
        (4, 32, 128, 512),
        (1000, 10000, 50000),
        32,
    )
    plan = bench.make_plan(1437, None, quick=False)
    assert plan.growth == (1000, 1437)
    plan = bench.make_plan(300, None, quick=False)
    assert (plan.batch_sizes, plan.growth) == ((4, 32, 128), (300,))
    plan = bench.make_plan(1437, 8, quick=True)
    assert (plan.batch_sizes, plan.growth, plan.growth_batch) == ((8,), (), 8)
    assert plan.turns * plan.seconds < 10


# --- The loops


def plain_losses(net: torch.nn.Module, dataset: Dataset, lr: float) -> list[float]:
    """Of three steps on all of the first images, without anything of the project's."""
    images = (
        torch.from_numpy((dataset.train_images[:IMAGES] / 255 - 0.5) / 0.5)
        .float()
        .permute(0, 3, 1, 2)
    )
    labels = torch.from_numpy(dataset.train_labels[:IMAGES])
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


IMAGES = 48  # all in one batch, so that their order does not matter


@pytest.mark.parametrize("kind", ["tutorial", "eager"])
def test_the_loops_compared_with_train_as_torch_does(kind: str, digits: Dataset) -> None:
    torch.manual_seed(0)
    given = (digits.train_images[:IMAGES], digits.train_labels[:IMAGES], 10, IMAGES)
    loop = tutorial.Tutorial(*given, workers=0) if kind == "tutorial" else tutorial.Eager(*given)
    same, other = (copy.deepcopy(loop.net) for _ in range(2))
    losses = []
    for done in itertools.islice(loop.calls(), 3):
        assert done == loops.Done(steps=1, images=IMAGES)
        losses.append(loop.loss.item())
    assert losses == pytest.approx(plain_losses(same, digits, 0.001), rel=1e-5)
    assert losses != pytest.approx(plain_losses(other, digits, 0.002), rel=1e-5)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_loops_compared_with_stay_in_the_precision_that_is_asked_for(
    dtype: str, digits: Dataset
) -> None:
    given = (digits.train_images[:8], digits.train_labels[:8], 10, 4, dtype)
    for loop in (tutorial.Tutorial(*given, workers=0), tutorial.Eager(*given)):
        assert [done.images for done in itertools.islice(loop.calls(), 3)] == [4, 4, 4]
        assert loop.loss.dtype == getattr(torch, dtype)


def test_an_epoch_of_the_loops_ends_with_a_smaller_batch_as_the_tutorials_does(
    digits: Dataset,
) -> None:
    given = (digits.train_images[:10], digits.train_labels[:10], 10, 4)
    for loop in (tutorial.Tutorial(*given, workers=0), tutorial.Eager(*given)):
        assert [done.images for done in itertools.islice(loop.calls(), 4)] == [4, 4, 2, 4]


@pytest.fixture
def job(digits: Dataset, tmp_path: Path) -> loops.Job:
    loops.write_images(digits.train_images, digits.train_labels, tmp_path)
    return loops.Job("eager", 16, 100, 10, "float32", "cpu", seed=3, folder=tmp_path)


def test_a_worker_reads_the_first_images(job: loops.Job, digits: Dataset) -> None:
    images, labels = loops.read_images(job)
    assert np.array_equal(images, digits.train_images[:100]) and np.array_equal(
        labels, digits.train_labels[:100]
    )


def test_fused_and_single_steps_are_the_same_training(
    job: loops.Job, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `train` has it: two chunks of one step, then long ones. What is compiled in PyTorch has
    tests of its own."""
    cls: Any = backends.load(name)
    monkeypatch.setattr(backends, "load", lambda name: lambda *given: cls(*given[:-1], "off"))
    losses = []
    for path in (name, f"{name} fused"):
        loop = loops.make_loop(dataclasses.replace(job, path=path, batch_size=4, dtype="float64"))
        assert isinstance(loop, loops.Training)
        done = [*itertools.islice(loop.calls(), loop.opening)]
        *opening, steps = (call.steps for call in done)
        assert opening == [1, 1] and 50 < steps <= chunking.CHUNK_STEPS
        assert [call.images for call in done] == [4, 4, 4 * steps]
        losses.append(loop.losses)
        assert loop.losses.shape == (steps,)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][0] != losses[0][1]


def test_the_stopwatch_counts_whole_calls_for_at_least_so_long(job: loops.Job) -> None:
    watch = loops.Stopwatch(job)
    assert watch.opening()["steps"] == 1
    found = watch.run(0.05)
    assert found["seconds"] >= 0.05 and found["steps"] > 1
    assert 4 * found["images"] == pytest.approx(4 * 16 * found["steps"], rel=0.2), (
        "epochs end with a batch of 4"
    )
    facts = watch.facts()
    assert facts["loader"] is None and facts["flops_per_image"] is None
    assert facts["memory"] > 50e6


@pytest.mark.parametrize("path", PRODUCTS)
def test_a_product_is_one_of_two_large_matrices(
    path: str, job: loops.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loops.SIZE == bench.PRODUCT_SIZE
    monkeypatch.setattr(loops, "SIZE", 8)
    loop = loops.make_loop(dataclasses.replace(job, path=path, dtype="float64"))
    assert isinstance(loop, loops.TorchProduct | loops.FlaxProduct)
    assert next(loop.calls()) == loops.Done(steps=1, images=0)
    one, other = np.asarray(loop.matrices)
    assert np.asarray(loop.product) == pytest.approx(one @ other, rel=1e-12)
    assert loop.product.dtype == loop.matrices.dtype and "64" in str(loop.product.dtype)


# --- The workers


def test_a_worker_answers_with_the_settings_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_TEST_GONE", "here")
    settings = {"LOCKSTEP_TEST_GONE": None, "LOCKSTEP_TEST_NEW": "new"}
    with workers.Worker("settings", settings, functools.partial, os.getenv) as worker:
        assert worker.ask("__call__", "LOCKSTEP_TEST_GONE") is None
        assert worker.ask("__call__", "LOCKSTEP_TEST_NEW") == "new"
        assert worker.seconds > 0
    assert os.environ["LOCKSTEP_TEST_GONE"] == "here"


def test_a_loader_in_a_worker_starts_its_processes_as_anywhere() -> None:
    """Python hands on how a process was started to the processes that it starts; a loader's would
    import all anew."""
    with workers.Worker(
        "a loader's", {}, eval, "__import__('multiprocessing').get_start_method"
    ) as worker:
        assert (
            worker.ask("__call__") == multiprocessing.get_all_start_methods()[0]
        )  # the system's default


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere there is rusage only")
def test_a_worker_does_not_inherit_the_peak_memory_of_who_started_it() -> None:
    with workers.Worker("memory", {}, functools.partial, loops.peak_memory) as worker:
        assert worker.ask("__call__") < loops.peak_memory() / 2


def test_what_goes_wrong_in_a_worker_is_raised_by_who_asked() -> None:
    with pytest.raises(
        BackendError, match=r"^an integer cannot be measured here \(ValueError: invalid .*\): free"
    ):
        workers.Worker("an integer", {}, int, "no number")
    with pytest.raises(BackendError, match=r"^unknown backend 'keras'"):
        workers.Worker("keras", {}, loops.smallest_backend, "keras", "cpu")
    with workers.Worker("a list", {}, list) as worker:
        with pytest.raises(BackendError, match=r"^a list cannot be measured here \(IndexError"):
            worker.ask("pop")
        assert worker.ask("append", 1) is None and worker.ask("pop") == 1, "it is still there"


def test_no_process_outlives_its_worker() -> None:
    with (
        contextlib.suppress(KeyboardInterrupt),
        workers.Worker("sleeping", {}, functools.partial, os.getpid) as worker,
    ):
        number = worker.ask("__call__")
        os.kill(number, 0)
        raise KeyboardInterrupt
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def test_only_what_is_not_lockstep_runs_without_its_settings(
    job: loops.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(
        workers, "Worker", lambda title, settings, *_: made.setdefault(title, settings)
    )
    for path in (*PATHS, *PRODUCTS):
        workers.start(dataclasses.replace(job, path=path), "a-cache")
    foreign = {path for path, settings in made.items() if "GOMP_SPINCOUNT" in settings}
    assert foreign == {"tutorial", "eager", *PRODUCTS}
    assert all(made[path]["GOMP_SPINCOUNT"] == backends.ORIGINAL_SPIN_COUNT for path in foreign)
    caches = ("TORCHINDUCTOR_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR")
    for settings in made.values():
        assert all(
            str(settings[name]).startswith(str(job.folder / "caches" / "a-cache"))
            for name in caches
        )
    made.clear()
    workers.start(dataclasses.replace(job, path="flax"), None)
    assert made == {"flax": {}}


@pytest.mark.parametrize(
    ("users", "count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
    ids=["nothing set", "a count", "a policy"],
)
def test_threads_wait_a_little_unless_the_user_has_said_how(
    users: dict[str, str], count: str
) -> None:
    theirs = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    program = "import os, lockstep.backends; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=theirs | users,
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == count


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
    def dying(job: loops.Job, cache: str | None) -> workers.Worker:
        worker = workers.Worker(job.path, {}, functools.partial, os.getpid)
        os.kill(worker.ask("__call__"), signal.SIGKILL)
        return worker

    monkeypatch.setattr(workers, "start", dying)
    assert lockstep(*SHORT, "--batch-size", "4", "--quiet", "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: tutorial cannot be measured here (its process was ended by signal 9): "
    ), error
    assert error.count("\n") == 1 and "--batch-size" in error
    assert list(tmp_path.iterdir()) == []
