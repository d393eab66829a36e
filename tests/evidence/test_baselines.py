"""The rules that others use: each passes what it should, alarms just outside its bound, and is what
its source is."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.utils import same

from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.dtypes import numpy_dtype
from lockstep.common.evidence import NullProgress, baselines, torch_closeness
from lockstep.common.evidence.baselines import RULES, TORCH_TOLERANCES
from lockstep.common.protocol import Arrays
from lockstep.common.runs import training
from lockstep.common.runs.record import Record

NAMES = [rule.name for rule in RULES]
SAYS = {rule.name: rule.differs for rule in RULES}
STEPS = 60
TORCH_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def make(backend: str = "torch", dtype: str = "float32", **changes: Any) -> Record:
    values = np.random.default_rng(1)

    def cast(array: np.ndarray) -> np.ndarray:
        return array.astype(numpy_dtype(dtype))

    shapes = {"conv1.kernel": (5, 5, 3, 2), "fc1.bias": (4,)}
    first_steps: Arrays = {}
    for step in range(2):
        first_steps[f"{step}/data/images"] = cast(values.normal(size=(4, 2, 2, 3)))
        first_steps[f"{step}/forward/conv1"] = cast(values.normal(size=(4, 2, 2, 2)))
        first_steps[f"{step}/forward/logits"] = cast(values.normal(size=(4, 5)))
        first_steps[f"{step}/loss/loss"] = cast(np.array(2.5))
        for name, shape in shapes.items():
            for tensor in (f"backward/{name}", f"update/{name}", f"update/momentum of {name}"):
                first_steps[f"{step}/{tensor}"] = cast(values.normal(size=shape))
    record = Record(
        backend=backend,
        dtype=dtype,
        twin=None,
        config=Config(steps=STEPS).resolve(160).to_json(),  # batch 4: 40 steps to the epoch
        data={
            "name": "made",
            "digest": "d",
            "order": "o",
            "sizes": {"train": 160},
            "classes": ["a", "b"],
        },
        environment={},
        source="s",
        loss=np.linspace(2.5, 1.5, STEPS).astype(np.float32).astype(np.float64),
        gradient_norm=np.linspace(3.0, 1.0, STEPS),
        lr=np.full(STEPS, 0.1),
        batch_digests=np.arange(1, STEPS + 1),
        predictions=np.zeros(10, np.int64),
        test_loss=1.5,
        seconds=1.0,
        steps_per_second=60.0,
        weights={},
        first_steps=first_steps,
        final={name: cast(values.uniform(0.5, 1, shape)) for name, shape in shapes.items()},
    )
    return dataclasses.replace(record, **changes)


def exact(**changes: Any) -> Record:
    """A float64 record whose first steps are `make`'s except for float32's rounding."""
    return make(dtype="float64", **changes)


def added(group: str, name: str, amount: Any, place: Any = ...) -> Callable[[Record], Record]:
    """A record with `amount` added to one tensor or series, at `place`."""

    def change(record: Record) -> Record:
        if group == "series":
            array = getattr(record, name)
            changed = np.array(array, np.float64)
            changed[place] += amount
            return dataclasses.replace(
                record, **{name: changed if np.ndim(array) else float(changed)}
            )
        arrays = dict(getattr(record, group))
        changed = arrays[name].astype(np.float64)
        changed[place] += amount
        arrays[name] = changed.astype(arrays[name].dtype)
        return dataclasses.replace(record, **{group: arrays})

    return change


def steered(name: str, factor: float) -> Callable[[Record], Record]:
    return lambda record: dataclasses.replace(record, **{name: getattr(record, name) * factor})


KERNEL = (0, 0, 0, 0)
# By rule: a change it must pass over, and one just outside its bound. Losses are near 2.5 at the
# start, 1.5 at the end.
EDGES: dict[str, tuple[Callable[[Record], Record], Callable[[Record], Record]]] = {
    "assert_close, losses": (
        added("series", "loss", 1.1e-5, -1),
        added("series", "loss", 1.3e-5, -1),
    ),
    "assert_close, weights": (
        added("final", "conv1.kernel", 1.0e-5, KERNEL),
        added("final", "conv1.kernel", 1.2e-5, KERNEL),
    ),
    "allclose, losses": (added("series", "loss", 1.4e-5, -1), added("series", "loss", 1.6e-5, -1)),
    "allclose, weights": (
        added("final", "conv1.kernel", 4e-6, KERNEL),
        added("final", "conv1.kernel", 1.2e-5, KERNEL),
    ),
    "transformers": (
        added("first_steps", "0/forward/conv1", 0.9e-5, KERNEL),
        added("first_steps", "0/forward/conv1", 1.1e-5),
    ),
    "reprod_log, losses": (
        added("series", "loss", 0.9e-6 * STEPS, 3),
        added("series", "loss", 1.1e-6),
    ),
    "reprod_log, ten steps": (
        added("series", "loss", 0.9e-6, 9),
        added("series", "loss", 1.1e-6, 9),
    ),
    "Keras numerical_test": (added("series", "loss", 0.9e-3), added("series", "loss", 1.1e-3)),
    "AlgoPerf, last step": (steered("loss", 1.99), steered("loss", 2.01)),
    "AlgoPerf, ten steps": (steered("loss", 1.0049), steered("loss", 1.0051)),
    "msprobe": (steered("loss", 1.0099), steered("loss", 1.0101)),
    "TorchDynamo RMSE": (
        added("first_steps", "0/backward/conv1.kernel", 0.9e-4),
        added("first_steps", "0/backward/conv1.kernel", 0.9e-2),
    ),
}
# More that the same rules look at, each just outside.
OUTSIDE = [
    ("transformers", added("first_steps", "0/forward/logits", -1.1e-5)),
    ("reprod_log, ten steps", added("first_steps", "1/backward/fc1.bias", 1.1e-6)),
    ("Keras numerical_test", added("final", "fc1.bias", -1.1e-3)),
    ("Keras numerical_test", added("series", "test_loss", 1.1e-3)),
    ("AlgoPerf, last step", steered("gradient_norm", 2.01)),
    ("AlgoPerf, last step", steered("test_loss", 2.01)),
    ("AlgoPerf, ten steps", steered("gradient_norm", 0.994)),
    ("msprobe", added("series", "loss", 0.026, 0)),  # of 2.5, at the first step only
    ("TorchDynamo RMSE", added("first_steps", "0/forward/logits", 3e-3)),
    ("TorchDynamo RMSE", added("first_steps", "0/loss/loss", 3e-3)),
    ("TorchDynamo RMSE", added("first_steps", "0/update/fc1.bias", 3e-3)),
]
# What the rules do not look at.
INSIDE = [
    ("transformers", added("first_steps", "1/forward/logits", 1.0)),
    ("reprod_log, ten steps", added("series", "loss", 1.0, 10)),
    ("AlgoPerf, last step", added("series", "loss", 9.0, -2)),
    ("AlgoPerf, ten steps", added("series", "loss", 9.0, 10)),
    ("TorchDynamo RMSE", added("first_steps", "0/update/momentum of fc1.bias", 1.0)),
    (
        "Keras numerical_test",
        added("series", "loss", 0.9e-3 * 40, 5),
    ),  # one step of the 40 of an epoch
]


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("rule", NAMES)
def test_no_rule_alarms_on_identical_records(rule: str, dtype: str) -> None:
    assert SAYS[rule](make("torch", dtype), make("flax", dtype), exact()) is False


def test_every_rule_has_its_edges_and_no_name_is_used_twice() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert set(EDGES) == set(NAMES)
    assert all(rule.what and rule.source for rule in RULES)


@pytest.mark.parametrize("rule", NAMES)
def test_each_rule_passes_what_is_just_inside_its_bound_and_alarms_just_outside(rule: str) -> None:
    inside, outside = EDGES[rule]
    assert SAYS[rule](make(), inside(make("flax")), exact()) is False
    assert SAYS[rule](make(), outside(make("flax")), exact()) is True


@pytest.mark.parametrize(("rule", "change"), OUTSIDE, ids=[name for name, _ in OUTSIDE])
def test_each_rule_looks_at_all_that_its_source_looks_at(
    rule: str, change: Callable[[Record], Record]
) -> None:
    assert SAYS[rule](make(), change(make("flax")), exact()) is True


@pytest.mark.parametrize(("rule", "change"), INSIDE, ids=[name for name, _ in INSIDE])
def test_no_rule_looks_at_more_than_its_source_looks_at(
    rule: str, change: Callable[[Record], Record]
) -> None:
    assert SAYS[rule](make(), change(make("flax")), exact()) is False


@pytest.mark.parametrize("rule", NAMES)
def test_a_missing_step_or_another_shape_is_an_alarm(rule: str) -> None:
    def cut(arrays: Arrays) -> Arrays:
        return {name: a[:-1] if a.ndim else a for name, a in arrays.items()}

    flax = make("flax")
    short = {name: getattr(flax, name)[:-1] for name in ("loss", "gradient_norm", "lr")}
    if rule == "AlgoPerf, ten steps" or rule == "reprod_log, ten steps":
        short = {name: getattr(flax, name)[:9] for name in short}
    broken = dataclasses.replace(
        flax, **short, first_steps=cut(flax.first_steps), final=cut(flax.final)
    )
    assert SAYS[rule](make(), broken, exact()) is True


@pytest.mark.parametrize("rule", NAMES)
def test_a_loss_and_tensors_that_are_not_finite_on_one_side_are_alarms_where_the_source_has_them_so(
    rule: str,
) -> None:
    flax = make("flax")
    for name in ("loss", "gradient_norm", "test_loss"):
        flax = steered(name, np.nan)(flax)
    broken = {
        k: a * a.dtype.type(np.nan) if a.dtype.kind == "f" else a
        for k, a in flax.first_steps.items()
    }
    flax = dataclasses.replace(
        flax, first_steps=broken, final={k: a * np.float32(np.nan) for k, a in flax.final.items()}
    )
    lenient = (
        rule.startswith("reprod_log") or rule == "transformers"
    )  # `mean > bound` and "NaN is set to 0"
    assert SAYS[rule](make(), flax, exact()) is not lenient


@pytest.mark.parametrize("rule", NAMES)
def test_infinite_values_on_one_side_are_an_alarm(rule: str) -> None:
    flax = make("flax")
    for name in ("loss", "gradient_norm", "test_loss"):
        flax = steered(name, np.inf)(flax)
    broken = {
        k: np.full_like(a, np.inf) if a.dtype.kind == "f" else a
        for k, a in flax.first_steps.items()
    }
    flax = dataclasses.replace(
        flax, first_steps=broken, final={k: np.full_like(a, np.inf) for k, a in flax.final.items()}
    )
    assert SAYS[rule](make(), flax, exact()) is True


def test_nan_on_both_sides_passes_where_the_source_has_nan_equal_nan_only() -> None:
    torch_run, flax = (steered("loss", np.nan)(make(name)) for name in ("torch", "flax"))
    assert SAYS["Keras numerical_test"](torch_run, flax, None) is False
    assert SAYS["msprobe"](torch_run, flax, None) is False  # no more of them than the other has
    assert SAYS["msprobe"](torch_run, make("flax"), None) is False
    for rule in (
        "assert_close, losses",
        "allclose, losses",
        "AlgoPerf, last step",
        "AlgoPerf, ten steps",
    ):
        assert SAYS[rule](torch_run, flax, None) is True


def test_a_rule_without_anything_to_look_at_says_nothing() -> None:
    one, other = (make(name, first_steps={}, final={}) for name in ("torch", "flax"))
    for rule in ("assert_close, weights", "allclose, weights", "transformers", "TorchDynamo RMSE"):
        assert SAYS[rule](one, other, exact()) is None
    assert SAYS["TorchDynamo RMSE"](make(), make("flax"), None) is None
    assert SAYS["TorchDynamo RMSE"](make(), make("flax"), make()) is None, (
        "float32 is no reference for float32"
    )
    assert set(baselines.verdicts(one, other)) == set(NAMES)


def test_the_tolerances_of_assert_close_are_those_of_the_lens() -> None:
    for dtype, inside, outside in (("float64", 1.3e-7, 1.7e-7), ("bfloat16", 1.5e-2, 1.7e-2)):
        one, other = make("torch", dtype), make("flax", dtype)
        assert SAYS["assert_close, losses"](one, steered("loss", 1 + inside)(other), None) is False
        assert SAYS["assert_close, losses"](one, steered("loss", 1 + outside)(other), None) is True


def test_keras_weighs_a_smaller_last_batch_by_its_images() -> None:
    config = Config(steps=50, batch_size=4).resolve(158).to_json()  # 39 batches of 4 and one of 2
    one, other = (
        make(name, config=config, data={"sizes": {"train": 158}}, loss=np.ones(50))
        for name in ("torch", "flax")
    )
    amount = 1e-3 * 158 / 2
    assert (
        SAYS["Keras numerical_test"](one, added("series", "loss", 0.99 * amount, 39)(other), None)
        is False
    )
    assert (
        SAYS["Keras numerical_test"](one, added("series", "loss", 1.01 * amount, 39)(other), None)
        is True
    )


# --- Against the true functions


def tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.tensor(array.astype(np.float64)).to(TORCH_DTYPES[dtype])


def near(
    seed: int, size: int, dtype: str, rtol: float, atol: float, spread: float
) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays whose differences are about at the tolerance."""
    generator = np.random.default_rng(seed)
    expected = generator.normal(size=size) * 10.0 ** generator.integers(-6, 3, size)
    sign = generator.choice([-1, 1], size)
    actual = expected + sign * (atol + rtol * np.abs(expected)) * (
        1 + spread * generator.normal(size=size)
    )
    special = generator.random(size) < 0.02
    actual = np.where(special, generator.choice([np.nan, np.inf, -np.inf, 0.0], size), actual)
    expected = np.where(special & (generator.random(size) < 0.5), actual, expected)
    return actual.astype(numpy_dtype(dtype)), expected.astype(numpy_dtype(dtype))


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1e-9, 1e-7, 1e-2]))
@settings(max_examples=25, deadline=None)
def test_isclose_is_torchs_to_the_last_bit(dtype: str, seed: int, spread: float) -> None:
    for rtol, atol in (TORCH_TOLERANCES[dtype], (1e-4, 1e-4), (4e-2, 4e-2)):
        actual, expected = near(seed, 2000, dtype, rtol, atol, spread)
        true = torch.isclose(
            tensor(actual, dtype), tensor(expected, dtype), rtol=rtol, atol=atol
        ).numpy()
        np.testing.assert_array_equal(torch_closeness.isclose(actual, expected, rtol, atol), true)


