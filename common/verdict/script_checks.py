"""The checks of two scripts' records."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from lockstep.common.protocol import STAGES, split_slot
from lockstep.common.recorder.align import Alignment, ScriptRecord
from lockstep.common.recorder.modules import components
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import FIRST_STEPS, Record
from lockstep.common.verdict.check import Check
from lockstep.common.verdict.distances import (
    magnitude,
    max_difference,
    max_tensor_difference,
)
from lockstep.common.verdict.evaluation import allowed_count
from lockstep.common.verdict.first_steps import Order, check_first_steps
from lockstep.common.verdict.script_comparison import EVERY_STEP
from lockstep.common.verdict.statistics import (
    MAX_NEAR_ZERO,
    NEAR_ZERO_ULP,
    PROOF_BOUND,
    SEPARATION,
    between_and_within,
    bound,
)
from lockstep.common.verdict.trajectory import (
    check_means,
    check_parameters,
    check_scalar,
    check_series,
)

# float64. Of the largest change that the steps so far made to any parameter: what an entry may
# differ by whose gradient is zero but for rounding. Adam divides the gradient by its own size, plus
# an epsilon of 1e-8, and so makes 1e-9 of a step of it. To be caught: decay of such a parameter.
FREE_SHARE = 1e-6
# Below float64. Of a parameter's change so far: what an optimizer's own scalars may add. Adam's bias
# correction, 1 - b2^t, is computed in float32 by optax and in float64 by PyTorch; at b2 0.999 its
# error is up to 3e-5, half of it in the root. Seen: 6.5e-6 of the first update, in no twin.
SCALARS_SHARE = 2e-5
# float64. What two equal shares of a count, such as accuracies, may differ by: a script that
# computes them by `(predicted == y).float().mean()` has them in float32. Seen: 6e-8.
ROUNDED_SHARE = 1e-7
# Counts behind an accuracy, up to which they are looked for: `_count_behind`.
MAX_COUNT = 10**5


def script(record: Record) -> ScriptRecord:
    assert isinstance(record, ScriptRecord)
    return record


def all_checks(a: Ensemble, b: Ensemble, finished: bool) -> list[Check]:
    """Everything that both sides' records hold, compared.

    Args:
        finished: whether the state after the last step, and the results, belong to these steps.
    """
    first, second = script(a.run), script(b.run)
    checks = check_first_steps(a, b, order=causal_order(first))
    checks += [_check_digests(name, a, b) for name in first.batches]
    if len(first.lr):
        checks += check_series(a, b, "lr", "update", operator.attrgetter("lr"))
    for name in first.losses:
        checks += check_series(a, b, name, "loss", loss_of(name))
        checks += check_means(a, b, name, loss_of(name))
    checks += check_parameters(a, b, finished)
    if finished:
        checks += check_results(a, b)
    return _with_room_for_rounding(first, second, checks)


def loss_of(name: str) -> Callable[[Record], np.ndarray]:
    """The values of a loss, float64 (steps,), in a record."""
    return lambda record: script(record).losses[name]


def causal_order(record: ScriptRecord) -> Order:
    """Sorts "<step>/<stage>/<tensor>" as a difference travels: forward through the layers, backward
    against them; an optimizer's state before the parameters."""
    layers = {tensor: place for place, tensor in enumerate(record.layers)}

    def position(key: str) -> tuple[int | str, ...]:
        step, stage, tensor = key.split("/", 2)
        slot, parameter = split_slot(tensor)
        defined = record.order.get(parameter, 0)
        layer = layers.get(record.holders.get(parameter, ""), -1)
        places: tuple[int, int] = (defined, 0)
        if stage == "forward":
            places = (layers.get(tensor, len(layers)), 0)
        elif stage == "backward":
            places = (-layer, -defined)
        return int(step), STAGES.index(stage), not slot, *places, tensor

    return position


