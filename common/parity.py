"""Are two runs the same run? Gaps, bounds, and a verdict with the first place where they part.

Two runs are held against each other rung by rung, in the order in which a difference travels: the data, the initial
weights, then for the first steps the logits, the loss, every gradient, and the updated parameters and momentum; then
the learning rate, loss and gradient norm of every step; then the test loss, the predictions and each class's accuracy.

The proof lens (float64) leaves no room: a bound near rounding on every rung. In the production lenses (float32,
bfloat16) two correct programs drift apart chaotically, so the measure is taken from the runs themselves: a *twin* is
the same program started from weights moved by at most one ulp, and the gap between the frameworks may be at most
`DRIFT_FACTOR` times the largest gap between a run and one of its twins, plus a few ulp, plus what a rectifier that
rounding tipped can do to a gradient. Twins are asked in float64, too, where a run is so near instability that it
amplifies rounding past the bound after the first steps (see `may_be_chaos`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from common.errors import RecordError
from common.protocol import STAGES
from common.record import Record

# float64. Relative to the largest magnitude in the tensor; absolute for values below 1 along the trajectory. Measured:
# 7e-15 in the loss over the tutorial's 37,500 steps, 1e-15 of the magnitude in the tensors of the first steps. To be
# caught: logits that pass through float32, 1e-8; a learning rate computed in float32, 1e-8 of it.
PROOF_BOUND = 1e-12

# float32 and bfloat16. Measured in float32 on 33 clean pairs with two twins each (digits and CIFAR-10, batch 4 to 64,
# momentum 0 to 0.95, 60 to 1,000 steps), none of which disagreed: gaps between losses of up to 2.6 times the drift. To
# be caught: what grows past everything that twins do.
DRIFT_FACTOR = 8.0
# Gaps are a few ulp where twins show none, for loss and logits come in steps of an ulp: 1 ulp of float32 seen, in the
# loss. bfloat16's ulp is 0.8 % and its twins always show some.
FLOOR_ULP = {"float32": 16.0, "bfloat16": 1.0}
# Of a gradient: what one rectifier or pooling window that rounding tipped the other way may change. One pair in 33 had
# one in its first steps, and it changed a gradient by 0.9 %. To be caught: a sum for a mean, a layer without gradient.
FLIP_SHARE = 0.03
# Predictions that may differ where no twin's does.
IMAGES_FLOOR = 5


@dataclass(frozen=True)
class Rung:
    """One thing that was compared, and how it came out."""

    step: int  # 0 is the first; the number of steps for what is measured after the last
    stage: str
    tensor: str
    gap: float  # largest absolute difference; infinite where there is nothing finite to compare
    bound: float
    drift: float | None = None  # the largest difference between a run and one of its twins
    values: tuple[float, float] | None = None  # both sides, where the gap is largest
    start: int | None = None  # for a stretch of steps: its first ...
    stop: int | None = None  # ... and one past its last

    @property
    def agrees(self) -> bool:
        return math.isfinite(self.gap) and self.gap <= self.bound


def compare(runs: dict[str, Record], twins: dict[str, Sequence[Record]], labels: np.ndarray) -> dict[str, Any]:
    """One lens of report.json: two runs held against each other, or one described.

    Args:
        runs: by backend, one or two records through the same lens.
        twins: by backend, their twins; needed in the production lenses.
        labels: int64 (test images,): the true classes.

    Raises:
        RecordError: if the records cannot be compared: of other runs, of no steps, or without twins.
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
    kin = [(runs[name], twin) for name in runs for twin in twins.get(name, ())]
    if first.dtype != "float64" and not kin:
        raise RecordError(f"nothing says how far {first.dtype} runs may drift apart: run with --twins 1 or more")

    opening = _opening(first, second, kin)
    trajectory = _trajectory(first, second, kin)
    evaluation = _evaluation(first, second, kin, labels, report["per_class_accuracy"])
    rungs = opening + trajectory + evaluation
    failures = sorted((r for r in rungs if not r.agrees), key=lambda r: (r.step, STAGES.index(r.stage)))
    report["verdict"] = "disagree" if failures else "agree"
    report["max_abs_loss_gap"] = _finite(_largest(first.loss, second.loss)[0])
    report["bound"] = _rule(first.dtype, kin)
    report["first_divergence"] = _divergence(failures[0], list(runs)) if failures else None
    report["ladder"] = [_row(rung) for rung in opening + evaluation]
    report["stretches"] = [_stretch(rung) for rung in trajectory]
    report["predictions_equal"] = _equal(first, second)
    report["twins"] = {
        name: [
            {
                "max_abs_loss_gap": _finite(_largest(runs[name].loss, t.loss)[0]),
                "predictions_equal": _equal(runs[name], t),
            }
            for t in twins.get(name, ())
        ]
        for name in runs
    }
    return report


