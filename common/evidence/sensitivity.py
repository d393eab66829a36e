"""How small an error is seen, and when: a learning rate that is wrong by a tenth, a hundredth, ...
down to 1e-14."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lockstep.common.config import BACKENDS, RECIPES, Config
from lockstep.common.data import Dataset
from lockstep.common.evidence import Build, family, judge
from lockstep.common.runs.record import Record

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
    """One row per error: the quick recipe, with a Flax side whose learning rate is lr (1 + error).

    Only its backend is built with the wrong rate; its record, and its twins', claim the right
    configuration. What such a run computes, the series of learning rates included, is wrong; what
    it says of itself is not.

    Returns:
        error (relative), steps, and lenses: by dtype caught (bool) and, of the first divergence,
        step, stage, tensor and message (None where nothing was seen), loss_step (the first step
        whose loss is past its bound, whatever was seen before it; None: not within the run), and
        twins (per side; more than given where the verdict asked for them).
    """
    config = dataclasses.replace(RECIPES["quick"].config, steps=steps).resolve(
        len(dataset.train_images)
    )
    torch = {dtype: build("torch", config, dtype) for dtype in lenses}
    right = {dtype: family(torch[dtype], config, dataset, dtype, twins) for dtype in lenses}
    for error in errors:
        row: dict[str, Any] = {"error": error, "steps": steps, "lenses": {}}
        for dtype in lenses:
            flax = build("flax", wrong(config, error), dtype)
            families = {
                "torch": list(right[dtype]),
                "flax": family(flax, config, dataset, dtype, twins),
            }
            lens = judge(families, {"torch": torch[dtype], "flax": flax}, config, dataset)
            first = lens["first_divergence"] or {}
            row["lenses"][dtype] = {
                "caught": lens["verdict"] == "disagree",
                **{name: first.get(name) for name in ("step", "stage", "tensor", "message")},
                "loss_step": loss_step(lens, *(families[name][0] for name in BACKENDS)),
                "twins": len(families["flax"]) - 1,
            }
        yield row


def wrong(config: Config, error: float) -> Config:
    """`config` with its learning rate wrong by `error` of it."""
    return dataclasses.replace(config, lr=config.lr * (1 + error))


def loss_step(lens: Mapping[str, Any], torch: Record, flax: Record) -> int | None:
    """The first step at which the two losses are further apart than their stretch allows; None if
    there is none.

    Args:
        lens: what `parity.compare` says of these two runs.
    """
    for row in lens["stretches"]:
        if row["quantity"] != "loss" or row["agrees"]:
            continue
        span = slice(row["start"], row["stop"])
        with np.errstate(all="ignore"):
            gaps = np.abs(torch.loss[span] - flax.loss[span])
        gaps = np.where(np.isfinite(gaps), gaps, np.inf)
        outside = np.flatnonzero(gaps > (row["bound"] or 0.0))
        return row["start"] + int(outside[0] if len(outside) else np.argmax(gaps))
    return None


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Per error and lens: where it is first seen and the loss's own step. Column names (`>` for
    numbers) and lines."""
    lines = []
    for row in rows:
        for dtype, seen in row["lenses"].items():
            where = f"{seen['stage']}, {seen['tensor']}" if seen["caught"] else "not seen"
            if seen["caught"] and seen["stage"] == seen["tensor"]:
                where = seen["stage"]
            cells = [_number(seen["step"]), where, _number(seen["loss_step"])]
            lines.append((f"{row['error']:.0e}", dtype, *cells))
    return ("error>", "lens", "step>", "first seen in", "loss's step>"), lines


def _number(step: int | None) -> str:
    return "-" if step is None else str(step)
