"""Where two runs diverge: what the records show is read from them, and what they do not is found by
replaying."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import optax
import pytest

from lockstep.backends import load
from lockstep.common.config import BACKENDS, DTYPES, Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.dtypes import numpy_dtype
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.model.layers import (
    ATTENTION,
    CONVOLUTION,
    DENSE,
    NORM,
    ModuleNames,
    kind_of,
    module_names,
)
from lockstep.common.protocol import STAGES, Snapshot
from lockstep.common.runs import chunks, training
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record
from lockstep.common.verdict import locate
from lockstep.common.verdict.causes import CAUSES, NAMED, Cause, find_causes
from lockstep.common.verdict.compare import compare
from lockstep.common.verdict.comparison import Divergence, Location
from lockstep.common.verdict.first_steps import check_first_steps
from lockstep.common.verdict.locate import one_step
from lockstep.common.verdict.relations import (
    AS_BEFORE,
    INVERSE,
    ITSELF,
    N_WORST,
    UNCHANGED,
    describe_relation,
)
from tests.conftest import SilentObserver
from tests.marks import slow_except
from tests.verdict.helpers import diverging

NAMES = ["torch", "flax"]
MOMENTUM = "momentum of "


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# --- Patterns


def test_a_tensor_in_another_order_is_seen() -> None:
    kernel = numbers(5, 4)
    same = "the same numbers in another order"
    assert (
        describe_relation(kernel, kernel.T.copy(), NAMES) == f"{same}: axes 0 and 1 are exchanged"
    )
    assert describe_relation(kernel, kernel[:, ::-1], NAMES) == same
    assert describe_relation(kernel, kernel, NAMES) is None
    changed = kernel.T.copy()
    changed[0, 1] += 1e-3  # the control
    assert describe_relation(kernel, changed, NAMES) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [2.0, -1.0, 0.0625])
def test_a_multiple_is_seen_with_its_factor(dtype: str, factor: float) -> None:
    one = numbers(7).astype(numpy_dtype(dtype))
    other = (factor * one.astype(np.float64)).astype(one.dtype)  # exact: a power of two
    assert describe_relation(one, other, NAMES) == f"flax is {factor:g} times torch"
    assert describe_relation(other, one, NAMES) == f"flax is {1 / factor:g} times torch"
    other[2] = other[3]  # the control
    assert describe_relation(one, other, NAMES) is None


def test_a_factor_of_one_is_none() -> None:
    one = numbers(7)
    assert describe_relation(one, (1 + 1e-9) * one, NAMES) is None
    assert describe_relation(one, 1.001 * one, NAMES) == "flax is 1.001 times torch"


def test_whose_numbers_are_all_zero_is_said() -> None:
    one, zeros = numbers(3, 2), np.zeros((3, 2))
    assert describe_relation(one, zeros, NAMES) == "flax has nothing but zeros"
    assert describe_relation(zeros, one, NAMES) == "torch has nothing but zeros"
    assert describe_relation(zeros, zeros, NAMES) is None
    assert (
        describe_relation(1e-200 * one, zeros, NAMES) == "flax has nothing but zeros"
    )  # whose squares vanish


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_where_the_sides_differ(value: float) -> None:
    one, finite = np.array([value, 1.0, 2.0]), np.array([0.0, 1.0, 2.0])
    found = describe_relation(finite, 2 * one, NAMES)
    assert found == "not finite: 1 of 3 entries of flax, none of torch"
    both = describe_relation(one, np.array([value, value, 1.0]), NAMES)
    assert both == "not finite: 2 of 3 entries of flax, 1 of torch"
    assert describe_relation(np.array(value), np.array(1.0), NAMES) == "torch is not finite"
    assert (
        describe_relation(one, one + np.array([0, 0, 1]), NAMES) is None
    )  # the control: at one place
    [cause, *_] = find_causes("backward", "fc1.kernel", both)
    assert cause.startswith("a division by 0")


def test_an_axis_in_another_order_is_named() -> None:
    images = numbers(2, 4, 4, 3)
    same = "the same numbers in another order"
    for other, text in (
        (images[..., ::-1], f"{same} along axis 3"),
        (images[[1, 0]], f"{same} along axis 0"),
        (images.swapaxes(1, 2), f"{same}: axes 1 and 2 are exchanged"),
        (images.reshape(2, 3, 4, 4).transpose(0, 2, 3, 1), same),
    ):
        assert describe_relation(images, other, NAMES) == text
    colours = describe_relation(images, images[..., ::-1], NAMES)
    [cause, *_] = find_causes("forward", "input of conv1", colours)
    assert "colours" in cause and "flatten" not in cause
    [cause, *_] = find_causes("forward", "input of fc1", same)  # the control
    assert cause.startswith("flatten")
    shuffled = describe_relation(images, images[[1, 0]], NAMES)
    assert "shuffle" in find_causes("data", "images", shuffled)[0]
    assert "BGR" in find_causes("data", "images", colours)[0]


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_numbers_whose_squares_are_out_of_range_have_no_pattern_and_do_no_harm(
    scale: float,
) -> None:
    one = scale * numbers(5)
    assert describe_relation(one, 2 * one, NAMES) in (None, "flax is 2 times torch")
    assert describe_relation(one, one + scale, NAMES) is None


def test_one_number_alone_has_no_pattern() -> None:
    assert describe_relation(np.array(2.0), np.array(4.0), NAMES) is None
    assert describe_relation(np.zeros(0), np.zeros(0), NAMES) is None


def test_other_numbers_have_no_pattern() -> None:
    assert describe_relation(numbers(9), numbers(9, seed=1), NAMES) is None


def test_another_numbering_of_the_classes_is_seen() -> None:
    one = np.random.default_rng(0).integers(0, 4, 50)
    renumbered = np.array([2, 0, 3, 1])[one]
    assert "another numbering" in str(describe_relation(one, renumbered, NAMES, classes=True))
    renumbered[7] = (renumbered[7] + 1) % 4  # the control
    assert describe_relation(one, renumbered, NAMES, classes=True) is None
    merged = np.array([2, 0, 3, 3])[one]  # two classes have become one
    assert describe_relation(one, merged, NAMES, classes=True) is None


@pytest.mark.parametrize(
    "predictions", [[], [3, 3, 3], [0, 1, 2]], ids=["none", "one class", "several"]
)
def test_the_same_predictions_are_no_other_numbering(predictions: list[int]) -> None:
    one = np.array(predictions, np.int64)
    assert describe_relation(one, one.copy(), NAMES, classes=True) is None
    assert (
        len(one) == 0 or describe_relation(one, 0 * one + 5, NAMES, classes=True) is None
    )  # one class says nothing


# --- Traps

SAMPLES = {  # by stage, the tensors that there are
    "data": ["images", "labels"],
    "weights": ["conv1.kernel", "fc1.bias"],
    "forward": [
        "input of conv1",
        "conv1",
        "input of fc1",
        "fc1",
        "bn1",
        "input of attention.out",
        "attention",
        "embed",
        "LayerNorm_0",
        "logits",
    ],
    "loss": ["loss"],
    "backward": ["conv1.kernel", "gradient_norm"],
    "update": [
        *["lr", "fc1.bias", "bn1.mean", "bn1.var", "all parameters", "momentum of fc1.bias"],
        *["first moment of fc1.bias", "second moment of fc1.bias", "sum of squares of fc1.bias"],
    ],
    "evaluate": ["test loss", "predictions", "accuracy of cat"],
}
SCALARS = ("loss", "lr", "gradient_norm", "test loss", "all parameters")


def pairs(stage: str, tensor: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What two runs may hold of this tensor, one pair for each pattern."""
    if stage == "evaluate":
        predictions = np.arange(20) % 5
        yield predictions, (predictions + 1) % 5
        yield predictions, np.minimum(predictions, 3)
        return
    one = numbers(1) if tensor in SCALARS else numbers(6, 4)
    yield one, one[::-1].copy()
    yield one, 2 * one
    yield one, 0 * one
    yield one, numbers(*one.shape, seed=1)
    if tensor not in SCALARS:
        images = numbers(2, 4, 4, 3)
        yield images, images[..., ::-1]
        yield images, images[::-1]
        yield images, images.swapaxes(1, 2)