def may_be_chaos(lens: dict[str, Any]) -> bool:
    """Whether a float64 lens, compared without twins, disagrees only after the first steps.

    Near instability training amplifies even float64's rounding: digits at lr 0.05 and momentum 0.9 passed 1e-12 at step
    85. Then twins must say how much of the gap is chaos; what shows in the first steps is none.
    """
    late = lens["first_divergence"] is not None and lens["first_divergence"]["step"] > 1
    return lens["dtype"] == "float64" and late and not any(lens["twins"].values())


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
        if record.steps == 0 or lengths != {record.config["steps"]} or not (record.weights and record.opening):
            raise RecordError(f"the {record.backend} record holds no whole run: run {record.backend} again")


def check_twins(record: Record, twins: Sequence[Record]) -> None:
    """Raise RecordError unless all `twins` are twins of `record`."""
    for twin in twins:
        check_comparable(record, twin)
        if twin.backend != record.backend or twin.twin is None or record.twin is not None:
            raise RecordError(f"{twin.stem} is no twin of {record.stem}: run {record.backend} again")


# --- The rungs


def _opening(first: Record, second: Record, kin: list[tuple[Record, Record]]) -> list[Rung]:
    """Data and initial weights, which must be the same bits; then the first steps, tensor by tensor."""
    rungs = []
    for name in sorted(first.weights | second.weights):
        gap, values = _tensor_gap(first.weights.get(name), second.weights.get(name))
        rungs.append(Rung(0, "weights", name, gap, 0.0, values=values))
    for key in sorted(first.opening | second.opening, key=_position):
        step, stage, tensor = key.split("/", 2)
        one, other = first.opening.get(key), second.opening.get(key)
        gap, values = _tensor_gap(one, other)
        if stage == "data":
            rungs.append(Rung(int(step), stage, tensor, gap, 0.0, values=values))
            continue
        drift = None  # in float64, two steps are too few for chaos
        if first.dtype != "float64":
            drift = max((_tensor_gap(a.opening.get(key), b.opening.get(key))[0] for a, b in kin), default=None)
        scale = max(_magnitude(one), _magnitude(other))
        bound = _bound(first.dtype, drift, scale, **_tipped(first, second, int(step), stage, tensor))
        rungs.append(Rung(int(step), stage, tensor, gap, bound, drift, values))
    for name in sorted(first.final | second.final):
        one, other = first.final.get(name), second.final.get(name)
        gap, values = _tensor_gap(one, other)
        drift = max((_tensor_gap(a.final.get(name), b.final.get(name))[0] for a, b in kin), default=None)
        scale = max(_magnitude(one), _magnitude(other))
        bound = _bound(first.dtype, drift, scale, gradient=_difference(one, first.weights.get(name)))
        rungs.append(Rung(first.steps - 1, "update", name, gap, bound, drift, values))
    return sorted(rungs, key=lambda r: (r.step, STAGES.index(r.stage)))


