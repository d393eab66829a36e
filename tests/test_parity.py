"""The verdict: what agrees agrees, whatever is broken is named, and nothing that is not there passes for agreement."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from common.config import DTYPES, Config
from common.errors import RecordError
from common.parity import STAGES, Rung, class_accuracy, compare, may_be_chaos, stretches
from common.protocol import Arrays
from common.record import Record
from common.weights import numpy_dtype, twin_weights

STEPS = 100
CLASSES = ("plane", "car", "bird", "cat", "deer")
LABELS = np.repeat(np.arange(5), 10)
SHAPES = {"conv1.kernel": (3, 3, 3, 2), "fc1.bias": (4,)}
PRODUCTION = ("float32", "bfloat16")

# Noise relative to the value: a few ulp. The largest gap it makes in a float64 trajectory is 1.0e-14, bound 2.3e-12.
NOISE = {"float64": 2e-16, "float32": 1e-7, "bfloat16": 8e-3}
# What a control adds to one value. Must exceed the bounds: 1e-12 of 2.3; 8 times a drift of 1e-5 (float32) or
# 0.7 (bfloat16) plus 16 ulp, and 1 % of what gradients made.
FAULT = {"float64": 1e-10, "float32": 0.2, "bfloat16": 30.0}

Runs = dict[str, Record]
Twins = dict[str, list[Record]]


def make(backend: str, dtype: str, twin: int | None = None, **changes: Any) -> Record:
    """One run of a family: all its members share their values, up to a noise of their own."""
    values = np.random.default_rng(1)
    own = np.random.default_rng([len(backend), ord(backend[0]), twin or 0])

    def noisy(array: np.ndarray, growth: Any = 1.0) -> np.ndarray:
        return array * (1 + NOISE[dtype] * growth * own.uniform(-1, 1, array.shape))

    def cast(array: np.ndarray) -> np.ndarray:
        return array.astype(numpy_dtype(dtype))

    weights = {name: cast(values.normal(size=shape)) for name, shape in SHAPES.items()}
    opening: Arrays = {}
    for step in range(2):
        opening[f"{step}/data/images"] = cast(values.uniform(-1, 1, (4, 2, 2, 3)))
        opening[f"{step}/data/labels"] = values.integers(0, 5, 4)
        opening[f"{step}/forward/logits"] = cast(noisy(values.normal(size=(4, 5))))
        opening[f"{step}/loss/loss"] = cast(noisy(np.array(2.3)))
        for name, shape in SHAPES.items():
            opening[f"{step}/backward/{name}"] = cast(noisy(values.normal(size=shape)))
            opening[f"{step}/update/{name}"] = cast(noisy(values.normal(size=shape)))
            opening[f"{step}/update/momentum of {name}"] = cast(noisy(values.normal(size=shape)))
    growth = np.linspace(1, 10, STEPS)
    record = Record(
        backend=backend,
        dtype=dtype,
        twin=twin,
        config=Config(steps=STEPS).resolve(160).to_json(),
        data={"name": "made", "digest": "d1", "order": "o1", "sizes": {"train": 160}, "classes": list(CLASSES)},
        environment={"device": "cpu"},
        source="s1",
        loss=noisy(np.linspace(2.3, 1.1, STEPS), growth),
        gradient_norm=noisy(np.linspace(3.0, 1.0, STEPS), growth),
        lr=np.linspace(0.1, 0.05, STEPS),
        predictions=np.where(np.arange(50) % 10 < 7, LABELS, (LABELS + 1) % 5),  # each class: 7 right, 3 wrong
        test_loss=float(noisy(np.array(1.2))),
        seconds=2.0,
        steps_per_second=20.0,
        weights=weights if twin is None else twin_weights(weights, 0, twin),
        opening=opening,
    )
    return dataclasses.replace(record, **changes)


def family(dtype: str) -> tuple[Runs, Twins]:
    runs = {name: make(name, dtype) for name in ("torch", "flax")}
    twins = {name: [] if dtype == "float64" else [make(name, dtype, twin) for twin in (1, 2)] for name in runs}
    return runs, twins


def judge(dtype: str, torch: Record | None = None, flax: Record | None = None, twins: Twins | None = None) -> dict:
    """The lens that a family gives with some members put in another's place; it must survive strict JSON."""
    runs, kin = family(dtype)
    runs |= {name: record for name, record in (("torch", torch), ("flax", flax)) if record is not None}
    lens = compare(runs, {**(kin if twins is None else twins)}, LABELS)
    assert json.loads(json.dumps(lens, allow_nan=False)) == lens
    return lens


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
        changed = {key: moved(record.opening[key], FAULT[record.dtype])}
        return dataclasses.replace(record, opening=record.opening | changed)

    return fault