def described(stage: str, tensor: str, pair: list[Any]) -> dict[str, Any]:
    one, other = pair
    found = locate.describe(diverging(0, stage, tensor), (one, other), "as recorded").to_json()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_every_stage_has_a_trap_and_every_trap_a_stage() -> None:
    assert {trap.stage for trap in CAUSES} == set(STAGES) == set(SAMPLES)


COMMON = (
    "all biases, no kernel",
    "every tensor",
    "every parameter; no moment",
)  # what failing tensors may have in common


UPDATES = (  # of `update_relation` and `slot_relation`
    f"flax adds -0.01 {ITSELF}",
    f"flax adds 0.1 {AS_BEFORE}",
    f"flax {UNCHANGED} it",
    f"the two updates differ most {INVERSE} the gradient's entry is",
    "flax's update is 0.9 times torch's",
)


def said_of(stage: str, tensor: str) -> Iterator[tuple[str, ...]]:
    """The causes that may be said of this tensor, whatever was seen of it."""
    patterns = [
        describe_relation(one, other, NAMES, classes=stage == "evaluate")
        for one, other in pairs(stage, tensor)
    ]
    for pattern in [*patterns, *(UPDATES if stage == "update" else ())]:
        for common in ("", *COMMON):
            for kind in (None, "", *(kind for kind, _ in NAMED)):
                yield find_causes(stage, tensor, "; ".join(filter(None, [pattern, common])), kind)


