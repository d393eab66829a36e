"""The verdict: what agrees agrees, whatever is broken is named, and nothing that is not there
passes for agreement."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from lockstep.common.config import DTYPES, Config
from lockstep.common.dtypes import compute_dtype, numpy_dtype
from lockstep.common.errors import RecordError
from lockstep.common.model.perturb import twin_weights
from lockstep.common.protocol import STAGES, Arrays
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record, windows
from lockstep.common.verdict import compare as comparing
from lockstep.common.verdict.check import Check
from lockstep.common.verdict.comparison import Comparison, common_nonfinite_step, divergence
from lockstep.common.verdict.evaluation import class_accuracy
from lockstep.common.verdict.first_steps import check_first_steps
from lockstep.common.verdict.judge import INITIAL_TWINS, MAX_TWINS, twins_wanted, without_twins
from lockstep.common.verdict.judge import judge as judge_ensembles
from lockstep.common.verdict.statistics import (
    COUNT_FLOOR,
    FLIP_SHARE,
    SEPARATION,
    SEPARATION_IMAGES,
    paired_difference,
)
from tests.marks import slow_except

STEPS = 100
CLASSES = ("plane", "car", "bird", "cat", "deer")
LABELS = np.repeat(np.arange(5), 40)
IMAGES = len(LABELS)
WRONG = np.arange(IMAGES) % 10 >= 7  # of each class 28 images are recognised and 12 are not
SHAPES = {"conv1.kernel": (3, 3, 3, 2), "fc1.bias": (4,)}
LAYERS = ["input of conv1", "conv1", "input of fc1", "fc1", "logits"]  # no alphabet has this order
ALONG = (3, 10, 30)  # the steps done when parameters are kept
PRODUCTION = ("float32", "bfloat16", "mixed_bfloat16")

# Noise relative to the value: a few ulp. The largest gap it makes in a float64 trajectory is
# 1.0e-14, bound 2.3e-12.
NOISE = {"float64": 2e-16, "float32": 1e-7, "bfloat16": 8e-3, "mixed_bfloat16": 8e-3}
# What a control adds to one value. Must exceed the bounds: 1e-12 of 2.3; 8 times a drift of 1e-5
# (float32) or 0.7 (bfloat16), 4 ulp, and 0.4 % of what gradients made.
FAULT = {"float64": 1e-10, "float32": 0.2, "bfloat16": 30.0, "mixed_bfloat16": 30.0}

Runs = dict[str, Record]
Twins = dict[str, list[Record]]


def make(backend: str, dtype: str, twin: int | None = None, **changes: Any) -> Record:
    """One run of a family: all its members share their values, up to a noise of their own."""
    values = np.random.default_rng(1)
    own = np.random.default_rng([len(backend), ord(backend[0]), twin or 0])

    def noisy(array: np.ndarray, growth: Any = 1.0, precision: str = dtype) -> np.ndarray:
        return array * (1 + NOISE[precision] * growth * own.uniform(-1, 1, array.shape))

    held = numpy_dtype(dtype).name  # in mixed precision weights are as exact as float32's

    def cast(array: np.ndarray) -> np.ndarray:
        return array.astype(numpy_dtype(dtype))

    def computed(array: np.ndarray) -> np.ndarray:
        return array.astype(compute_dtype(dtype))

    weights = {name: cast(values.normal(size=shape)) for name, shape in SHAPES.items()}
    opening: Arrays = {}
    for step in range(2):
        opening[f"{step}/data/images"] = computed(values.uniform(-1, 1, (4, 2, 2, 3)))
        opening[f"{step}/data/labels"] = values.integers(0, 5, 4)
        for layer in LAYERS:
            opening[f"{step}/forward/{layer}"] = computed(noisy(values.normal(size=(4, 5))))
        opening[f"{step}/loss/loss"] = cast(noisy(np.array(2.3)))
        for name, shape in SHAPES.items():
            opening[f"{step}/backward/{name}"] = cast(noisy(values.normal(size=shape)))
            opening[f"{step}/update/{name}"] = cast(
                noisy(values.normal(size=shape), precision=held)
            )
            opening[f"{step}/update/momentum of {name}"] = cast(noisy(values.normal(size=shape)))
    growth = np.linspace(1, 10, STEPS)

    def trained(steps: int) -> Arrays:
        away = {
            name: 0.1 * np.sqrt(steps / STEPS) * values.normal(size=shape)
            for name, shape in SHAPES.items()
        }
        return {
            name: cast(noisy(weights[name].astype(np.float64) + away[name], precision=held))
            for name in SHAPES
        }

    record = Record(
        backend=backend,
        dtype=dtype,
        twin=twin,
        config=Config(steps=STEPS).resolve(160).to_json(),
        data={
            "name": "made",
            "digest": "d1",
            "order": "o1",
            "sizes": {"train": 160},
            "classes": list(CLASSES),
        },
        environment={"device": "cpu"},
        source="s1",
        loss=noisy(np.linspace(2.3, 1.1, STEPS), growth),
        gradient_norm=noisy(np.linspace(3.0, 1.0, STEPS), growth),
        lr=np.linspace(0.1, 0.05, STEPS),
        batch_digests=np.arange(1, STEPS + 1),
        predictions=np.where(WRONG, (LABELS + 1) % 5, LABELS),
        test_loss=float(noisy(np.array(1.2))),
        seconds=2.0,
        steps_per_second=20.0,
        weights=weights if twin is None else twin_weights(weights, 0, twin),
        first_steps=opening,
        layers=LAYERS,
        parameter_history={
            f"{steps}/{name}": array for steps in ALONG for name, array in trained(steps).items()
        },
        final=trained(STEPS),
    )
    return dataclasses.replace(record, **changes)


def family(dtype: str) -> tuple[Runs, Twins]:
    runs = {name: make(name, dtype) for name in ("torch", "flax")}
    twins = {
        name: [] if dtype == "float64" else [make(name, dtype, twin) for twin in (1, 2)]
        for name in runs
    }
    return runs, twins


def compare(runs: Runs, twins: Twins, labels: np.ndarray) -> dict:
    return found(runs, twins, labels).to_json()


def found(runs: Runs, twins: Twins, labels: np.ndarray = LABELS) -> Comparison:
    kin = {name: tuple(twins.get(name, ())) for name in runs}
    return comparing.compare({n: Ensemble(run, kin[n]) for n, run in runs.items()}, labels)


def judged(
    dtype: str, torch: Record | None = None, flax: Record | None = None, twins: Twins | None = None
) -> Comparison:
    runs, kin = family(dtype)
    runs |= {name: run for name, run in (("torch", torch), ("flax", flax)) if run is not None}
    return found(runs, kin if twins is None else twins)


def judge(
    dtype: str, torch: Record | None = None, flax: Record | None = None, twins: Twins | None = None
) -> dict:
    """The lens that a family gives with some members put in another's place; it must survive strict
    JSON."""
    runs, kin = family(dtype)
    runs |= {
        name: record for name, record in (("torch", torch), ("flax", flax)) if record is not None
    }
    lens = compare(runs, {**(kin if twins is None else twins)}, LABELS)
    assert json.loads(json.dumps(lens, allow_nan=False)) == lens
    return lens


def faulty_comparison(dtype: str, **faults: Callable[[Record], Record]) -> Comparison:
    runs, twins = family(dtype)
    for side, fault in faults.items():
        runs[side], twins[side] = fault(runs[side]), [fault(twin) for twin in twins[side]]
    return found(runs, twins)


def faulty(dtype: str, **faults: Callable[[Record], Record]) -> dict:
    """The lens of a family in which one backend's program is at fault, and so its twins are too."""
    runs, twins = family(dtype)
    for side, fault in faults.items():
        runs[side], twins[side] = fault(runs[side]), [fault(twin) for twin in twins[side]]
    return judge(dtype, **runs, twins=twins)


def moved(array: np.ndarray, amount: float) -> np.ndarray:
    """`array` with `amount` added to its last entry."""
    copy = np.array(array)
    copy.flat[-1] = np.asarray(copy.flat[-1] + amount, copy.dtype)
    return copy