def next_bits(key: str) -> Callable[[Record], Record]:
    """The smallest change that there is, to what must be the same bits."""

    def fault(record: Record) -> Record:
        group, name = ("weights", key.partition("/")[2]) if key.startswith("weights/") else ("opening", key)
        arrays = dict(getattr(record, group))
        last = np.array(arrays[name])
        entry = last.flat[-1]
        last.flat[-1] = entry + 1 if last.dtype.kind == "i" else np.nextafter(entry, np.asarray(9, last.dtype))
        return dataclasses.replace(record, **{group: arrays | {name: last}})

    return fault


def in_series(name: str, step: int) -> Callable[[Record], Record]:
    def fault(record: Record) -> Record:
        series = getattr(record, name).copy()
        series[step] += 1e-9 if name == "lr" else FAULT[record.dtype]  # lr is held to 1e-12 in every lens
        return dataclasses.replace(record, **{name: series})

    return fault


def in_test_loss(record: Record) -> Record:
    return dataclasses.replace(record, test_loss=record.test_loss + FAULT[record.dtype])


def in_predictions(record: Record) -> Record:
    """Wrong images get another wrong class, so that no accuracy moves: 15 of them, of which 5 are put up with."""
    wrong = record.predictions != LABELS
    return dataclasses.replace(record, predictions=np.where(wrong, (LABELS + 2) % 5, record.predictions))


# What is broken: how, and where it must be found.
RUNGS: dict[str, tuple[Callable[[Record], Record], tuple[int, str, str]]] = {
    "images": (next_bits("0/data/images"), (0, "data", "images")),
    "labels": (next_bits("0/data/labels"), (0, "data", "labels")),
    "weights": (next_bits("weights/fc1.bias"), (0, "weights", "fc1.bias")),
    "forward": (in_opening("0/forward/logits"), (0, "forward", "logits")),
    "loss of the first batch": (in_opening("0/loss/loss"), (0, "loss", "loss")),
    "gradient of a kernel": (in_opening("0/backward/conv1.kernel"), (0, "backward", "conv1.kernel")),
    "gradient of a bias": (in_opening("0/backward/fc1.bias"), (0, "backward", "fc1.bias")),
    "updated kernel": (in_opening("0/update/conv1.kernel"), (0, "update", "conv1.kernel")),
    "updated bias": (in_opening("0/update/fc1.bias"), (0, "update", "fc1.bias")),
    "momentum": (in_opening("0/update/momentum of fc1.bias"), (0, "update", "momentum of fc1.bias")),
    "images of the second step": (next_bits("1/data/images"), (1, "data", "images")),
    "momentum of the second step": (
        in_opening("1/update/momentum of conv1.kernel"),
        (1, "update", "momentum of conv1.kernel"),
    ),
    "lr trajectory": (in_series("lr", 11), (11, "update", "lr")),
    "loss trajectory": (in_series("loss", 17), (17, "loss", "loss")),
    "gradient norm trajectory": (in_series("gradient_norm", 29), (29, "backward", "gradient_norm")),
    "last loss": (in_series("loss", STEPS - 1), (STEPS - 1, "loss", "loss")),
    "test loss": (in_test_loss, (STEPS, "evaluate", "test loss")),
    "predictions": (in_predictions, (STEPS, "evaluate", "predictions")),
}

lenses = pytest.mark.parametrize("dtype", DTYPES)
production = pytest.mark.parametrize("dtype", PRODUCTION)
sides = pytest.mark.parametrize("side", ["torch", "flax"])


def place(lens: dict) -> tuple[int, str, str]:
    first = lens["first_divergence"]
    return first["step"], first["stage"], first["tensor"]


# --- Agreement, and its controls


@lenses
def test_two_runs_that_differ_by_rounding_agree(dtype: str) -> None:
    lens = judge(dtype)
    assert lens["verdict"] == "agree", lens["first_divergence"]
    assert lens["first_divergence"] is None
    assert all(row["agrees"] for row in lens["ladder"] + lens["stretches"])
    assert 0 < lens["max_abs_loss_gap"] < FAULT[dtype] / 10
    assert lens["predictions_equal"] == lens["predictions_total"] == 50


