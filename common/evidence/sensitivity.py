"""How small an error Lockstep detects, and at which step: a learning rate that is wrong by a tenth,
a hundredth, ..., down to 1e-14."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.evidence import Build, judge, train_ensemble
from lockstep.common.recipes import RECIPES
from lockstep.common.runs.record import Record
from lockstep.common.verdict.check import Check

# relative; below 1e-16 float64 has no number for them
ERRORS = tuple(10.0**-power for power in range(1, 15))
STEPS = 200
LENSES = ("float64", "float32")


def measure(
    dataset: Dataset,
    build: Build,
    steps: int = STEPS,
    lenses: Sequence[str] = LENSES,
    twins: int = 2,
    errors: Iterable[float] = ERRORS,
) -> Iterator[dict[str, Any]]:
    """One row per error: the quick recipe, with Flax's learning rate at lr (1 + error).

    Only the Flax backend is built with the wrong rate. The records of its runs name the right
    configuration, as those of a faulty program would; their numbers, the series of learning rates
    included, are wrong.

    Returns:
        error (relative), steps, and lenses: by dtype caught (bool) and, of the first divergence,
        step, stage, tensor and message (None if nothing was detected), loss_step (the first step
        whose loss is past its bound; None if there is none), and
        twins (per side; more than given where the verdict asked for them).
    """
    config = dataclasses.replace(RECIPES["quick"].config, steps=steps).resolve(
        len(dataset.train_images)
    )
    torch = {dtype: build("torch", config, dtype) for dtype in lenses}
    right = {dtype: train_ensemble(torch[dtype], config, dataset, dtype, twins) for dtype in lenses}
    for error in errors:
        row: dict[str, Any] = {"error": error, "steps": steps, "lenses": {}}
        for dtype in lenses:
            flax = build("flax", with_lr_error(config, error), dtype)
            ensembles = {
                "torch": right[dtype],
                "flax": train_ensemble(flax, config, dataset, dtype, twins),
            }
            found = judge(ensembles, {"torch": torch[dtype], "flax": flax}, config, dataset)
            first = found.first_divergence.to_json() if found.first_divergence else {}
            row["lenses"][dtype] = {
                "caught": found.verdict == "disagree",
                **{name: first.get(name) for name in ("step", "stage", "tensor", "message")},
                "loss_step": loss_step(found.windows, *(ensembles[name].run for name in BACKENDS)),
                "twins": len(ensembles["flax"].twins),
            }
        yield row


def with_lr_error(config: Config, error: float) -> Config:
    """`config` with the learning rate lr (1 + error)."""
    return dataclasses.replace(config, lr=config.lr * (1 + error))


def loss_step(windows: Sequence[Check], torch: Record, flax: Record) -> int | None:
    """The first step at which the two losses are further apart than the bound of their range; None if
    there is none.

    Args:
        windows: of their `Comparison`.
    """
    for check in windows:
        if check.tensor != "loss" or check.agrees or check.start is None:
            continue
        span = slice(check.start, check.stop)
        with np.errstate(all="ignore"):
            gaps = np.abs(torch.loss[span] - flax.loss[span])
        gaps = np.where(np.isfinite(gaps), gaps, np.inf)
        outside = np.flatnonzero(gaps > (check.bound if np.isfinite(check.bound) else 0.0))
        return check.start + int(outside[0] if len(outside) else np.argmax(gaps))
    return None


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Per error and precision: where it is first detected, and in which step the loss shows it. Column names (`>` for
    numbers) and lines."""
    lines = []
    for row in rows:
        for dtype, seen in row["lenses"].items():
            where = f"{seen['stage']}, {seen['tensor']}" if seen["caught"] else "not seen"
            if seen["caught"] and seen["stage"] == seen["tensor"]:
                where = seen["stage"]
            cells = [_number(seen["step"]), where, _number(seen["loss_step"])]
            lines.append((f"{row['error']:.0e}", dtype, *cells))
    return ("error>", "dtype", "step>", "first seen in", "loss's step>"), lines


def _number(step: int | None) -> str:
    return "-" if step is None else str(step)
