"""Which more twins a verdict waits for, case by case."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record
from lockstep.common.verdict import judge as judging
from lockstep.common.verdict.comparison import Comparison, Divergence
from lockstep.common.verdict.judge import differs_in_first_steps, twins_wanted
from tests.verdict.test_compare import LABELS, family, found, in_opening, make

FIRST, MOST = 2, 6  # twins per backend
NAMES = ("torch", "flax")
Case = tuple[int, str, str]  # step, stage and tensor of the first divergence
LATE, EARLY, EVALUATE = (30, "loss", "loss"), (1, "loss", "loss"), (40, "evaluate", "test loss")
BACKWARD = (0, "backward", "fc1.bias")


def comparison(
    dtype: str,
    first: Case | None,
    *,
    twins: tuple[int, int] = (2, 2),
    short: tuple[int, int] = (0, 0),
    gap: float = 1.0,
) -> Comparison:
    """One that diverges first at `first`, of runs with so many twins."""
    runs, _ = family(dtype)
    made = found(runs, {name: [make(name, dtype, 1)] for name in runs})
    assert made.twins is not None
    of_each = {name: made.twins[name] * count for name, count in zip(NAMES, twins, strict=True)}
    place = None if first is None else Divergence(*first, gap=gap, bound=0.1, names=NAMES)
    short_twins = dict(zip(NAMES, short, strict=True))
    return dataclasses.replace(made, first_divergence=place, twins=of_each, short_twins=short_twins)


@pytest.mark.parametrize(
    ("dtype", "first", "options", "wanted"),
    [
        ("float64", None, {}, 0),
        ("float64", LATE, {"gap": math.inf}, 0),  # not finite: no twin explains it
        ("float64", LATE, {"twins": (0, 0)}, FIRST),
        ("float64", LATE, {"twins": (0, 2)}, FIRST),
        ("float64", LATE, {}, MOST),
        ("float64", LATE, {"twins": (6, 5)}, MOST),
        ("float64", LATE, {"twins": (6, 6)}, 0),
        ("float64", EVALUATE, {"twins": (0, 0)}, 0),
        ("float64", EVALUATE, {"twins": (2, 2)}, MOST),
        ("float64", EARLY, {"twins": (0, 0)}, 0),
        ("float64", (2, "loss", "loss"), {"twins": (0, 0)}, FIRST),
        ("float32", None, {}, 0),
        ("float32", LATE, {"gap": math.inf}, 0),
        ("float32", LATE, {"twins": (0, 0)}, MOST),
        ("float32", LATE, {}, MOST),
        ("float32", LATE, {"twins": (6, 6)}, 0),
        ("float32", EVALUATE, {}, MOST),
        ("float32", BACKWARD, {}, 0),
        ("float32", EARLY, {}, MOST),
        ("float32", EARLY, {"short": (0, 4)}, 0),  # their first steps have been asked
        ("float32", (2, "loss", "loss"), {"short": (4, 4)}, MOST),
        ("float32", (1, "data", "batch"), {}, 0),  # no rounding, in any precision
        ("float32", (1, "update", "lr"), {}, 0),
    ],
)
def test_so_many_twins_are_wanted(
    dtype: str, first: Case | None, options: dict[str, Any], wanted: int
) -> None:
    assert twins_wanted(comparison(dtype, first, **options)) == wanted


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("first", "gap", "differs"),
    [
        (None, 1.0, False),
        (BACKWARD, 1.0, True),
        (BACKWARD, math.inf, False),
        ((0, "update", "fc1.bias"), 1.0, True),
        ((0, "forward", "fc1"), 1.0, False),
        ((0, "loss", "loss"), 1.0, False),
        ((1, "forward", "fc1"), 1.0, True),
        ((1, "update", "lr"), 1.0, False),
        ((1, "data", "batch"), 1.0, False),
        ((0, "weights", "fc1.bias"), 1.0, False),
        ((2, "backward", "fc1.bias"), 1.0, False),
    ],
)
def test_the_first_steps_of_more_twins_are_wanted(
    dtype: str, first: Case | None, gap: float, differs: bool
) -> None:
    assert differs_in_first_steps(comparison(dtype, first, gap=gap)) is differs


# --- What is trained in the end


def asked_for(dtype: str, fault: Callable[[Record], Record], twins: int) -> dict[str, list[range]]:
    """What `judge` asks for, of either kind, where no twin can be trained."""
    runs, kin = family(dtype)
    runs["flax"], kin["flax"] = fault(runs["flax"]), list(map(fault, kin["flax"]))
    ensembles = {name: Ensemble(run, tuple(kin[name][:twins])) for name, run in runs.items()}
    asked: dict[str, list[range]] = {"whole": [], "short": []}

    def train(kind: str, name: str, numbers: range) -> list[Record]:
        if name == "torch" and len(numbers):
            asked[kind].append(numbers)
        return []

    judging.judge(ensembles, lambda *a: train("whole", *a), LABELS, lambda *a: train("short", *a))
    return asked


def late(record: Record) -> Record:
    loss = np.where(np.arange(len(record.loss)) >= 30, 2 * record.loss, record.loss)
    return dataclasses.replace(record, loss=loss)


def test_the_numbers_of_the_twins_go_on_where_those_that_are_there_end() -> None:
    # In float64 the first are the same run again, 0, and two twins.
    assert asked_for("float64", late, 0) == {"whole": [range(3)], "short": []}
    assert asked_for("float32", late, 2) == {"whole": [range(3, MOST + 1)], "short": []}
    key = "0/backward/fc1.bias"
    in_gradient = in_opening(key)
    assert asked_for("float64", in_gradient, 0)["short"] == [range(1, FIRST + 1)]
    assert asked_for("float32", in_gradient, 2)["short"] == [range(3, MOST + 1)]


def test_a_verdict_that_stands_asks_for_none() -> None:
    assert asked_for("float32", lambda record: record, 2) == {"whole": [], "short": []}
    assert asked_for("float64", lambda record: record, 0) == {"whole": [], "short": []}


def test_twins_of_one_backend_alone_count() -> None:
    def train(name: str, numbers: range) -> list[Record]:
        return [make(name, "float64", number) for number in numbers] if name == "flax" else []

    def alone(fault: Callable[[Record], Record]) -> Comparison:
        runs, _ = family("float64")
        runs["flax"] = fault(runs["flax"])
        ensembles = {name: Ensemble(run) for name, run in runs.items()}
        return judging.judge(ensembles, train, LABELS, train)

    whole = alone(late).twins
    assert whole is not None
    assert {name: len(each) for name, each in whole.items()} == {"torch": 0, "flax": FIRST}
    assert alone(in_opening("0/backward/fc1.bias")).short_twins == {"torch": 0, "flax": FIRST}
