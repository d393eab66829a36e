"""Handovers: one backend starts a run and the other finishes it, for each option with each
schedule, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.common.config import BACKENDS, SCHEDULES, Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.evidence import NullProgress
from lockstep.common.evidence.optimizer_grid import GRID_BOUND
from lockstep.common.protocol import Backend
from lockstep.common.runs import checkpoint, training
from lockstep.common.runs.record import Record
from lockstep.common.system import environment

STEPS = 2_000
MIN_STEPS = 400
TEST_IMAGES = 100  # the evaluation itself is not under test
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 5e-4},
    {
        "momentum": 0.9,
        "nesterov": True,
        "maximize": True,
        "lr": 1e-5,
    },  # climbing faster, the loss overflows
    {"weight_decay": 5e-4, "maximize": True, "lr": 1e-4},
)


def configurations(steps: int = STEPS) -> Iterator[Config]:
    """Every option with every schedule; plateau has time to reduce the learning rate."""
    for kind, options in itertools.product(SCHEDULES, OPTIONS):
        schedule = Schedule(kind, patience=1) if kind == "plateau" else Schedule(kind)
        yield Config(
            **{"steps": steps, "batch_size": 4, "lr": 0.001, "schedule": schedule} | options
        )


def measure(
    config: Config,
    dataset: Dataset,
    build: Callable[[str, Config], Backend],
    folder: Path,
    every: int,
) -> dict[str, Any]:
    """One row: the largest gaps between uninterrupted runs and runs that the other backend
    finishes from each checkpoint.

    Args:
        config: resolved.
        folder: receives the checkpoints; they are read back and then removed.
        every: steps between two checkpoints.
    """
    runs, places = {}, {}
    backends = {name: build(name, config) for name in BACKENDS}
    for name, backend in backends.items():
        manager = checkpoint.CheckpointManager(folder, every)
        runs[name] = training.train(
            backend, config, dataset, "float64", NullProgress(), log_every=0, checkpoints=manager
        )
        kept = checkpoint.found(folder, runs[name].stem)
        places[name] = [checkpoint.read(path) for path in reversed(kept)]
        checkpoint.remove(folder, runs[name].stem)
    row = config.to_json() | {
        "schedule": config.schedule.kind,
        "places": [c.step for c in places[BACKENDS[0]]],
    }
    row["last_lr"] = float(runs[BACKENDS[0]].lr[-1])
    for first, second in itertools.permutations(BACKENDS):
        gaps = []
        for start in places[first]:
            start = checkpoint.for_backend(start, second, environment.source_digest(second))
            joined = training.train(
                backends[second],
                config,
                dataset,
                "float64",
                NullProgress(),
                log_every=0,
                start=start,
            )
            gaps += [max_gap(joined, run) for run in runs.values()]
        row[f"{first} to {second}"] = max(gaps)
    row["agrees"] = all(
        row[f"{a} to {b}"] <= GRID_BOUND for a, b in itertools.permutations(BACKENDS)
    )
    return row


def max_gap(one: Record, other: Record) -> float:
    """Between two losses in nats, or two final parameters; nan if any is not finite."""
    pairs = [(one.loss, other.loss), *((one.final[name], other.final[name]) for name in one.final)]
    return float(np.max([np.max(np.abs(a - b)) for a, b in pairs]))


def table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The largest gaps per schedule: column names (`>` for numbers) and lines."""
    directions = [f"{a} to {b}" for a, b in itertools.permutations(BACKENDS)]
    lines = []
    for kind in SCHEDULES:
        group = [row for row in rows if row["schedule"] == kind]
        if group:
            gaps = [f"{max(row[direction] for row in group):.1e}" for direction in directions]
            broken = sum(not row["agrees"] for row in group)
            handovers = str(sum(len(row["places"]) * len(directions) for row in group))
            lines.append(
                (kind, str(len(group)), handovers, *gaps, "ok" if broken == 0 else f"NO: {broken}")
            )
    return (
        "schedule",
        "runs>",
        "handovers>",
        *(f"{direction}>" for direction in directions),
        "ok",
    ), lines
