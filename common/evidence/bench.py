"""Measures how fast the tutorial's loop and both backends train. `bench_report` has the summary.

Every way to train has its own process. The processes take turns of a few seconds, several
times over, so that a slow phase of the machine slows all of them; ratios are taken turn by turn.
`results/bench/LOG.md` says where a step's time goes and which trials did not help.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict, TypeVar

T = TypeVar("T")

PATHS = {  # the ways to train, and their names in plots
    # as the tutorial writes it: a loader with two processes, eager mode, loss.item() every step
    "tutorial": "the tutorial's loop",
    "eager": "the same, data in memory",  # normalised beforehand; no loader, no loss.item()
    "torch": "torch, single steps",  # Lockstep's PyTorch backend, one train_step after the other
    # its train_steps, compiled where `--compile auto` compiles them, which it does in long runs
    "torch fused": "torch, fused steps",
    "flax": "flax, single steps",  # Lockstep's Flax backend: the same two ways
    "flax fused": "flax, fused steps",
}
FUSED = ("torch fused", "flax fused")
PRODUCTS = ("torch product", "flax product")  # the arithmetic limit: products of large matrices
BATCH_SIZES = (4, 32, 128, 512)
SCALING_BATCH = 32
SCALING_IMAGES = (1000, 10000)  # and all
WARMUP = "warmup"  # a start that is not reported: it compiles what the next start finds

TableName = Literal["speed", "growth"]


class Turn(TypedDict):
    """The training of one loop in one turn."""

    steps: int
    images: int
    seconds: float


class CompileTime(TypedDict):
    """The first calls of a loop, until everything is compiled."""

    steps: int
    seconds: float


class StartTime(TypedDict):
    """One start of a worker."""

    first_step: float  # seconds from the start of the process to the end of its first step
    opening: CompileTime


class Loader(TypedDict):
    """The processes of a data loader."""

    processes: int
    memory: int  # peak resident memory of the largest one, bytes


class WorkerFacts(TypedDict):
    """The facts of a worker after its turns."""

    environment: dict[str, object]
    memory: int  # peak resident memory, bytes
    loader: Loader | None
    flops_per_image: int | None


class WorkerRow(TypedDict):
    """One worker before its turns: the way to train, what it trains on, and its starts by name."""

    path: str
    batch_size: int
    images: int | None  # None for a product of matrices
    starts: dict[str, StartTime]


class Row(WorkerRow):
    """One worker after its turns."""

    table: TableName
    runs: list[Turn]
    facts: WorkerFacts


class Worker(Protocol):
    """A process that has taken its first step and waits for calls; see
    `lockstep.backends.benchmark.worker.Worker`."""

    seconds: float  # from its start to the end of the first step

    def call(self, method: str, *arguments: object) -> Any: ...


# (way to train, batch size, training images, name of the folder for compiled programs); the last
# is None for the usual folder.
Start = Callable[[str, int, int, str | None], AbstractContextManager[Worker]]
Item = tuple[str, int, int]  # way to train, batch size, training images


# --- The plan


@dataclass(frozen=True)
class Plan:
    """The loops to measure, and for how long."""

    batch_sizes: tuple[int, ...]
    images: int  # training images
    scaling_batch: int
    scaling: tuple[int, ...]  # numbers of training images
    seconds: float  # of one turn
    repetitions: int  # turns of each way to train
    # "cold": nothing is compiled; "warm": earlier starts have compiled; "kept": the caches are
    # those of this machine.
    starts: tuple[str, ...]
    scaling_starts: tuple[str, ...]  # the same, or WARMUP

    @property
    def turns(self) -> int:
        """The number of turns of all workers."""
        at_each_size = len(self.batch_sizes) * (len(PATHS) + len(PRODUCTS))
        return (at_each_size + len(self.scaling) * len(FUSED)) * self.repetitions

    def to_json(self) -> dict[str, object]:
        return {
            "batch_sizes": self.batch_sizes,
            "images": self.images,
            "growth_batch": self.scaling_batch,
            "growth": self.scaling,
            "seconds": self.seconds,
            "repetitions": self.repetitions,
            "starts": self.starts,
            "growth_starts": self.scaling_starts,
        }


def make_plan(images: int, batch_size: int | None, quick: bool) -> Plan:
    """The plan for so many training images.

    Args:
        batch_size: the only one; None for all of BATCH_SIZES that fit.
        quick: a minute, to see that the measurement works.
    """
    sizes = (
        tuple(size for size in BATCH_SIZES if size <= images)
        if batch_size is None
        else (batch_size,)
    )
    scaling_batch = SCALING_BATCH if batch_size is None else batch_size
    scaling = tuple(number for number in SCALING_IMAGES if scaling_batch <= number < images)
    if quick:
        return Plan(sizes, images, scaling_batch, (), 0.2, 3, ("kept",), ())
    return Plan(
        sizes,
        images,
        scaling_batch,
        (*scaling, images),
        1.5,
        7,
        ("cold", "warm"),
        (WARMUP, "warm"),
    )


def round_robin(items: Sequence[T], repetitions: int) -> Iterator[T]:
    """Each item once in every repetition. Every second repetition runs backwards, so that an item
    does not always follow the same one."""
    for repetition in range(repetitions):
        yield from items if repetition % 2 == 0 else reversed(items)


def load() -> float | None:
    """The number of processes that wanted to run at a time, over the last minute; None where the
    system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def slug(name: str) -> str:
    """The folder name for a processor or a GPU."""
    return (
        re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-") or "unknown"
    )


