"""The first steps of two runs, compared tensor by tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np

from lockstep.common.dtypes import compute_dtype
from lockstep.common.optimizers import FROM_PAIR, SLOTS
from lockstep.common.protocol import STAGES, split_slot
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record
from lockstep.common.verdict.check import Check
from lockstep.common.verdict.distances import (
    magnitude,
    max_tensor_difference,
    tensor_quantile_difference,
)
from lockstep.common.verdict.statistics import (
    BULK,
    FLIP_SHARE,
    MAX_NEAR_ZERO,
    NEAR_ZERO_ULP,
    PROOF_BOUND,
    REPLAY_BOUND,
    SATURATED_ULP,
    between_and_within,
    bound,
)

STATISTICS = (".mean", ".var")  # running ones, of what was computed


Order = Callable[[str], tuple[int | str, ...]]  # sorts "<step>/<stage>/<tensor>"


def check_first_steps(
    a: Ensemble, b: Ensemble, replayed: bool = False, order: Order | None = None
) -> list[Check]:
    """Data and initial weights, which must be the same bits; then the first steps, tensor by
    tensor.

    Args:
        a, b: the runs, their twins, and their short twins.
        replayed: whether it is a later step, taken again from one state: then twins set the bound
            in float64, too, as short twins always do, and it is no less than `REPLAY_BOUND`. At the
            start of a run they are seldom needed: where a gradient cancels, such as that of a scale
            before a batch norm, which 1 ulp in the weights moves by 6.5e-12 of its largest. Late in
            one, where p - y cancels in a well-fitted network's gradient, rounding exceeds 1e-12 of
            what is left.
        order: of the checks of one step and stage; None: `causal_order`.
    """
    ask_twins = bool(a.run.dtype != "float64" or replayed or a.short_twins or b.short_twins)
    first, second = a.run, b.run
    sides = [[*side.records, *side.short_twins] for side in (a, b)]
    exact = first.dtype == "float64"
    epsilon = float(ml_dtypes.finfo(compute_dtype(first.dtype)).eps)
    near_zero = min(NEAR_ZERO_ULP * epsilon, MAX_NEAR_ZERO)
    largest_of = functools.cache(functools.partial(_stage_magnitude, first))
    checks = []
    for name in sorted(first.weights | second.weights):
        gap, values = max_tensor_difference(first.weights.get(name), second.weights.get(name))
        checks.append(Check(0, "weights", name, gap, 0.0, values=values))
    for key in sorted(first.first_steps | second.first_steps, key=order or causal_order(first)):
        step, stage, tensor = key.split("/", 2)
        tensors = first.first_steps.get(key), second.first_steps.get(key)
        if any(t is None for t in tensors) and _may_be_missing(first, stage, tensor):
            continue
        gap, values = max_tensor_difference(*tensors)
        if stage == "data":
            checks.append(Check(int(step), stage, tensor, gap, 0.0, values=values))
            continue
        spread = None
        if ask_twins:
            ours, theirs = ([record.first_steps.get(key) for record in side] for side in sides)
            gap, spread = between_and_within(
                ours, theirs, lambda x, y: max_tensor_difference(x, y)[0]
            )
        least, scale = sorted(map(magnitude, tensors))
        rest = near_zero * (largest := largest_of(step, stage, split_slot(tensor)[0]))
        if scale < rest:
            # Both are what is left of a sum that is zero, with either sign; one that is exactly zero
            # may be that of a frozen layer.
            scale, rest = largest, 2 * rest if least else 0.0
        else:
            rest = 0.0
        stored = stage == "update" and not split_slot(tensor)[0] and not tensor.endswith(STATISTICS)
        limit = bound(
            first.dtype,
            spread,
            scale,
            flip_allowance(first, second, int(step), stage, tensor),
            stored,
            REPLAY_BOUND if replayed else PROOF_BOUND,
        )
        if exact and stage == "backward" and least:
            rest = max(rest, SATURATED_ULP * epsilon * largest)
        limit = max(limit, rest)
        found = Check(int(step), stage, tensor, gap, limit, spread, values)
        if stage == "backward" and not exact:
            found = max(_bulk(sides, key, found, scale, rest), found, key=lambda c: c.bound_usage)
        checks.append(found)
    return sorted(checks, key=lambda r: (r.step, STAGES.index(r.stage)))


def _may_be_missing(record: Record, stage: str, tensor: str) -> bool:
    """Whether a correct run may lack the tensor: the activations of a layer that is the user's own
    on one side, or a slot of a pair's own optimizer."""
    own_slot = record.config.get("optimizer") == FROM_PAIR and split_slot(tensor)[0] != ""
    return stage == "forward" or (stage == "update" and own_slot)


