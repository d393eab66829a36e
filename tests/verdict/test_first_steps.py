"""The bounds of the first steps, number by number: what each tensor is measured against, and what a
flipped ReLU may move."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from lockstep.common.protocol import Arrays
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record
from lockstep.common.verdict import first_steps
from lockstep.common.verdict.first_steps import check_first_steps, flip_allowance
from lockstep.common.verdict.statistics import (
    FLIP_SHARE,
    FLOOR_ULP,
    MAX_NEAR_ZERO,
    NEAR_ZERO_ULP,
    PROOF_BOUND,
    REPLAY_BOUND,
    SATURATED_ULP,
    SEPARATION,
)
from tests.verdict.test_compare import make

KEY = "0/backward/fc1.bias"
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-7}


def record(dtype: str, first: Arrays, **changes: Any) -> Record:
    """A run of which only these tensors are known."""
    return dataclasses.replace(make("torch", dtype), first_steps=first, weights={}, **changes)


def bounds(dtype: str, first: Arrays) -> dict[str, float]:
    """The bound of each tensor, of two runs that are equal and have no twins."""
    side = Ensemble(record(dtype, first))
    return {f"{c.step}/{c.stage}/{c.tensor}": c.bound for c in check_first_steps(side, side)}


def array(*values: float) -> np.ndarray:
    return np.array(values)


# --- What rounding leaves of a sum that is zero


@pytest.mark.parametrize("dtype", EPS)
def test_a_gradient_that_is_nearly_zero_is_measured_by_the_largest_of_its_step(dtype: str) -> None:
    limit = min(NEAR_ZERO_ULP * EPS[dtype], MAX_NEAR_ZERO)
    sizes = {"float64": limit, "float32": limit, "bfloat16": MAX_NEAR_ZERO}
    assert limit == sizes[dtype]

    def measured(size: float, stage: str = "backward", prefix: str = "") -> float:
        """The bound of a small tensor, over that of the largest one."""
        small, large = f"0/{stage}/{prefix}fc1.bias", f"0/{stage}/{prefix}fc1.kernel"
        other = {f"1/{stage}/{prefix}fc1.kernel": array(1e6)}  # another step says nothing
        found = bounds(dtype, {small: array(size), large: array(1.0, 0.5)} | other)
        return found[small] / found[large]

    # Below float64's bound, what is left of two sums that are zero is allowed.
    rest = max(1.0, 2 * limit / bounds(dtype, {KEY: array(1.0)})[KEY])
    assert rest > 1 or dtype != "float32"
    # Above it, in float64, a gradient may differ by what an activation that saturates leaves.
    saturated = SATURATED_ULP * EPS[dtype] / PROOF_BOUND if dtype == "float64" else 0.0
    for stage, prefix, least in (("backward", "", saturated), ("update", "momentum of ", 0.0)):
        assert measured(0.9 * limit, stage, prefix) == pytest.approx(rest)
        for size in (limit, 1.1 * limit):
            assert measured(size, stage, prefix) == pytest.approx(max(size, least))
    # Parameters and activations are measured by their own size.
    assert measured(0.5 * limit, "update") == pytest.approx(0.5 * limit)
    assert measured(0.5 * limit, "forward") == pytest.approx(0.5 * limit)


@pytest.mark.parametrize(("other", "agrees"), [(-0.9, True), (0.0, False), (1.1, False)])
def test_two_rests_of_sums_that_are_zero_agree_and_a_frozen_layer_does_not(
    other: float, agrees: bool
) -> None:
    limit, large = NEAR_ZERO_ULP * EPS["float32"], array(1.0, 0.5)

    def side(value: float) -> Ensemble:
        made = record("float32", {KEY: array(value), "0/backward/fc1.kernel": large})
        return Ensemble(made, (made,))

    first, _ = check_first_steps(side(0.9 * limit), side(other * limit))
    assert (first.tensor, first.agrees) == ("fc1.bias", agrees)


def test_in_float64_the_slope_of_a_saturated_activation_may_be_zero_and_a_fault_is_found() -> None:
    """A tanh of 1 on one side and of 1 less an ulp on the other; a layer that is frozen is not that."""
    large, least = array(1.0, 0.5), 1e-15

    def side(*values: float) -> Ensemble:
        return Ensemble(record("float64", {KEY: array(*values), "0/backward/fc1.kernel": large}))

    run = side(3e-12, least)
    for other, agrees in [(0.0, True), (least + 1e-14, True), (least + 1e-13, False)]:
        first, _ = check_first_steps(run, side(3e-12, other))
        assert (first.tensor, first.agrees) == ("fc1.bias", agrees)
    assert not check_first_steps(run, side(0.0, 0.0))[0].agrees


def test_in_bfloat16_a_gradient_of_no_more_than_a_thousandth_is_nearly_zero() -> None:
    assert NEAR_ZERO_ULP * EPS["bfloat16"] > MAX_NEAR_ZERO > NEAR_ZERO_ULP * EPS["float32"]


# --- Twins in float64


def test_in_float64_twins_set_the_bound_only_where_they_are_asked_or_short() -> None:
    run = record("float64", {KEY: array(1.0)})
    twin = record("float64", {KEY: array(1.0 + 1e-9)})
    other = record("float64", {KEY: array(1.0 + 4e-9)})

    whole = Ensemble(run, (twin,)), Ensemble(other, (other,))
    [alone] = check_first_steps(*whole)
    assert alone.bound == pytest.approx(PROOF_BOUND, rel=1e-6)
    assert alone.spread is None
    [asked] = check_first_steps(*whole, replayed=True)
    assert asked.spread == 0
    for short in (0, 1):  # short twins of either side are enough
        sides = [Ensemble(run), Ensemble(other)]
        sides[short] = sides[short].with_short_twins([twin])
        [found] = check_first_steps(sides[0], sides[1])
        assert found.spread is not None
        assert found.bound > PROOF_BOUND * 1.1


@pytest.mark.parametrize(
    ("gap", "agrees"), [(0.9 * REPLAY_BOUND, True), (1.1 * REPLAY_BOUND, False)]
)
def test_a_step_taken_again_has_room_for_sums_that_cancel(gap: float, agrees: bool) -> None:
    one, other = (
        Ensemble(made, (made,))
        for made in (record("float64", {KEY: array(value)}) for value in (1.0, 1.0 + gap))
    )
    [found] = check_first_steps(one, other, replayed=True)
    assert found.agrees == agrees
    [found] = check_first_steps(one, other)  # the control: the first steps have none
    assert not found.agrees


# --- What must be equal, and what one side may lack


@pytest.mark.parametrize("dtype", EPS)
def test_weights_and_data_have_no_room(dtype: str) -> None:
    one = record(dtype, {"0/data/images": array(1.0)})
    one = dataclasses.replace(one, weights={"fc1.bias": array(1.0)})
    checks = check_first_steps(Ensemble(one, (one,)), Ensemble(one, (one,)))
    assert [(c.step, c.stage, c.bound, c.agrees) for c in checks] == [
        (0, "data", 0, True),
        (0, "weights", 0, True),
    ]


def test_only_an_activation_may_be_known_of_one_side_alone() -> None:
    def gaps(stage: str) -> list[float]:
        tensors = {f"0/{stage}/fc1": array(1.0)}
        known = record("float64", tensors | {KEY: array(1.0)})
        unknown = record("float64", {KEY: array(1.0)})
        sides = Ensemble(known), Ensemble(unknown)
        return [check.gap for check in check_first_steps(*sides) if check.stage == stage]

    assert gaps("forward") == []
    assert gaps("update") == [np.inf]


def test_a_given_order_takes_the_place_of_the_causal_one() -> None:
    run = record("float64", {f"0/forward/{name}": array(1.0) for name in "abc"}, layers=list("abc"))
    side = Ensemble(run)
    assert [c.tensor for c in check_first_steps(side, side)] == ["a", "b", "c"]
    reverse = check_first_steps(side, side, order=lambda key: (-ord(key[-1]),))
    assert [c.tensor for c in reverse] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("key", "stored"),
    [
        ("0/update/fc1.bias", True),
        ("0/update/bn.mean", False),
        ("0/update/bn.var", False),
        ("0/update/momentum of fc1.bias", False),
        ("0/forward/fc1", False),
    ],
)
def test_in_mixed_precision_parameters_alone_are_as_exact_as_float32(
    key: str, stored: bool
) -> None:
    run = record("mixed_bfloat16", {key: array(1.0)}, lr=np.zeros(0), gradient_norm=np.zeros(3))
    [found] = check_first_steps(Ensemble(run, (run,)), Ensemble(run, (run,)))
    dtype = "float32" if stored else "bfloat16"
    floor = SEPARATION[dtype] * FLOOR_ULP[dtype] * EPS[dtype]
    assert found.bound == pytest.approx(floor)


# --- The smaller half of a gradient's differences


@pytest.mark.parametrize(("dtype", "stage"), [("float64", "backward"), ("float32", "forward")])
def test_the_median_counts_for_gradients_and_not_in_float64(dtype: str, stage: str) -> None:
    def measure(dtype: str, stage: str) -> str:
        one, other = (
            record(dtype, {f"0/{stage}/fc1.bias": np.full(4, value)}) for value in (1.0, 1.002)
        )
        sides = Ensemble(one, (one,)), Ensemble(other, (other,))
        [found] = check_first_steps(*sides, replayed=True)
        return found.measure

    assert measure("float32", "backward") == "median"
    assert measure(dtype, stage) == "largest"


# --- What a flipped ReLU may move

GRADIENTS = {"0/backward/fc1.bias": array(2.0, 1.0), "1/backward/fc1.bias": array(5.0, 0.0)}


def pair(shift: float, **changes: Any) -> tuple[Record, Record]:
    """Two runs whose gradients of both steps differ by `shift`."""
    moved = {key: value + shift for key, value in GRADIENTS.items()}
    return record("float32", GRADIENTS, **changes), record("float32", moved, **changes)


def test_of_a_gradient_it_may_move_a_share() -> None:
    allowed = flip_allowance(*pair(0.1), 1, "backward", "fc1.bias")
    assert allowed == pytest.approx(FLIP_SHARE * 5)
    assert flip_allowance(*pair(0.1), 0, "backward", "fc1.bias") == pytest.approx(FLIP_SHARE * 2)


def test_an_update_may_differ_by_what_its_gradients_differ() -> None:
    lr = array(0.5, 0.25, 100.0)
    for step, seen in ((0, 0.1), (1, 0.2)):  # of this step, and of those before it
        runs = pair(0.1, lr=lr)
        buffer = flip_allowance(*runs, step, "update", "momentum of fc1.bias")
        assert buffer == pytest.approx(seen)
        parameter = flip_allowance(*runs, step, "update", "fc1.bias")
        assert parameter == pytest.approx(0.5 * seen)  # the largest rate so far
    broken = pair(np.inf, lr=lr)
    assert flip_allowance(*broken, 1, "update", "fc1.bias") == 0


def test_where_the_learning_rate_is_not_known_it_is_taken_from_the_update() -> None:
    weights, after = {"fc1.bias": array(1.0, 1.0)}, {"0/update/fc1.bias": array(0.4, 0.9)}
    one, other = pair(0.1, lr=np.zeros(0))
    first = dataclasses.replace(one, weights=weights, first_steps=one.first_steps | after)
    # moved by 0.6 where the gradient is 2
    assert flip_allowance(first, other, 0, "update", "fc1.bias") == pytest.approx(0.1 * 0.6 / 2)
    assert flip_allowance(one, other, 0, "update", "fc1.bias") == 0  # nothing is known
    later = {"1/update/fc1.bias": array(0.4, 0.1)}
    both = dataclasses.replace(first, first_steps=first.first_steps | later)
    # moved by 0.9 in two steps; the smaller of both gradients, 2
    assert flip_allowance(both, other, 1, "update", "fc1.bias") == pytest.approx(0.2 * 0.9 / 2)


@pytest.mark.parametrize("stage", ["forward", "loss"])
def test_the_loss_may_move_by_what_the_smaller_update_moves_it(stage: str) -> None:
    def run(momentum: float, rate: float, norm: float) -> Record:
        made = record("float32", {}, lr=array(rate, 9.0), gradient_norm=array(norm, 9.0))
        return dataclasses.replace(made, config=made.config | {"momentum": momentum})

    one, other = run(0.5, 0.1, 3.0), run(0.5, 0.2, 3.0)
    for runs in ((one, other), (other, one)):
        assert flip_allowance(*runs, 1, stage, "") == pytest.approx(FLIP_SHARE * 2 * 0.1 * 9)
        assert flip_allowance(*runs, 0, stage, "") == 0
    most = run(0.999, 0.1, 3.0)
    assert flip_allowance(most, most, 1, stage, "") == pytest.approx(FLIP_SHARE * 100 * 0.1 * 9)


def test_where_the_gradient_norm_is_not_known_it_is_what_the_first_update_moved() -> None:
    weights = {"fc1.bias": array(1.0, 1.0), "frozen": array(3.0)}
    first = GRADIENTS | {"0/update/fc1.bias": array(0.4, 0.9)}
    run = dataclasses.replace(record("float32", first, gradient_norm=np.zeros(0)), weights=weights)
    assert flip_allowance(run, run, 1, "loss", "loss") == pytest.approx(FLIP_SHARE * 1.3)
    assert flip_allowance(run, run, 0, "loss", "loss") == 0


# --- The bounds that follow


def test_a_bound_is_the_spread_the_floor_and_the_allowance() -> None:
    runs = [record("float32", {KEY: array(value, 0.0, 0.0)}) for value in (1.0, 1.25, 9.0, 9.5)]
    [found] = check_first_steps(Ensemble(runs[0], (runs[1],)), Ensemble(runs[2], (runs[3],)))
    floor = 9 * FLOOR_ULP["float32"] * EPS["float32"]
    assert found.measure == "largest"
    assert found.gap == 9.0 - 1.25  # of the closest runs
    assert found.spread == 0.25  # of the side that spreads less
    assert found.bound == pytest.approx(8 * (0.25 + floor + 0.004))  # as the README has it


def test_the_order_of_a_backward_pass_is_that_of_the_layers_reversed() -> None:
    layers = ["input of a", "a", "b"]
    keys = ["1/backward/a.kernel", "0/backward/b.kernel", "0/backward/a.kernel", "0/forward/b"]
    keys += ["0/forward/a", "0/update/a.kernel", "0/update/momentum of b.kernel"]
    keys += ["0/forward/unknown", "0/backward/0.kernel"]  # of no layer: with the first one
    run = record("float64", {key: array(1.0) for key in keys}, layers=layers)
    assert sorted(keys, key=first_steps.causal_order(run)) == [
        "0/forward/unknown",
        "0/forward/a",
        "0/forward/b",
        "0/backward/b.kernel",
        "0/backward/a.kernel",
        "0/backward/0.kernel",
        "0/update/momentum of b.kernel",
        "0/update/a.kernel",
        "1/backward/a.kernel",
    ]