def in_opening(key: str) -> Callable[[Record], Record]:
    def fault(record: Record) -> Record:
        changed = {key: moved(record.first_steps[key], FAULT[record.dtype])}
        return dataclasses.replace(record, first_steps=record.first_steps | changed)

    return fault


def next_bits(key: str) -> Callable[[Record], Record]:
    """The smallest change that there is, to what must be the same bits."""

    def fault(record: Record) -> Record:
        group, name = (
            ("weights", key.partition("/")[2])
            if key.startswith("weights/")
            else ("first_steps", key)
        )
        arrays = dict(getattr(record, group))
        last = np.array(arrays[name])
        entry = last.flat[-1]
        last.flat[-1] = (
            entry + 1 if last.dtype.kind == "i" else np.nextafter(entry, np.asarray(9, last.dtype))
        )
        return dataclasses.replace(record, **{group: arrays | {name: last}})

    return fault


def in_series(name: str, step: int) -> Callable[[Record], Record]:
    def fault(record: Record) -> Record:
        series = getattr(record, name).copy()
        series[step] += (
            1e-9 if name == "lr" else FAULT[record.dtype]
        )  # lr is held to 1e-12 in every lens
        return dataclasses.replace(record, **{name: series})

    return fault


def in_parameters(group: str, key: str) -> Callable[[Record], Record]:
    def fault(record: Record) -> Record:
        arrays = getattr(record, group)
        return dataclasses.replace(
            record, **{group: arrays | {key: moved(arrays[key], FAULT[record.dtype])}}
        )

    return fault


def in_test_loss(record: Record) -> Record:
    return dataclasses.replace(record, test_loss=record.test_loss + FAULT[record.dtype])


def in_predictions(record: Record) -> Record:
    """Wrong images get another wrong class, so that no accuracy moves: 60 of them, of which 16 are
    put up with."""
    return dataclasses.replace(
        record, predictions=np.where(WRONG, (LABELS + 2) % 5, record.predictions)
    )


# What is broken: how, and where it must be found.
RUNGS: dict[str, tuple[Callable[[Record], Record], tuple[int, str, str]]] = {
    "images": (next_bits("0/data/images"), (0, "data", "images")),
    "labels": (next_bits("0/data/labels"), (0, "data", "labels")),
    "weights": (next_bits("weights/fc1.bias"), (0, "weights", "fc1.bias")),
    "forward": (in_opening("0/forward/logits"), (0, "forward", "logits")),
    "loss of the first batch": (in_opening("0/loss/loss"), (0, "loss", "loss")),
    "gradient of a kernel": (
        in_opening("0/backward/conv1.kernel"),
        (0, "backward", "conv1.kernel"),
    ),
    "gradient of a bias": (in_opening("0/backward/fc1.bias"), (0, "backward", "fc1.bias")),
    "updated kernel": (in_opening("0/update/conv1.kernel"), (0, "update", "conv1.kernel")),
    "updated bias": (in_opening("0/update/fc1.bias"), (0, "update", "fc1.bias")),
    "momentum": (
        in_opening("0/update/momentum of fc1.bias"),
        (0, "update", "momentum of fc1.bias"),
    ),
    "images of the second step": (next_bits("1/data/images"), (1, "data", "images")),
    "momentum of the second step": (
        in_opening("1/update/momentum of conv1.kernel"),
        (1, "update", "momentum of conv1.kernel"),
    ),
    "lr trajectory": (in_series("lr", 11), (11, "update", "lr")),
    "parameter after ten steps": (
        in_parameters("parameter_history", "10/fc1.bias"),
        (9, "update", "fc1.bias"),
    ),
    "loss trajectory": (in_series("loss", 17), (17, "loss", "loss")),
    "gradient norm trajectory": (in_series("gradient_norm", 29), (29, "backward", "gradient_norm")),
    "last loss": (in_series("loss", STEPS - 1), (STEPS - 1, "loss", "loss")),
    "parameter after the last step": (
        in_parameters("final", "conv1.kernel"),
        (STEPS - 1, "update", "conv1.kernel"),
    ),
    "test loss": (in_test_loss, (STEPS, "evaluate", "test loss")),
    "predictions": (in_predictions, (STEPS, "evaluate", "predictions")),
}

# In the production lenses, one loss moves the mean loss of its stretch with it: the last step of
# the stretch.
MEANS = {
    "loss trajectory": (29, "loss", "mean loss"),
    "last loss": (STEPS - 1, "loss", "mean loss"),
}

# Below float64 all precisions are judged alike, each with bounds of its own.
lenses = pytest.mark.parametrize("dtype", slow_except(DTYPES, "float64", "float32"))
production = pytest.mark.parametrize("dtype", slow_except(PRODUCTION, "float32"))
sides = pytest.mark.parametrize("side", ["torch", "flax"])


def place(lens: dict) -> tuple[int, str, str]:
    first = lens["first_divergence"]
    return first["step"], first["stage"], first["tensor"]


def expected_place(dtype: str, rung: str) -> tuple[int, str, str]:
    """Where the fault of a rung is named: the production lenses know all parameters together
    only."""
    step, stage, tensor = RUNGS[rung][1]
    return (
        step,
        stage,
        "all parameters" if rung.startswith("parameter") and dtype != "float64" else tensor,
    )


def failing(lens: dict) -> set[tuple[int, str, str]]:
    """All rungs that disagree; of a stretch, the last step."""
    stages = {"lr": "update", "loss": "loss", "gradient_norm": "backward", "mean loss": "loss"}
    found = {
        (row["step"], row["stage"], row["tensor"]) for row in lens["ladder"] if not row["agrees"]
    }
    rows = [row for row in lens["stretches"] if not row["agrees"]]
    return found | {(row["stop"] - 1, stages[row["quantity"]], row["quantity"]) for row in rows}


# --- Agreement, and its controls


@lenses
def test_two_runs_that_differ_by_rounding_agree(dtype: str) -> None:
    lens = judge(dtype)
    assert lens["verdict"] == "agree", lens["first_divergence"]
    assert lens["first_divergence"] is None
    assert all(row["agrees"] for row in lens["ladder"] + lens["stretches"])
    assert 0 < lens["max_abs_loss_gap"] < FAULT[dtype] / 10
    assert lens["predictions_equal"] == lens["predictions_total"] == IMAGES
    assert 0 < lens["score"] < 1


@lenses
@sides
@pytest.mark.parametrize("rung", RUNGS)
def test_a_fault_on_one_rung_is_named_by_its_step_its_stage_and_its_tensor(
    dtype: str, side: str, rung: str
) -> None:
    expected = expected_place(dtype, rung)
    lens = faulty(dtype, **{side: RUNGS[rung][0]})
    assert lens["verdict"] == "disagree"
    assert place(lens) == expected
    others = failing(lens) - ({MEANS[rung]} if rung in MEANS and dtype != "float64" else set())
    assert len(others) == 1, "a control breaks one rung only, and the mean that the rung is part of"
    [(step, *rest)] = others
    assert (*rest,) == expected[1:] and expected[
        0
    ] <= step  # of a stretch, its last step stands there
    assert lens["score"] is None or lens["score"] > 1