def raises(check: Callable[[], Any]) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1e-7, 1e-2]))
@settings(max_examples=40, deadline=None)
def test_assert_close_on_weights_is_torchs(dtype: str, seed: int, spread: float) -> None:
    actual, expected = near(seed, 1, dtype, *TORCH_TOLERANCES[dtype], spread)
    said = SAYS["assert_close, weights"](
        make(final={"a": expected}, dtype=dtype), make(final={"a": actual}, dtype=dtype), None
    )
    assert said == raises(
        lambda: torch.testing.assert_close(tensor(actual, dtype), tensor(expected, dtype))
    )


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1e-7, 1e-2]))
@settings(max_examples=40, deadline=None)
def test_assert_close_on_losses_is_torchs(dtype: str, seed: int, spread: float) -> None:
    actual, expected = (
        a.astype(np.float64) for a in near(seed, 1, dtype, *TORCH_TOLERANCES[dtype], spread)
    )
    said = SAYS["assert_close, losses"](
        make(dtype=dtype, loss=expected), make(dtype=dtype, loss=actual), None
    )
    assert said == raises(
        lambda: torch.testing.assert_close(tensor(actual, dtype), tensor(expected, dtype))
    )


@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1e-7, 1e-2]))
@settings(max_examples=40, deadline=None)
def test_allclose_is_numpys(seed: int, spread: float) -> None:
    actual, expected = near(seed, 1, "float64", 1e-5, 1e-8, spread)
    said = SAYS["allclose, losses"](make(loss=expected), make(loss=actual), None)
    assert said is not np.allclose(actual, expected)