def _trajectory(first: Record, second: Record, kin: list[tuple[Record, Record]]) -> list[Rung]:
    """Learning rate, loss and gradient norm of every step, in growing stretches, as the drift grows by magnitudes.

    Rounding stays small until one rectifier or one pooling window decides otherwise, and then explodes, in one pair of
    runs sooner than in another. So a stretch may use the drift of the stretch after it, and of all those before.
    """
    rungs = []
    for quantity, stage in (("lr", "update"), ("loss", "loss"), ("gradient_norm", "backward")):
        one, other = getattr(first, quantity), getattr(second, quantity)
        spans = [slice(start, stop) for start, stop in stretches(first.steps)]
        for span, following in zip(spans, [*spans[1:], spans[-1]], strict=True):
            drift = allowed = None
            if kin:
                kin_gaps = [_gaps(getattr(a, quantity), getattr(b, quantity)) for a, b in kin]
                # Twins that are not finite explain nothing; what is not finite itself fails at its own step.
                kin_gaps = [np.where(np.isfinite(gaps), gaps, 0.0) for gaps in kin_gaps]
                drift = max(float(gaps[: span.stop].max()) for gaps in kin_gaps)
                allowed = max(float(gaps[: following.stop].max()) for gaps in kin_gaps)
                if first.dtype == "float64":
                    allowed = drift  # where rounding tips nothing, it grows at the same pace in all runs
            scale = max(_magnitude(one[span]), _magnitude(other[span]))
            if quantity == "lr":  # no network's rounding is in it, but plateau's decisions are
                bound = PROOF_BOUND * scale + DRIFT_FACTOR * (allowed or 0.0)
            else:
                moved = min(_loss_per_step(record, span.stop - 1) for record in (first, second))
                by_gradients = scale if quantity == "gradient_norm" else moved
                bound = _bound(first.dtype, allowed, max(1.0, scale), gradient=by_gradients)
            gaps = _gaps(one[span], other[span])
            outside = np.flatnonzero(gaps > bound)
            place = int(outside[0]) if len(outside) else int(np.argmax(gaps))
            values = (float(one[span][place]), float(other[span][place]))
            rungs.append(
                Rung(
                    span.start + place, stage, quantity, float(gaps.max()), bound, drift, values, span.start, span.stop
                )
            )
    return rungs


def _evaluation(
    first: Record,
    second: Record,
    kin: list[tuple[Record, Record]],
    labels: np.ndarray,
    per_class: dict[str, dict[str, float | None]],
) -> list[Rung]:
    """Test loss, predictions, and the accuracy of each class."""
    steps = first.steps
    gap = _scalar_gap(first.test_loss, second.test_loss)
    drift = max((_scalar_gap(a.test_loss, b.test_loss) for a, b in kin), default=None)
    scale = max(1.0, _magnitude(np.array([first.test_loss, second.test_loss])))
    values = (first.test_loss, second.test_loss)
    bound = _bound(first.dtype, drift, scale)
    rungs = [Rung(steps, "evaluate", "test loss", gap, bound, drift, values)]

    differing = len(labels) - _equal(first, second)
    drift = max((float(len(labels) - _equal(a, b)) for a, b in kin), default=None)
    whole = len(first.predictions) == len(second.predictions) == len(labels)
    images = 0 if first.dtype == "float64" else IMAGES_FLOOR
    bound = 2 * (drift or 0.0) + images
    rungs.append(Rung(steps, "evaluate", "predictions", float(differing) if whole else math.inf, bound, drift))

    one, other = (per_class[record.backend] for record in (first, second))
    spread = [_class_gaps(a, b, labels, first.data["classes"]) for a, b in kin]
    drift = max((float(gaps.max()) for gaps in spread), default=None)
    counts = np.bincount(labels, minlength=len(one))
    for name, count in zip(one, counts, strict=True):
        values = one[name], other[name]
        if values[0] is None or values[1] is None:
            continue  # a class without test images
        gap = abs(values[0] - values[1])
        bound = 2 * (drift or 0.0) + images / int(count)
        rungs.append(Rung(steps, "evaluate", f"accuracy of {name}", gap, bound, drift, (values[0], values[1])))
    return rungs