@production
def test_a_class_whose_images_are_recognised_by_one_side_only_is_named(dtype: str) -> None:
    runs, twins = family(dtype)
    # Six images that a twin gets wrong in another way make room for 20 other predictions, and for
    # no other class.
    others = np.where(WRONG & (np.arange(IMAGES) < 20), (LABELS + 2) % 5, runs["torch"].predictions)
    kin = {"torch": [dataclasses.replace(twins["torch"][0], predictions=others)], "flax": []}
    allowed = int(SEPARATION_IMAGES * COUNT_FLOOR)
    bird, recognised = LABELS == 2, runs["flax"].predictions == LABELS

    def lens(lost: int, found: int = 0) -> dict:
        predictions = runs["flax"].predictions.copy()
        predictions[np.flatnonzero(bird & recognised)[:lost]] = 4
        predictions[np.flatnonzero(bird & ~recognised)[:found]] = 2
        return judge(
            dtype, flax=dataclasses.replace(runs["flax"], predictions=predictions), twins=kin
        )

    assert place(lens(allowed + 1)) == (STEPS, "evaluate", "accuracy of bird")
    assert lens(allowed)["verdict"] == "agree"
    # As many lost as found: the accuracy is the same, the images are not.
    swapped = lens(9, 9)
    assert place(swapped) == (STEPS, "evaluate", "accuracy of bird")
    assert swapped["accuracy"]["torch"] == swapped["accuracy"]["flax"]
    [row] = [row for row in swapped["ladder"] if row["tensor"] == "accuracy of bird"]
    assert (row["gap"], row["bound"], row["drift"]) == (18 / 40, allowed / 40, 0.0)
    assert swapped["first_divergence"]["torch"] == swapped["first_divergence"]["flax"] == 0.7


@lenses
def test_each_class_has_the_interval_of_its_difference(dtype: str) -> None:
    flax = make("flax", dtype)
    flax.predictions[np.flatnonzero((LABELS == 3) & ~WRONG)[:5]] = 0
    flax.predictions[np.flatnonzero((LABELS == 3) & WRONG)[:2]] = 3
    runs = {"torch": make("torch", dtype), "flax": flax}
    twins = family(dtype)[1]
    labels = np.where(LABELS == 4, 3, LABELS)  # no test image is a deer
    found = compare(runs, {**twins}, labels)["class_differences"]
    assert list(found) == ["plane", "car", "bird", "cat"]
    cat = labels == 3
    one, other = (record.predictions[cat] == labels[cat] for record in runs.values())
    [row] = [
        row
        for row in compare(runs, {**twins}, labels)["ladder"]
        if row["tensor"] == "accuracy of cat"
    ]
    judged = {"gap": row["gap"], "spread": row["drift"], "bound": row["bound"]}
    assert found["cat"] == {**paired_difference(one, other, 4), **judged}
    assert found["cat"]["discordant"] == [5, 2] and found["cat"]["difference"] == 3 / 80
    assert (
        found["plane"]["discordant"] == [0, 0]
        and found["plane"]["low"] < 0 < found["plane"]["high"]
    )


def test_in_the_proof_lens_a_prediction_may_differ_only_if_some_differ_between_twins() -> None:
    flax = make("flax", "float64")
    other = flax.predictions.copy()
    other[3] = (other[3] + 1) % 5
    flax = dataclasses.replace(flax, predictions=other)
    assert place(judge("float64", flax=flax)) == (STEPS, "evaluate", "predictions")
    same, chaotic = (
        make("torch", "float64", 1),
        make("torch", "float64", 1, predictions=(LABELS + 1) % 5),
    )
    assert place(judge("float64", flax=flax, twins={"torch": [same]})) == (
        STEPS,
        "evaluate",
        "predictions",
    )
    assert judge("float64", flax=flax, twins={"torch": [chaotic]})["verdict"] == "agree"


def test_more_twins_are_asked_for_what_parts_late_and_in_float64_never_in_the_first_steps() -> None:
    tip = in_series("loss", 17)
    late, early = tip(make("flax", "float64")), in_series("loss", 1)(make("flax", "float64"))
    assert twins_wanted(judged("float64", flax=late)) == INITIAL_TWINS
    assert twins_wanted(judged("float64", flax=early)) == twins_wanted(judged("float64")) == 0
    for count, wanted in ((1, MAX_TWINS), (MAX_TWINS, 0)):
        twins = {
            name: [make(name, "float64", twin + 1) for twin in range(count)]
            for name in ("torch", "flax")
        }
        twins["flax"] = [tip(twin) for twin in twins["flax"]]
        assert twins_wanted(judged("float64", flax=late, twins=twins)) == wanted
    drifting = {"torch": [in_series("loss", 15)(make("torch", "float64", 1))]}
    assert judge("float64", flax=late, twins=drifting)["verdict"] == "agree"


def test_without_twins_a_verdict_that_should_wait_for_them_is_open() -> None:
    late, early = (
        judged("float64", flax=in_series("loss", step)(make("flax", "float64"))) for step in (17, 1)
    )
    assert without_twins(late).verdict == "undecided" and not without_twins(late)
    assert repr(without_twins(late)).startswith("not decided without twins")
    # Neither a difference in the first steps nor an agreement waits for any.
    for decided in (dataclasses.replace(early, first_divergence=None), judged("float64")):
        assert without_twins(decided) is decided


@pytest.mark.parametrize("dtype", PRODUCTION)
def test_in_a_production_lens_too_more_twins_are_asked_for_what_parts_late(dtype: str) -> None:
    late, second, early = (
        faulty_comparison(dtype, flax=in_series("loss", step)) for step in (17, 1, 0)
    )
    assert late.verdict == second.verdict == early.verdict == "disagree"
    first = second.first_divergence
    assert first is not None
    assert twins_wanted(late) == twins_wanted(second) == MAX_TWINS
    assert twins_wanted(early) == twins_wanted(judged(dtype)) == 0
    for what in ({"stage": "data"}, {"tensor": "lr"}):  # another batch or rate is no rounding
        other = dataclasses.replace(first, **what)
        assert twins_wanted(dataclasses.replace(second, first_divergence=other)) == 0


@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize("key", ["0/backward/conv1.kernel", "0/update/fc1.bias", "1/forward/fc1"])
@production
def test_what_rounding_may_tip_in_the_first_steps_those_of_more_twins_must_not_show(
    dtype: str, key: str, clears: bool
) -> None:
    tip = in_opening(key)
    runs, twins = family(dtype)
    ensembles = {
        "torch": Ensemble.of([runs["torch"], *twins["torch"]]),
        "flax": Ensemble.of([tip(runs["flax"]), *map(tip, twins["flax"])]),
    }
    asked = []

    def begin(name: str, numbers: range) -> list[Record]:
        asked.append((name, list(numbers)))
        made = [
            dataclasses.replace(
                make(name, dtype, n), final={}, parameter_history={}, loss=np.zeros(2)
            )
            for n in numbers
        ]
        return [
            tip(twin) if name == "flax" or (clears and twin.twin == 5) else twin for twin in made
        ]

    comparison = judge_ensembles(ensembles, lambda name, numbers: [], LABELS, begin)
    lens = comparison.to_json()
    assert asked == [("torch", [3, 4, 5, 6]), ("flax", [3, 4, 5, 6])]
    assert lens["beginners"] == {"torch": 4, "flax": 4}
    assert lens["verdict"] == ("agree" if clears else "disagree")
    assert twins_wanted(comparison) == 0


@pytest.mark.parametrize("key", ["0/data/images", "0/forward/fc1", "0/loss/loss"])
@production
def test_what_rounding_cannot_tip_in_the_first_step_no_twin_is_asked_of(
    dtype: str, key: str
) -> None:
    runs, twins = family(dtype)
    kin = {name: [run, *twins[name]] for name, run in runs.items()}
    kin["flax"] = [in_opening(key)(record) for record in kin["flax"]]
    ensembles = {name: Ensemble.of(records) for name, records in kin.items()}

    def begin(name: str, numbers: range) -> list[Record]:
        raise AssertionError(numbers)

    lens = judge_ensembles(ensembles, lambda name, numbers: [], LABELS, begin).to_json()
    assert place(lens)[:2] == (0, key.split("/")[1])