def raises_keras(actual: np.ndarray, expected: np.ndarray) -> bool:
    return raises(lambda: np.testing.assert_allclose(actual, expected, atol=1e-3))


@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([1e-7, 1e-2]))
@settings(max_examples=40, deadline=None)
def test_keras_rule_is_numpys_assert_allclose_with_its_atol(seed: int, spread: float) -> None:
    actual, expected = near(seed, 1, "float32", 1e-7, 1e-3, spread)
    said = SAYS["Keras numerical_test"](
        make(final={"a": expected}), make(final={"a": actual}), None
    )
    assert said == raises_keras(actual.astype(np.float64), expected.astype(np.float64))


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1, 10, 999, 1000, 3000]),
    ratio=st.floats(0.5, 5),
    noise=st.sampled_from([1e-6, 1e-4, 1e-2]),
    broken=st.sampled_from(["", "", "", "ref", "res", "both"]),
)
@settings(max_examples=60, deadline=None)
def test_same_is_dynamos(
    dtype: str, seed: int, size: int, ratio: float, noise: float, broken: str
) -> None:
    generator = np.random.default_rng(seed)
    fp64 = generator.normal(size=size)
    ref, res = (fp64 + noise * scale * generator.normal(size=size) for scale in (1, ratio))
    if broken in ("ref", "both"):
        ref[0] = np.nan
    if broken in ("res", "both"):
        res[0] = np.nan
    ref, res = ref.astype(numpy_dtype(dtype)), res.astype(numpy_dtype(dtype))
    logging.disable(logging.ERROR)
    try:
        true = same(tensor(ref, dtype), tensor(res, dtype), torch.tensor(fp64))
    finally:
        logging.disable(logging.NOTSET)
    assert torch_closeness.same(ref, res, fp64) == true


