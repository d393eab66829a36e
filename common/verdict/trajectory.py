"""Two runs compared along their steps: the batches, the series of each range of steps, and the
parameters now and then."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable

import numpy as np

from lockstep.common.protocol import Arrays
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record, windows
from lockstep.common.verdict.check import BATCH, MEAN, Check
from lockstep.common.verdict.distances import (
    abs_differences,
    magnitude,
    max_tensor_difference,
    scalar_gap,
    weights_distance,
)
from lockstep.common.verdict.statistics import (
    EXPLODED,
    FLIP_SHARE,
    PROOF_BOUND,
    between_and_within,
    bound,
    distances_of,
    nearest_twin,
    smaller_spread,
)

# What a run is compared with of its own side.
OWN_TWIN, AGAIN = "its nearest twin", "the same run again"
MEAN_STEPS = 10  # the mean loss of a range of steps is compared where it has so many steps


def check_trajectory(a: Ensemble, b: Ensemble, finished: bool = True) -> list[Check]:
    """Compare the series of two runs in growing ranges of steps, since the spread grows by orders
    of magnitude. In float64, compare each run with its own twins, too.

    Args:
        finished: whether `Record.final` is the state after the last of these steps.
    """
    if a.run.steps == 0:
        return []
    checks = [check_batches(a.run, b.run)]
    for quantity, stage in (("lr", "update"), ("loss", "loss"), ("gradient_norm", "backward")):
        checks += check_series(a, b, quantity, stage, operator.attrgetter(quantity))
    checks += check_means(a, b, "loss", operator.attrgetter("loss"))
    checks += check_replicate(a, b) + check_replicate(b, a)
    return checks + check_parameters(a, b, finished)


def check_series(
    a: Ensemble, b: Ensemble, quantity: str, stage: str, of: Callable[[Record], np.ndarray]
) -> list[Check]:
    """One quantity in growing ranges of steps; in float64, each run with its own twins, too.

    Args:
        of: its values, float64 (steps,), in a record.
    """
    spans = [slice(start, stop) for start, stop in windows(a.run.steps)]
    checks = []
    for span, following in zip(spans, [*spans[1:], *spans[-1:]], strict=True):
        checks.append(_check_range(a, b, quantity, stage, span, following, of))
        if quantity != "lr" and a.run.dtype == "float64":
            own = (_check_own_twins(side, quantity, stage, span, of) for side in (a, b))
            checks += [check for check in own if check is not None]
    return checks


def check_means(
    a: Ensemble, b: Ensemble, quantity: str, of: Callable[[Record], np.ndarray]
) -> list[Check]:
    """The means of a loss over ranges of steps, in every precision but float64.

    Args:
        of: as of `check_series`.
    """
    if a.run.dtype == "float64":
        return []
    spans = [slice(start, stop) for start, stop in windows(a.run.steps)]
    return [
        check_scalar(
            a,
            b,
            span.stop - 1,
            "loss",
            f"{MEAN}{quantity}",
            lambda record, span=span: float(of(record)[span].mean()),
            span,
            most=max(magnitude(of(record)[: span.stop]) for record in (a.run, b.run)),
        )
        for span in spans
        if span.stop - span.start >= MEAN_STEPS
    ]


def _check_range(
    a: Ensemble,
    b: Ensemble,
    quantity: str,
    stage: str,
    span: slice,
    following: slice,
    of: Callable[[Record], np.ndarray],
) -> Check:
    """One quantity over one range of steps.

    Rounding stays small until it flips one ReLU or one pooling window, and then explodes, in one
    pair of runs sooner than in another. So a range may use the spread of the range after it, and of
    all those before.
    """
    dtype = a.run.dtype
    series = [[of(record) for record in side.records] for side in (a, b)]
    between = [abs_differences(x, y) for x in series[0] for y in series[1]]
    within = [
        [abs_differences(x, y) for x, y in itertools.combinations(side, 2)] for side in series
    ]
    gap, spread = distances_of(
        [float(differences[span].max()) for differences in between],
        [[_largest_finite(d[: span.stop]) for d in side] for side in within],
    )
    allowed_spread = spread
    # in float64 it grows at the same pace in all runs
    if dtype != "float64" and spread is not None:
        allowed_spread = smaller_spread(
            [[_largest_finite(d[: following.stop]) for d in side] for side in within]
        )
    scale = max(magnitude(series[0][0][span]), magnitude(series[1][0][span]))
    if quantity == "lr":  # no network's rounding is in it, but plateau's decisions are
        limit = PROOF_BOUND * scale + (allowed_spread or 0.0)
    else:
        limit = bound(dtype, allowed_spread, max(1.0, scale))
    outside = np.flatnonzero(between[0][span] > limit)
    place = int(outside[0]) if len(outside) else int(np.argmax(between[0][span]))
    values = float(series[0][0][span][place]), float(series[1][0][span][place])
    step = span.start + place
    so_far = max(magnitude(series[0][0][: span.stop]), magnitude(series[1][0][: span.stop]))
    return Check(
        step,
        stage,
        quantity,
        gap,
        limit,
        spread,
        values,
        span.start,
        span.stop,
        most=so_far if quantity != "lr" else math.inf,
    )


def _check_own_twins(
    side: Ensemble, quantity: str, stage: str, span: slice, of: Callable[[Record], np.ndarray]
) -> Check | None:
    """A run among its own twins: as far from the nearest of them as they are from each other.

    A fault in the run alone does not show between the closest runs of the two sides. In float64
    only: in the other precisions one run in six leaves both of its twins where rounding
    flips a ReLU in it alone (6 of 38 clean pairs, by up to 10,000 times the bound).
    """
    run, *twins = (of(record) for record in side.records)

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        return float(abs_differences(x, y)[: span.stop].max())

    found = nearest_twin(run, twins, distance)
    if found is None:
        return None
    limit = bound(side.run.dtype, found.within, max(1.0, magnitude(run[span])))
    nearest = min(twins, key=functools.partial(distance, run))
    return _own_check(side, quantity, stage, span, run, nearest, limit, OWN_TWIN)


def check_replicate(side: Ensemble, other: Ensemble) -> list[Check]:
    """A run and the same run again: no further apart than the runs of the side that spreads less.

    They should be equal to the bit (see `first_irreproducible_step`); where several threads add in
    any order, they need not be.
    """
    if side.replicate is None:
        return []
    span, checks = slice(0, side.run.steps), []
    for quantity, stage in (("loss", "loss"), ("gradient_norm", "backward")):
        series = [[getattr(record, quantity) for record in of.records] for of in (side, other)]
        spread = smaller_spread(
            [
                [_largest_finite(abs_differences(x, y)) for x, y in itertools.combinations(of, 2)]
                for of in series
            ]
        )
        limit = bound(side.run.dtype, spread, max(1.0, magnitude(series[0][0])))
        run, again = series[0][0], getattr(side.replicate, quantity)
        checks.append(_own_check(side, quantity, stage, span, run, again, limit, AGAIN))
    return checks


def first_irreproducible_step(side: Ensemble) -> int | None:
    """The first step at which a run and the same run again are not equal to the bit; None if they
    are, or it was not trained again."""
    if side.replicate is None:
        return None
    run, again = side.run, side.replicate
    unequal = (
        (run.loss.view(np.int64) != again.loss.view(np.int64))
        | (run.gradient_norm.view(np.int64) != again.gradient_norm.view(np.int64))
        | (run.batch_digests != again.batch_digests)
    )
    return int(np.argmax(unequal)) if unequal.any() else None


def exploded_together_at(a: Ensemble, b: Ensemble) -> int | None:
    """The step from which on rounding alone moves the loss by more than `EXPLODED` times the first
    one, on both sides in one range of steps or in the next; None if it does not."""
    starts = [_exploded_at(side) for side in (a, b)]
    if None in starts:
        return None
    ranges = [
        index
        for at in starts
        for index, (start, stop) in enumerate(windows(a.run.steps))
        if at is not None and start <= at < stop
    ]
    return min(at for at in starts if at is not None) if max(ranges) - min(ranges) <= 1 else None


def _exploded_at(side: Ensemble) -> int | None:
    """The first step at which the losses of two runs of one side, finite both, are so far apart."""
    losses = [record.loss for record in side.records]
    limit = EXPLODED * max(1.0, magnitude(side.run.loss[:1]))
    apart = np.zeros(side.run.steps, bool)
    for x, y in itertools.combinations(losses, 2):
        differences = abs_differences(x, y)
        apart |= np.isfinite(differences) & (differences > limit)
    return int(np.argmax(apart)) if apart.any() else None


def _own_check(
    side: Ensemble,
    quantity: str,
    stage: str,
    span: slice,
    run: np.ndarray,
    other: np.ndarray,
    limit: float,
    what: str,
) -> Check:
    """A run compared with another one of its own side, up to the end of a range of steps."""
    name = side.run.backend
    differences = abs_differences(run, other)[: span.stop]
    outside = np.flatnonzero(differences > limit)
    step = int(outside[0]) if len(outside) else span.start
    return Check(
        step,
        stage,
        f"{quantity} of {name} and of {what}",
        float(differences.max()),
        limit,
        None,
        (float(run[step]), float(other[step])),
        span.start,
        span.stop,
        sides=(name, what),
    )


def _largest_finite(differences: np.ndarray) -> float:
    """0 if none is: a twin's that is not finite explains nothing."""
    return float(np.max(differences, initial=0.0, where=np.isfinite(differences)))