@lenses
@sides
@pytest.mark.parametrize("rung", RUNGS)
def test_a_fault_on_one_rung_is_named_by_its_step_its_stage_and_its_tensor(dtype: str, side: str, rung: str) -> None:
    fault, expected = RUNGS[rung]
    lens = faulty(dtype, **{side: fault})
    assert lens["verdict"] == "disagree"
    assert place(lens) == expected
    failing = {(row["step"], row["stage"], row["tensor"]) for row in lens["ladder"] if not row["agrees"]}
    failing |= {(None, None, row["quantity"]) for row in lens["stretches"] if not row["agrees"]}
    assert len(failing) == 1, "a control breaks one rung only"


@production
def test_an_accuracy_that_moves_further_than_twins_move_it_is_named_with_its_class(dtype: str) -> None:
    runs, twins = family(dtype)
    # Six images that a twin gets wrong in another way make room for 17 other predictions, but for no other accuracy.
    others = np.where((runs["torch"].predictions != LABELS) & (np.arange(50) < 20), (LABELS + 2) % 5, -1)
    twin = dataclasses.replace(twins["torch"][0], predictions=np.where(others >= 0, others, runs["torch"].predictions))
    worse = runs["flax"].predictions.copy()
    worse[20:26] = 4  # six birds of ten; five are put up with
    flax = dataclasses.replace(runs["flax"], predictions=worse)
    lens = judge(dtype, flax=flax, twins={"torch": [twin], "flax": []})
    assert place(lens) == (STEPS, "evaluate", "accuracy of bird")
    worse[20] = 2
    flax = dataclasses.replace(runs["flax"], predictions=worse)
    assert judge(dtype, flax=flax, twins={"torch": [twin], "flax": []})["verdict"] == "agree"


def test_in_the_proof_lens_a_prediction_may_differ_only_if_some_differ_between_twins() -> None:
    flax = make("flax", "float64")
    other = flax.predictions.copy()
    other[3] = (other[3] + 1) % 5
    flax = dataclasses.replace(flax, predictions=other)
    assert place(judge("float64", flax=flax)) == (STEPS, "evaluate", "predictions")
    same, chaotic = make("torch", "float64", 1), make("torch", "float64", 1, predictions=(LABELS + 1) % 5)
    assert place(judge("float64", flax=flax, twins={"torch": [same]})) == (STEPS, "evaluate", "predictions")
    assert judge("float64", flax=flax, twins={"torch": [chaotic]})["verdict"] == "agree"


def test_chaos_in_float64_is_suspected_late_and_never_in_the_first_steps() -> None:
    late, early = in_series("loss", 17)(make("flax", "float64")), in_series("loss", 1)(make("flax", "float64"))
    assert may_be_chaos(judge("float64", flax=late))
    assert not may_be_chaos(judge("float64", flax=early))
    assert not may_be_chaos(judge("float64"))
    assert not may_be_chaos(judge("float64", flax=late, twins={"torch": [make("torch", "float64", 1)]}))
    drifting = {"torch": [in_series("loss", 15)(make("torch", "float64", 1))]}
    assert judge("float64", flax=late, twins=drifting)["verdict"] == "agree"


@pytest.mark.parametrize("rung", RUNGS)
def test_of_two_faults_the_earlier_step_is_named_and_within_a_step_the_earlier_stage(rung: str) -> None:
    fault, where = RUNGS[rung]
    for other_fault, other_where in RUNGS.values():
        lens = faulty("float64", flax=lambda record, other=other_fault: other(fault(record)))
        expected = min((where, other_where), key=lambda at: (at[0], STAGES.index(at[1])))
        assert place(lens)[:2] == expected[:2]


def test_within_one_step_of_the_trajectory_loss_comes_before_gradient_norm_before_lr() -> None:
    flax = make("flax", "float64")
    for name, stage in (("lr", "update"), ("gradient_norm", "backward"), ("loss", "loss")):
        flax = in_series(name, 20)(flax)
        assert place(judge("float64", flax=flax)) == (20, stage, name)


def test_a_message_gives_both_sides_and_their_gap_at_the_step_it_names_not_a_later_larger_gap() -> None:
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


@lenses
def test_a_record_agrees_with_itself_bit_by_bit(dtype: str) -> None:
    torch = make("torch", dtype)
    lens = judge(dtype, flax=dataclasses.replace(torch, backend="flax"))
    assert lens["verdict"] == "agree"
    assert lens["max_abs_loss_gap"] == 0


# --- Not finite


