"""How small an error Lockstep detects, and at which step: learning rates that are wrong by 1e-1 to
1e-14, relative."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict

import numpy as np

from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.evidence import Build, judge, train_ensemble
from lockstep.common.recipes import RECIPES
from lockstep.common.runs.record import Record
from lockstep.common.verdict.check import Check

# relative; float64 cannot represent an lr that is wrong by less than 1e-16
ERRORS = tuple(10.0**-power for power in range(1, 15))
STEPS = 200
PRECISIONS = ("float64", "float32")


class Finding(TypedDict):
    """When one error is seen in one precision; None where it is not."""

    caught: bool
    step: int | None  # of the first divergence, as are stage, tensor and message
    stage: str | None
    tensor: str | None
    message: str | None
    loss_step: int | None  # the first step whose loss is past its bound
    twins: int  # per backend; more than asked for where the verdict wanted more


class Row(TypedDict):
    """The results for one error."""

    error: float  # relative
    steps: int
    lenses: dict[str, Finding]  # by precision


def measure(
    dataset: Dataset,
    build: Build,
    steps: int = STEPS,
    precisions: Sequence[str] = PRECISIONS,
    twins: int = 2,
    errors: Iterable[float] = ERRORS,
) -> Iterator[Row]:
    """One row per error: the quick recipe, with Flax's learning rate at lr (1 + error).

    Only the Flax backend is built with the wrong rate. The records of its runs name the right
    configuration, as those of a faulty program would; their numbers, the series of learning rates
    included, are wrong.
    """
    config = dataclasses.replace(RECIPES["quick"].config, steps=steps).resolve(
        len(dataset.train_images)
    )
    torch = {dtype: build("torch", config, dtype) for dtype in precisions}
    right = {
        dtype: train_ensemble(torch[dtype], config, dataset, dtype, twins) for dtype in precisions
    }
    for error in errors:
        findings: dict[str, Finding] = {}
        for dtype in precisions:
            flax = build("flax", with_lr_error(config, error), dtype)
            ensembles = {
                "torch": right[dtype],
                "flax": train_ensemble(flax, config, dataset, dtype, twins),
            }
            found = judge(ensembles, {"torch": torch[dtype], "flax": flax}, config, dataset)
            first = found.first_divergence
            findings[dtype] = {
                "caught": found.verdict == "disagree",
                "step": first and first.step,
                "stage": first and first.stage,
                "tensor": first and first.tensor,
                "message": first and first.message,
                "loss_step": loss_step(found.windows, *(ensembles[name].run for name in BACKENDS)),
                "twins": len(ensembles["flax"].twins),
            }
        yield {"error": error, "steps": steps, "lenses": findings}


def with_lr_error(config: Config, error: float) -> Config:
    """`config` with the learning rate lr (1 + error)."""
    return dataclasses.replace(config, lr=config.lr * (1 + error))


def loss_step(windows: Sequence[Check], torch: Record, flax: Record) -> int | None:
    """The first step at which the gap of the two losses is past the bound of its step range; None
    if there is none.

    Args:
        windows: those of the `Comparison` of both runs.
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


def table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Per error and precision: where it is first detected, and at which step the loss shows it.
    Column names (`>` for numbers) and lines."""
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


def sentence(rows: Sequence[Row]) -> str:
    """The result in plain words: the smallest error that each precision shows."""
    parts = []
    for dtype in list({dtype: None for row in rows for dtype in row["lenses"]}):
        seen = [
            row["error"]
            for row in rows
            if dtype in row["lenses"] and row["lenses"][dtype]["caught"]
        ]
        parts.append(f"{dtype} {min(seen):.0e}" if seen else f"{dtype} none")
    return f"The smallest relative error of the learning rate that is seen: {', '.join(parts)}."