def stretches(steps: int) -> list[tuple[int, int]]:
    """Cut `steps` at 1, 3, 10, 30, 100, ...: (start, stop) pairs; what is left over belongs to the last whole one."""
    edges = [0, 1]
    while (edge := (1, 3)[len(edges) % 2 == 0] * 10 ** ((len(edges) - 1) // 2)) <= steps:
        edges.append(edge)
    edges = [*edges[:-1], steps] if steps > 1 else edges
    return list(itertools.pairwise(edges))


# --- Gaps and bounds


def _bound(dtype: str, drift: float | None, scale: float, gradient: float = 0.0, known: float = 0.0) -> float:
    """How far two correct programs may be apart, in something of magnitude `scale`.

    In the production lenses, that part of it which is made of a `gradient` may hold a tipped rectifier, and `known` is
    a gap that was already seen, and allowed, in what it is computed from.
    """
    if drift is None:
        return PROOF_BOUND * scale
    if not math.isfinite(drift):
        return 0.0  # twins that are not finite explain nothing
    if dtype == "float64":
        return PROOF_BOUND * scale + DRIFT_FACTOR * drift
    floor = FLOOR_ULP[dtype] * float(ml_dtypes.finfo(dtype).eps) * scale
    return DRIFT_FACTOR * drift + floor + FLIP_SHARE * gradient + known


def _tipped(first: Record, second: Record, step: int, stage: str, tensor: str) -> dict[str, float]:
    """What a rectifier tipped by rounding may do to a tensor of the opening: arguments of `_bound`."""
    if stage in ("forward", "loss"):
        return {"gradient": min(_loss_per_step(record, step) for record in (first, second))}
    if stage == "backward":
        return {"gradient": _magnitude(first.opening.get(f"{step}/backward/{tensor}"))}
    # An update may differ by what its gradients were seen to differ, and no more.
    parameter = tensor.removeprefix("momentum of ")
    keys = [f"{earlier}/backward/{parameter}" for earlier in range(step + 1)]
    gaps = [_tensor_gap(first.opening.get(key), second.opening.get(key))[0] for key in keys]
    factor = 1.0 if tensor != parameter else _magnitude(first.lr[: step + 1])
    return {"known": 2 * factor * sum(gaps) if all(map(math.isfinite, gaps)) else 0.0}


def _loss_per_step(record: Record, steps: int) -> float:
    """How much one of the first `steps` updates may move the loss, to first order: lr g^2, kept on by momentum."""
    kept = 1 / (1 - min(record.config["momentum"], 0.99))
    with np.errstate(over="ignore", invalid="ignore"):
        return _magnitude(kept * record.lr[:steps] * record.gradient_norm[:steps] ** 2)


def _tensor_gap(one: np.ndarray | None, other: np.ndarray | None) -> tuple[float, tuple[float, float] | None]:
    """The largest absolute difference and the values there; infinite for missing tensors, other shapes or dtypes."""
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return math.inf, None
    return _largest(np.ravel(one).astype(np.float64), np.ravel(other).astype(np.float64))


def _largest(one: np.ndarray, other: np.ndarray) -> tuple[float, tuple[float, float] | None]:
    if len(one) == 0:
        return 0.0, None
    gaps = _gaps(one, other)
    worst = int(np.argmax(gaps))
    return float(gaps[worst]), (float(one[worst]), float(other[worst]))


def _difference(one: np.ndarray | None, other: np.ndarray | None) -> float:
    """The largest absolute difference; 0 where there is none to take."""
    gap, _ = _tensor_gap(one, other)
    return gap if math.isfinite(gap) else 0.0


def _scalar_gap(one: float, other: float) -> float:
    return _largest(np.array([one]), np.array([other]))[0]


def _gaps(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Absolute differences; infinite where either side is not finite, were both so."""
    with np.errstate(invalid="ignore"):
        gaps = np.abs(one - other)
    return np.where(np.isfinite(gaps), gaps, np.inf)


def _magnitude(array: np.ndarray | None) -> float:
    if array is None or array.size == 0:
        return 0.0
    largest = float(np.max(np.abs(array.astype(np.float64))))
    return largest if math.isfinite(largest) else 0.0  # no bound grows on what is not finite


def _equal(one: Record, other: Record) -> int:
    """How many predictions are the same; where one side has none, they are not."""
    shared = min(len(one.predictions), len(other.predictions))
    return int(np.sum(one.predictions[:shared] == other.predictions[:shared]))


def class_accuracy(record: Record, labels: np.ndarray, classes: Sequence[str]) -> dict[str, float | None]:
    """Correct predictions over test images, per class; an image without prediction counts as wrong.

    None for a class that has no test images.
    """
    predictions = np.full(len(labels), -1, np.int64)
    shared = min(len(labels), len(record.predictions))
    predictions[:shared] = record.predictions[:shared]
    correct = np.bincount(labels[predictions == labels], minlength=len(classes))
    counts = np.bincount(labels, minlength=len(classes))
    return {name: int(c) / int(n) if n else None for name, c, n in zip(classes, correct, counts, strict=True)}


def _class_gaps(one: Record, other: Record, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    a, b = (class_accuracy(record, labels, classes) for record in (one, other))
    return np.array([abs((a[name] or 0.0) - (b[name] or 0.0)) for name in classes])


# --- The report


def _describe(runs: dict[str, Record], labels: np.ndarray) -> dict[str, Any]:
    """A lens before anything is compared."""
    some = next(iter(runs.values()))
    classes = some.data["classes"]
    shared = {name: min(len(r.predictions), len(labels)) for name, r in runs.items()}
    return {
        "dtype": some.dtype,
        "steps": some.steps,
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
        "per_class_accuracy": {name: class_accuracy(r, labels, classes) for name, r in runs.items()},
        "predictions_equal": None,
        "predictions_total": len(labels),
        "twins": {name: [] for name in runs},
        "steps_per_second": {name: _finite(r.steps_per_second) for name, r in runs.items()},
        "seconds": {name: _finite(r.seconds) for name, r in runs.items()},
    }


def _rule(dtype: str, kin: list[tuple[Record, Record]]) -> dict[str, Any]:
    if dtype == "float64":
        rule = f"{PROOF_BOUND:g} of the largest magnitude, and of 1 for losses; data, weights and predictions equal"
        if kin:
            rule += f"; after the first steps, {DRIFT_FACTOR:g} times the largest drift of {len(kin)} twins besides"
        return {"rule": rule, "relative": PROOF_BOUND, "twins": len(kin)}
    floor = FLOOR_ULP[dtype]
    rule = (
        f"{DRIFT_FACTOR:g} times the largest drift of {len(kin)} twins started 1 ulp away, plus {floor:g} ulp, "
        f"plus {100 * FLIP_SHARE:g} % of what one gradient changes"
    )
    constants = {"drift_factor": DRIFT_FACTOR, "floor_ulp": floor, "flip_share": FLIP_SHARE}
    return {"rule": rule, **constants, "twins": len(kin)}


def _divergence(rung: Rung, names: list[str]) -> dict[str, Any]:
    values: tuple[float | None, float | None] = rung.values or (None, None)
    gap = rung.gap if rung.values is None else _scalar_gap(*rung.values)  # that step's; the rung's is its stretch's
    message = f"{rung.stage}: step {rung.step}: "
    if rung.tensor != rung.stage:
        message += f"{rung.tensor}: "
    if rung.values:
        message += (
            " ".join(f"{name}={text}" for name, text in zip(names, _tell_apart(*rung.values), strict=True)) + ", "
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


def _tell_apart(one: float, other: float) -> tuple[str, str]:
    """Both values, in as few digits as show a difference."""
    for digits in range(6, 18):
        texts = f"{one:.{digits}g}", f"{other:.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts


def _row(rung: Rung) -> dict[str, Any]:
    place = {"step": rung.step, "stage": rung.stage, "tensor": rung.tensor}
    return place | {"gap": _finite(rung.gap), "bound": _finite(rung.bound), "agrees": rung.agrees}


def _stretch(rung: Rung) -> dict[str, Any]:
    place = {"quantity": rung.tensor, "start": rung.start, "stop": rung.stop}
    measured = {"gap": _finite(rung.gap), "drift": _finite(rung.drift), "bound": _finite(rung.bound)}
    return place | measured | {"agrees": rung.agrees}


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _position(key: str) -> tuple[int, int, str]:
    step, stage, tensor = key.split("/", 2)
    return int(step), STAGES.index(stage), f"{not tensor.startswith('momentum')} {tensor}"  # the buffer moves first


def _unnamed(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name != "name"}  # the same data may lie elsewhere


def _first_difference(what: str, one: dict[str, Any], other: dict[str, Any]) -> tuple[str, Any, Any]:
    for name in sorted(one | other):
        if one.get(name) != other.get(name):
            return f"{what}, {name}", one.get(name), other.get(name)
    raise AssertionError("equal dictionaries have no difference")