@pytest.mark.parametrize("clears", [True, False])
def test_a_verdict_stands_only_when_enough_twins_were_asked(clears: bool) -> None:
    """Rounding tips something in Flax's run; a third twin of PyTorch's shows that it may, or none
    does."""
    tip = in_series("loss", 17)
    runs, twins = family("float32")
    ensembles = {
        "torch": Ensemble.of([runs["torch"], *twins["torch"]]),
        "flax": Ensemble.of([tip(runs["flax"]), *map(tip, twins["flax"])]),
    }
    asked = []

    def more(name: str, numbers: range) -> list[Record]:
        asked.append((name, list(numbers)))
        made = [make(name, "float32", number) for number in numbers]
        return [
            tip(twin) if name == "flax" or (clears and twin.twin == 3) else twin for twin in made
        ]

    assert judge_ensembles(ensembles, more, LABELS).verdict == ("agree" if clears else "disagree")
    assert asked[:2] == [("torch", [3, 4, 5, 6]), ("flax", [3, 4, 5, 6])]
    assert not any(numbers for _, numbers in asked[2:])
    # Whoever has no more twins to give is not asked for ever.
    ensembles = {name: Ensemble.of(of.records[:3]) for name, of in ensembles.items()}
    again = judge_ensembles(ensembles, lambda name, numbers: [], LABELS)
    assert again.verdict == "disagree"


def test_what_shows_in_evaluation_alone_is_never_excused_by_float64_twins_that_roll_dice() -> None:
    other = make("flax", "float64").predictions.copy()
    other[::7] = (other[::7] + 1) % 5  # dropout left on
    lens = judged("float64", flax=make("flax", "float64", predictions=other))
    assert lens.first_divergence is not None and lens.first_divergence.stage == "evaluate"
    assert twins_wanted(lens) == 0


@pytest.mark.parametrize("rung", RUNGS)
def test_of_two_faults_the_earlier_step_is_named_and_within_a_step_the_earlier_stage(
    rung: str,
) -> None:
    fault, where = RUNGS[rung]  # in float64, where each parameter is a rung
    for other_fault, other_where in RUNGS.values():
        lens = faulty("float64", flax=lambda record, other=other_fault: other(fault(record)))
        expected = min((where, other_where), key=lambda at: (at[0], STAGES.index(at[1])))
        assert place(lens)[:2] == expected[:2]


def test_within_one_step_of_the_trajectory_loss_comes_before_gradient_norm_before_lr() -> None:
    flax = make("flax", "float64")
    for name, stage in (("lr", "update"), ("gradient_norm", "backward"), ("loss", "loss")):
        flax = in_series(name, 20)(flax)
        assert place(judge("float64", flax=flax)) == (20, stage, name)


def test_a_message_gives_both_sides_and_their_gap_at_the_step_it_names_not_a_later_larger_gap() -> (
    None
):
    loss = make("flax", "float64").loss.copy()
    loss[17] += 0.25
    loss[25] += 8.0
    flax = make("flax", "float64", loss=loss)
    lens = judge("float64", flax=flax)
    first = lens["first_divergence"]
    assert place(lens) == (17, "loss", "loss")
    assert first["gap"] == pytest.approx(0.25, abs=1e-12)  # the noise is 1e-14; the larger gap is 8
    assert first["flax"] - first["torch"] == pytest.approx(0.25, abs=1e-12)
    assert first["message"].startswith("loss: step 17: torch=2.09394 flax=2.34394, gap 2.5e-01 > ")
    assert "\n" not in first["message"]
    [row] = [row for row in lens["stretches"] if not row["agrees"]]
    assert (row["start"], row["stop"], round(row["gap"])) == (10, 30, 8)


@production
def test_a_drift_as_large_as_the_twins_is_put_up_with_and_one_far_larger_is_not(dtype: str) -> None:
    runs, twins = family(dtype)

    def late(record: Record, amount: float) -> Record:
        return dataclasses.replace(record, loss=record.loss + amount * (np.arange(STEPS) >= 30))

    twins = {"torch": [twins["torch"][0], late(twins["torch"][1], 10.0)]}
    assert judge(dtype, flax=late(runs["flax"], 10.0), twins=twins)["verdict"] == "agree"
    assert place(judge(dtype, flax=late(runs["flax"], 200.0), twins=twins)) == (30, "loss", "loss")
    # What the twins do late explains nothing early.
    early = in_series("loss", 5)(runs["flax"])
    assert place(judge(dtype, flax=early, twins=twins)) == (5, "loss", "loss")


# --- Two clusters


@production
def test_the_gap_is_that_of_the_closest_runs_and_the_drift_that_of_the_most_distant_of_one_side(
    dtype: str,
) -> None:
    runs, twins = family(dtype)
    sides = [[runs[name].loss, *(twin.loss for twin in twins[name])] for name in runs]
    rows = [row for row in judge(dtype)["stretches"] if row["quantity"] == "loss"]
    for row in rows:
        span = slice(row["start"], row["stop"])
        assert row["gap"] == min(np.abs(a - b)[span].max() for a in sides[0] for b in sides[1])
        assert row["drift"] == min(
            max(np.abs(a - b)[: row["stop"]].max() for a, b in itertools.combinations(side, 2))
            for side in sides
        )


@production
def test_one_run_that_parts_from_all_others_is_chance_and_one_side_that_does_is_a_difference(
    dtype: str,
) -> None:
    runs, twins = family(dtype)
    fault = in_series("loss", 12)
    alone = judge(dtype, flax=fault(runs["flax"]))
    assert alone["verdict"] == "agree", alone["first_divergence"]
    assert alone["max_abs_loss_gap"] > FAULT[dtype] / 2
    # The control: the whole side.
    assert place(faulty(dtype, flax=fault)) == (12, "loss", "loss")
    # Without twins of its own, the side is that one run.
    assert place(judge(dtype, flax=fault(runs["flax"]), twins={"torch": twins["torch"]})) == (
        12,
        "loss",
        "loss",
    )


def test_a_mean_loss_is_named_where_no_single_step_is_far_enough() -> None:
    def shaken(record: Record, shift: float = 0.0) -> Record:
        own = np.random.default_rng([len(record.backend), ord(record.backend[0]), record.twin or 0])
        loss = record.loss + np.where(
            np.arange(STEPS) >= 30, shift + own.uniform(-0.01, 0.01, STEPS), 0.0
        )
        return dataclasses.replace(record, loss=loss)

    alike = faulty("float32", torch=shaken, flax=shaken)
    assert alike["verdict"] == "agree", alike["first_divergence"]
    lens = faulty("float32", torch=shaken, flax=lambda record: shaken(record, 0.05))
    assert place(lens) == (STEPS - 1, "loss", "mean loss")
    assert failing(lens) == {place(lens)}
    assert lens["first_divergence"]["flax"] - lens["first_divergence"]["torch"] == pytest.approx(
        0.05, abs=0.01
    )
    means = [row for row in lens["stretches"] if row["quantity"] == "mean loss"]
    assert [(row["start"], row["stop"]) for row in means] == [
        (10, 30),
        (30, STEPS),
    ]  # of 10 steps or more
    assert not [row for row in judge("float64")["stretches"] if row["quantity"] == "mean loss"]


@production
def test_parameters_may_be_apart_by_the_drift_and_by_a_share_of_the_way_they_went(
    dtype: str,
) -> None:
    runs, _ = family(dtype)

    def steps(lens: dict) -> dict[int, dict]:
        return {row["step"]: row for row in lens["ladder"] if row["tensor"] == "all parameters"}

    lens = judge(dtype)
    assert list(steps(lens)) == [step - 1 for step in (*ALONG, STEPS)]
    # As in a run that barely moves: what a tipped rectifier may do is a share of the way.
    still = {"parameter_history": {}, "final": runs["torch"].weights}
    near = faulty(dtype, **dict.fromkeys(runs, lambda record: dataclasses.replace(record, **still)))
    [row] = steps(near).values()
    final = steps(lens)[STEPS - 1]
    assert (
        row["gap"] == row["drift"] == 0
        and row["bound"] < final["bound"] - SEPARATION[dtype] * final["drift"]
    )
    way = np.sqrt(
        sum(
            np.sum(np.square(runs["torch"].final[n].astype(float) - runs["torch"].weights[n]))
            for n in SHAPES
        )
    )
    share = (final["bound"] - row["bound"]) / SEPARATION[dtype] - final["drift"]
    assert share == pytest.approx(FLIP_SHARE * way, rel=0.2)