@pytest.mark.parametrize(
    "trap",
    [cause for cause in CAUSES if cause.tensor != "^batch$"],
    ids=lambda trap: f"{trap.stage}-{trap.tensor}-{trap.pattern}-{trap.kind}",
)
def test_every_trap_is_said_of_some_tensor_and_pattern(trap: Cause) -> None:
    assert re.compile(trap.tensor) and re.compile(trap.pattern) and trap.text
    said = [
        (tensor, cause)
        for tensor in SAMPLES[trap.stage]
        for causes in said_of(trap.stage, tensor)
        for cause in causes
    ]
    assert trap.text in {cause for _, cause in said}
    assert all(re.search(trap.tensor, tensor) for tensor, cause in said if cause == trap.text)


def repeated_words(causes: Sequence[str]) -> set[str]:
    """Words of more than five letters that two causes have both."""
    words = [set(re.findall(r"[a-z]{6,}", text.lower())) for text in causes]
    return words[0] & words[1] if len(words) == 2 else set()


@pytest.mark.parametrize("stage", STAGES)
def test_no_two_causes_say_the_same(stage: str) -> None:
    for tensor in SAMPLES[stage]:
        for causes in said_of(stage, tensor):
            assert repeated_words(causes) <= {"momentum", "buffer", "pytorch"}, causes
    # The control: what was said of a convolution once.
    assert repeated_words(
        ["padding (Flax pads SAME by default), strides", "padding (Flax's is SAME), a missing bias"]
    )


def test_a_layer_is_told_by_its_class_before_its_name() -> None:
    norm, padding = "epsilon", "padding (Flax pads SAME"
    for tensor in ("LayerNorm_0", "bn1", "block.norm2"):
        assert find_causes("forward", tensor, None)[0].startswith(norm)
        # The control: a convolution of such a name.
        assert find_causes("forward", tensor, None, CONVOLUTION)[0].startswith(padding)
    modules = [ModuleNames({}, {"stem": NORM, "attention": ATTENTION, "attention.out": DENSE})]
    assert kind_of("stem", modules) == kind_of("stem.kernel", modules) == NORM
    assert kind_of("input of stem", modules) == kind_of("other", modules) == ""
    assert kind_of("input of attention.out", modules) == ATTENTION
    assert kind_of("attention.out", modules) == DENSE


def test_float32_inside_is_said_of_gaps_of_its_size_in_float64_and_of_no_others() -> None:
    one = numbers(6, 4)

    def causes(share: float, dtype: str = "float64") -> tuple[str, ...]:
        other = one + share * np.abs(one).max() * np.sign(numbers(6, 4, seed=2))
        pair = one.astype(dtype), other.astype(dtype)
        return locate.describe(diverging(0, "forward", "fc1"), pair, "as recorded").causes

    for share in (3e-9, 1e-7, 9e-7):
        assert causes(share)[0].startswith("float32 inside: a gap of") and len(causes(share)) == 2
    for share in (1e-11, 3e-6, 0.1):
        assert not any("float32 inside" in cause for cause in causes(share))
    assert not any("float32 inside" in cause for cause in causes(5e-7, "float32"))
    kept = locate.describe(
        diverging(0, "forward", "fc1"), (one, one.astype(np.float32)), "as recorded"
    )
    assert kept.pattern == "torch's dtype is float64, flax's float32"
    assert kept.causes[0].startswith("float32 inside")


def test_the_code_to_try_is_that_of_the_causes_and_the_sources_are_of_both_networks() -> None:
    names = {name: module_names(load(name)(Config(), 10)) for name in NAMES}
    first = diverging(0, "forward", "conv2")
    pair = numbers(3), numbers(3, seed=1)
    found: Any = locate.describe(first, pair, "", None, names).to_json()
    assert [text.partition(" ")[0] for text in found["fixes"]] == ["padding=1"]
    for name, source in found["sources"].items():
        assert source["file"] == f"backends/{name}_backend/models/net.py"
        assert all("conv2" in line for _, line in source["lines"])
    assert list(found["sources"]) == list(NAMES)
    loss: Any = locate.describe(
        diverging(0, "loss", "loss"), (None, None), "", None, names
    ).to_json()
    assert loss["fixes"] == [] and "sources" not in loss  # the control


