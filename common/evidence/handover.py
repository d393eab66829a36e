"""Handovers: one backend starts a run and the other finishes it, in float64, for each option with
each schedule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from lockstep.common.verdict.check import finite

STEPS = 2_000
MIN_STEPS = 400
TEST_IMAGES = 100  # the evaluation itself is not under test
DIRECTIONS = tuple(f"{a} to {b}" for a, b in itertools.permutations(BACKENDS))
OPTIONS: tuple[dict[str, Any], ...] = (  # of `Config`
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 5e-4},
    # with a larger lr, the loss grows until it overflows
    {"momentum": 0.9, "nesterov": True, "maximize": True, "lr": 1e-5},
    {"weight_decay": 5e-4, "maximize": True, "lr": 1e-4},
    {"optimizer": "adamw", "weight_decay": 0.01},
)


@dataclass(frozen=True)
class Handover:
    """The handovers of one configuration."""

    config: Config
    places: list[int]  # steps at which the other backend took over
    last_lr: float
    gaps: Mapping[str, float]  # the largest, by direction; nan if a run is not finite

    @property
    def agrees(self) -> bool:
        return all(gap <= GRID_BOUND for gap in self.gaps.values())

    def to_json(self) -> dict[str, object]:
        return self.config.to_json() | {
            "schedule": self.config.schedule.kind,
            "places": self.places,
            "last_lr": self.last_lr,
            **{direction: finite(gap) for direction, gap in self.gaps.items()},
            "agrees": self.agrees,
        }


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
) -> Handover:
    """Compare uninterrupted runs with runs that the other backend finishes from each checkpoint.

    Args:
        config: resolved.
        folder: for the checkpoints, which are read and then removed.
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
    largest: dict[str, float] = {}
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
        largest[f"{first} to {second}"] = float(np.max(gaps))
    return Handover(
        config=config,
        places=[start.step for start in places[BACKENDS[0]]],
        last_lr=float(runs[BACKENDS[0]].lr[-1]),
        gaps=largest,
    )


def max_gap(one: Record, other: Record) -> float:
    """The largest gap between two losses, in nats, or two final parameters; nan if any is not
    finite."""
    pairs = [(one.loss, other.loss), *((one.final[name], other.final[name]) for name in one.final)]
    return float(np.max([np.max(np.abs(a - b)) for a, b in pairs]))


def table(rows: list[Handover]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The largest gaps per schedule: column names (`>` for numbers) and lines."""
    lines = []
    for kind in SCHEDULES:
        group = [row for row in rows if row.config.schedule.kind == kind]
        if group:
            gaps = [f"{largest_gap(group, direction):.1e}" for direction in DIRECTIONS]
            broken = sum(not row.agrees for row in group)
            handovers = str(sum(len(row.places) * len(DIRECTIONS) for row in group))
            lines.append(
                (kind, str(len(group)), handovers, *gaps, "ok" if broken == 0 else f"NO: {broken}")
            )
    directions = (f"{direction}>" for direction in DIRECTIONS)
    return ("schedule", "runs>", "handovers>", *directions, "ok"), lines


def largest_gap(rows: list[Handover], *directions: str) -> float:
    """nan if a run is not finite."""
    return float(np.max([row.gaps[direction] for row in rows for direction in directions]))
