"""Compares the two backends in float64 in every legal combination of the optimizer's options."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypedDict

import numpy as np

from lockstep.common import data
from lockstep.common.config import BACKENDS, SCHEDULES, Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.protocol import Backend, Snapshot

STEPS = 200
# For losses in nats, for parameters, and for lr relative to its start; 9e-16, 3e-17 and 2e-16 were
# measured.
GRID_BOUND = 1e-12


class Row(TypedDict):
    """One combination of options, and the largest gaps between the two backends over the run."""

    schedule: str
    maximize: bool
    weight_decay: float
    momentum: float
    dampening: float
    nesterov: bool
    first_loss: float
    last_loss: float
    last_lr: float
    loss_gap: float | None  # in nats; None where it is not finite
    lr_gap: float
    parameter_gap: float | None  # None where it is not finite
    agrees: bool


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


def measure(config: Config, dataset: Dataset, build: Callable[[str, Config], Backend]) -> Row:
    """Train both backends with one resolved configuration."""
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
    parameter_gap = float(
        np.max([np.max(np.abs(ends[0][name] - ends[1][name])) for name in ends[0]])
    )
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


def table(rows: list[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The worst gaps per schedule: column names (`>` for numbers) and lines."""
    lines = []
    for kind in SCHEDULES:
        group = [row for row in rows if row["schedule"] == kind]
        if not group:
            continue
        broken = sum(not row["agrees"] for row in group)
        shown = [
            _largest(row["loss_gap"] for row in group),
            _largest(row["parameter_gap"] for row in group),
            _largest(row["lr_gap"] for row in group),
        ]
        lines.append((kind, str(len(group)), *shown, "ok" if broken == 0 else f"NO: {broken}"))
    return ("schedule", "combinations>", "loss gap>", "parameter gap>", "lr gap>", "ok"), lines


def sentence(rows: list[Row]) -> str:
    """The result in plain words."""
    broken = sum(not row["agrees"] for row in rows)
    gap = _largest(row["loss_gap"] for row in rows)
    verdict = f"{broken} do NOT agree" if broken else "all agree"
    return (
        f"{len(rows)} combinations: {verdict}; the largest gap of two losses is {gap} (bound "
        f"{GRID_BOUND:g})."
    )


def _largest(gaps: Iterable[float | None]) -> str:
    found = list(gaps)
    finite = [gap for gap in found if gap is not None]
    return f"{max(finite):.1e}" if len(finite) == len(found) else "not finite"