def test_the_names_that_both_modules_give_a_tensor_are_told_where_they_differ() -> None:
    modules = {
        "torch": ModuleNames({"fc.kernel": "head.weight", "fc.bias": "head.bias"}, {}),
        "flax": ModuleNames({"fc.kernel": "fc.kernel", "fc.bias": "fc.bias"}, {}),
    }
    pair = numbers(3), numbers(3, seed=1)

    def names(stage: str, tensor: str) -> Any:
        first = diverging(0, stage, tensor)
        return locate.describe(first, pair, "", None, modules).to_json().get("own_names")

    both = {"torch": "head.weight", "flax": "fc.kernel"}
    assert names("backward", "fc.kernel") == names("update", "momentum of fc.kernel") == both
    assert names("forward", "input of fc") == {"torch": "head", "flax": "fc"}
    assert names("forward", "logits") is names("loss", "loss") is None
    modules["torch"] = modules["flax"]  # the control
    assert names("backward", "fc.kernel") is None


@pytest.mark.parametrize("exponent", range(-14, 1))
def test_a_factor_is_never_said_to_be_one(exponent: int) -> None:
    one = numbers(50)
    for factor in (1 + 10.0**exponent, 1 - 10.0**exponent, 1 + 1.5 * 10.0**exponent):
        found = describe_relation(one, factor * one, NAMES)
        assert found is None or not re.search(r"is 1(\.0*)? times", found), found


@pytest.mark.parametrize("stage", STAGES)
def test_there_is_a_cause_for_whatever_a_tensor_looks_like_and_at_most_two(stage: str) -> None:
    for tensor in SAMPLES[stage]:
        for pair in [
            *pairs(stage, tensor),
            (None, None),
            (None, numbers(3)),
            (numbers(2), numbers(3)),
        ]:
            causes = described(stage, tensor, list(pair))["causes"]
            assert 1 <= len(causes) <= 2
            assert len(set(causes)) == len(causes)


def test_a_flatten_is_named_where_the_order_of_the_features_differs_and_only_there() -> None:
    one = numbers(2, 8)
    flatten = "flatten: PyTorch unrolls (C, H, W), Flax (H, W, C); see `flattened`"
    assert described("forward", "input of fc1", [one, one[:, ::-1].copy()])["causes"][0] == flatten
    assert flatten not in described("forward", "input of fc1", [one, 2 * one])["causes"]
    assert flatten not in described("forward", "conv1", [one, one[:, ::-1].copy()])["causes"]


# --- Offenders


def test_the_entries_that_differ_most_are_listed_with_their_place_and_both_values() -> None:
    one = numbers(3, 4, 2)
    other = one.copy()
    for size, place in enumerate(
        [(2, 3, 1), (0, 0, 0), (1, 2, 0), (1, 2, 1), (0, 3, 1), (2, 0, 0)], start=1
    ):
        other[place] += size * (-1) ** size
    found = described("forward", "conv1", [one, other])
    assert [entry["index"] for entry in found["offenders"]] == [
        [2, 0, 0],
        [0, 3, 1],
        [1, 2, 1],
        [1, 2, 0],
        [0, 0, 0],
    ]
    assert len(found["offenders"]) == N_WORST
    assert found["offenders"][0] == {
        "index": [2, 0, 0],
        "torch": one[2, 0, 0],
        "flax": other[2, 0, 0],
    }
    assert found["pattern"] is None


def test_entries_that_are_the_same_are_no_offenders() -> None:
    one = numbers(6)
    other = one.copy()
    other[4] += 1
    assert [entry["index"] for entry in described("forward", "fc1", [one, other])["offenders"]] == [
        [4]
    ]
    assert described("forward", "fc1", [one, one])["offenders"] == []


def test_entries_that_are_not_finite_come_first_and_as_null() -> None:
    one = np.array([1.0, math.inf, 3.0, 4.0], ml_dtypes.bfloat16)
    other = np.array([9.0, math.inf, math.nan, 4.0], ml_dtypes.bfloat16)
    assert described("forward", "fc1", [one, other])["offenders"] == [
        {"index": [1], "torch": None, "flax": None},
        {"index": [2], "torch": 3.0, "flax": None},
        {"index": [0], "torch": 1.0, "flax": 9.0},
    ]


@pytest.mark.parametrize("pair", [(None, numbers(3)), (numbers(3), None), (numbers(3), numbers(4))])
def test_tensors_that_are_missing_or_of_another_shape_have_no_offenders_but_their_shapes(
    pair: tuple,
) -> None:
    found = described("weights", "fc1.bias", list(pair))
    shapes = None if pair[0] is None or pair[1] is None else "torch's shape is (3,), flax's (4,)"
    assert found["offenders"] == [] and found["pattern"] == shapes


# --- Batches


def test_another_batch_is_said_to_be_that_of_another_step_where_it_is() -> None:
    first = Divergence(12, "data", "batch", 1.0, 0.0, ("torch", "flax"))

    def located(digest: int) -> Location:
        other = made("flax")
        digests = other.batch_digests.copy()
        digests[12] = digest
        runs = {"torch": made("torch"), "flax": replace(other, batch_digests=digests)}
        config = Config(steps=40).resolve(160)
        nothing: Any = None
        found = locate.locate(first, runs, config, nothing, forbidden)
        assert found is not None
        return found

    repeated = located(12)
    assert repeated.pattern == "flax's batch is that of step 11 in torch"
    assert repeated.causes[0].startswith("a batch is repeated")
    other = located(1_000_000)
    assert other.pattern is None and other.causes[0].startswith("other images or labels")