def check_batches(first: Record, second: Record) -> Check:
    """Every step's batch, as the backends held it: the first step where they are not the same."""
    different = np.flatnonzero(first.batch_digests != second.batch_digests)
    step = int(different[0]) if len(different) else 0
    return Check(step, "data", BATCH, float(len(different) > 0), 0.0)


def check_parameters(a: Ensemble, b: Ensemble, finished: bool = True) -> list[Check]:
    """The parameters along the run and after it: tensor by tensor in float64, else their Euclidean
    distance.

    Args:
        finished: as in `check_trajectory`.
    """
    first, second = a.run, b.run
    records = [*a.records, *b.records]
    steps = sorted(
        {int(key.partition("/")[0]) for key in first.parameter_history | second.parameter_history}
    )
    moments = [(step, {id(r): parameters_at(r, step) for r in records}) for step in steps]
    if finished:
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
                weights_distance(_started_from(record, weights[id(record)]), weights[id(record)])
                for record in (first, second)
            ]
            limit = bound(
                first.dtype, spread, norm, FLIP_SHARE * min(distance_from_start), stored=True
            )
            furthest = sum(distance_from_start)  # as far apart as in opposite directions
            checks.append(
                Check(step - 1, "update", "all parameters", gap, limit, spread, most=furthest)
            )
    return checks


def _started_from(record: Record, weights: Arrays) -> Arrays:
    """The initial values of these tensors."""
    return {name: array for name, array in record.weights.items() if name in weights}


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
    most: float | None = None,
) -> Check:
    """One number of each run; `extra` is added to its bound. `most` is `Check.most`; None: the
    largest loss."""
    gap, spread = between_and_within(a.records, b.records, lambda x, y: scalar_gap(of(x), of(y)))
    values = of(a.run), of(b.run)
    limit = bound(a.run.dtype, spread, max(1.0, magnitude(np.array(values)))) + extra
    start, stop = (span.start, span.stop) if span else (None, None)
    losses = [magnitude(record.loss[:stop]) for record in (a.run, b.run)]
    largest = max(losses) if most is None else most
    largest = max(largest, magnitude(np.array(values)))
    return Check(step, stage, name, gap, limit, spread, values, start, stop, most=largest)