def test_in_float64_every_parameter_along_the_run_is_a_rung_of_its_own() -> None:
    rows = [
        row for row in judge("float64")["ladder"] if row["stage"] == "update" and row["step"] >= 2
    ]
    assert [(row["step"], row["tensor"]) for row in rows] == [
        (step - 1, name) for step in (*ALONG, STEPS) for name in sorted(SHAPES)
    ]


@lenses
def test_differences_are_named_in_the_order_in_which_they_travel_through_the_layers(
    dtype: str,
) -> None:
    def everywhere(stage: str) -> Callable[[Record], Record]:
        def fault(record: Record) -> Record:
            for key in record.first_steps:
                if key.startswith(f"0/{stage}/"):
                    record = in_opening(key)(record)
            return record

        return fault

    assert place(faulty(dtype, flax=everywhere("forward"))) == (0, "forward", "input of conv1")
    assert place(faulty(dtype, flax=everywhere("backward"))) == (0, "backward", "fc1.bias")
    assert place(faulty(dtype, flax=everywhere("update"))) == (
        0,
        "update",
        "momentum of conv1.kernel",
    )
    runs, twins = family(dtype)
    sides = [Ensemble.of([runs[name], *twins[name]]) for name in runs]
    rungs = check_first_steps(sides[0], sides[1])
    order = [rung.tensor for rung in rungs if (rung.step, rung.stage) == (1, "forward")]
    assert order == LAYERS
    assert [rung.tensor for rung in rungs if (rung.step, rung.stage) == (1, "backward")] == [
        "fc1.bias",
        "conv1.kernel",
    ]


def test_a_learning_rate_is_named_before_what_it_did_to_momentum_and_parameters() -> None:
    flax = in_series("lr", 1)(make("flax", "float64"))
    for name in SHAPES:
        flax = in_opening(f"1/update/momentum of {name}")(in_opening(f"1/update/{name}")(flax))
    assert place(judge("float64", flax=flax)) == (1, "update", "lr")
    flax = dataclasses.replace(flax, lr=make("flax", "float64").lr)  # the control
    assert place(judge("float64", flax=flax)) == (1, "update", "momentum of conv1.kernel")


# --- The score


@lenses
@pytest.mark.parametrize("rung", [None, *RUNGS])
def test_runs_agree_where_the_score_is_at_most_one(dtype: str, rung: str | None) -> None:
    lens = judge(dtype) if rung is None else faulty(dtype, flax=RUNGS[rung][0])
    within = lens["score"] is not None and lens["score"] <= 1
    assert within == (lens["verdict"] == "agree") == (rung is None)


def test_a_share_of_a_bound_is_none_where_nothing_differs_and_infinite_where_there_is_no_bound() -> (
    None
):
    assert Check(0, "loss", "loss", 0.0, 0.0).bound_usage == 0
    assert Check(0, "loss", "loss", 1.0, 4.0).bound_usage == 0.25
    assert (
        Check(0, "loss", "loss", 1.0, 0.0).bound_usage
        == Check(0, "loss", "loss", math.inf, 1.0).bound_usage
        == math.inf
    )


def test_a_message_tells_two_values_apart_however_close() -> None:
    rung = Check(3, "update", "fc1.bias", 1e-12, 1e-13, values=(0.5, 0.5 + 1e-12))
    found = divergence(rung, ["torch", "flax"])
    assert found.message.startswith(
        "update: step 3: fc1.bias: torch=0.5 flax=0.500000000001, gap 1.0e-12"
    )
    bare = divergence(Check(3, "update", "all parameters", 2.0, 1.0), ["torch", "flax"])
    assert bare.message == "update: step 3: all parameters: gap 2.0e+00 > 1.0e+00"


@lenses
def test_a_record_agrees_with_itself_bit_by_bit(dtype: str) -> None:
    torch = make("torch", dtype)
    lens = judge(dtype, flax=dataclasses.replace(torch, backend="flax"))
    assert lens["verdict"] == "agree"
    assert lens["max_abs_loss_gap"] == 0


# --- Not finite

GROUPS = {
    "first_steps": "0/forward/logits",
    "weights": "fc1.bias",
    "parameter_history": "10/fc1.bias",
    "final": "fc1.bias",
}


@pytest.mark.parametrize("bound", [0.0, 1.0, math.inf, math.nan])
@pytest.mark.parametrize("gap", [math.nan, math.inf])
def test_no_bound_is_wide_enough_for_a_gap_that_is_not_finite(gap: float, bound: float) -> None:
    assert not Check(0, "loss", "loss", gap, bound).agrees
    assert Check(0, "loss", "loss", 0.5, 1.0).agrees


@lenses
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["one side", "both sides", "all runs and twins"])
@pytest.mark.parametrize(
    "series",
    [
        "loss",
        "gradient_norm",
        "lr",
        "test_loss",
        "first_steps",
        "weights",
        "parameter_history",
        "final",
    ],
)
def test_what_is_not_finite_never_agrees(dtype: str, value: float, where: str, series: str) -> None:
    def spoil(record: Record) -> Record:
        if series == "test_loss":
            return dataclasses.replace(record, test_loss=value)
        if series in GROUPS:
            name = GROUPS[series]
            array = np.array(getattr(record, series)[name])
            array.flat[1] = value
            return dataclasses.replace(record, **{series: getattr(record, series) | {name: array}})
        array = getattr(record, series).copy()
        array[12] = value
        return dataclasses.replace(record, **{series: array})

    runs, twins = family(dtype)
    runs["flax"] = spoil(runs["flax"])
    if where != "one side":
        runs["torch"] = spoil(runs["torch"])
    if where == "all runs and twins":
        twins = {name: [spoil(twin) for twin in kin] for name, kin in twins.items()}
    lens = judge(dtype, **runs, twins=twins)
    if series in ("loss", "gradient_norm") and where != "one side":
        assert (lens["verdict"], lens["diverged_at"]) == ("diverged", 12)
        assert lens["first_divergence"] is None
        return
    assert lens["verdict"] == "disagree"
    expected = {
        "test_loss": (STEPS, "evaluate"),
        "first_steps": (0, "forward"),
        "weights": (0, "weights"),
    }
    expected |= {"parameter_history": (9, "update"), "final": (STEPS - 1, "update")}
    stages = {"loss": "loss", "gradient_norm": "backward", "lr": "update"}
    assert place(lens)[:2] == (expected[series] if series in expected else (12, stages[series]))
    assert lens["first_divergence"]["gap"] is None
    assert "gap inf" in lens["first_divergence"]["message"]


@production
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first twin", "second twin"])
@pytest.mark.parametrize(
    ("quantity", "rung"),
    [
        ("loss", "loss trajectory"),
        ("gradient_norm", "gradient norm trajectory"),
        ("lr", "lr trajectory"),
        ("test_loss", "test loss"),
        ("first_steps", "forward"),
        ("parameter_history", "parameter after ten steps"),
        ("final", "parameter after the last step"),
    ],
)
def test_twins_that_are_not_finite_explain_nothing(
    dtype: str, order: tuple[int, int], quantity: str, rung: str
) -> None:
    runs, twins = family(dtype)
    nothing: Any = {
        "test_loss": math.nan,
        **{
            group: {
                key: np.full_like(array, math.nan)
                for key, array in getattr(runs["torch"], group).items()
            }
            for group in ("parameter_history", "final")
        },
        "first_steps": {
            key: np.full(array.shape, math.nan) for key, array in runs["torch"].first_steps.items()
        },
    }
    spoilt = nothing.get(quantity, np.full(STEPS, math.nan))
    kin = [dataclasses.replace(twins["torch"][0], **{quantity: spoilt}), twins["torch"][1]]
    fault, expected = RUNGS[rung][0], expected_place(dtype, rung)
    twins = {"torch": [kin[index] for index in order]}
    lens = judge(dtype, flax=fault(runs["flax"]), twins=twins)
    assert lens["verdict"] == "disagree"
    assert expected[1:] in {(stage, tensor) for _, stage, tensor in failing(lens)}
    alone = judge(dtype, flax=fault(runs["flax"]), twins={"torch": kin[:1]})
    assert expected[1:] in {(stage, tensor) for _, stage, tensor in failing(alone)}