def _check_digests(name: str, a: Ensemble, b: Ensemble) -> Check:
    """One array of every step's batch: the first step where they are not the same.

    Below float64, an array that is not the same in a run and its twins says nothing: rounding
    decides what it holds, as it does where a policy acts and what it sees is the batch.
    """
    first, second = script(a.run).batches[name], script(b.run).batches[name]
    different = np.flatnonzero(first != second)
    if (
        len(different)
        and a.run.dtype != "float64"
        and any(_twins_see_other(name, x) for x in (a, b))
    ):
        different = different[:0]
    step = int(different[0]) if len(different) else 0
    return Check(step, "data", name + EVERY_STEP, float(len(different) > 0), 0.0)


def _twins_see_other(name: str, side: Ensemble) -> bool:
    of_run = script(side.run).batches[name]
    return any(not np.array_equal(script(twin).batches[name], of_run) for twin in side.twins)


# --- Parameters that rounding alone moves


def _with_room_for_rounding(
    first: ScriptRecord, second: ScriptRecord, checks: list[Check]
) -> list[Check]:
    """The checks; in float64, those of parameters that rounding alone moves with the bound of
    `FREE_SHARE`, and in other precisions those of all parameters with that of `SCALARS_SHARE`."""
    if first.dtype != "float64":
        return [_with_room_for_scalars(first, check) for check in checks]
    free = moved_by_rounding(first, second)
    return [
        _without_rounding(first, second, check, free[check.tensor])
        if check.stage == "update" and not check.agrees and check.tensor in free
        else check
        for check in checks
    ]


def _without_rounding(
    first: ScriptRecord, second: ScriptRecord, check: Check, free: np.ndarray
) -> Check:
    """The check without the entries that rounding alone moves, where these have moved no further
    than `FREE_SHARE` says.

    Args:
        free: bool, of the parameter's shape: these entries.
    """
    pair = [parameter_at(record, check.step, check.tensor) for record in (first, second)]
    a, b = pair
    if a is None or b is None or a.shape != b.shape or a.shape != free.shape:
        return check
    if max_difference(a[free], b[free])[0] > FREE_SHARE * largest_change(first, check.step):
        return check
    gap, values = max_difference(a[~free], b[~free])
    return replace(check, gap=min(check.gap, gap), values=values)


def parameter_at(record: ScriptRecord, step: int, name: str) -> np.ndarray | None:
    """The parameter after this step, if it was recorded."""
    found = record.first_steps.get(f"{step}/update/{name}")
    if found is None:
        found = record.parameter_history.get(f"{step + 1}/{name}")
    return record.final.get(name) if found is None and step == record.steps - 1 else found


def _with_room_for_scalars(record: ScriptRecord, check: Check) -> Check:
    after = record.first_steps.get(f"{check.step}/update/{check.tensor}")
    before = record.weights.get(check.tensor)
    if check.stage != "update" or before is None or after is None:
        return check
    change, _ = max_tensor_difference(before, after)
    room = SEPARATION[record.dtype] * SCALARS_SHARE * change
    return replace(check, bound=check.bound + (room if math.isfinite(room) else 0.0))


def moved_by_rounding(first: ScriptRecord, second: ScriptRecord) -> dict[str, np.ndarray]:
    """bool, of the parameter's shape, by parameter: the entries whose gradients are zero but for
    rounding on both sides, in each step whose gradients are known: a bias before a norm, or that of
    an attention's keys, which may be a part of a larger one. Only parameters with such entries."""
    sides = [small_gradients(record) for record in (first, second)]
    found = {}
    for name in sides[0].keys() & sides[1].keys():
        (small_a, zero_a), (small_b, zero_b) = (side[name] for side in sides)
        if small_a.shape == small_b.shape:
            found[name] = small_a & small_b & ~(zero_a & zero_b)
    return {name: free for name, free in found.items() if free.any()}


