"""Every legal combination of the optimizer's options, in both backends in float64: does any of them
part?

And runs that one backend begins and the other ends, for each option with each schedule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.common import data
from lockstep.common.config import BACKENDS, SCHEDULES, Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.evidence import Silent
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.protocol import Backend, Snapshot
from lockstep.common.runs import checkpoint, training
from lockstep.common.runs.record import Record
from lockstep.common.system import environment

STEPS = 200
GRID_BOUND = 1e-12  # of losses in nats, of parameters, of lr relative to its start; measured 9e-16, 3e-17, 2e-16


def combinations(steps: int = STEPS) -> Iterator[Config]:
    """Momentum 0 / 0.9, dampening 0 / 0.5, weight decay 0 / 5e-4, nesterov, maximize, and each
    schedule."""
    for kind, maximize, weight_decay, momentum, dampening, nesterov in itertools.product(
        SCHEDULES, (False, True), (0.0, 5e-4), (0.0, 0.9), (0.0, 0.5), (False, True)
    ):
        if nesterov and (momentum == 0 or dampening != 0):
            continue  # torch.optim.SGD refuses these
        # A short patience, so that plateau does reduce the learning rate within the run.
        schedule = Schedule(kind, patience=1) if kind == "plateau" else Schedule(kind)
        yield Config(
            steps=steps,
            batch_size=4,
            drop_last=True,  # batches of one size are one array
            lr=0.001,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            schedule=schedule,
        )


def measure(
    config: Config, dataset: Dataset, build: Callable[[str, Config], Backend]
) -> dict[str, Any]:
    """One row: the options of a resolved run, and the largest gaps between the two backends over
    all of it."""
    indices = np.stack(list(data.batch_indices(config, len(dataset.train_images))))
    images = data.normalise(dataset.train_images[indices], np.float64)
    labels = dataset.train_labels[indices]
    metrics, ends = [], []
    for name in BACKENDS:
        backend = build(name, config)
        state = backend.init(
            Snapshot.start(initial_weights(backend.shapes(), config.seed, "float64"))
        )
        state, history = backend.train_steps(state, images, labels)
        metrics.append(history)
        ends.append(backend.export(state).parameters)
    one, other = metrics
    loss_gap = float(np.max(np.abs(one.loss - other.loss)))  # nan if either is not finite
    parameter_gap = max(float(np.max(np.abs(ends[0][name] - ends[1][name]))) for name in ends[0])
    lr_gap = float(np.max(np.abs(one.lr - other.lr)))
    return {
        "schedule": config.schedule.kind,
        "maximize": config.maximize,
        "weight_decay": config.weight_decay,
        "momentum": config.momentum,
        "dampening": config.dampening,
        "nesterov": config.nesterov,
        "first_loss": float(one.loss[0]),
        "last_loss": float(one.loss[-1]),
        "last_lr": float(one.lr[-1]),
        "loss_gap": loss_gap if np.isfinite(loss_gap) else None,
        "lr_gap": lr_gap,
        "parameter_gap": parameter_gap if np.isfinite(parameter_gap) else None,
        "agrees": bool(
            loss_gap <= GRID_BOUND
            and parameter_gap <= GRID_BOUND
            and lr_gap <= GRID_BOUND * config.lr
        ),
    }


# --- Handovers

HANDOVER_STEPS = 2_000
HANDOVER_LEAST = 400
HANDOVER_TEST_IMAGES = 100  # evaluation is not what is looked at
HANDOVER_OPTIONS: tuple[dict[str, Any], ...] = (
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


def handover_configs(steps: int = HANDOVER_STEPS) -> Iterator[Config]:
    """Every option, with every schedule; plateau has time to reduce the learning rate."""
    for kind, options in itertools.product(SCHEDULES, HANDOVER_OPTIONS):
        schedule = Schedule(kind, patience=1) if kind == "plateau" else Schedule(kind)
        yield Config(
            **{"steps": steps, "batch_size": 4, "lr": 0.001, "schedule": schedule} | options
        )


def hand_over(
    config: Config,
    dataset: Dataset,
    build: Callable[[str, Config], Backend],
    folder: Path,
    every: int,
) -> dict[str, Any]:
    """One row: the largest gaps between runs that change hands at each checkpoint and the
    uninterrupted ones.

    Args:
        config: resolved.
        folder: for the checkpoints, which are written there, read back, and removed.
        every: steps between two checkpoints.
    """
    runs, places = {}, {}
    backends = {name: build(name, config) for name in BACKENDS}
    for name, backend in backends.items():
        keeper = checkpoint.Keeper(folder, every)
        runs[name] = training.train(
            backend, config, dataset, "float64", Silent(), log_every=0, keeper=keeper
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
            start = checkpoint.handed_over(start, second, environment.source(second))
            joined = training.train(
                backends[second], config, dataset, "float64", Silent(), log_every=0, start=start
            )
            gaps += [largest_gap(joined, run) for run in runs.values()]
        row[f"{first} to {second}"] = max(gaps)
    row["agrees"] = all(
        row[f"{a} to {b}"] <= GRID_BOUND for a, b in itertools.permutations(BACKENDS)
    )
    return row


def largest_gap(one: Record, other: Record) -> float:
    """Between two losses in nats, or two final parameters; nan if any is not finite."""
    pairs = [(one.loss, other.loss), *((one.final[name], other.final[name]) for name in one.final)]
    return float(np.max([np.max(np.abs(a - b)) for a, b in pairs]))


def handover_table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
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


def table(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The worst gaps per schedule: column names (`>` for numbers) and lines."""
    lines = []
    for kind in SCHEDULES:
        group = [row for row in rows if row["schedule"] == kind]
        if not group:
            continue
        broken = sum(not row["agrees"] for row in group)
        gaps = [[row[key] for row in group] for key in ("loss_gap", "parameter_gap", "lr_gap")]
        shown = ["not finite" if None in values else f"{max(values):.1e}" for values in gaps]
        lines.append((kind, str(len(group)), *shown, "ok" if broken == 0 else f"NO: {broken}"))
    return ("schedule", "combinations>", "loss gap>", "parameter gap>", "lr gap>", "ok"), lines