# --- Not there


def without(record: Record, group: str, name: str) -> Record:
    return dataclasses.replace(
        record, **{group: {k: v for k, v in getattr(record, group).items() if k != name}}
    )


def reshaped(record: Record, group: str, name: str) -> Record:
    arrays = getattr(record, group)
    return dataclasses.replace(
        record, **{group: arrays | {name: np.append(arrays[name], arrays[name].flat[0])}}
    )


@lenses
@sides
@pytest.mark.parametrize("damage", [without, reshaped], ids=["missing", "of another shape"])
@pytest.mark.parametrize(
    ("group", "name", "expected"),
    [
        ("weights", "fc1.bias", (0, "weights", "fc1.bias")),
        ("first_steps", "0/data/images", (0, "data", "images")),
        ("first_steps", "0/loss/loss", (0, "loss", "loss")),
        ("first_steps", "1/backward/conv1.kernel", (1, "backward", "conv1.kernel")),
        ("first_steps", "1/update/momentum of fc1.bias", (1, "update", "momentum of fc1.bias")),
        ("parameter_history", "10/fc1.bias", (9, "update", "fc1.bias")),
        ("final", "fc1.bias", (STEPS - 1, "update", "fc1.bias")),
    ],
    ids=["weights", "images", "loss", "gradient", "momentum", "parameter_history", "final"],
)
def test_a_tensor_that_is_missing_or_of_another_shape_on_one_side_is_a_disagreement(
    dtype: str, side: str, damage: Any, group: str, name: str, expected: tuple[int, str, str]
) -> None:
    if group in ("parameter_history", "final") and dtype != "float64":
        expected = (*expected[:2], "all parameters")
    alone = judge(dtype, **{side: damage(make(side, dtype), group, name)})
    whole = faulty(dtype, **{side: lambda record: damage(record, group, name)})
    for lens in (alone, whole):
        assert place(lens) == expected
        assert lens["first_divergence"]["gap"] is None


@production
def test_a_tensor_that_the_twins_lack_is_held_to_no_gap_at_all(dtype: str) -> None:
    runs, twins = family(dtype)
    bare = {
        name: [without(twin, "first_steps", "0/forward/logits") for twin in kin]
        for name, kin in twins.items()
    }
    assert place(judge(dtype, **runs, twins=bare)) == (0, "forward", "logits")


@lenses
@pytest.mark.parametrize("count", [0, 1, IMAGES - 1, IMAGES + 1])
@pytest.mark.parametrize("both", [False, True], ids=["one side", "both sides"])
def test_missing_or_surplus_predictions_never_agree(dtype: str, count: int, both: bool) -> None:
    predictions = np.resize(make("flax", dtype).predictions, count)
    runs = {
        name: make(name, dtype, predictions=predictions)
        for name in (("torch", "flax") if both else ("flax",))
    }
    lens = judge(dtype, runs.get("torch"), runs["flax"])
    assert place(lens) == (STEPS, "evaluate", "predictions")
    assert lens["accuracy"]["flax"] == np.sum(predictions[:IMAGES] == LABELS[:count]) / IMAGES


# --- What cannot be compared


def differing(changes: dict[str, Any]) -> Callable[[Record], Record]:
    def change(record: Record) -> Record:
        fields = {
            name: getattr(record, name) | value if isinstance(value, dict) else value
            for name, value in changes.items()
        }
        return dataclasses.replace(record, **fields)

    return change


def shorter(steps: int) -> Callable[[Record], Record]:
    def change(record: Record) -> Record:
        series = {name: getattr(record, name)[:steps] for name in ("loss", "gradient_norm", "lr")}
        return dataclasses.replace(record, **series)

    return change


OTHERS: dict[str, tuple[Callable[[Record], Record], str]] = {
    "number of steps": (shorter(STEPS - 1), "number of steps: 100 and 99"),
    "data": (differing({"data": {"digest": "d2"}}), "data, digest: d1 and d2"),
    "order": (differing({"data": {"order": "o2"}}), "data, order: o1 and o2"),
    "classes": (differing({"data": {"classes": [*CLASSES[:4], "dog"]}}), "data, classes: "),
    "learning rate": (differing({"config": {"lr": 0.5}}), "configuration, lr: 0.001 and 0.5"),
    "seed": (differing({"config": {"seed": 7}}), "configuration, seed: 0 and 7"),
    "option that one lacks": (
        differing({"config": {"novelty": 3}}),
        "configuration, novelty: None and 3",
    ),
    "precision": (differing({"dtype": "float16"}), "precision: "),
}


@lenses
@pytest.mark.parametrize("what", OTHERS)
def test_records_of_different_runs_are_refused_and_the_difference_is_named(
    dtype: str, what: str
) -> None:
    change, expected = OTHERS[what]
    with pytest.raises(RecordError) as caught:
        judge(dtype, flax=change(make("flax", dtype)), twins={"torch": family(dtype)[1]["torch"]})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@production
@sides
@pytest.mark.parametrize("what", OTHERS)
def test_twins_of_another_run_are_refused_and_the_difference_is_named(
    dtype: str, side: str, what: str
) -> None:
    change, expected = OTHERS[what]
    twins = family(dtype)[1]
    twins[side][1] = change(twins[side][1])
    with pytest.raises(RecordError) as caught:
        judge(dtype, twins=twins)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@production
@pytest.mark.parametrize("backends", [("torch",), ("torch", "flax")], ids=["single", "both"])
def test_a_run_is_not_its_own_twin_and_no_backend_has_the_twins_of_the_other(
    dtype: str, backends: Sequence[str]
) -> None:
    runs = {name: make(name, dtype) for name in backends}
    for stranger in (make("torch", dtype), make("flax", dtype, 1)):
        with pytest.raises(RecordError, match=r"^\S+ is no twin of torch-\w+: run torch again$"):
            compare(runs, {"torch": [stranger]}, LABELS)


@lenses
def test_a_twin_and_the_other_backends_run_are_not_taken_for_the_run(dtype: str) -> None:
    for stranger in (make("torch", dtype, 1), make("flax", dtype)):
        with pytest.raises(
            RecordError, match=r"^a record is not the run that it is taken for: run both"
        ):
            compare({"torch": stranger}, {}, LABELS)


@pytest.mark.parametrize(
    ("steps", "same"),
    [
        ({"torch": None, "flax": None}, None),
        ({"torch": 7, "flax": 7}, 7),
        ({"torch": 7}, 7),
        ({"torch": 7, "flax": 8}, None),
        ({"torch": 7, "flax": None}, None),
        ({}, None),
    ],
)
def test_runs_end_early_together_only_where_all_end_at_the_same_step(
    steps: dict, same: int | None
) -> None:
    assert common_nonfinite_step(steps.values()) == same
    assert common_nonfinite_step([]) is None


def test_no_twin_is_asked_to_explain_a_run_that_ended_early() -> None:
    late = in_series("loss", 17)(make("flax", "float64"))
    assert twins_wanted(judged("float64", flax=late)) == INITIAL_TWINS
    ended = dataclasses.replace(late, loss=np.where(np.arange(STEPS) < 17, late.loss, np.nan))
    assert twins_wanted(judged("float64", flax=ended)) == 0


def ended_at(step: int) -> Callable[[Record], Record]:
    """A run whose loss is not finite at `step`, where training ended."""

    def end(record: Record) -> Record:
        loss = np.where(np.arange(STEPS) < step, record.loss, np.nan)
        return dataclasses.replace(record, loss=loss, nonfinite_step=step)

    return end


@lenses
@pytest.mark.parametrize("step", [0, 1, 42, STEPS - 1])
def test_another_batch_is_named_at_its_step_whatever_the_loss_does(dtype: str, step: int) -> None:
    def swap(record: Record) -> Record:
        digests = record.batch_digests.copy()
        digests[step] = 1_000_000
        return dataclasses.replace(record, batch_digests=digests)

    lens = faulty(dtype, flax=swap)
    assert place(lens) == (step, "data", "batch")
    assert lens["first_divergence"]["message"] == (
        f"data: step {step}: the two runs trained on different batches"
    )
    assert judge(dtype)["verdict"] == "agree"  # the control