@pytest.mark.parametrize("bound", [0.0, 1.0, math.inf, math.nan])
@pytest.mark.parametrize("gap", [math.nan, math.inf])
def test_no_bound_is_wide_enough_for_a_gap_that_is_not_finite(gap: float, bound: float) -> None:
    assert not Rung(0, "loss", "loss", gap, bound).agrees
    assert Rung(0, "loss", "loss", 0.5, 1.0).agrees


@lenses
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["one side", "both sides", "all runs and twins"])
@pytest.mark.parametrize("series", ["loss", "gradient_norm", "lr", "test_loss", "opening", "weights"])
def test_what_is_not_finite_never_agrees(dtype: str, value: float, where: str, series: str) -> None:
    def spoil(record: Record) -> Record:
        if series == "test_loss":
            return dataclasses.replace(record, test_loss=value)
        if series in ("opening", "weights"):
            name = "0/forward/logits" if series == "opening" else "fc1.bias"
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
    assert lens["verdict"] == "disagree"
    expected = {"test_loss": (STEPS, "evaluate"), "opening": (0, "forward"), "weights": (0, "weights")}
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
        ("opening", "forward"),
    ],
)
def test_twins_that_are_not_finite_explain_nothing(
    dtype: str, order: tuple[int, int], quantity: str, rung: str
) -> None:
    runs, twins = family(dtype)
    nothing: Any = {
        "test_loss": math.nan,
        "opening": {key: np.full(array.shape, math.nan) for key, array in runs["torch"].opening.items()},
    }
    spoilt = nothing.get(quantity, np.full(STEPS, math.nan))
    kin = [dataclasses.replace(twins["torch"][0], **{quantity: spoilt}), twins["torch"][1]]
    fault, expected = RUNGS[rung]
    twins = {"torch": [kin[index] for index in order]}
    lens = judge(dtype, flax=fault(runs["flax"]), twins=twins)
    assert lens["verdict"] == "disagree"
    failing = [(row["step"], row["stage"], row["tensor"]) for row in lens["ladder"] if not row["agrees"]]
    failing += [(expected[0], expected[1], row["quantity"]) for row in lens["stretches"] if not row["agrees"]]
    assert expected in failing


# --- Not there


def without(record: Record, group: str, name: str) -> Record:
    return dataclasses.replace(record, **{group: {k: v for k, v in getattr(record, group).items() if k != name}})


def reshaped(record: Record, group: str, name: str) -> Record:
    arrays = getattr(record, group)
    return dataclasses.replace(record, **{group: arrays | {name: np.append(arrays[name], arrays[name].flat[0])}})


@lenses
@sides
@pytest.mark.parametrize("damage", [without, reshaped], ids=["missing", "of another shape"])
@pytest.mark.parametrize(
    ("group", "name", "expected"),
    [
        ("weights", "fc1.bias", (0, "weights", "fc1.bias")),
        ("opening", "0/data/images", (0, "data", "images")),
        ("opening", "0/loss/loss", (0, "loss", "loss")),
        ("opening", "1/backward/conv1.kernel", (1, "backward", "conv1.kernel")),
        ("opening", "1/update/momentum of fc1.bias", (1, "update", "momentum of fc1.bias")),
    ],
    ids=["weights", "images", "loss", "gradient", "momentum"],
)
def test_a_tensor_that_is_missing_or_of_another_shape_on_one_side_is_a_disagreement(
    dtype: str, side: str, damage: Any, group: str, name: str, expected: tuple[int, str, str]
) -> None:
    lens = judge(dtype, **{side: damage(make(side, dtype), group, name)})
    assert place(lens) == expected
    assert lens["first_divergence"]["gap"] is None


@production
def test_a_tensor_that_the_twins_lack_is_held_to_no_gap_at_all(dtype: str) -> None:
    runs, twins = family(dtype)
    bare = {name: [without(twin, "opening", "0/forward/logits") for twin in kin] for name, kin in twins.items()}
    assert place(judge(dtype, **runs, twins=bare)) == (0, "forward", "logits")


@lenses
@pytest.mark.parametrize("count", [0, 1, 49, 51])
@pytest.mark.parametrize("both", [False, True], ids=["one side", "both sides"])
def test_missing_or_surplus_predictions_never_agree(dtype: str, count: int, both: bool) -> None:
    predictions = np.resize(make("flax", dtype).predictions, count)
    runs = {name: make(name, dtype, predictions=predictions) for name in (("torch", "flax") if both else ("flax",))}
    lens = judge(dtype, runs.get("torch"), runs["flax"])
    assert place(lens) == (STEPS, "evaluate", "predictions")
    assert lens["accuracy"]["flax"] == np.sum(predictions[:50] == LABELS[:count]) / 50


