"""Are two runs the same run? Gaps, bounds, and a verdict with the first place where they diverge.

Two runs are compared check by check, in the order in which a difference travels: the data, the
initial weights, then for the first steps every activation, the loss, every gradient, and the
updated momentum and parameters; then the learning rate, loss and gradient norm of every step and
the parameters now and then; then the test loss, the predictions and each class.

In float64 nothing is left open: every check has a bound near rounding. In the other precisions two
correct programs drift apart chaotically, so the bound comes from the runs themselves and their
twins: see `lockstep.common.verdict.statistics`. Few twins may all miss what rounding can do, and
float64 has none; so where runs diverge after the first step (in float64, the second), more twins
are trained before the verdict stands (see `lockstep.common.verdict.judge`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from lockstep.common.config import BACKENDS
from lockstep.common.dtypes import compute_dtype
from lockstep.common.errors import RecordError
from lockstep.common.optimizers import FROM_PAIR
from lockstep.common.protocol import STAGES, split_slot
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record
from lockstep.common.system.storage import JsonObject
from lockstep.common.verdict.check import Check
from lockstep.common.verdict.comparison import (
    Comparison,
    Rule,
    RunSummary,
    TwinSummary,
    common_nonfinite_step,
    divergence,
)
from lockstep.common.verdict.distances import max_difference
from lockstep.common.verdict.evaluation import (
    check_evaluation,
    class_accuracy,
    class_differences,
    equal_predictions,
    has_classes,
)
from lockstep.common.verdict.first_steps import check_first_steps
from lockstep.common.verdict.rank_checks import check_ranks, ranks_location
from lockstep.common.verdict.statistics import (
    COUNT_FLOOR,
    FLIP_SHARE,
    FLOOR_ULP,
    PROOF_BOUND,
    SEPARATION,
    SEPARATION_IMAGES,
)
from lockstep.common.verdict.trajectory import (
    check_trajectory,
    exploded_together_at,
    first_irreproducible_step,
)


def compare(ensembles: Mapping[str, Ensemble], labels: np.ndarray) -> Comparison:
    """Compare two runs in one precision (or summarise one).

    Args:
        ensembles: by backend, one or two; in every precision but float64, two need twins.
        labels: int64 (test images,): the true classes; of a pair that predicts none, its targets.

    Raises:
        RecordError: if the records cannot be compared: of other runs, of no steps, or without
            twins.
    """
    for ensemble in ensembles.values():
        check_twins(ensemble.run, ensemble.twins)
    runs = {name: ensemble.run for name, ensemble in ensembles.items()}
    sides = list(ensembles.values())
    a, b = sides[0], sides[-1]  # the same, if there is one only
    # A side is called by its backend, and more where two are of one.
    if any(not n.startswith(r.backend) or r.twin is not None for n, r in runs.items()):
        raise RecordError("a record is not the run that it is taken for: run both backends again")
    check_comparable(a.run, b.run)
    single = Comparison(
        dtype=a.run.dtype,
        steps=a.run.steps,
        verdict="single",
        runs={name: _summary(record, labels) for name, record in runs.items()},
        predictions_total=len(labels),
        rule={"rule": "nothing was compared"},
        exchanged={
            name: list(layers)
            for name, record in runs.items()
            if (layers := record.environment.get("exchanged"))
        },
    )
    of_ranks = check_ranks(runs.values())
    if len(runs) == 1:
        return _with_failures(single, of_ranks, of_ranks) if of_ranks else single
    number = len(a.twins) + len(b.twins)
    if single.dtype != "float64" and number == 0:
        raise RecordError(
            f"nothing says how far {single.dtype} runs may drift apart: run with --twins 1 or more"
        )

    together = diverged_at(a, b)
    checks = of_ranks + _all_checks(a, b, labels, together)
    compared = replace(
        single,
        verdict="agree" if together is None else "diverged",
        diverged_at=together,
        not_reproducible={
            name: step
            for name, side in ensembles.items()
            if (step := first_irreproducible_step(side)) is not None
        },
        rule=_rule(single.dtype, number),
        unmatched_slots=_unmatched_slots(runs),
        max_loss_gap=max_difference(a.run.loss, b.run.loss)[0],
        predictions_equal=equal_predictions(a.run, b.run) if has_classes(a.run) else None,
        twins={
            name: tuple(_twin_summary(side.run, twin) for twin in side.twins)
            for name, side in ensembles.items()
        },
        short_twins={name: len(side.short_twins) for name, side in ensembles.items()},
        class_differences=class_differences(a, b, labels) if has_classes(a.run) else None,
    )
    return _with_failures(compared, checks, of_ranks)


def _unmatched_slots(runs: Mapping[str, Record]) -> dict[str, list[str]]:
    """By side, the slots of a pair's own optimizer that the other side does not have."""
    slots = {
        name: {split_slot(key.split("/", 2)[2])[0] for key in record.first_steps}
        for name, record in runs.items()
        if record.config.get("optimizer") == FROM_PAIR
    }
    shared = set.intersection(*slots.values()) if slots else set()
    return {name: sorted(own - shared) for name, own in slots.items() if own - shared}