# --- The measurement


def measure(
    plan: Plan, start: Start, advance: Callable[[int], None] = lambda turns: None
) -> list[Row]:
    """One row for each way to train at each batch size, then one for each fused way at each number
    of images. The rows of PRODUCTS repeat for each batch size.

    Args:
        start: starts a worker; only one worker is busy at a time.
        advance: called after each turn.
    """
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        # These start first, so that the frameworks are in the disk cache before a start counts.
        products = {path: stack.enter_context(start(path, 1, 0, None)) for path in PRODUCTS}
        for size in plan.batch_sizes:
            items = [(path, size, plan.images) for path in PATHS]
            rows += _in_turns("speed", items, plan, plan.starts, start, advance, products)
        items = [(path, plan.scaling_batch, images) for images in plan.scaling for path in FUSED]
        if items:
            rows += _in_turns("growth", items, plan, plan.scaling_starts, start, advance, {})
    return rows


def _in_turns(
    table: TableName,
    items: Sequence[Item],
    plan: Plan,
    starts: tuple[str, ...],
    start: Start,
    advance: Callable[[int], None],
    products: Mapping[str, Worker],
) -> list[Row]:
    """The rows of workers that take turns with each other."""
    rows: list[WorkerRow] = []
    workers: list[Worker] = []
    with contextlib.ExitStack() as stack:
        for path, size, images in items:
            cache = None if "kept" in starts else f"{path} {size}".replace(" ", "-")
            found = {}
            for name in starts[:-1]:
                with start(path, size, images, cache) as worker:
                    found[name] = _start_time(worker)
            # the last start trains later
            workers.append(stack.enter_context(start(path, size, images, cache)))
            found[starts[-1]] = _start_time(workers[-1])
            found.pop(WARMUP, None)
            rows.append({"path": path, "batch_size": size, "images": images, "starts": found})
        for path, worker in products.items():
            workers.append(worker)
            rows.append({"path": path, "batch_size": items[0][1], "images": None, "starts": {}})
        runs: list[list[Turn]] = [[] for _ in rows]
        for turns, worker in round_robin(list(zip(runs, workers, strict=True)), plan.repetitions):
            turns.append(worker.call("run", plan.seconds))
            advance(1)
        facts: list[WorkerFacts] = [worker.call("describe") for worker in workers]
    return [
        {"table": table, **row, "runs": turns, "facts": known}
        for row, turns, known in zip(rows, runs, facts, strict=True)
    ]


def _start_time(worker: Worker) -> StartTime:
    return {"first_step": worker.seconds, "opening": worker.call("compile")}