def small_gradients(record: ScriptRecord) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By parameter, the entries whose gradients are near zero in each known step, and those whose
    gradients are zero."""
    near_zero = min(NEAR_ZERO_ULP * float(np.finfo(np.float64).eps), MAX_NEAR_ZERO)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for step in range(FIRST_STEPS):
        prefix = f"{step}/backward/"
        gradients = {
            key.removeprefix(prefix): array
            for key, array in record.first_steps.items()
            if key.startswith(prefix)
        }
        limit = near_zero * max(map(magnitude, gradients.values()), default=0.0)
        for name, gradient in gradients.items():
            small, zero = np.abs(gradient) < limit, gradient == 0
            before = found.get(name, (np.array(True), np.array(True)))
            found[name] = before[0] & small, before[1] & zero
    return found


def largest_change(record: ScriptRecord, step: int) -> float:
    """How far the steps up to this one moved any entry of a parameter, as far as that is known."""
    moments = [(s, f"{s}/update/", record.first_steps) for s in range(FIRST_STEPS)]
    history = record.parameter_history
    done = {int(key.partition("/")[0]) for key in history}
    moments += [(count - 1, f"{count}/", history) for count in sorted(done)]
    moments.append((record.steps - 1, "", record.final))
    largest = 0.0
    for at, prefix, arrays in moments:
        if at <= step:
            changes = (
                max_tensor_difference(before, arrays.get(prefix + name))[0]
                for name, before in record.weights.items()
            )
            largest = max(largest, *(change for change in changes if math.isfinite(change)), 0.0)
    return largest


# --- Results


def check_results(a: Ensemble, b: Ensemble) -> list[Check]:
    """What was given to `Run.finish`: whole numbers are counted where they differ, others are
    compared by their largest difference."""
    first, second = script(a.run), script(b.run)
    seen = _training_gap(first, second)
    return [_check_result(a, b, name, seen) for name in first.results]


def _check_result(a: Ensemble, b: Ensemble, name: str, extra: float) -> Check:
    records = [*a.records, *b.records]
    values = {id(record): script(record).results.get(name) for record in records}
    ours, theirs = values[id(a.run)], values[id(b.run)]
    assert ours is not None and theirs is not None
    step, dtype = a.run.steps, a.run.dtype
    if ours.dtype.kind == "i" and theirs.dtype.kind == "i":
        return _check_counts(a, b, name, values)
    if ours.size == 1 and theirs.size == 1:

        def of(record: Record) -> float:
            value = values[id(record)]
            return float(value.ravel()[0]) if value is not None and value.size else math.nan

        found = check_scalar(a, b, step, "evaluate", name, of, extra=extra, most=math.inf)
        count = _count_behind([of(record) for record in records], first_counts(a.run))
        if count is None:
            return found
        if dtype == "float64":  # float32 holds such a share to 6e-8; one more image is 1e-5
            return replace(found, bound=max(found.bound, ROUNDED_SHARE))
        spread = None if found.spread is None else found.spread * count
        return replace(
            found, bound=max(found.bound, allowed_count(dtype, spread) / count), most=1.0
        )
    gap, spread = between_and_within(
        a.records, b.records, lambda x, y: max_tensor_difference(values[id(x)], values[id(y)])[0]
    )
    _, pair = max_tensor_difference(ours, theirs)
    limit = bound(dtype, spread, max(magnitude(ours), magnitude(theirs))) + extra
    return Check(step, "evaluate", name, gap, limit, spread, pair)


def _check_counts(
    a: Ensemble, b: Ensemble, name: str, values: dict[int, np.ndarray | None]
) -> Check:
    """How many whole numbers differ; of a single one, by how much."""

    def distance(x: Record, y: Record) -> float:
        one, other = values[id(x)], values[id(y)]
        if one is None or other is None or one.shape != other.shape:
            return math.inf
        return float(np.abs(one - other)) if one.size == 1 else float(np.sum(one != other))

    gap, spread = between_and_within(a.records, b.records, distance)
    ours, theirs = values[id(a.run)], values[id(b.run)]
    assert ours is not None and theirs is not None
    single = ours.size == theirs.size == 1
    pair = (float(ours.ravel()[0]), float(theirs.ravel()[0])) if single else None
    limit = allowed_count(a.run.dtype, spread)
    most = math.inf if single else float(ours.size)
    return Check(a.run.steps, "evaluate", name, gap, limit, spread, pair, most=most)


def first_counts(record: Record) -> list[int]:
    """The sizes of the results that are whole numbers, such as predictions."""
    results = script(record).results.values()
    return [array.size for array in results if array.dtype.kind == "i" and array.size > 1]


def _count_behind(values: Sequence[float], sizes: Sequence[int]) -> int | None:
    """The count of which all values are shares, as accuracies are of the test data: one of `sizes`,
    or the smallest that fits; None if none does.

    Three digits of a float32 fit some count up to 1,000 by chance in one case of thirty, all digits
    of a float64 none up to 100,000.
    """
    if not all(0 <= value <= 1 for value in values):
        return None
    for size in sizes:
        if all(abs(value * size - round(value * size)) < 1e-4 for value in values):
            return size
    for most, error in ((MAX_COUNT, 1e-15), (1000, 1e-7)):
        found = [Fraction(value).limit_denominator(most) for value in values]
        count = math.lcm(*(each.denominator for each in found))
        close = all(abs(float(f) - v) <= error for f, v in zip(found, values, strict=True))
        if close and 1 < count <= most:
            return count
    return None


def _training_gap(first: ScriptRecord, second: ScriptRecord) -> float:
    """The largest gap of float64's losses, up to its bound: as `evaluation.training_loss_gap`."""
    if first.dtype != "float64":
        return 0.0
    found = [0.0]
    for name, ours in first.losses.items():
        gap, _ = max_difference(ours, second.losses[name])
        limit = PROOF_BOUND * max(1.0, magnitude(ours))
        found.append(min(gap, limit) if math.isfinite(gap) else 0.0)
    return max(found)