def _with_failures(
    comparison: Comparison, checks: Sequence[Check], of_ranks: Sequence[Check]
) -> Comparison:
    """A comparison with all that was checked; it disagrees if a check fails.

    Args:
        of_ranks: those of `checks` that are about the processes of one run.
    """
    # Within an update the learning rate comes first; else, of one step and stage, the order is that
    # of the checks.
    failures = [check for check in checks if not check.agrees]
    failures.sort(key=lambda check: (check.step, STAGES.index(check.stage), check.tensor != "lr"))
    found = replace(
        comparison,
        checks=tuple(check for check in checks if check.start is None),
        windows=tuple(check for check in checks if check.start is not None),
        score=max(check.bound_usage for check in checks),
    )
    if not failures:
        return found
    names = list(comparison.runs) if len(comparison.runs) == 2 else BACKENDS
    first = divergence(failures[0], names)
    return replace(
        found,
        verdict="disagree",
        first_divergence=first,
        location=ranks_location(first, of_ranks),
    )


def diverged_at(a: Ensemble, b: Ensemble) -> int | None:
    """The step at which both runs are not finite; None if they do not blow up together.

    Close to the largest number of a precision, rounding alone decides which step overflows, and
    whether one does. So below float64 the steps may differ if a run of one side shares its step with
    one of the other, or if the twins of both sides explode (`exploded_together_at`). Seen in bfloat16 at lr 1000: a loss of 1.4e29, and one that was not
    finite; at lr 10: 1.6e34, and 13.6, while twins of either side were 3e31 apart.
    """
    steps = [side.run.first_nonfinite for side in (a, b)]
    common = common_nonfinite_step(steps)
    if common is not None or a.run.dtype == "float64":
        return common
    ours, theirs = ({record.first_nonfinite for record in side.records} for side in (a, b))
    found = [step for step in steps if step is not None]
    if len(found) == 2 and ours & theirs - {None}:
        return min(found)
    return exploded_together_at(a, b)


def _all_checks(
    a: Ensemble, b: Ensemble, labels: np.ndarray, diverged_at: int | None
) -> list[Check]:
    """Everything that is compared; up to `diverged_at`, where both runs diverge."""
    if diverged_at is None:
        return check_first_steps(a, b) + check_trajectory(a, b) + check_evaluation(a, b, labels)
    before = a.until(diverged_at), b.until(diverged_at)
    return check_first_steps(*before) + check_trajectory(*before, finished=False)


def _twin_summary(run: Record, twin: Record) -> TwinSummary:
    equal = equal_predictions(run, twin) if has_classes(run) else None
    return TwinSummary(max_difference(run.loss, twin.loss)[0], equal)


