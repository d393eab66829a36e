"""Are two runs the same run? Gaps, bounds, and a verdict with the first place where they part.

Two runs are held against each other rung by rung, in the order in which a difference travels: the
data, the initial weights, then for the first steps every activation, the loss, every gradient, and
the updated momentum and parameters; then the learning rate, loss and gradient norm of every step
and the parameters now and then; then the test loss, the predictions and each class.

The proof lens (float64) leaves no room: a bound near rounding on every rung. In the production
lenses (the others) two correct programs drift apart chaotically, so the measure is taken from the
runs themselves and their twins: see `lockstep.common.verdict.statistics`. Few twins may all miss
what rounding can do, and float64 has none; so where runs part after the first step (in float64, the
second), more twins are trained before the verdict stands (see `judge`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from lockstep.common.dtypes import compute_dtype
from lockstep.common.errors import RecordError
from lockstep.common.protocol import STAGES
from lockstep.common.runs.record import OPENING_STEPS, Record, stretches
from lockstep.common.verdict.statistics import (
    FLIP_SHARE,
    FLOOR_ULP,
    IMAGES_FLOOR,
    MOST_RESIDUE,
    PROOF_BOUND,
    RESIDUE_ULP,
    SEPARATION,
    SEPARATION_IMAGES,
    bound,
    correct,
    gaps,
    largest,
    magnitude,
    paired_difference,
    scalar_gap,
    separation,
    separation_of,
    tensor_gap,
    weights_distance,
)

FIRST_TWINS = 2  # per side, where float64 turns out to need any
ENOUGH_TWINS = 6  # per side: then what parts late is no rounding. Three were enough for each of 3 in 900 clean pairs
STATISTICS = (".mean", ".var")  # running ones, of what was computed
MEAN_STEPS = 10  # the mean loss of a stretch is compared where it has so many steps
Sides = tuple[list[Record], list[Record]]  # each side's run, followed by its twins


@dataclass(frozen=True)
class Rung:
    """One thing that was compared, and how it came out."""

    step: int  # 0 is the first; the number of steps for what is measured after the last
    stage: str
    tensor: str
    gap: float  # between the closest runs of the two sides (see `Separation`); infinite where nothing is finite
    bound: float
    drift: float | None = None  # between the most distant runs of one side
    # both runs, where their difference is largest or first too large
    values: tuple[float, float] | None = None
    start: int | None = None  # for a stretch of steps: its first ...
    stop: int | None = None  # ... and one past its last

    @property
    def agrees(self) -> bool:
        return math.isfinite(self.gap) and self.gap <= self.bound

    @property
    def share(self) -> float:
        """Of its bound; infinite where there is none to take a share of."""
        if self.gap == 0:
            return 0.0
        return self.gap / self.bound if self.bound > 0 and math.isfinite(self.gap) else math.inf


def compare(
    runs: dict[str, Record],
    twins: dict[str, Sequence[Record]],
    labels: np.ndarray,
    beginners: dict[str, Sequence[Record]] | None = None,
) -> dict[str, Any]:
    """One lens of report.json: two runs held against each other, or one described.

    Args:
        runs: by backend, one or two records through the same lens.
        twins: by backend, their twins; needed in the production lenses.
        labels: int64 (test images,): the true classes.
        beginners: by backend, twins of which there are the first steps only
            (`lockstep.common.runs.first_steps`).

    Raises:
        RecordError: if the records cannot be compared: of other runs, of no steps, or without
            twins.
    """
    for record in runs.values():
        check_twins(record, twins.get(record.backend, ()))
    records = list(runs.values())
    first, second = records[0], records[-1]  # the same, if there is one only
    if any(record.backend != name or record.twin is not None for name, record in runs.items()):
        raise RecordError("a record is not the run that it is taken for: run both backends again")
    check_comparable(first, second)
    report = _describe(runs, labels)
    if len(runs) == 1:
        return report
    ours, theirs = ([run, *twins.get(name, ())] for name, run in runs.items())
    sides = ours, theirs
    number = sum(len(side) - 1 for side in sides)
    if first.dtype != "float64" and number == 0:
        raise RecordError(
            f"nothing says how far {first.dtype} runs may drift apart: run with --twins 1 or more"
        )

    more = beginners or {}
    opening = opening_rungs(
        ([*ours, *more.get(first.backend, ())], [*theirs, *more.get(second.backend, ())])
    )
    trajectory = _trajectory(sides)
    evaluation = _evaluation(sides, labels)
    rungs = opening + trajectory + evaluation
    # Within an update the learning rate comes first; else, of one step and stage, the order is that
    # of the rungs.
    failures = [rung for rung in rungs if not rung.agrees]
    failures.sort(key=lambda rung: (rung.step, STAGES.index(rung.stage), rung.tensor != "lr"))
    report["verdict"] = "disagree" if failures else "agree"
    report["score"] = _finite(max(rung.share for rung in rungs))
    report["max_abs_loss_gap"] = _finite(largest(first.loss, second.loss)[0])
    report["bound"] = _rule(first.dtype, number)
    report["first_divergence"] = divergence(failures[0], list(runs)) if failures else None
    report["ladder"] = [_row(rung) for rung in rungs if rung.start is None]
    report["stretches"] = [_stretch(rung) for rung in rungs if rung.start is not None]
    report["predictions_equal"] = _equal(first, second)
    report["beginners"] = {name: len(more.get(name, ())) for name in runs}
    report["class_differences"] = _class_differences(first, second, labels)
    report["twins"] = {
        name: [
            {
                "max_abs_loss_gap": _finite(largest(runs[name].loss, t.loss)[0]),
                "predictions_equal": _equal(runs[name], t),
            }
            for t in twins.get(name, ())
        ]
        for name in runs
    }
    return report


def judge(
    families: dict[str, list[Record]],
    more: Callable[[str, range], Iterable[Record]],
    labels: np.ndarray,
    begin: Callable[[str, range], Iterable[Record]] = lambda name, twins: (),
) -> dict[str, Any]:
    """`compare`, with more twins wherever the verdict should wait for them.

    Args:
        families: by backend, the run and its twins; twins that are asked for are added.
        more: trains the twins of these numbers of one backend; none, if it cannot.
        begin: likewise, but the first steps of them only.
    """
    beginners: dict[str, Sequence[Record]] = {}
    while True:
        runs = {name: members[0] for name, members in families.items()}
        lens = compare(
            runs, {name: members[1:] for name, members in families.items()}, labels, beginners
        )
        if not beginners and begins_apart(lens):
            beginners = {
                name: list(begin(name, range(len(of), ENOUGH_TWINS + 1)))
                for name, of in families.items()
            }
            if any(beginners.values()):
                continue
        wanted, before = twins_wanted(lens), sum(map(len, families.values()))
        for name, members in families.items():
            members.extend(more(name, range(len(members), wanted + 1)))
        if sum(map(len, families.values())) == before:
            return lens


def twins_wanted(lens: dict[str, Any]) -> int:
    """How many twins per side should be asked before this verdict stands; 0 if it does.

    What shows in the first step is no chaos, nor in float64 in the second (but see `begins_apart`),
    and what is not finite no twin explains. Later, near instability, training amplifies even
    float64's rounding: digits at lr 0.05 and momentum 0.9 passed 1e-12 at step 85. And in float32
    two twins may both keep to their run's path where rounding tipped a rectifier between the
    frameworks: 2 of 300 clean pairs, each of which a third twin cleared, and in the second step of
    ResNet-20 on digits 2 of 6, which a fourth did. In evaluation alone no float64 run is chaotic: a
    port that leaves dropout on there would be excused by its own twins.
    """
    first = lens["first_divergence"]
    ended = any(step is not None for step in lens.get("broken", {}).values())
    if first is None or ended:
        return 0
    exact = lens["dtype"] == "float64" or first["stage"] == "data" or first["tensor"] == "lr"
    if first["step"] < (OPENING_STEPS if exact or any(lens.get("beginners", {}).values()) else 1):
        return 0
    fewest = min(len(twins) for twins in lens["twins"].values())
    if lens["dtype"] == "float64" and fewest == 0:
        return 0 if first["stage"] == "evaluate" else FIRST_TWINS
    return ENOUGH_TWINS if fewest < ENOUGH_TWINS else 0


def begins_apart(lens: dict[str, Any]) -> bool:
    """Whether the first steps of more twins should be seen before this verdict stands.

    In a production lens rounding may tip a rectifier in the first step already. It shows in
    gradients, and in what they update; in the step after, anywhere. With 32 images and lr 0.05, two
    tipped in PyTorch's first step of ResNet-20, moved a gradient by 3.6 % of its largest, and in
    one twin a side none did.
    """
    first = lens["first_divergence"]
    if (
        first is None
        or lens["dtype"] == "float64"
        or first["stage"] == "data"
        or first["tensor"] == "lr"
    ):
        return False
    tipped = first["step"] > 0 or first["stage"] in ("backward", "update")
    return tipped and first["step"] < OPENING_STEPS


def broken_off(lens: dict[str, Any]) -> int | None:
    """The step whose loss is not finite, if it is the same one in all runs of this lens."""
    steps = set(lens.get("broken", {}).values())  # reports of older versions have none
    return next(iter(steps)) if len(steps) == 1 else None


def check_comparable(first: Record, second: Record) -> None:
    """Raise RecordError unless both are records of the same run through the same lens."""
    pairs = {
        "precision": (first.dtype, second.dtype),
        "configuration": (first.config, second.config),
        "data": (_unnamed(first.data), _unnamed(second.data)),
        "number of steps": (first.steps, second.steps),
    }
    for what, (one, other) in pairs.items():
        if one != other:
            if isinstance(one, dict):
                what, one, other = _first_difference(what, one, other)
            raise RecordError(
                f"the {first.backend} and {second.backend} records are of different runs "
                f"({what}: {one} and {other}): run both again with the same options"
            )
    for record in (first, second):
        lengths = {len(record.loss), len(record.gradient_norm), len(record.lr)}
        parts = record.weights and record.opening and record.final
        if record.steps == 0 or lengths != {record.config["steps"]} or not parts:
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


# --- The rungs


def opening_rungs(sides: Sides, amplified: bool = False) -> list[Rung]:
    """Data and initial weights, which must be the same bits; then the first steps, tensor by
    tensor.

    Args:
        amplified: let twins say what rounding explains in float64, too. At the start of a run they
            are not asked; late in one, where p - y cancels in a well-fitted network's gradient,
            rounding exceeds 1e-12 of what is left.
    """
    first, second = sides[0][0], sides[1][0]
    residue = min(
        RESIDUE_ULP * float(ml_dtypes.finfo(compute_dtype(first.dtype)).eps), MOST_RESIDUE
    )
    rungs = []
    for name in sorted(first.weights | second.weights):
        gap, values = tensor_gap(first.weights.get(name), second.weights.get(name))
        rungs.append(Rung(0, "weights", name, gap, 0.0, values=values))
    for key in sorted(first.opening | second.opening, key=_travel(first)):
        step, stage, tensor = key.split("/", 2)
        one, other = first.opening.get(key), second.opening.get(key)
        if stage == "forward" and (one is None or other is None):
            continue  # one side's layer is the user's own, of whose activations nothing is known
        gap, values = tensor_gap(one, other)
        if stage == "data":
            rungs.append(Rung(int(step), stage, tensor, gap, 0.0, values=values))
            continue
        drift = None
        if first.dtype != "float64" or amplified:
            ours, theirs = ([record.opening.get(key) for record in side] for side in sides)
            gap, drift = separation(ours, theirs, lambda a, b: tensor_gap(a, b)[0], calmer=True)
        scale = max(magnitude(one), magnitude(other))
        if scale < residue * (largest_of := _largest(first, step, stage)):
            scale = largest_of
        held = (
            stage == "update"
            and not tensor.startswith("momentum of ")
            and not tensor.endswith(STATISTICS)
        )
        limit = bound(
            first.dtype, drift, scale, _tipped(first, second, int(step), stage, tensor), held
        )
        rungs.append(Rung(int(step), stage, tensor, gap, limit, drift, values))
    return sorted(rungs, key=lambda r: (r.step, STAGES.index(r.stage)))


def _largest(record: Record, step: str, stage: str) -> float:
    """The largest gradient, or momentum, of a step; 0 for other stages."""
    prefix = {"backward": f"{step}/backward/", "update": f"{step}/update/momentum of "}.get(stage)
    found = [
        array
        for key, array in record.opening.items()
        if prefix is not None and key.startswith(prefix)
    ]
    return max(map(magnitude, found), default=0.0)


def _trajectory(sides: Sides) -> list[Rung]:
    """What was measured along the run, in growing stretches of steps, as the drift grows by
    magnitudes.

    Rounding stays small until one rectifier or one pooling window decides otherwise, and then
    explodes, in one pair of runs sooner than in another. So a stretch may use the drift of the
    stretch after it, and of all those before.
    """
    first = sides[0][0]
    spans = [slice(start, stop) for start, stop in stretches(first.steps)]
    rungs = []
    for quantity, stage in (("lr", "update"), ("loss", "loss"), ("gradient_norm", "backward")):
        series = [[getattr(record, quantity) for record in side] for side in sides]
        between = [gaps(one, other) for one in series[0] for other in series[1]]
        within = [
            gaps(one, other) for side in series for one, other in itertools.combinations(side, 2)
        ]
        within = [np.where(np.isfinite(differences), differences, 0.0) for differences in within]
        for span, following in zip(spans, [*spans[1:], spans[-1]], strict=True):
            gap, drift = separation_of(
                [float(differences[span].max()) for differences in between],
                [float(differences[: span.stop].max()) for differences in within],
            )
            allowed = drift
            # in float64 it grows at the same pace in all runs
            if first.dtype != "float64" and within:
                allowed = max(float(differences[: following.stop].max()) for differences in within)
            scale = max(magnitude(series[0][0][span]), magnitude(series[1][0][span]))
            if quantity == "lr":  # no network's rounding is in it, but plateau's decisions are
                limit = PROOF_BOUND * scale + (allowed or 0.0)
            else:
                limit = bound(first.dtype, allowed, max(1.0, scale))
            outside = np.flatnonzero(between[0][span] > limit)
            place = int(outside[0]) if len(outside) else int(np.argmax(between[0][span]))
            values = float(series[0][0][span][place]), float(series[1][0][span][place])
            step = span.start + place
            rungs.append(
                Rung(step, stage, quantity, gap, limit, drift, values, span.start, span.stop)
            )
    for span in spans:
        if span.stop - span.start >= MEAN_STEPS and first.dtype != "float64":
            rungs.append(
                _scalars(
                    sides,
                    span.stop - 1,
                    "loss",
                    "mean loss",
                    lambda r, s=span: float(r.loss[s].mean()),
                    span,
                )
            )
    return rungs + _parameters(sides)


def _parameters(sides: Sides) -> list[Rung]:
    """The parameters along the run and after it: tensor by tensor in float64, else their Euclidean
    distance."""
    first, second = sides[0][0], sides[1][0]
    steps = sorted({int(key.partition("/")[0]) for key in first.along | second.along})
    moments = [(step, {id(r): _at(r, step) for side in sides for r in side}) for step in steps] + [
        (first.steps, {id(r): r.final for side in sides for r in side})
    ]
    rungs = []
    for step, weights in moments:
        ours, theirs = weights[id(first)], weights[id(second)]
        if first.dtype == "float64":
            for name in sorted(ours | theirs):
                _, values = tensor_gap(ours.get(name), theirs.get(name))
                gap, drift = separation(
                    *sides,
                    lambda a, b, n=name, w=weights: tensor_gap(w[id(a)].get(n), w[id(b)].get(n))[0],
                )
                scale = max(magnitude(ours.get(name)), magnitude(theirs.get(name)))
                rungs.append(
                    Rung(
                        step - 1, "update", name, gap, bound("float64", drift, scale), drift, values
                    )
                )
        else:
            gap, drift = separation(
                *sides, lambda a, b, w=weights: weights_distance(w[id(a)], w[id(b)])
            )
            norm = float(
                np.sqrt(sum(np.sum(np.square(array.astype(np.float64))) for array in ours.values()))
            )
            travelled = [
                weights_distance(record.weights, weights[id(record)]) for record in (first, second)
            ]
            limit = bound(first.dtype, drift, norm, FLIP_SHARE * min(travelled), held=True)
            rungs.append(Rung(step - 1, "update", "all parameters", gap, limit, drift))
    return rungs


def _at(record: Record, step: int) -> dict[str, np.ndarray]:
    prefix = f"{step}/"
    return {
        key.removeprefix(prefix): array
        for key, array in record.along.items()
        if key.startswith(prefix)
    }


def _scalars(
    sides: Sides,
    step: int,
    stage: str,
    name: str,
    of: Callable[[Record], float],
    span: slice | None = None,
    besides: float = 0.0,
) -> Rung:
    """One number of each run; `besides` is added to its bound."""
    gap, drift = separation(*sides, lambda one, other: scalar_gap(of(one), of(other)))
    values = of(sides[0][0]), of(sides[1][0])
    limit = bound(sides[0][0].dtype, drift, max(1.0, magnitude(np.array(values)))) + besides
    start, stop = (span.start, span.stop) if span else (None, None)
    return Rung(step, stage, name, gap, limit, drift, values, start, stop)


def _seen_in_training(first: Record, second: Record) -> float:
    """What float64's training losses were seen to differ by, within their bound: the test loss is
    of the same weights.

    Digits at batch 4, lr 0.01 and momentum 0.9, after 300 steps: 1.4e-12 between losses of up to
    4.6, which agree, and 1.25e-12 between test losses of 1.1, which did not.
    """
    gap, _ = largest(first.loss, second.loss)
    limit = PROOF_BOUND * max(1.0, magnitude(first.loss))
    return min(gap, limit) if first.dtype == "float64" and math.isfinite(gap) else 0.0


def _evaluation(sides: Sides, labels: np.ndarray) -> list[Rung]:
    """Test loss, predictions, and for each class the images that one side recognises and the other
    does not."""
    first, second = sides[0][0], sides[1][0]
    steps, classes = first.steps, first.data["classes"]
    seen = _seen_in_training(first, second)
    rungs = [
        _scalars(
            sides, steps, "evaluate", "test loss", lambda record: record.test_loss, besides=seen
        )
    ]

    def allowed(drift: float | None) -> float:
        if first.dtype == "float64":
            return SEPARATION_IMAGES * (drift or 0.0)
        return SEPARATION_IMAGES * ((drift or 0.0) + IMAGES_FLOOR)

    gap, drift = separation(*sides, lambda one, other: float(len(labels) - _equal(one, other)))
    whole = len(first.predictions) == len(second.predictions) == len(labels)
    rungs.append(
        Rung(steps, "evaluate", "predictions", gap if whole else math.inf, allowed(drift), drift)
    )

    recognised = {
        id(record): correct(record.predictions, labels) for side in sides for record in side
    }
    for index, name in enumerate(classes):
        members = labels == index
        if not members.any():
            continue
        gap, drift = separation(
            *sides,
            lambda a, b, m=members: float(np.sum((recognised[id(a)] != recognised[id(b)])[m])),
        )
        values = (
            float(np.mean(recognised[id(first)][members])),
            float(np.mean(recognised[id(second)][members])),
        )
        limit, count = allowed(drift), int(members.sum())
        drift = None if drift is None else drift / count
        rungs.append(
            Rung(
                steps, "evaluate", f"accuracy of {name}", gap / count, limit / count, drift, values
            )
        )
    return rungs


def _tipped(first: Record, second: Record, step: int, stage: str, tensor: str) -> float:
    """What a rectifier tipped by rounding may do to a tensor of the opening."""
    if stage in ("forward", "loss"):
        return FLIP_SHARE * min(_loss_per_step(record, step) for record in (first, second))
    if stage == "backward":
        return FLIP_SHARE * magnitude(first.opening.get(f"{step}/backward/{tensor}"))
    # An update may differ by what its gradients were seen to differ, and no more.
    parameter = tensor.removeprefix("momentum of ")
    keys = [f"{earlier}/backward/{parameter}" for earlier in range(step + 1)]
    seen = sum(tensor_gap(first.opening.get(key), second.opening.get(key))[0] for key in keys)
    factor = 1.0 if tensor != parameter else magnitude(first.lr[: step + 1])
    return factor * seen if math.isfinite(seen) else 0.0


def _loss_per_step(record: Record, steps: int) -> float:
    """How much one of the first `steps` updates may move the loss, to first order: lr g^2, kept on
    by momentum."""
    kept = 1 / (1 - min(record.config["momentum"], 0.99))
    with np.errstate(over="ignore", invalid="ignore"):
        return magnitude(kept * record.lr[:steps] * record.gradient_norm[:steps] ** 2)


# --- The report


def _describe(runs: dict[str, Record], labels: np.ndarray) -> dict[str, Any]:
    """A lens before anything is compared."""
    some = next(iter(runs.values()))
    classes = some.data["classes"]
    shared = {name: min(len(r.predictions), len(labels)) for name, r in runs.items()}
    return {
        "dtype": some.dtype,
        "steps": some.steps,
        "broken": {name: r.broken for name, r in runs.items()},
        "legs": {name: r.legs for name, r in runs.items()},
        "verdict": "single",
        "max_abs_loss_gap": None,
        "bound": {"rule": "nothing was compared"},
        "first_divergence": None,
        "ladder": [],
        "stretches": [],
        "final_loss": {name: _finite(r.loss[-1]) for name, r in runs.items()},
        "test_loss": {name: _finite(r.test_loss) for name, r in runs.items()},
        "accuracy": {
            name: int(np.sum(r.predictions[: shared[name]] == labels[: shared[name]])) / len(labels)
            for name, r in runs.items()
        },
        "per_class_accuracy": {
            name: class_accuracy(r, labels, classes) for name, r in runs.items()
        },
        "predictions_equal": None,
        "predictions_total": len(labels),
        "twins": {name: [] for name in runs},
        "steps_per_second": {name: _finite(r.steps_per_second) for name, r in runs.items()},
        "seconds": {name: _finite(r.seconds) for name, r in runs.items()},
    }


def _rule(dtype: str, twins: int) -> dict[str, Any]:
    separation = SEPARATION[dtype]
    if dtype == "float64":
        rule = f"{PROOF_BOUND:g} of the largest magnitude, and of 1 for losses; data, weights and predictions equal; "
        rule += "the test loss as far apart as training losses were, besides"
        if twins:
            rule += (
                f"; after the first steps, {separation:g} times the drift of {twins} twins besides"
            )
        return {"rule": rule, "relative": PROOF_BOUND, "twins": twins}
    floor = FLOOR_ULP[dtype]
    rule = (
        f"the closest runs of the two frameworks may be {separation:g} times as far apart as the most distant runs of "
        f"one by the end of the next stretch ({twins} twins, with weights and images 1 ulp away), and "
        f"{separation * floor:g} ulp of {compute_dtype(dtype).name}; for counts of test images {SEPARATION_IMAGES:g} "
        f"times and {SEPARATION_IMAGES * IMAGES_FLOOR:g} images; of first gradients and of the way that the weights "
        f"have gone {100 * separation * FLIP_SHARE:g} % may be rectifiers that rounding tipped"
    )
    constants = {
        "separation": separation,
        "separation_images": SEPARATION_IMAGES,
        "floor_ulp": floor,
        "flip_share": FLIP_SHARE,
        "images": IMAGES_FLOOR,
    }
    return {"rule": rule, **constants, "twins": twins}


def divergence(rung: Rung, names: list[str]) -> dict[str, Any]:
    """The rung where two runs part, as plain JSON, with a message of one line."""
    values: tuple[float | None, float | None] = rung.values or (None, None)
    at_step = rung.start is not None and rung.tensor != "mean loss" and rung.values is not None
    # that step's; the rung's is its stretch's
    gap = scalar_gap(*rung.values) if at_step and rung.values else rung.gap
    message = f"{rung.stage}: step {rung.step}: "
    if rung.tensor != rung.stage:
        message += f"{rung.tensor}: "
    if rung.values:
        message += (
            " ".join(
                f"{name}={text}" for name, text in zip(names, tell_apart(*rung.values), strict=True)
            )
            + ", "
        )
    return {
        "step": rung.step,
        "stage": rung.stage,
        "tensor": rung.tensor,
        "gap": _finite(gap),
        "bound": _finite(rung.bound),
        **{name: _finite(value) for name, value in zip(names, values, strict=True)},
        "message": message + f"gap {gap:.1e} > {rung.bound:.1e}",
    }


def tell_apart(one: float, other: float) -> tuple[str, str]:
    """Both values, in as few digits as show a difference."""
    for digits in range(6, 18):
        texts = f"{one:.{digits}g}", f"{other:.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts


def _row(rung: Rung) -> dict[str, Any]:
    place = {"step": rung.step, "stage": rung.stage, "tensor": rung.tensor}
    measured = {
        "gap": _finite(rung.gap),
        "drift": _finite(rung.drift),
        "bound": _finite(rung.bound),
    }
    return place | measured | {"agrees": rung.agrees}


def _stretch(rung: Rung) -> dict[str, Any]:
    place = {"quantity": rung.tensor, "start": rung.start, "stop": rung.stop}
    measured = {
        "gap": _finite(rung.gap),
        "drift": _finite(rung.drift),
        "bound": _finite(rung.bound),
    }
    return place | measured | {"agrees": rung.agrees}


def _equal(one: Record, other: Record) -> int:
    """How many predictions are the same; where one side has none, they are not."""
    shared = min(len(one.predictions), len(other.predictions))
    return int(np.sum(one.predictions[:shared] == other.predictions[:shared]))


def class_accuracy(
    record: Record, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, float | None]:
    """The share of each class's test images that was recognised; None for a class without any."""
    recognised = correct(record.predictions, labels)
    members = {name: labels == index for index, name in enumerate(classes)}
    return {
        name: float(np.mean(recognised[own])) if own.any() else None
        for name, own in members.items()
    }