# --- What cannot be compared


def differing(changes: dict[str, Any]) -> Callable[[Record], Record]:
    def change(record: Record) -> Record:
        fields = {
            name: getattr(record, name) | value if isinstance(value, dict) else value for name, value in changes.items()
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
    "option that one lacks": (differing({"config": {"novelty": 3}}), "configuration, novelty: None and 3"),
    "precision": (differing({"dtype": "float16"}), "precision: "),
}


@lenses
@pytest.mark.parametrize("what", OTHERS)
def test_records_of_different_runs_are_refused_and_the_difference_is_named(dtype: str, what: str) -> None:
    change, expected = OTHERS[what]
    with pytest.raises(RecordError) as caught:
        judge(dtype, flax=change(make("flax", dtype)), twins={"torch": family(dtype)[1]["torch"]})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@production
@sides
@pytest.mark.parametrize("what", OTHERS)
def test_twins_of_another_run_are_refused_and_the_difference_is_named(dtype: str, side: str, what: str) -> None:
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


@pytest.mark.parametrize("backends", [("torch",), ("torch", "flax")], ids=["single", "both"])
@lenses
@pytest.mark.parametrize("steps", [0, 39])
def test_a_run_of_no_steps_or_cut_short_is_refused(dtype: str, backends: Sequence[str], steps: int) -> None:
    cut = shorter(steps)
    runs = {name: cut(make(name, dtype)) for name in backends}
    twins = {name: [cut(make(name, dtype, 1))] for name in backends if dtype != "float64"}
    with pytest.raises(RecordError, match=r"^the torch record holds no whole run: run torch again$"):
        compare(runs, {**twins}, LABELS)


@pytest.mark.parametrize("series", ["lr", "gradient_norm"])
def test_series_of_different_lengths_are_no_whole_run(series: str) -> None:
    flax = make("flax", "float64")
    flax = dataclasses.replace(flax, **{series: getattr(flax, series)[:-1]})
    with pytest.raises(RecordError, match="the flax record holds no whole run"):
        judge("float64", flax=flax)


@production
@pytest.mark.parametrize("twins", [{}, {"torch": [], "flax": []}], ids=["none", "empty"])
def test_a_production_lens_without_twins_is_refused(dtype: str, twins: Twins) -> None:
    with pytest.raises(RecordError, match=f"^nothing says how far {dtype} runs may drift apart: run with --twins"):
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


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 11, 29, 30, 100, 101, 999, 37_500])
def test_stretches_cover_every_step_once_and_grow(steps: int) -> None:
    pieces = stretches(steps)
    assert [step for start, stop in pieces for step in range(start, stop)] == list(range(steps))
    lengths = [stop - start for start, stop in pieces[:-1]]  # the last is cut off by the end of the run
    assert lengths == sorted(lengths)
    assert all(later > earlier for earlier, later in itertools.pairwise(lengths[1:]))


@lenses
def test_the_report_shows_each_quantity_over_all_stretches(dtype: str) -> None:
    lens = judge(dtype)
    for quantity in ("lr", "loss", "gradient_norm"):
        rows = [row for row in lens["stretches"] if row["quantity"] == quantity]
        assert [(row["start"], row["stop"]) for row in rows] == [(0, 1), (1, 3), (3, 10), (10, 30), (30, STEPS)]


def test_accuracy_is_counted_per_class_and_what_has_no_prediction_counts_as_wrong() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    record = make("torch", "float64", predictions=np.array([0, 0, 0, 1, 1, 0, 0]))
    classes = ("cat", "dog", "cow", "none of these")
    assert class_accuracy(record, labels, classes) == {"cat": 0.75, "dog": 0.5, "cow": 0.0, "none of these": None}
    record = make("torch", "float64", predictions=np.array([0, 0]))
    assert class_accuracy(record, labels, classes) == {"cat": 0.5, "dog": 0.0, "cow": 0.0, "none of these": None}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_made_records_hold_what_real_ones_hold(dtype: str) -> None:
    record = make("torch", dtype)
    expected = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    assert all(a.dtype == expected for key, a in record.opening.items() if not key.endswith("labels"))
    assert {key.split("/")[1] for key in record.opening} == set(STAGES) - {"weights", "evaluate"}