def reproduced(record: Record, change: Callable[[Record], Record] = lambda r: r) -> Record:
    """The same run again."""
    return change(dataclasses.replace(record, twin=0))


def test_a_run_that_is_not_reproducible_is_named_and_judged_by_the_other_side() -> None:
    runs, _ = family("float64")
    twins = {name: [make(name, "float64", twin) for twin in (1, 2)] for name in runs}
    again = {name: [*twins[name], reproduced(run)] for name, run in runs.items()}
    ensembles = {name: Ensemble.of([runs[name], *again[name]]) for name in runs}
    assert all(len(side.twins) == 2 and side.replicate for side in ensembles.values())
    clean = comparing.compare(ensembles, LABELS)
    assert (clean.verdict, dict(clean.not_reproducible)) == ("agree", {})
    # One bit, as where several threads add in any order: said, and no disagreement.
    bit = reproduced(
        runs["flax"],
        lambda r: dataclasses.replace(
            r, loss=np.where(np.arange(STEPS) < 7, r.loss, r.loss * (1 + 4e-16))
        ),
    )
    ensembles["flax"] = Ensemble.of([runs["flax"], *twins["flax"], bit])
    found = comparing.compare(ensembles, LABELS)
    assert (found.verdict, dict(found.not_reproducible)) == ("agree", {"flax": 7})
    # More than rounding: a disagreement, of that side.
    ensembles["flax"] = Ensemble.of(
        [runs["flax"], *twins["flax"], reproduced(runs["flax"], in_series("loss", 20))]
    )
    found = comparing.compare(ensembles, LABELS)
    assert found.verdict == "disagree" and dict(found.not_reproducible) == {"flax": 20}
    assert found.first_divergence is not None
    assert found.first_divergence.tensor == "loss of flax and of the same run again"
    assert "the same run again=" in found.first_divergence.message


def test_a_run_far_from_its_own_twins_disagrees_though_they_agree_with_the_other_side() -> None:
    runs, _ = family("float64")
    twins = {name: [make(name, "float64", twin) for twin in (1, 2)] for name in runs}
    assert judge("float64", twins=twins)["verdict"] == "agree"  # the control
    alone = judge("float64", flax=in_series("loss", 20)(runs["flax"]), twins=twins)
    assert place(alone) == (20, "loss", "loss of flax and of its nearest twin")


@production
def test_reduced_precision_in_most_entries_of_a_gradient_shows(dtype: str) -> None:
    if dtype != "float32":
        pytest.skip("a bfloat16 gradient has no more than 8 bits")

    def rounded(record: Record) -> Record:
        key = "0/backward/conv1.kernel"
        bits = record.first_steps[key].view(np.int32)
        array = ((bits + 0x1000) & ~0x1FFF).astype(np.int32).view(np.float32)
        return dataclasses.replace(record, first_steps=record.first_steps | {key: array})

    lens = faulty(dtype, flax=rounded)
    assert place(lens) == (0, "backward", "conv1.kernel")
    assert "median gap" in lens["first_divergence"]["message"]
    # The control: one entry as far off as a flipped ReLU puts it.
    key = "0/backward/conv1.kernel"

    def flipped(record: Record) -> Record:
        array = record.first_steps[key].copy()
        array.flat[3] += FLIP_SHARE * np.abs(array).max()
        return dataclasses.replace(record, first_steps=record.first_steps | {key: array})

    assert faulty(dtype, flax=flipped)["verdict"] == "agree"


def test_a_bound_that_no_run_could_exceed_is_no_check() -> None:
    check = Check(5, "loss", "loss", 1.0, 18.0, most=2.3)
    assert check.agrees and not check.has_power and check.to_json()["power"] is False
    assert Check(5, "loss", "loss", 1.0, 1.5, most=2.3).has_power
    _, twins = family("float32")
    wild = {
        name: [
            dataclasses.replace(
                twin,
                loss=np.where(
                    np.arange(STEPS) < 30, twin.loss, twin.loss * (1.5 + (twin.twin or 0))
                ),
                gradient_norm=np.where(
                    np.arange(STEPS) < 30, twin.gradient_norm, 9.0 + 9 * (twin.twin or 0)
                ),
            )
            for twin in kin
        ]
        for name, kin in twins.items()
    }
    found = judged("float32", twins=wild)
    assert found.no_power_from == 30
    assert judged("float32").no_power_from is None  # the control


@lenses
@pytest.mark.parametrize("step", [0, 1, 17, STEPS - 1])
def test_runs_that_diverge_together_have_a_verdict_of_their_own(dtype: str, step: int) -> None:
    runs, twins = family(dtype)
    together = {name: ended_at(step)(run) for name, run in runs.items()}
    # whatever is evaluated after it is not compared
    together["flax"] = dataclasses.replace(together["flax"], test_loss=7.0)
    found = judged(dtype, **together, twins=twins)
    assert (found.verdict, found.diverged_at) == ("diverged", step)
    assert not found and f"at step {step}" in repr(found) and "they agree" in repr(found)
    # the controls: one ends a step later; one had diverged from the other before
    other = STEPS - 1 if step < STEPS - 1 else 3
    apart = judged(dtype, together["torch"], ended_at(other)(runs["flax"]), twins)
    assert apart.verdict == "disagree"
    if step > 12:
        wrong = in_series("loss", 12)
        kin = twins | {"flax": [wrong(twin) for twin in twins["flax"]]}
        assert judged(dtype, together["torch"], wrong(together["flax"]), kin).verdict == "disagree"


@pytest.mark.parametrize("shared", [True, False], ids=["as a twin does", "as no twin does"])
@lenses
def test_rounding_may_decide_which_step_overflows_where_a_twin_shows_it(
    dtype: str, shared: bool
) -> None:
    runs, twins = family(dtype)
    steps = {"torch": 20, "flax": 21}
    ends = {name: ended_at(steps[name])(run) for name, run in runs.items()}
    kin = {
        name: [ended_at(20 if shared else steps[name])(twin) for twin in of]
        for name, of in twins.items()
    }
    found = judged(dtype, **ends, twins=kin)
    explained = shared and dtype != "float64"
    assert (found.verdict, found.diverged_at) == (
        ("diverged", 20) if explained else ("disagree", None)
    )


def apart_from(step: int) -> Callable[[Record], Record]:
    """As a run whose loss is 1e20 from `step` on, as rounding had it."""

    def changed(record: Record) -> Record:
        loss = record.loss.copy()
        loss[step:] = 1e20
        return dataclasses.replace(record, loss=loss)

    return changed


@pytest.mark.parametrize(
    ("torch", "flax", "diverged"),
    [(20, 25, 20), (25, 20, 20), (8, 20, 8), (1, 20, None), (20, None, None), (None, 20, None)],
)
@lenses
def test_where_twins_of_both_sides_explode_the_loss_is_left_to_rounding(
    dtype: str, torch: int | None, flax: int | None, diverged: int | None
) -> None:
    """In ranges of steps next to each other; (1, 20) is no such pair."""
    runs, twins = family(dtype)
    changes = {"torch": torch, "flax": flax}
    kin = {
        name: [*(twin if at is None else apart_from(at)(twin) for twin in of[:1]), *of[1:]]
        for (name, of), at in zip(twins.items(), changes.values(), strict=True)
    }
    run = ended_at(22)(runs["torch"])
    found = judged(dtype, run, runs["flax"], kin)
    expected = None if dtype == "float64" else diverged
    assert (found.verdict, found.diverged_at) == (
        ("disagree", None) if expected is None else ("diverged", expected)
    )