def _class_differences(first: Record, second: Record, labels: np.ndarray) -> dict[str, Any]:
    """Per class with test images, first less second, with the interval of `paired_difference`."""
    one, other = (correct(record.predictions, labels) for record in (first, second))
    classes = [(name, labels == index) for index, name in enumerate(first.data["classes"])]
    classes = [(name, members) for name, members in classes if members.any()]
    return {
        name: paired_difference(one[members], other[members], len(classes))
        for name, members in classes
    }


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _travel(record: Record) -> Callable[[str], tuple[int, int, int, str]]:
    """Sorts "<step>/<stage>/<tensor>" as a difference travels: forward through the layers, backward
    against them."""
    layers = {tensor: place for place, tensor in enumerate(record.layers)}

    def position(key: str) -> tuple[int, int, int, str]:
        step, stage, tensor = key.split("/", 2)
        layer = tensor.removeprefix("momentum of ").rpartition(".")[0]
        place = {"forward": layers.get(tensor, 0), "backward": -layers.get(layer, 0)}.get(stage, 0)
        return (
            int(step),
            STAGES.index(stage),
            place,
            f"{not tensor.startswith('momentum')} {tensor}",
        )  # buffers first

    return position


def _unnamed(data: dict[str, Any]) -> dict[str, Any]:
    # the same data may lie elsewhere
    return {name: value for name, value in data.items() if name != "name"}


def _first_difference(
    what: str, one: dict[str, Any], other: dict[str, Any]
) -> tuple[str, Any, Any]:
    for name in sorted(one | other):
        if one.get(name) != other.get(name):
            return f"{what}, {name}", one.get(name), other.get(name)
    raise AssertionError("equal dictionaries have no difference")