# --- What the records show


def made(backend: str, **changes: Any) -> Record:
    steps = 40
    record = Record(
        backend=backend,
        dtype="float64",
        twin=None,
        config={},
        data={},
        environment={},
        source="",
        loss=np.linspace(2.3, 1.1, steps),
        gradient_norm=np.linspace(3.0, 1.0, steps),
        lr=np.full(steps, 0.1),
        batch_digests=np.arange(1, steps + 1),
        predictions=np.arange(20) % 5,
        test_loss=1.0,
        seconds=1.0,
        steps_per_second=1.0,
        weights={"fc1.kernel": numbers(4, 3)},
        first_steps={
            f"{step}/{name}": numbers(4, 3, seed=step)
            for step in (0, 1)
            for name in ("forward/fc1", "update/fc1")
        },
    )
    return replace(record, **changes)


def forbidden(name: str) -> Any:
    raise AssertionError(f"{name} was built, where the records show all there is")


def located(step: int, stage: str, tensor: str, **changes: Any) -> dict[str, Any]:
    """What is found of a divergence that Flax's record shows; nothing may be built."""
    first = diverging(step, stage, tensor)
    runs = {"torch": made("torch"), "flax": made("flax", **changes)}
    nothing: Any = None
    location = locate.locate(first, runs, Config(steps=40).resolve(160), nothing, forbidden)
    assert location is not None and location.divergence == first
    found = location.to_json()
    assert found["how"] == "as recorded"
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_what_parts_in_the_first_steps_is_read_from_the_records() -> None:
    opening = made("flax").first_steps
    found = located(
        1, "forward", "fc1", first_steps=opening | {"1/forward/fc1": 2 * opening["1/forward/fc1"]}
    )
    assert found["pattern"] == "flax is 2 times torch"
    worst = np.unravel_index(np.argmax(np.abs(opening["1/forward/fc1"])), (4, 3))
    assert found["offenders"][0]["index"] == [int(part) for part in worst]


@pytest.mark.parametrize(
    ("tensor", "change", "pattern", "cause"),
    [
        (
            "fc1.kernel",
            lambda w, g, m: w - 0.09 * g,
            "flax's update is 0.9 times torch's",
            "the learn",
        ),
        (
            "fc1.kernel",
            lambda w, g, m: 0.99 * w - 0.1 * g,
            f"adds -0.01 {ITSELF}",
            "decoupled decay",
        ),
        ("fc1.kernel", lambda w, g, m: w, f"flax {UNCHANGED} it", "the tensor is frozen"),
        (
            f"{MOMENTUM}fc1.kernel",
            lambda w, g, m: g + 0.8 * m,
            f"-0.1 {AS_BEFORE}",
            "the factor that",
        ),
        (f"{MOMENTUM}fc1.kernel", lambda w, g, m: g + 0.9 * m + 0.1 * w, ITSELF, "decay added to"),
    ],
)
@pytest.mark.parametrize("step", [0, 1])
def test_how_one_recorded_update_is_made_of_the_other_is_said(
    tensor: str,
    change: Callable[..., np.ndarray],
    pattern: str,
    cause: str,
    step: int,
) -> None:
    weights, gradient, momentum = (numbers(4, 3, seed=seed) for seed in range(3))
    kept = momentum if step else np.zeros((4, 3))
    key, name = f"{step}/update", "fc1.kernel"
    recorded = {
        f"{step}/backward/{name}": gradient,
        f"{key}/{name}": weights - 0.1 * gradient,
        f"{key}/{MOMENTUM}{name}": gradient + 0.9 * kept,
    }
    before = {f"0/update/{name}": weights, f"0/update/{MOMENTUM}{name}": momentum} if step else {}
    record = replace(
        made("torch"), first_steps=before | recorded, weights={name: weights if not step else kept}
    )
    changed = recorded | {f"{key}/{tensor}": change(weights, gradient, kept)}
    runs = {"torch": record, "flax": replace(record, backend="flax", first_steps=before | changed)}
    nothing: Any = None
    first = diverging(step, "update", tensor)
    found = locate.locate(first, runs, Config(steps=40).resolve(160), nothing, forbidden)
    assert found is not None
    if step == 0 and "before" in pattern:  # nothing was kept yet: the two are equal
        assert found.pattern is None
        return
    assert found.pattern is not None and pattern in found.pattern
    assert found.causes[0].startswith(cause)