def check_comparable(first: Record, second: Record) -> None:
    """Raise RecordError unless both are records of the same run in the same precision."""
    pairs = {
        "precision": (first.dtype, second.dtype),
        "configuration": (first.config, second.config),
        "data": (without_name(first.data), without_name(second.data)),
        "number of steps": (first.steps, second.steps),
    }
    for what, (a, b) in pairs.items():
        if a != b:
            if isinstance(a, dict):
                what, a, b = _first_difference(what, a, b)
            both = dict.fromkeys((first.backend, second.backend))
            raise RecordError(
                f"the {' and '.join(both)} records are of different runs "
                f"({what}: {a} and {b}): run both again with the same options"
            )
    for record in (first, second):
        series = (record.loss, record.gradient_norm, record.lr, record.batch_digests)
        lengths = set(map(len, series))
        complete = record.weights and record.first_steps and record.final
        if record.steps == 0 or lengths != {record.config["steps"]} or not complete:
            raise RecordError(
                f"the {record.backend} record holds no whole run: run {record.backend} again"
            )


def check_twins(record: Record, twins: Sequence[Record]) -> None:
    """Raise RecordError unless all `twins` are twins of `record`."""
    for twin in twins:
        check_comparable(record, twin)
        if twin.backend != record.backend or twin.twin is None or record.twin is not None:
            raise RecordError(
                f"{twin.stem} is no twin of {record.stem}: run {record.backend} again"
            )


def _summary(record: Record, labels: np.ndarray) -> RunSummary:
    accuracy, by_class = None, {}
    if has_classes(record):
        shared = min(len(record.predictions), len(labels))
        accuracy = int(np.sum(record.predictions[:shared] == labels[:shared])) / len(labels)
        by_class = class_accuracy(record, labels, record.data["classes"])
    return RunSummary(
        final_loss=float(record.loss[-1]),
        test_loss=record.test_loss,
        accuracy=accuracy,
        class_accuracy=by_class,
        steps_per_second=record.steps_per_second,
        seconds=record.seconds,
        nonfinite_step=record.nonfinite_step,
        segments=record.segments,
    )


def _rule(dtype: str, twins: int) -> Rule:
    factor = SEPARATION[dtype]
    if dtype == "float64":
        rule = (
            f"a gap may be {PROOF_BOUND:g} of the largest entry, and {PROOF_BOUND:g} for losses below "
            "1. The data of every step, the initial weights and the predictions must be equal. The "
            "test loss may also differ by as much as the training losses do"
        )
        if twins:
            rule += (
                f". After the first steps a gap may in addition be {factor:g} times the spread of "
                f"{twins} twins, those of the framework whose twins are closer together"
            )
        return {"rule": rule, "relative": PROOF_BOUND, "twins": twins}
    floor = FLOOR_ULP[dtype]
    rule = (
        f"the closest runs of the two frameworks may be {factor:g} times as far apart as the most "
        f"distant runs of one, plus {factor * floor:g} ulp of {compute_dtype(dtype).name}. That "
        "one is the framework whose runs are closer together, and its runs count up to the end of "
        f"the next step range. There are {twins} twins, whose weights and images are moved by an "
        f"ulp. Counts of test images may differ by {SEPARATION_IMAGES:g} times as much, plus "
        f"{SEPARATION_IMAGES * COUNT_FLOOR:g}. First gradients and the total change of the weights "
        f"get {100 * factor * FLIP_SHARE:g} % extra, because rounding can flip a ReLU; half of the "
        "entries of a first gradient do not. The data of every step must be equal"
    )
    return {
        "rule": rule,
        "separation": factor,
        "separation_images": SEPARATION_IMAGES,
        "floor_ulp": floor,
        "flip_share": FLIP_SHARE,
        "images": COUNT_FLOOR,
        "twins": twins,
    }


def without_name(data: JsonObject) -> JsonObject:
    """`data` without its name: the same data may lie elsewhere."""
    return {name: value for name, value in data.items() if name != "name"}


def _first_difference(what: str, a: JsonObject, b: JsonObject) -> tuple[str, object, object]:
    for name in sorted(a | b):
        if a.get(name) != b.get(name):
            return f"{what}, {name}", a.get(name), b.get(name)
    raise AssertionError("equal dictionaries have no difference")