@pytest.mark.parametrize(
    ("ratio", "shape"), [(2.5, (1, 1, 50, 40)), (2.5, (5, 5, 20, 4)), (3.5, (1, 1, 50, 40))]
)
def test_same_is_dynamos_on_the_kernels_of_1x1_convolutions(
    ratio: float, shape: tuple[int, ...]
) -> None:
    generator = np.random.default_rng(0)
    fp64 = generator.normal(size=shape)
    noise = generator.choice([-1e-2, 1e-2], shape)
    ref, res = (fp64 + noise).astype(np.float32), (fp64 + ratio * noise).astype(np.float32)
    layout = (3, 2, 0, 1)  # HWIO to PyTorch's OIHW
    tensors = [torch.tensor(array.transpose(layout)) for array in (ref, res, fp64)]
    true = same(tensors[0], tensors[1], tensors[2])
    assert (
        torch_closeness.same(ref, res, fp64, pointwise=shape[:2] == (1, 1))
        == true
        == (ratio < 3 and shape[0] == 1)
    )


def test_another_dtype_is_not_the_same() -> None:
    array = np.ones(3, np.float32)
    assert not torch_closeness.same(
        array, array.astype(ml_dtypes.bfloat16), array.astype(np.float64)
    )


# --- The float64 reference