def test_weights_are_read_from_the_weights() -> None:
    found = located(
        0,
        "weights",
        "fc1.kernel",
        weights={"fc1.kernel": made("flax").weights["fc1.kernel"][::-1].copy()},
    )
    assert found["pattern"] == "the same numbers in another order"
    assert found["causes"][0].startswith("a kernel is transposed")


def test_what_parts_in_evaluation_is_read_from_the_predictions() -> None:
    for tensor in ("predictions", "accuracy of cat"):
        found = located(40, "evaluate", tensor, predictions=(np.arange(20) + 1) % 5)
        assert "another numbering" in found["pattern"]
    found = located(40, "evaluate", "test loss", test_loss=1.5)
    assert found["pattern"] is None and found["offenders"] == []
    assert found["causes"][0].startswith("batch means averaged")


@pytest.mark.parametrize("step", [0, 1, 2, 39])
def test_a_learning_rate_is_read_from_the_records_however_late(step: int) -> None:
    lr = made("flax").lr.copy()
    lr[step] = 0.05
    found = located(step, "update", "lr", lr=lr)
    assert found["offenders"] == [{"index": [0], "torch": 0.1, "flax": 0.05}]
    assert found["causes"][0].startswith("the schedule")


def test_a_loss_of_the_first_steps_is_read_from_the_series_where_the_opening_has_none() -> None:
    loss = made("flax").loss.copy()
    loss[1] = 9.0
    assert located(1, "loss", "loss", loss=loss)["offenders"][0]["flax"] == 9.0


def test_runs_that_agree_are_not_looked_into() -> None:
    nothing: Any = None
    runs = {name: made(name) for name in BACKENDS}
    assert locate.locate(None, runs, Config(), nothing, forbidden) is None


def test_a_late_loss_is_not_in_the_records_and_something_must_be_built() -> None:
    """The control of all these tests."""
    with pytest.raises(AssertionError, match="was built"):
        located(2, "loss", "loss")


# --- One step from the same state

CONFIGS = {
    "dampening": Config(
        lr=0.05,
        momentum=0.9,
        dampening=0.1,
        weight_decay=1e-3,
        schedule=Schedule("step", period=3, gamma=0.5),
    ),
    "nesterov": Config(
        lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3, schedule=Schedule("exponential")
    ),
}
MIDDLE = 7  # steps before the one that is looked at


class Step:
    """A batch in the middle of a run, and what both backends make of it from PyTorch's state."""

    def __init__(self, config: Config, digits: Dataset, build: Callable) -> None:
        self.config = replace(config, steps=20, batch_size=8).resolve(len(digits.train_images))
        self.digits = digits
        self.sides = {name: build(name, self.config) for name in BACKENDS}
        images = training.data.normalise(
            digits.train_images[: 8 * (MIDDLE + 1)], numpy_dtype("float64")
        )
        self.images = images.reshape(MIDDLE + 1, 8, 32, 32, 3)
        self.labels = digits.train_labels[: 8 * (MIDDLE + 1)].reshape(MIDDLE + 1, 8)
        reference = self.sides["torch"]
        self.state = reference.init(
            Snapshot.start(initial_weights(reference.shapes(), 0, "float64"))
        )
        for batch, truth in zip(self.images[:MIDDLE], self.labels[:MIDDLE], strict=True):
            self.state, _ = reference.train_step(self.state, batch, truth)
        self.snapshot = reference.export(self.state)

    def taken(self, name: str, snapshot: Snapshot | None = None, twin: int | None = None) -> Record:
        snapshot = self.snapshot if snapshot is None else snapshot
        batch = self.images[MIDDLE], self.labels[MIDDLE]
        return one_step(
            self.sides[name], self.config, self.digits, "float64", snapshot, *batch, twin=twin
        )


@pytest.fixture(scope="module", params=CONFIGS)
def middle(request: pytest.FixtureRequest, digits: Dataset, build: Callable) -> Step:
    return Step(CONFIGS[request.param], digits, build)


def failing(one: Record, other: Record) -> list[tuple[str, str]]:
    return [
        (rung.stage, rung.tensor)
        for rung in check_first_steps(Ensemble(one), Ensemble(other))
        if not rung.agrees
    ]


def test_both_backends_take_the_same_step_from_the_same_state_in_the_middle_of_a_run(
    middle: Step,
) -> None:
    assert middle.snapshot.step == MIDDLE and middle.snapshot.slots["momentum"]
    one, other = (middle.taken(name) for name in BACKENDS)
    assert failing(one, other) == []
    assert one.first_steps.keys() == other.first_steps.keys() and one.layers == other.layers
    assert {key.split("/")[1] for key in one.first_steps} == {
        "data",
        "forward",
        "loss",
        "backward",
        "update",
    }
    assert one.lr == other.lr != middle.config.lr  # the schedule has gone on, too
    shifted = middle.snapshot._replace(
        slots={
            "momentum": {n: (1 + 1e-9) * a for n, a in middle.snapshot.slots["momentum"].items()}
        }
    )
    parted = failing(one, middle.taken("flax", shifted))  # the control
    assert parted and {stage for stage, _ in parted} == {"update"}
    assert parted[0][1].startswith("momentum of ")


