"""What training by several processes costs on one machine.

    python -m tests.runs.overhead [--steps 20] [--windows 10] [--out results/overhead-processes]

Trains the network of the tutorial by 1, 2 and 4 processes, in PyTorch and in JAX, on batches of 32
images, each process with one thread. Takes each process's CPU time (that of communication, too) for
windows of steps, and counts the collectives of a step: PyTorch's profiler sees each that gloo
carries out, and the compiled program of JAX names them. Run it alone on the machine. It says nothing
about more cores or a network.
"""

from __future__ import annotations

import argparse
import collections
import re
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lockstep.backends import build
from lockstep.common import data
from lockstep.common.config import BACKENDS, Config
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.protocol import Rank, Snapshot
from lockstep.common.report import write_json
from lockstep.common.runs.rank_group import HOST, free_port
from lockstep.common.system import environment
from lockstep.common.system.process import Report, WorkerProcess

COUNTS = (1, 2, 4)  # processes
BATCH = 32
# Processes that share the cores, as a backend is told: so each computes with one thread, and none
# spins while it waits for another.
SHARING = environment.cores()
WARM_UP = 2  # windows that do not count
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-broadcast"


class Measured(NamedTuple):
    """What one process has seen."""

    cpu_ms: list[float]  # of each window, milliseconds per step
    wall_ms: list[float]
    collectives: dict[str, float]  # by kind, in one step


class Trainer:
    """In a process of its own: trains for a while."""

    def __init__(self, rank: Rank | None) -> None:
        self.rank = rank

    def measure(self, name: str, steps: int, windows: int) -> Measured:
        dataset = data.load("digits")
        images = len(dataset.train_images)
        config = Config(steps=steps, batch_size=BATCH, lr=0.01, momentum=0.9).resolve(images)
        backend: Any = build(
            config, len(dataset.classes), "cpu", "off", name, "float32", SHARING, self.rank
        )
        state = backend.init(Snapshot.start(initial_weights(backend.shapes(), 0, "float32")))
        indices = np.random.default_rng(0).integers(0, images, (steps, BATCH))
        batches = backend.batches(
            backend.upload(dataset.train_images, dataset.train_labels), indices
        )
        cpu, wall = [], []
        for _ in range(WARM_UP + windows):
            began = time.process_time(), time.perf_counter()
            state, _ = backend.train_steps(state, *batches)  # waits for its metrics
            cpu.append(1e3 * (time.process_time() - began[0]) / steps)
            wall.append(1e3 * (time.perf_counter() - began[1]) / steps)
        counted = {"torch": collectives_torch, "flax": collectives_flax}[name]
        return Measured(cpu[WARM_UP:], wall[WARM_UP:], counted(backend, state, *batches))


def collectives_torch(backend: Any, state: Any, images: Any, labels: Any) -> dict[str, float]:
    """What gloo was asked for in these steps, as the profiler saw it, per step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        backend.train_steps(state, images, labels)
    names = [event.name for event in found.events() or () if event.name.startswith("gloo:")]
    kinds = collections.Counter(name.removeprefix("gloo:").replace("_", "-") for name in names)
    return {kind: count / len(labels) for kind, count in sorted(kinds.items())}


def collectives_flax(backend: Any, state: Any, images: Any, labels: Any) -> dict[str, float]:
    """The collectives in the compiled program of one step."""
    batch = backend._on_device(state, images[0], labels[0])
    program = backend._compiled_step.lower(state, *batch).compile().as_text()
    kinds = re.findall(rf" ({COLLECTIVES})(?:-start)?\(", program)
    return {kind: float(count) for kind, count in sorted(collections.Counter(kinds).items())}


def start(report: Report, rank: Rank | None) -> Trainer:
    del report
    return Trainer(rank)


def measured(name: str, count: int, steps: int, windows: int) -> list[Measured]:
    """One framework, trained by `count` processes: what each of them has seen."""
    port = free_port()
    ranks = [None] if count == 1 else [Rank(n, count, HOST, port) for n in range(count)]
    processes = [WorkerProcess(start, rank) for rank in ranks]
    try:
        calls = [process.send("measure", name, steps, windows) for process in processes]
        return [process.receive(call) for process, call in zip(processes, calls, strict=True)]
    finally:
        for process in processes:
            process.stop()


def row(name: str, ranks: list[Measured]) -> Mapping[str, object]:
    """The summary of one group of processes."""
    cpu = [window for rank in ranks for window in rank.cpu_ms]
    wall = ranks[0].wall_ms
    assert all(rank.collectives == ranks[0].collectives for rank in ranks)
    return {
        "backend": name,
        "processes": len(ranks),
        "cpu_ms": {"min": min(cpu), "median": statistics.median(cpu)},
        "wall_ms": {"min": min(wall), "median": statistics.median(wall)},
        "collectives": ranks[0].collectives,
        "windows": [{"cpu_ms": rank.cpu_ms, "wall_ms": rank.wall_ms} for rank in ranks],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of a window")
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("results/overhead-processes"))
    options = parser.parse_args()
    rows = []
    for name in BACKENDS:
        for count in COUNTS:
            rows.append(row(name, measured(name, count, options.steps, options.windows)))
            print({key: value for key, value in rows[-1].items() if key != "windows"}, flush=True)
    report = {
        "schema": 1,
        "command": ["python", "-m", "tests.runs.overhead", *sys.argv[1:]],
        "environment": environment.describe(),
        "batch": BATCH,
        "rows": rows,
    }
    write_json(report, options.out)
    return 0


if __name__ == "__main__":
    from tests.runs import overhead  # by this name, other processes find what they are sent

    sys.exit(overhead.main())