def _bulk(sides: list[list[Record]], key: str, found: Check, scale: float, least: float) -> Check:
    """The median of a gradient's differences in place of the largest, and no allowance for flipped
    ReLUs.

    Reduced precision moves most entries of a gradient by up to some hundredths of a percent, which
    the allowance would cover; a flipped ReLU moves few of them by so much.
    """

    def median_gap(x: np.ndarray | None, y: np.ndarray | None) -> float:
        return tensor_quantile_difference(x, y, BULK)

    ours, theirs = ([record.first_steps.get(key) for record in side] for side in sides)
    gap, spread = between_and_within(ours, theirs, median_gap)
    limit = max(bound(sides[0][0].dtype, spread, scale), least)
    return replace(found, gap=gap, bound=limit, spread=spread, measure="median")


def _stage_magnitude(record: Record, step: str, stage: str, slot: str) -> float:
    """The largest gradient of a step, or the largest tensor of a slot of the optimizer's state; 0 for
    all else."""
    prefix = f"{step}/backward/" if stage == "backward" else f"{step}/update/{slot} of "
    if stage not in ("backward", "update") or (stage == "update" and not slot):
        return 0.0
    found = [array for key, array in record.first_steps.items() if key.startswith(prefix)]
    return max(map(magnitude, found), default=0.0)


def flip_allowance(first: Record, second: Record, step: int, stage: str, tensor: str) -> float:
    """By how much a ReLU flipped by rounding may change a tensor of the first steps."""
    if stage in ("forward", "loss"):
        return FLIP_SHARE * min(_loss_per_step(record, step) for record in (first, second))
    if stage == "backward":
        return FLIP_SHARE * magnitude(first.first_steps.get(f"{step}/backward/{tensor}"))
    # An update may differ by what its gradients were seen to differ, and no more.
    slot, parameter = split_slot(tensor)
    keys = [f"{earlier}/backward/{parameter}" for earlier in range(step + 1)]
    seen = sum(
        max_tensor_difference(first.first_steps.get(key), second.first_steps.get(key))[0]
        for key in keys
    )
    if slot:
        factor = 1.0
    elif len(first.lr) and _is_sgd(first):
        factor = magnitude(first.lr[: step + 1])
    else:
        factor = _update_per_gradient(first, step, parameter)
    return factor * seen if math.isfinite(seen) else 0.0


def _is_sgd(record: Record) -> bool:
    return record.config.get("optimizer", "sgd") == "sgd"


def _update_per_gradient(record: Record, step: int, parameter: str) -> float:
    """By how much the updates changed a parameter, by what its gradients were: the learning rate
    of SGD, and what stands in its place for other optimizers."""
    before, after = (
        record.weights.get(parameter),
        record.first_steps.get(f"{step}/update/{parameter}"),
    )
    gradients = [record.first_steps.get(f"{s}/backward/{parameter}") for s in range(step + 1)]
    size = min((magnitude(g) for g in gradients if g is not None), default=0.0)
    change, _ = max_tensor_difference(before, after)
    return change / size if size and math.isfinite(change) else 0.0


def _loss_per_step(record: Record, steps: int) -> float:
    """How much one of the first `steps` updates may move the loss, to first order: lr g^2, kept on
    by momentum; where it is not SGD, or these are not known, what the first update moved times its
    gradient."""
    if not len(record.gradient_norm) or not _is_sgd(record):
        return _first_order_change(record) if steps else 0.0
    kept = 1 / (1 - min(record.config["momentum"], 0.99))
    with np.errstate(over="ignore", invalid="ignore"):
        return magnitude(kept * record.lr[:steps] * record.gradient_norm[:steps] ** 2)


def _first_order_change(record: Record) -> float:
    """|sum of gradient times change| over the parameters, of the first update."""
    total = 0.0
    for name, before in record.weights.items():
        after = record.first_steps.get(f"0/update/{name}")
        gradient = record.first_steps.get(f"0/backward/{name}")
        if after is not None and gradient is not None and after.shape == gradient.shape:
            with np.errstate(over="ignore", invalid="ignore"):
                total += float(np.sum((after - before) * gradient))
    return magnitude(np.array([total]))


def causal_order(record: Record) -> Order:
    """Sorts "<step>/<stage>/<tensor>" as a difference travels: forward through the layers, backward
    against them."""
    layers = {tensor: place for place, tensor in enumerate(record.layers)}

    def position(key: str) -> tuple[int, int, int, str]:
        step, stage, tensor = key.split("/", 2)
        slot, parameter = split_slot(tensor)
        layer = parameter.rpartition(".")[0]
        place = {"forward": layers.get(tensor, 0), "backward": -layers.get(layer, 0)}.get(stage, 0)
        return (
            int(step),
            STAGES.index(stage),
            place,
            f"{SLOTS.index(slot) if stage == 'update' and slot in SLOTS else len(SLOTS)} {tensor}",
        )  # what the optimizer keeps first

    return position