def test_a_step_from_the_start_is_another_one(middle: Step) -> None:
    """The control: momentum and schedule of the state are used."""
    start = Snapshot.start(middle.snapshot.parameters)
    found = middle.taken("flax", start)
    assert failing(middle.taken("torch", start), found) == []
    assert {stage for stage, _ in failing(middle.taken("torch"), found)} == {"update"}
    assert found.lr != middle.taken("torch").lr


def test_the_step_that_is_taken_is_the_one_that_the_run_takes(middle: Step) -> None:
    reference = middle.sides["torch"]
    state = reference.init(middle.snapshot)
    state, metrics = reference.train_step(state, middle.images[MIDDLE], middle.labels[MIDDLE])
    after = reference.export(state)
    found = middle.taken("torch")
    for name, array in after.parameters.items():
        assert np.array_equal(found.first_steps[f"0/update/{name}"], array)
        assert np.array_equal(
            found.first_steps[f"0/update/momentum of {name}"], after.slots["momentum"][name]
        )
        assert np.array_equal(found.weights[name], middle.snapshot.parameters[name])
    assert found.loss == [float(metrics.loss)]
    # And it leaves the state as it was.
    again = reference.export(middle.state)
    assert all(
        np.array_equal(again.parameters[name], array)
        for name, array in middle.snapshot.parameters.items()
    )


def test_a_twin_of_a_step_has_weights_momentum_and_images_within_one_ulp(middle: Step) -> None:
    def within(one: np.ndarray, other: np.ndarray) -> bool:
        return bool(
            np.all(
                (other == one) | (other == np.nextafter(one, 9)) | (other == np.nextafter(one, -9))
            )
        )

    run, first, second = (middle.taken("torch", twin=twin) for twin in (None, 1, 2))
    for twin in (first, second):
        assert all(within(run.weights[name], twin.weights[name]) for name in run.weights)
        assert within(run.first_steps["0/data/images"], twin.first_steps["0/data/images"])
        assert np.array_equal(run.first_steps["0/data/labels"], twin.first_steps["0/data/labels"])
    differing = {
        name
        for name in run.weights
        if not np.array_equal(first.weights[name], second.weights[name])
    }
    assert differing == set(run.weights)
    assert not np.array_equal(
        first.first_steps["0/data/images"], second.first_steps["0/data/images"]
    )
    again = middle.taken("torch", twin=1)
    assert all(
        np.array_equal(first.first_steps[key], again.first_steps[key]) for key in first.first_steps
    )
    alike = [middle.taken(name, twin=1) for name in BACKENDS]
    assert all(
        np.array_equal(alike[0].weights[name], alike[1].weights[name]) for name in run.weights
    )


# --- Replaying

LATE, LENGTH = 34, 38
RUN = Config(steps=LENGTH, batch_size=4, lr=0.02, momentum=0.9)

Update = Callable[[Any, Any, Any], Any]


def from_step(step: int, before: Update | None = None, after: Update | None = None) -> Callable:
    """An optimizer that from `step` on changes gradients before its update, or updates after it."""

    def wrap(optimizer: Any) -> Any:
        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            late = state["sgd"][1].count >= step
            if before is not None:
                updates = before(late, updates, params)
            updates, state = optimizer.update(updates, state, params, **extra)
            return (updates if after is None else after(late, updates, params)), state

        return optax.GradientTransformationExtraArgs(optimizer.init, update)

    return wrap


def decayed(late: Any, gradients: Any, params: Any) -> Any:
    """Weight decay that nobody asked for."""
    return {name: gradient + late * 0.01 * params[name] for name, gradient in gradients.items()}


def lengthened(late: Any, updates: Any, params: Any) -> Any:
    """A learning rate that `lr` does not show."""
    del params
    return {name: update * (1 + 0.01 * late) for name, update in updates.items()}


FAULTS = {
    "weight decay": (from_step(LATE, before=decayed), "momentum of conv1.bias"),
    "schedule": (from_step(LATE, after=lengthened), "conv1.bias"),
}


