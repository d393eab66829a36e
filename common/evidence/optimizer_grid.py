"""Compares the two backends in float64 in every legal combination of the optimizer's options."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypedDict

import numpy as np

from lockstep.common import data, optimizers
from lockstep.common.config import BACKENDS, SCHEDULES, Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.protocol import Backend, Snapshot

STEPS = 200
# For losses in nats, for parameters, and for lr relative to its start; for SGD 9e-16, 3e-17 and 2e-16
# were measured, for the others 3e-14 and 4e-13 (digits): a small gradient over its own root carries
# its rounding into the weights at the size of lr.
GRID_BOUND = 1e-12


class Row(TypedDict):
    """One combination of options, and the largest gaps between the two backends over the run."""

    optimizer: str
    options: dict[str, object]  # those that SGD does not have, where they are not the defaults
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


# Of the others, every choice of these, with and without weight decay and maximize.
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "adam": {"amsgrad": (False, True)},
    "adamw": {"amsgrad": (False, True), "decay_biases_and_norms": (True, False)},
    "rmsprop": {"centered": (False, True), "momentum": (0.0, 0.9)},
    "adagrad": {"lr_decay": (0.0, 0.01), "initial_accumulator_value": (0.0, 0.1)},
    "lion": {},
}
RATES = {"rmsprop": 1e-5, "lion": 1e-4}  # so that no loss jumps in the first steps; others: 0.001
CLIMBING = 0.01  # times that, with maximize: a loss of 4,000 would have a gap of 1e-12


def combinations(steps: int = STEPS) -> Iterator[Config]:
    """Every legal combination of each optimizer's options, with each schedule."""
    yield from _of_sgd(steps)
    for (name, choices), kind in itertools.product(CHOICES.items(), SCHEDULES):
        every = {"maximize": (False, True), "weight_decay": (0.0, 0.01), **choices}
        for values in itertools.product(*every.values()):
            options: dict[str, Any] = dict(zip(every, values, strict=True))
            if options["weight_decay"] == 0 and not options.get("decay_biases_and_norms", True):
                continue  # nothing decays
            rate = RATES.get(name, 0.001)
            yield Config(
                optimizer=name,
                lr=CLIMBING * rate if options["maximize"] else rate,
                **_run(steps, kind),
                **options,
            )


def _run(steps: int, kind: str) -> dict[str, Any]:
    """What all have in common."""
    # A short patience, so that plateau does reduce the learning rate within the run.
    schedule = Schedule(kind, patience=1) if kind == "plateau" else Schedule(kind)
    # Batches of one size are one array.
    return {"steps": steps, "batch_size": 4, "drop_last": True, "schedule": schedule}


def _of_sgd(steps: int) -> Iterator[Config]:
    """Momentum 0 / 0.9, dampening 0 / 0.5, weight decay 0 / 5e-4, nesterov, maximize, and each
    schedule."""
    for kind, maximize, weight_decay, momentum, dampening, nesterov in itertools.product(
        SCHEDULES, (False, True), (0.0, 5e-4), (0.0, 0.9), (0.0, 0.5), (False, True)
    ):
        if nesterov and (momentum == 0 or dampening != 0):
            continue  # torch.optim.SGD refuses these
        yield Config(
            lr=0.001,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            **_run(steps, kind),
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
    options = {name: getattr(config, name) for name in CHOICES.get(config.optimizer, ())}
    return {
        "optimizer": config.optimizer,
        "options": {k: v for k, v in options.items() if v != getattr(Config, k)},
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
    """The worst gaps per optimizer and schedule: column names (`>` for numbers) and lines."""
    lines = []
    for name, kind in itertools.product(optimizers.OPTIMIZERS, SCHEDULES):
        # Older reports have SGD alone.
        group = [r for r in rows if (r.get("optimizer", "sgd"), r["schedule"]) == (name, kind)]
        if not group:
            continue
        broken = sum(not row["agrees"] for row in group)
        shown = [
            _largest(row["loss_gap"] for row in group),
            _largest(row["parameter_gap"] for row in group),
            _largest(row["lr_gap"] for row in group),
        ]
        outcome = "ok" if broken == 0 else f"NO: {broken}"
        lines.append((name, kind, str(len(group)), *shown, outcome))
    return (
        "optimizer",
        "schedule",
        "combinations>",
        "loss gap>",
        "parameter gap>",
        "lr gap>",
        "ok",
    ), lines


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