@pytest.mark.parametrize("backends", [("torch",), ("torch", "flax")], ids=["single", "both"])
@lenses
@pytest.mark.parametrize("steps", [0, 39])
def test_a_run_of_no_steps_or_cut_short_is_refused(
    dtype: str, backends: Sequence[str], steps: int
) -> None:
    cut = shorter(steps)
    runs = {name: cut(make(name, dtype)) for name in backends}
    twins = {name: [cut(make(name, dtype, 1))] for name in backends if dtype != "float64"}
    with pytest.raises(
        RecordError, match=r"^the torch record holds no whole run: run torch again$"
    ):
        compare(runs, {**twins}, LABELS)


@lenses
@pytest.mark.parametrize("group", ["weights", "first_steps", "final"])
def test_a_run_without_a_part_is_refused_even_where_both_sides_lack_it(
    dtype: str, group: str
) -> None:
    with pytest.raises(
        RecordError, match=r"^the torch record holds no whole run: run torch again$"
    ):
        faulty(
            dtype,
            **dict.fromkeys(
                ("torch", "flax"), lambda record: dataclasses.replace(record, **{group: {}})
            ),
        )


@pytest.mark.parametrize("series", ["lr", "gradient_norm"])
def test_series_of_different_lengths_are_no_whole_run(series: str) -> None:
    flax = make("flax", "float64")
    flax = dataclasses.replace(flax, **{series: getattr(flax, series)[:-1]})
    with pytest.raises(RecordError, match="the flax record holds no whole run"):
        judge("float64", flax=flax)


@production
@pytest.mark.parametrize("twins", [{}, {"torch": [], "flax": []}], ids=["none", "empty"])
def test_a_production_lens_without_twins_is_refused(dtype: str, twins: Twins) -> None:
    with pytest.raises(
        RecordError, match=f"^nothing says how far {dtype} runs may drift apart: run with --twins"
    ):
        judge(dtype, twins=twins)


@production
def test_the_twins_of_one_backend_are_enough(dtype: str) -> None:
    assert judge(dtype, twins={"flax": family(dtype)[1]["flax"]})["verdict"] == "agree"


# --- One record, stretches, accuracy


@lenses
def test_a_single_record_is_described_and_compared_with_nothing(dtype: str) -> None:
    flax = make("flax", dtype)
    lens = compare({"flax": flax}, {}, LABELS)
    assert json.loads(json.dumps(lens, allow_nan=False)) == lens
    assert lens["verdict"] == "single"
    assert (lens["dtype"], lens["steps"]) == (dtype, STEPS)
    assert lens["accuracy"] == {"flax": 0.7}
    assert lens["per_class_accuracy"] == {"flax": dict.fromkeys(CLASSES, 0.7)}
    assert lens["final_loss"] == {"flax": flax.loss[-1]}
    assert lens["test_loss"] == {"flax": flax.test_loss}
    assert lens["first_divergence"] is lens["max_abs_loss_gap"] is lens["predictions_equal"] is None


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 10, 11, 29, 30, 100, 101, 999, 37_500])
def test_stretches_cover_every_step_once_and_grow(steps: int) -> None:
    pieces = windows(steps)
    assert [step for start, stop in pieces for step in range(start, stop)] == list(range(steps))
    lengths = [
        stop - start for start, stop in pieces[:-1]
    ]  # the last is cut off by the end of the run
    assert lengths == sorted(lengths)
    assert all(later > earlier for earlier, later in itertools.pairwise(lengths[1:]))


@lenses
def test_the_report_shows_each_quantity_over_all_stretches(dtype: str) -> None:
    lens = judge(dtype)
    for quantity in ("lr", "loss", "gradient_norm"):
        rows = [row for row in lens["stretches"] if row["quantity"] == quantity]
        assert [(row["start"], row["stop"]) for row in rows] == [
            (0, 1),
            (1, 3),
            (3, 10),
            (10, 30),
            (30, STEPS),
        ]


def test_accuracy_is_counted_per_class_and_what_has_no_prediction_counts_as_wrong() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    record = make("torch", "float64", predictions=np.array([0, 0, 0, 1, 1, 0, 0]))
    classes = ("cat", "dog", "cow", "none of these")
    assert class_accuracy(record, labels, classes) == {
        "cat": 0.75,
        "dog": 0.5,
        "cow": 0.0,
        "none of these": None,
    }
    record = make("torch", "float64", predictions=np.array([0, 0]))
    assert class_accuracy(record, labels, classes) == {
        "cat": 0.5,
        "dog": 0.0,
        "cow": 0.0,
        "none of these": None,
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_made_records_hold_what_real_ones_hold(dtype: str) -> None:
    record = make("torch", dtype)
    kinds = {"float64": {"float64"}, "float32": {"float32"}, "bfloat16": {"bfloat16"}}
    expected = kinds.get(dtype, {"float32", "bfloat16"})
    assert {
        a.dtype.name for key, a in record.first_steps.items() if not key.endswith("labels")
    } == expected
    assert {key.split("/")[1] for key in record.first_steps} == set(STAGES) - {
        "weights",
        "evaluate",
    }


@pytest.mark.parametrize(
    ("in_training", "in_test", "verdict"),
    [
        pytest.param(1.4e-12, 1.25e-12, "agree", id="as measured"),
        pytest.param(0.0, 1.25e-12, "disagree", id="in the test loss alone"),
        pytest.param(1.4e-12, 4e-12, "disagree", id="more than in training"),
        pytest.param(0.0, 1e-9, "disagree", id="a fault"),
        pytest.param(1e-9, 2e-12, "disagree", id="a fault in training, too"),
    ],
)
def test_a_float64_test_loss_may_differ_as_training_losses_do(
    in_training: float, in_test: float, verdict: str
) -> None:
    one = make("torch", "float64")
    other = make(
        "flax",
        "float64",
        **{name: getattr(one, name) for name in ("loss", "test_loss", "first_steps")},
    )
    loss = one.loss + np.where(np.arange(STEPS) == STEPS - 1, in_training, 0.0)
    other = dataclasses.replace(other, loss=loss, test_loss=one.test_loss + in_test)
    lens = compare({"torch": one, "flax": other}, {"torch": [], "flax": []}, LABELS)
    assert lens["verdict"] == verdict, lens["first_divergence"]
    if verdict == "disagree":
        assert lens["first_divergence"]["stage"] == ("loss" if in_training > 1e-10 else "evaluate")


# --- What rounding leaves of nothing


@pytest.mark.parametrize("tensor", ["backward/fc1.bias", "update/momentum of fc1.bias"])
@pytest.mark.parametrize(("size", "agrees"), [(1e-17, True), (1e-14, True), (1e-9, False)])
@lenses
def test_a_gradient_that_is_zero_but_for_rounding_is_held_against_the_largest(
    dtype: str, size: float, agrees: bool, tensor: str
) -> None:
    """As of a bias before a batch norm: each program has another remainder, and it has no digit in
    common."""
    size *= (
        1 if dtype == "float64" else 1e4
    )  # float32's and bfloat16's remainders are larger, and smaller than 1e-3
    if dtype != "float64" and not agrees:
        size = 30.0

    def remainder(generator: int) -> Callable[[Record], Record]:
        draws = size * np.random.default_rng(generator).normal(size=4)

        def fault(record: Record) -> Record:
            changed = {f"0/{tensor}": draws.astype(numpy_dtype(record.dtype))}
            return dataclasses.replace(record, first_steps=record.first_steps | changed)

        return fault

    lens = faulty(dtype, torch=remainder(1), flax=remainder(2))
    assert (lens["verdict"] == "agree") == agrees
    if not agrees:
        stage, _, name = tensor.partition("/")
        assert place(lens) == (0, stage, name)


def test_of_layers_that_one_side_alone_shows_nothing_is_said_unless_a_gradient_differs() -> None:
    """A user's own layer on one side, whose axes nobody knows."""

    def without(record: Record) -> Record:
        opening = {
            key: array
            for key, array in record.first_steps.items()
            if not key.endswith("/forward/fc1")
        }
        return dataclasses.replace(record, first_steps=opening)

    assert faulty("float64", flax=without)["verdict"] == "agree"
    lens = faulty("float64", flax=lambda record: in_opening("0/backward/fc1.bias")(without(record)))
    assert place(lens) == (0, "backward", "fc1.bias")
