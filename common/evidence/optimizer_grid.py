"""Every legal combination of the optimizer's options, trained by both backends in float64: do they
agree in all of them?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lockstep.common import data
from lockstep.common.config import BACKENDS, SCHEDULES, Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.protocol import Backend, Snapshot

STEPS = 200
# For losses in nats, for parameters, and for lr relative to its start; measured 9e-16, 3e-17, 2e-16.
GRID_BOUND = 1e-12


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
