"""How small an error is seen, and when: a learning rate that is wrong by a tenth, a hundredth, ... down to 1e-14."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.config import BACKENDS, DTYPES, RECIPES, Config
from common.data import Dataset
from common.evidence import Build, family, judge
from common.record import Record, write_whole

ERRORS = tuple(10.0**-power for power in range(1, 15))  # relative; below 1e-16 float64 has no number for them
STEPS = 200
LENSES = ("float64", "float32")
COLOURS = {"float64": "#0072B2", "float32": "#D55E00", "bfloat16": "#009E73"}  # of Okabe and Ito's
MARKERS = {"float64": "o", "float32": "s", "bfloat16": "^"}


def measure(
    dataset: Dataset,
    build: Build,
    steps: int = STEPS,
    lenses: Sequence[str] = LENSES,
    twins: int = 2,
    errors: Iterable[float] = ERRORS,
) -> Iterator[dict[str, Any]]:
    """One row per error: the quick recipe, with a Flax side whose learning rate is lr (1 + error).

    Only its backend is built with the wrong rate; its record, and its twins', claim the right configuration. What such
    a run computes, the series of learning rates included, is wrong; what it says of itself is not.

    Returns:
        error (relative), steps, and lenses: by dtype caught (bool) and, of the first divergence, step, stage, tensor
        and message (None where nothing was seen), loss_step (the first step whose loss is past its bound, whatever was
        seen before it; None: not within the run), and twins_asked (float64 needed them).
    """
    config = dataclasses.replace(RECIPES["quick"].config, steps=steps).resolve(len(dataset.train_images))
    torch = {dtype: build("torch", config, dtype) for dtype in lenses}
    right = {dtype: family(torch[dtype], config, dataset, dtype, twins) for dtype in lenses}
    for error in errors:
        row: dict[str, Any] = {"error": error, "steps": steps, "lenses": {}}
        for dtype in lenses:
            flax = build("flax", wrong(config, error), dtype)
            families = {"torch": list(right[dtype]), "flax": family(flax, config, dataset, dtype, twins)}
            lens, asked = judge(families, {"torch": torch[dtype], "flax": flax}, config, dataset)
            first = lens["first_divergence"] or {}
            row["lenses"][dtype] = {
                "caught": lens["verdict"] == "disagree",
                **{name: first.get(name) for name in ("step", "stage", "tensor", "message")},
                "loss_step": loss_step(lens, *(families[name][0] for name in BACKENDS)),
                "twins_asked": asked,
            }
        yield row


def wrong(config: Config, error: float) -> Config:
    """`config` with its learning rate wrong by `error` of it."""
    return dataclasses.replace(config, lr=config.lr * (1 + error))


def loss_step(lens: Mapping[str, Any], torch: Record, flax: Record) -> int | None:
    """The first step at which the two losses are further apart than their stretch allows; None if there is none.

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
    """Per error and lens: where it is first seen and the loss's own step. Column names (`>` for numbers) and lines."""
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


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A PNG of `measure`'s rows: the relative error (logarithmic) against the step at which each lens sees it.

    Filled marks: the first divergence; open ones: the loss alone. What is not seen stands above the dotted line.

    Raises:
        RecordError: if the file cannot be written.
    """
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    steps = max(row["steps"] for row in rows)
    lenses = [dtype for dtype in DTYPES if any(dtype in row["lenses"] for row in rows)]
    with matplotlib.style.context("default"):  # neither a matplotlibrc nor a caller may change the picture
        figure = Figure(figsize=(8.4, 4.6), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        unseen = steps * 2.2  # where the marks of what is not seen stand
        for place, dtype in enumerate(lenses):
            shift = 10 ** (0.24 * (place - (len(lenses) - 1) / 2))  # side by side, where both are at one step
            points = [(row["error"] * shift, row["lenses"][dtype]) for row in rows if dtype in row["lenses"]]
            style = {"color": COLOURS[dtype], "marker": MARKERS[dtype], "markersize": 7}
            loss = [unseen if seen["loss_step"] is None else seen["loss_step"] for _, seen in points]
            first = [unseen if seen["step"] is None else seen["step"] for _, seen in points]
            errors = [error for error, _ in points]
            axes.plot(
                errors, loss, linestyle=":", linewidth=1, fillstyle="none", label=f"{dtype}: in the loss", **style
            )
            axes.plot(errors, first, linestyle="", label=f"{dtype}: anywhere", **style)
        axes.axhline(steps * 1.4, color="#555555", linewidth=0.9, linestyle=(0, (1, 2)))
        axes.set_xscale("log")
        axes.invert_xaxis()  # the smaller the error, the further to the right
        axes.xaxis.set_major_locator(LogLocator(numticks=20))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_yscale("symlog", linthresh=1, linscale=0.5)
        ticks = [0, *(10**power for power in range(math.ceil(math.log10(steps)))), steps]
        axes.set_yticks([*ticks, unseen], [*(f"{tick:,}" for tick in ticks), "not seen"])
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(-0.35, steps * 3.4)
        axes.set_xlabel("relative error in Flax's learning rate")
        axes.set_ylabel("step at which it is seen")
        axes.set_title(f"How small an error is seen within {steps:,} steps, and when", fontsize=11)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside lower center", ncols=len(lenses), frameon=False, fontsize=9)
        content = io.BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
    write_whole(Path(path), content.getvalue())