class Pair:
    """Both backends in one dtype, Flax at fault if so asked, and what comes of their runs."""

    def __init__(
        self, build: Callable, digits: Dataset, dtype: str, fault: Callable | None, twins: int = 0
    ) -> None:
        self.config, self.digits = RUN.resolve(len(digits.train_images)), digits
        self.sides = {name: build(name, self.config, dtype) for name in BACKENDS}
        if fault is not None:
            self.sides["flax"].optimizer = fault(self.sides["flax"].optimizer)
        members = {
            name: [
                training.train(side, self.config, digits, dtype, SilentObserver(), twin)
                for twin in (None, *range(1, twins + 1))
            ]
            for name, side in self.sides.items()
        }
        self.runs = {name: runs[0] for name, runs in members.items()}
        self.twins = {name: runs[1:] for name, runs in members.items()}
        ensembles = {name: Ensemble.of(runs) for name, runs in members.items()}
        self.comparison = compare(ensembles, digits.test_labels)
        self.lens: Any = self.comparison.to_json()
        self.first = self.comparison.first_divergence
        self.built: list[str] = []

    def build(self, name: str) -> Any:
        self.built.append(name)
        return self.sides[name]

    def locate(self, first: Divergence | None = None, twins: int = 2) -> dict[str, Any] | None:
        first = first or self.first
        location = locate.locate(first, self.runs, self.config, self.digits, self.build, twins)
        if location is None:
            return None
        found = location.to_json()
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        return found


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step to a call, so that one program is compiled for runs and replays."""
    monkeypatch.setattr(chunks, "CHUNK_STEPS", 1)


@pytest.mark.parametrize("fault", slow_except(FAULTS, "schedule"))
@pytest.mark.usefixtures("short_chunks")
def test_a_fault_that_starts_late_is_found_by_its_step_and_stage(
    fault: str, digits: Dataset, build: Callable
) -> None:
    wrong, tensor = FAULTS[fault]
    pair = Pair(build, digits, "float64", wrong)
    first = pair.lens["first_divergence"]
    # The runs part where the parameters of that step are first used, or kept.
    assert first["step"] == LATE + 1
    assert (first["stage"], first["tensor"]) == ("loss", "loss")
    found = pair.locate()
    assert found is not None
    assert (found["step"], found["stage"], found["tensor"]) == (LATE, "update", tensor)
    assert (
        found["how"] == f"replayed: both took step {LATE} from the state that torch had before it"
    )
    assert found["message"].startswith(f"update: step {LATE}: {tensor}: torch=")
    assert found["gap"] > found["bound"] and len(found["offenders"]) == N_WORST
    assert found["causes"]
    assert sorted(pair.built) == sorted(BACKENDS)
    # Asked for a later step, the replay still names the first that goes wrong.
    assert pair.first is not None
    again = pair.locate(replace(pair.first, step=LENGTH - 1))
    assert again is not None and again["step"] == LATE


@pytest.mark.usefixtures("short_chunks")
def test_without_a_fault_nothing_is_found_and_a_difference_that_grew_is_said_to_have_grown(
    digits: Dataset, build: Callable
) -> None:
    """The control of the test above."""
    pair = Pair(build, digits, "float64", None)
    assert pair.lens["verdict"] == "agree"
    assert pair.locate() is None and pair.built == []
    first = diverging(LATE, "loss", "loss")
    found = pair.locate(first)
    assert found is not None
    assert found == found | first.to_json()
    assert "built up over many steps" in found["how"]
    assert sorted(pair.built) == sorted(BACKENDS)


@pytest.mark.usefixtures("short_chunks")
def test_only_the_last_steps_before_the_parting_are_replayed(
    digits: Dataset, build: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong in every step would be found at the first that is replayed."""
    pair = Pair(build, digits, "float64", from_step(0, after=lengthened))
    assert pair.lens["first_divergence"]["step"] == 0
    replayed: list[int] = []

    def watched(
        backend: Any, config: Any, dataset: Any, dtype: str, snapshot: Snapshot, *rest: Any
    ) -> Record:
        replayed.append(snapshot.step)
        return one_step(backend, config, dataset, dtype, snapshot, *rest)

    monkeypatch.setattr(locate, "one_step", watched)
    first = diverging(LATE, "loss", "loss")
    found = pair.locate(first)
    assert found is not None and found["step"] == LATE - locate.REPLAY_STEPS
    assert set(replayed) == {LATE - locate.REPLAY_STEPS}


@pytest.mark.slow
@pytest.mark.usefixtures("short_chunks")
def test_in_a_production_lens_a_step_is_judged_by_twins_of_its_own(
    digits: Dataset, build: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate, "REPLAY_STEPS", 4)
    pair = Pair(
        build,
        digits,
        "float32",
        from_step(LATE, after=lambda *given: lengthened(100.0 * given[0], *given[1:])),
        1,
    )
    first = pair.first
    assert first is not None and first.step >= LATE
    found = pair.locate(replace(first, step=LATE + 2), twins=1)
    assert found is not None
    assert (found["step"], found["stage"], found["tensor"]) == (LATE, "update", "conv1.bias")
    clean = {name: build(name, pair.config, "float32") for name in BACKENDS}  # the control
    pair.sides = clean
    found = pair.locate(replace(first, step=LATE + 2), twins=1)
    assert found is not None and "built up over many steps" in found["how"]
