"""Two networks that should be one: their tensors side by side, and what both compute of one
batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.model import pair
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.protocol import STAGES, Backend, Snapshot
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record
from lockstep.common.verdict import locate
from lockstep.common.verdict.check import Check
from lockstep.common.verdict.comparison import Location, divergence
from lockstep.common.verdict.first_steps import check_first_steps
from lockstep.common.verdict.judge import INITIAL_TWINS
from lockstep.common.verdict.statistics import PROOF_BOUND

CANCELS = ("backward", "update")  # where rounding may exceed the bound, and twins are asked


def measure(torch: Backend, flax: Backend, config: Config, dataset: Dataset) -> dict[str, Any]:
    """One step of both from the same weights on the run's first batch, in float64, and one look as
    in evaluation.

    Args:
        torch, flax: of the same tensors; see `pairs.check_same`.
    """
    shapes, sides = torch.shapes(), (torch, flax)
    indices = next(data.batch_indices(config, len(dataset.train_images)))
    images, labels = (
        data.normalise(dataset.train_images[indices], np.float64),
        dataset.train_labels[indices],
    )
    start = Snapshot.start(initial_weights(shapes, config.seed, "float64"))

    def one_step(side: Backend, twin: int | None) -> Record:
        return locate.one_step(side, config, dataset, "float64", start, images, labels, twin)

    records = [one_step(side, None) for side in sides]
    a, b = map(Ensemble, records)
    checks = check_first_steps(a, b)
    if any(check.step == 0 and check.stage in CANCELS and not check.agrees for check in checks):
        twins = [[one_step(side, twin) for twin in range(1, INITIAL_TWINS + 1)] for side in sides]
        checks = check_first_steps(a.with_short_twins(twins[0]), b.with_short_twins(twins[1]))
    losses = [side.evaluate(side.init(start), images, labels).loss for side in sides]
    own = {side.name: side.native_names() for side in sides}
    gap, limit = abs(losses[0] - losses[1]), PROOF_BOUND * max(1.0, abs(losses[0]))
    checks.append(Check(0, "evaluate", "test loss", gap, limit, values=(losses[0], losses[1])))
    apart = [check for check in checks if not check.agrees]
    gradients = {check.tensor: check.gap for check in checks if check.stage == "backward"}
    return {
        "tensors": [
            {
                "name": name,
                "torch": own["torch"][name],
                "flax": own["flax"][name],
                "shape": list(shape),
                "gradient_gap": gradients.get(name),
            }
            for name, shape in shapes.items()
        ],
        "parameters": sum(math.prod(shapes[name]) for name in gradients),
        "gaps": {
            stage: max((r.gap for r in checks if r.stage == stage), default=0.0) for stage in STAGES
        },
        "bound": PROOF_BOUND,
        "first_difference": describe_difference(apart[0], records, own).to_json()
        if apart
        else None,
    }


def describe_difference(
    check: Check, records: list[Record], own: Mapping[str, Mapping[str, str]]
) -> Location:
    """Where the two differ, and what usually causes it, or the line that is missing from the pair.

    Args:
        own: by side, what the module itself calls a tensor, by canonical name.
    """
    names = list(own)
    one, other = tensors = locate.tensors_at(
        dict(zip(names, records, strict=True)), 0, check.stage, check.tensor
    )
    found = locate.describe(
        divergence(check, names), tensors, "one step of both from the same weights"
    )
    layer = check.tensor.removeprefix(pair.INPUT_PREFIX)
    if layer != check.tensor and one is not None and other is not None:
        shape, kernel = flatten_shape(one, other), own[names[0]].get(f"{layer}.kernel")
        if shape is not None and kernel is not None:
            line = f"flattened={ {kernel.rpartition('.')[0]: shape} }"
            cause = f"a flatten, which unrolls channels first in PyTorch; add to the pair: {line}"
            return dataclasses.replace(found, causes=(cause,))
    return found


def flatten_shape(torch: np.ndarray, flax: np.ndarray) -> tuple[int, int, int] | None:
    """The (channels, height, width) of what one side unrolled channels first, the other channels
    last; None if none.

    Args:
        torch, flax: (n, features), what a dense layer was given.
    """
    if torch.ndim != 2 or torch.shape != flax.shape:
        return None
    n, features = torch.shape
    for channels in (size for size in range(2, features) if features % size == 0):
        pixels = features // channels
        # how the pixels lie does not matter: both unroll them row by row
        shape = channels, *_nearly_square(pixels)
        reordered = np.moveaxis(torch.reshape(n, *shape), 1, -1).reshape(n, features)
        if np.abs(reordered - flax).max() <= PROOF_BOUND * np.abs(flax).max():
            return shape
    return None


def _nearly_square(pixels: int) -> tuple[int, int]:
    height = next(size for size in range(math.isqrt(pixels), 0, -1) if pixels % size == 0)
    return height, pixels // height


def table(report: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Which tensor is which. Column names (`>` for numbers) and lines."""
    lines = []
    for row in report["tensors"]:
        shape = " x ".join(map(str, row["shape"])) or "one number"
        gap = "statistics" if row["gradient_gap"] is None else f"{row['gradient_gap']:.1e}"
        lines.append((row["torch"], row["flax"], shape, gap))
    return ("PyTorch", "Flax", "shape in Flax", "gradient's gap>"), lines


def sentence(report: dict[str, Any]) -> str:
    gaps, first = report["gaps"], report["first_difference"]
    counted = f"{report['parameters']:,} parameters in {len(report['tensors'])} tensors"
    if first is None:
        return (
            f"The two networks are one: {counted}; of one batch in float64, activations within {gaps['forward']:.1e}, "
            f"gradients within {gaps['backward']:.1e} (bound {report['bound']:g} of a tensor's largest)."
        )
    return f"The two networks differ: {counted}."