# --- Checks that say nothing of the training


def believed(checks: list[Check], alignment: Alignment) -> tuple[list[Check], list[str]]:
    """The checks without those that a later one contradicts, and a sentence on each of these.

    That two modules hold the same parameters does not make what they return the same: one may add a
    residual that the other leaves to its caller, or be called several times in a step. So where
    they differ and the module around them does not, or the losses of the step do not, or nothing
    but such modules differs, they are no place of the training. And the learning rate that a script
    reports counts only if an update differs.
    """
    rejected: dict[int, str] = {}
    guessed = [c for c in checks if c.stage == "forward" and c.tensor in set(alignment.inferred)]
    failing = [check for check in checks if not check.agrees]
    real = [c for c in failing if c not in guessed and not _is_rate(c)]
    good = {(c.step, c.tensor) for c in guessed if c.agrees}
    losses = {step: [c.agrees for c in checks if _is_loss(c, step)] for step in range(FIRST_STEPS)}
    for check in guessed:
        same_loss = bool(losses[check.step]) and all(losses[check.step])
        around = any(step == check.step and _holds(tensor, check.tensor) for step, tensor in good)
        if not check.agrees and (around or same_loss or not real):
            rejected[id(check)] = (
                f"forward: {check.tensor}: what the two modules return is not the same thing, "
                "though they hold the same parameters"
            )
    if _rate_is_not_applied(checks) or not real:
        for check in failing:
            if _is_rate(check):
                rejected[id(check)] = (
                    f"update: lr: the reported learning rates differ at step {check.step}, and the "
                    "updates do not"
                )
    kept = [check for check in checks if id(check) not in rejected]
    return kept, list(dict.fromkeys(rejected.values()))


def _is_rate(check: Check) -> bool:
    return check.stage == "update" and check.tensor == "lr"


def _is_loss(check: Check, step: int) -> bool:
    return check.stage == "loss" and check.step == step and check.start is None


def _rate_is_not_applied(checks: Sequence[Check]) -> bool:
    """Whether the first rate that differs is of a step whose updates were compared and agree."""
    steps = [c.step for c in checks if _is_rate(c) and not c.agrees]
    if not steps:
        return False
    updates = [
        c
        for c in checks
        if c.step == min(steps) < FIRST_STEPS and c.stage == "update" and not _is_rate(c)
    ]
    return bool(updates) and all(check.agrees for check in updates)


def _holds(module: str, inner: str) -> bool:
    """Whether a module's path leads to `inner`."""
    path, longer = components(module), components(inner)
    return module != inner and len(path) < len(longer) and longer[: len(path)] == path
