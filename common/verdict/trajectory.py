"""What was measured along two runs, compared over ranges of steps, and the parameters now and
then."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from lockstep.common.protocol import Arrays
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record, windows
from lockstep.common.verdict.check import Check
from lockstep.common.verdict.distances import (
    abs_differences,
    magnitude,
    max_tensor_difference,
    scalar_gap,
    weights_distance,
)
from lockstep.common.verdict.statistics import (
    FLIP_SHARE,
    PROOF_BOUND,
    between_and_within,
    bound,
    distances_of,
)

MEAN_STEPS = 10  # the mean loss of a range of steps is compared where it has so many steps


def check_trajectory(a: Ensemble, b: Ensemble) -> list[Check]:
    """What was measured along the run, in growing ranges of steps, as the spread grows by
    magnitudes.

    Rounding stays small until it flips one ReLU or one pooling window, and then explodes, in one
    pair of runs sooner than in another. So a range may use the spread of the range after it, and of
    all those before.
    """
    first = a.run
    spans = [slice(start, stop) for start, stop in windows(first.steps)]
    checks = []
    for quantity, stage in (("lr", "update"), ("loss", "loss"), ("gradient_norm", "backward")):
        series = [[getattr(record, quantity) for record in side.records] for side in (a, b)]
        between = [abs_differences(x, y) for x in series[0] for y in series[1]]
        within = [
            abs_differences(x, y) for side in series for x, y in itertools.combinations(side, 2)
        ]
        within = [np.where(np.isfinite(differences), differences, 0.0) for differences in within]
        for span, following in zip(spans, [*spans[1:], spans[-1]], strict=True):
            gap, spread = distances_of(
                [float(differences[span].max()) for differences in between],
                [float(differences[: span.stop].max()) for differences in within],
            )
            allowed_spread = spread
            # in float64 it grows at the same pace in all runs
            if first.dtype != "float64" and within:
                allowed_spread = max(
                    float(differences[: following.stop].max()) for differences in within
                )
            scale = max(magnitude(series[0][0][span]), magnitude(series[1][0][span]))
            if quantity == "lr":  # no network's rounding is in it, but plateau's decisions are
                limit = PROOF_BOUND * scale + (allowed_spread or 0.0)
            else:
                limit = bound(first.dtype, allowed_spread, max(1.0, scale))
            outside = np.flatnonzero(between[0][span] > limit)
            place = int(outside[0]) if len(outside) else int(np.argmax(between[0][span]))
            values = float(series[0][0][span][place]), float(series[1][0][span][place])
            step = span.start + place
            checks.append(
                Check(step, stage, quantity, gap, limit, spread, values, span.start, span.stop)
            )
    for span in spans:
        if span.stop - span.start >= MEAN_STEPS and first.dtype != "float64":
            checks.append(
                check_scalar(
                    a,
                    b,
                    span.stop - 1,
                    "loss",
                    "mean loss",
                    lambda r, s=span: float(r.loss[s].mean()),
                    span,
                )
            )
    return checks + check_parameters(a, b)


def check_parameters(a: Ensemble, b: Ensemble) -> list[Check]:
    """The parameters along the run and after it: tensor by tensor in float64, else their Euclidean
    distance."""
    first, second = a.run, b.run
    records = [*a.records, *b.records]
    steps = sorted(
        {int(key.partition("/")[0]) for key in first.parameter_history | second.parameter_history}
    )
    moments = [(step, {id(r): parameters_at(r, step) for r in records}) for step in steps]
    moments.append((first.steps, {id(r): r.final for r in records}))
    checks = []
    for step, weights in moments:
        ours, theirs = weights[id(first)], weights[id(second)]
        if first.dtype == "float64":
            for name in sorted(ours | theirs):
                _, values = max_tensor_difference(ours.get(name), theirs.get(name))
                gap, spread = between_and_within(
                    a.records,
                    b.records,
                    lambda x, y, n=name, w=weights: max_tensor_difference(
                        w[id(x)].get(n), w[id(y)].get(n)
                    )[0],
                )
                scale = max(magnitude(ours.get(name)), magnitude(theirs.get(name)))
                checks.append(
                    Check(
                        step - 1,
                        "update",
                        name,
                        gap,
                        bound("float64", spread, scale),
                        spread,
                        values,
                    )
                )
        else:
            gap, spread = between_and_within(
                a.records, b.records, lambda x, y, w=weights: weights_distance(w[id(x)], w[id(y)])
            )
            norm = float(
                np.sqrt(sum(np.sum(np.square(array.astype(np.float64))) for array in ours.values()))
            )
            distance_from_start = [
                weights_distance(record.weights, weights[id(record)]) for record in (first, second)
            ]
            limit = bound(
                first.dtype, spread, norm, FLIP_SHARE * min(distance_from_start), stored=True
            )
            checks.append(Check(step - 1, "update", "all parameters", gap, limit, spread))
    return checks


def parameters_at(record: Record, step: int) -> Arrays:
    """The parameters after `step` steps."""
    prefix = f"{step}/"
    return {
        key.removeprefix(prefix): array
        for key, array in record.parameter_history.items()
        if key.startswith(prefix)
    }


def check_scalar(
    a: Ensemble,
    b: Ensemble,
    step: int,
    stage: str,
    name: str,
    of: Callable[[Record], float],
    span: slice | None = None,
    extra: float = 0.0,
) -> Check:
    """One number of each run; `extra` is added to its bound."""
    gap, spread = between_and_within(a.records, b.records, lambda x, y: scalar_gap(of(x), of(y)))
    values = of(a.run), of(b.run)
    limit = bound(a.run.dtype, spread, max(1.0, magnitude(np.array(values)))) + extra
    start, stop = (span.start, span.stop) if span else (None, None)
    return Check(step, stage, name, gap, limit, spread, values, start, stop)