def test_the_reference_of_a_float64_run_is_the_run_itself_and_that_of_a_float32_run_is_near_it(
    digits: Dataset, build: Callable
) -> None:
    config = Config(steps=2, batch_size=16, lr=0.1, momentum=0.9).resolve(len(digits.train_images))
    backends = {dtype: build("torch", config, dtype) for dtype in ("float64", "float32")}
    runs = {
        dtype: training.train(b, config, digits, dtype, NullProgress())
        for dtype, b in backends.items()
    }
    mine = baselines.reference(runs["float64"], backends["float64"])
    keys = [
        key for key in runs["float64"].first_steps if key.startswith("0/") and "momentum" not in key
    ]
    assert sorted(mine.first_steps) == sorted(keys)
    for key in keys:
        np.testing.assert_array_equal(mine.first_steps[key], runs["float64"].first_steps[key])

    other = baselines.reference(runs["float32"], backends["float64"])
    assert other.dtype == "float64"
    for key in keys:
        assert other.first_steps[key].shape == runs["float32"].first_steps[key].shape
        np.testing.assert_allclose(
            other.first_steps[key], runs["float32"].first_steps[key], rtol=1e-3, atol=1e-5
        )
    assert SAYS["TorchDynamo RMSE"](runs["float32"], runs["float32"], other) is False
    # The control: the rounding of the weights is in the run's own float64 twin, and not in the
    # reference.
    assert np.any(
        other.first_steps["0/forward/logits"] != runs["float64"].first_steps["0/forward/logits"]
    )
