"""Checks that two networks compute the same: lists their tensors next to each other, and compares
one step of both."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.model import pair
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.model.layers import ModuleNames, module_names
from lockstep.common.protocol import STAGES, Arrays, Backend, Snapshot
from lockstep.common.runs.record import Record
from lockstep.common.verdict import locate
from lockstep.common.verdict.arithmetic import compare_one_step
from lockstep.common.verdict.check import Check
from lockstep.common.verdict.comparison import Location, divergence
from lockstep.common.verdict.distances import magnitude, max_tensor_difference
from lockstep.common.verdict.failures import failures
from lockstep.common.verdict.relations import REORDERED
from lockstep.common.verdict.statistics import PROOF_BOUND

AT_ZERO = (
    "an activation whose derivative at 0 differs: that of `jnp.maximum(x, 0)` is one half, that of a "
    "`relu` is 0; biases that start at zero show it"
)


@dataclass(frozen=True)
class TensorPair:
    """One tensor and its names in both modules."""

    name: str  # canonical
    torch: str
    flax: str
    shape: tuple[int, ...]  # canonical
    gradient_gap: float | None  # None for statistics, which have no gradient


@dataclass(frozen=True)
class PairCheck:
    """How two networks compare."""

    tensors: tuple[TensorPair, ...]
    parameters: int  # numbers that are trained
    gaps: Mapping[str, float]  # the largest, by stage
    bound: float  # relative to a tensor's largest entry
    first_difference: Location | None

    def to_json(self) -> dict[str, Any]:
        first = self.first_difference
        return dataclasses.asdict(self) | {
            "first_difference": None if first is None else first.to_json()
        }


def measure(
    torch: Backend,
    flax: Backend,
    config: Config,
    dataset: Dataset,
    own: Arrays | None = None,
) -> PairCheck:
    """Compare one step of both backends from the same weights on the run's first batch, in float64,
    and one evaluation.

    Args:
        torch, flax: of the same tensors; see `checks.check_same`.
        own: the initial tensors of PyTorch's module; None: weights that Lockstep draws. A bias
            that starts at zero shows the derivative of an activation there; a scale that starts at
            zero hides the layers before it.
    """
    shapes, sides = torch.shapes(), (torch, flax)
    indices = next(data.batch_indices(config, len(dataset.train_images)))
    images, labels = (
        data.normalise(dataset.train_images[indices], np.float64),
        dataset.train_labels[indices],
    )
    drawn = initial_weights(shapes, config.seed, "float64") if own is None else own
    start = Snapshot.start({name: array.astype(np.float64) for name, array in drawn.items()})

    records, checks = compare_one_step(sides, config, dataset, start, images, labels)
    evaluations = [side.evaluate(side.init(start), images, labels) for side in sides]
    losses = [evaluation.loss for evaluation in evaluations]
    modules = {side.name: module_names(side) for side in sides}
    native = {name: module.native for name, module in modules.items()}
    gap, limit = abs(losses[0] - losses[1]), PROOF_BOUND * max(1.0, abs(losses[0]))
    checks.append(Check(0, "evaluate", "test loss", gap, limit, values=(losses[0], losses[1])))
    outputs = [evaluation.predictions for evaluation in evaluations]
    if outputs[0].dtype.kind == "f":
        gap, values = max_tensor_difference(*outputs)
        limit = PROOF_BOUND * max(map(magnitude, outputs))
        checks.append(Check(0, "evaluate", "outputs", gap, limit, values=values))
    failed = [check for check in checks if not check.agrees]
    gradients = {check.tensor: check.gap for check in checks if check.stage == "backward"}
    return PairCheck(
        tensors=tuple(
            TensorPair(
                name, native["torch"][name], native["flax"][name], shape, gradients.get(name)
            )
            for name, shape in shapes.items()
        ),
        parameters=sum(math.prod(shapes[name]) for name in gradients),
        gaps={
            stage: max((check.gap for check in checks if check.stage == stage), default=0.0)
            for stage in STAGES
        },
        bound=PROOF_BOUND,
        first_difference=describe_difference(
            checks, records, modules, own is not None, pair.load(config.model).flattened
        )
        if failed
        else None,
    )


def describe_difference(
    checks: list[Check],
    records: list[Record],
    modules: Mapping[str, ModuleNames],
    own: bool = False,
    declared: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Location:
    """Where the two networks differ, and the usual cause, or the line that the pair lacks.

    Args:
        checks: in causal order; one fails.
        modules: by backend.
        own: whether both started from PyTorch's own weights.
        declared: `Pair.flattened`.
    """
    weights = "PyTorch's own initial weights" if own else "the same weights"
    names, check = list(modules), next(check for check in checks if not check.agrees)
    one, other = tensors = locate.tensors_at(
        dict(zip(names, records, strict=True)), 0, check.stage, check.tensor
    )
    found = locate.describe(
        divergence(check, names),
        tensors,
        f"one step of both from {weights}",
        failures(checks, check.step, check.stage, records[0].layers),
        modules,
    )
    if own and check.stage == "backward":  # from drawn weights, gradients agree
        return dataclasses.replace(found, causes=(AT_ZERO, *found.causes[:1]))
    layer = check.tensor.removeprefix(pair.INPUT_PREFIX)
    kernel = modules[names[0]].native.get(f"{layer}.kernel")
    if layer == check.tensor or kernel is None or one is None or other is None:
        return found
    name = kernel.rpartition(".")[0]
    if name in declared and found.pattern == REORDERED:
        cause = (
            f"the pair's flattened says {declared[name]} of {name}: give the channels, height and width "
            "before the flatten, or leave it out if both sides unroll alike"
        )
    elif name not in declared and (shape := flatten_shape(one, other)) is not None:
        cause = "a flatten, which unrolls channels first in PyTorch; add to the pair: "
        cause += f"flattened={ {name: shape} }"
    else:
        return found
    return dataclasses.replace(found, causes=(cause,), fixes=())


def flatten_shape(torch: np.ndarray, flax: np.ndarray) -> tuple[int, int, int] | None:
    """The (channels, height, width) that PyTorch flattened channels first and Flax channels last;
    None if there is no such shape.

    Args:
        torch, flax: (n, features), the inputs of a dense layer.
    """
    if torch.ndim != 2 or torch.shape != flax.shape:
        return None
    n, features = torch.shape
    for channels in (size for size in range(2, features) if features % size == 0):
        pixels = features // channels
        # The height does not matter: both flatten pixels row by row.
        shape = channels, *_nearly_square(pixels)
        reordered = np.moveaxis(torch.reshape(n, *shape), 1, -1).reshape(n, features)
        if np.abs(reordered - flax).max() <= PROOF_BOUND * np.abs(flax).max():
            return shape
    return None


def _nearly_square(pixels: int) -> tuple[int, int]:
    height = next(size for size in range(math.isqrt(pixels), 0, -1) if pixels % size == 0)
    return height, pixels // height


def table(report: PairCheck) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The tensors and their names. Column names (`>` for numbers) and lines."""
    lines = []
    for row in report.tensors:
        shape = " x ".join(map(str, row.shape)) or "one number"
        gap = "statistics" if row.gradient_gap is None else f"{row.gradient_gap:.1e}"
        lines.append((row.torch, row.flax, shape, gap))
    return ("PyTorch", "Flax", "shape in Flax", "gradient's gap>"), lines


def sentence(report: PairCheck, placed: bool = True) -> str:
    """The result in plain words.

    Args:
        placed: whether the place of a difference stands elsewhere.
    """
    size = f"{report.parameters:,} parameters in {len(report.tensors)} tensors"
    if report.first_difference is not None:
        where = "" if placed else f"; first in {report.first_difference.divergence.message}"
        return f"The two networks differ: {size}{where}."
    return (
        f"The two networks compute the same: {size}; for one batch in float64, activations within "
        f"{report.gaps['forward']:.1e}, gradients within {report.gaps['backward']:.1e} (bound "
        f"{report.bound:g} of a tensor's largest entry)."
    )
