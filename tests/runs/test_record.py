"""A record is read back bit by bit, or refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from lockstep.common.config import Config
from lockstep.common.errors import RecordError
from lockstep.common.protocol import Arrays
from lockstep.common.runs.record import SCHEMA, Record, file_name, file_stem, read, write
from lockstep.common.system import storage

SERIES = ("loss", "gradient_norm", "lr", "batch_digests", "predictions")
GROUPS = ("weights", "first_steps", "parameter_history", "final")


def make(twin: int | None = None) -> Record:
    generator = np.random.default_rng(0)
    return Record(
        backend="torch",
        dtype="bfloat16",
        twin=twin,
        config=Config(steps=3).resolve(8).to_json(),
        data={
            "name": "猫\udce9",
            "digest": "d1",
            "order": "o1",
            "sizes": {"train": 8, "test": 2},
            "classes": ["plane", "<b>"],
        },
        environment={"device": "cpu", "threads": 2},
        source="s1",
        loss=np.array([2.3, math.inf, math.nan]),
        gradient_norm=np.array([5e-324, math.nan, math.nan]),
        lr=np.array([0.1, 0.1, math.nan]),
        batch_digests=np.array([7, -3, 0]),
        predictions=np.array([1, 0]),
        test_loss=math.nan,
        seconds=1.5,
        steps_per_second=2.0,
        weights={
            "conv1.kernel": generator.normal(size=(2, 1, 3, 2)).astype(ml_dtypes.bfloat16),
            "conv1.bias": np.array([-0.0, 1.0], ml_dtypes.bfloat16),
        },
        first_steps={
            "0/data/labels": np.array([3, 1]),
            "0/loss/loss": np.array(2.25, np.float32),  # of no dimension, as the backends give it
            "0/forward/logits": generator.normal(size=(2, 3)).T,  # in no C order
            "0/forward/a, of no order": np.zeros(1),
            "0/backward/nothing": np.zeros((0, 2)),
        },
        layers=["logits", "a, of no order"],
        parameter_history={
            "1/conv1.kernel": generator.normal(size=(2, 1, 3, 2)).astype(ml_dtypes.bfloat16),
            "1/conv1.bias": np.array([-0.0, 9e-39], ml_dtypes.bfloat16),
        },
        final={
            "conv1.kernel": np.full((2, 1, 3, 2), math.nan, ml_dtypes.bfloat16),
            "conv1.bias": np.array([math.inf, 1.0], ml_dtypes.bfloat16),
        },
        nonfinite_step=1,
        segments=[{"backend": "torch", "stop": 1}],
    )


def same(one: Any, other: Any) -> bool:
    """Equal to the bit: dtypes, shapes, the sign of zero; nan is nan."""
    if isinstance(one, Record) and isinstance(other, Record):
        return same(vars(one), vars(other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    return type(one) is type(other) and (one == other or (one != one and other != other))


@functools.cache
def content() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write(make(), Path(folder)).read_bytes()


def reread(content: bytes) -> Record:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        path.write_bytes(content)
        return read(path)


# --- Reading


@pytest.mark.parametrize("twin", [None, 0, 1, 12])
def test_a_record_is_read_back_bit_by_bit(tmp_path: Path, twin: int | None) -> None:
    path = write(make(twin), tmp_path / "new" / "folders")
    assert path.name == f"{file_stem('torch', 'bfloat16', twin)}.safetensors"
    assert same(read(path), make(twin))


def test_the_comparison_of_records_that_this_file_uses_sees_one_bit() -> None:
    groups = {
        "weights": "conv1.kernel",
        "first_steps": "0/loss/loss",
        "parameter_history": "1/conv1.bias",
        "final": "conv1.bias",
    }
    for group, name in groups.items():
        other = make()
        array = getattr(other, group)[name]
        array.flat[-1] = np.nextafter(array.flat[-1], np.asarray(9, array.dtype))
        assert not same(make(), other)


# The first 8 bytes are the header's length, then comes the header, then the arrays: all of them are
# drawn.
@settings(
    max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
@given(position=st.integers(0, len(content()) - 1), change=st.integers(1, 255))
def test_a_changed_byte_anywhere_is_noticed(position: int, change: int) -> None:
    damaged = bytearray(content())
    damaged[position] ^= change
    try:
        found = reread(bytes(damaged))
    except RecordError as error:
        assert "\n" not in str(error)
        assert "delete it and run that backend again" in str(error)
    else:  # JSON has room for a byte that means the same, such as a tab for a space in the header's padding
        assert same(found, make())


@settings(max_examples=100, deadline=None, database=None)
@given(length=st.integers(0, len(content()) - 1))
def test_a_file_cut_off_anywhere_is_refused(length: int) -> None:
    with pytest.raises(RecordError, match="cannot be read"):
        reread(content()[:length])


def test_a_file_with_something_after_its_end_is_refused() -> None:
    with pytest.raises(RecordError, match="cannot be read"):
        reread(content() + b"\0")


def archive(facts: Any, arrays: Arrays | None = None, digest: str | None = None) -> bytes:
    """A safetensors file whose digest is right, whatever it holds."""
    arrays = tensors() if arrays is None else arrays
    arrays = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    text = facts if isinstance(facts, str) else json.dumps(facts)
    return save(arrays, metadata={"facts": text, "digest": digest or storage._digest(text, arrays)})


def facts(**changes: Any) -> dict[str, Any]:
    kept = {
        file_name(name): value
        for name, value in vars(make()).items()
        if name not in SERIES + GROUPS
    }
    return {"schema": SCHEMA} | kept | changes


def tensors(**changes: Any) -> Arrays:
    """All arrays of the record, with changes: slashes are written as two underscores; None leaves
    an array out."""
    whole = make()
    arrays: dict[str, Any] = {name: getattr(whole, name) for name in SERIES}
    for group in GROUPS:
        arrays |= {
            f"{file_name(group)}/{name}": array for name, array in getattr(whole, group).items()
        }
    arrays |= {name.replace("__", "/"): array for name, array in changes.items()}
    return {name: array for name, array in arrays.items() if array is not None}


ONE = {"loss": np.ones(3)}
FILES = {
    "empty": b"",
    "zeros": bytes(64),
    "text": b"not a record\n",
    "JSON": b'{"schema": 1}',
    "safetensors without metadata": save(ONE),
    "safetensors with other metadata": save(ONE, metadata={"format": "pt"}),
    "wrong digest": archive(facts(), digest="0" * 64),
    "facts that are no JSON": archive("{"),
    "facts that are a list": archive([]),
    "facts that are a string": archive('"abc"'),
    "facts that are a number": archive("1"),
    "facts that are null": archive("null"),
    "facts that are nested deeply": archive("[" * 100_000),
    "no schema": archive({}),
    "an older schema": archive(facts(schema=SCHEMA - 1)),
    "a newer schema": archive(facts(schema=SCHEMA + 1)),
    "a fact too few": archive({"schema": SCHEMA, "backend": "torch"}),
    "a fact too many": archive(facts(novelty=1)),
    "a series too few": archive(facts(), ONE),
    "a group that there is not": archive(facts(), tensors(novelty__x=np.ones(3))),
    "a fact in place of a group": archive(facts(), tensors(backend__x=np.ones(3))),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_record_is_refused_in_one_line_that_names_the_remedy(name: str) -> None:
    with pytest.raises(
        RecordError, match=r"^the record .* (is|cannot be (read|used)).*: delete it and run"
    ) as caught:
        reread(FILES[name])
    assert str(caught.value).isprintable()


def test_the_archive_that_these_refusals_vary_is_itself_a_record() -> None:
    assert reread(archive(facts())).backend == "torch"


def test_a_record_of_another_version_is_said_to_be_one() -> None:
    with pytest.raises(RecordError, match="another version"):
        reread(FILES["a newer schema"])


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(RecordError, match="there is no record"):
            read(path)


# --- What a digest cannot know: whether what was written is a record


def config(**changes: Any) -> dict[str, Any]:
    return make().config | changes


def data(**changes: Any) -> dict[str, Any]:
    return make().data | changes


BFLOAT16 = ml_dtypes.bfloat16
UNFIT: dict[
    str, tuple[dict[str, Any], dict[str, Any], str]
] = {  # changed facts, changed arrays, what is said
    "another backend": ({"backend": "caffe"}, {}, "backend"),
    "a folder above as backend": ({"backend": "../../flax"}, {}, "backend"),
    "a dtype that there is not": ({"dtype": "float8"}, {}, "dtype"),
    "a dtype with a path": ({"dtype": "../float64"}, {}, "dtype"),
    "a twin with a path": ({"twin": "/../1"}, {}, "twin"),
    "a twin that is no number": ({"twin": True}, {}, "twin"),
    "a negative twin": ({"twin": -1}, {}, "twin"),
    "a config that is a list": ({"config": []}, {}, "ConfigError"),
    "a config that is no run's": ({"config": config(lr=-1.0)}, {}, "ConfigError"),
    "a config of text": ({"config": config(lr="0.1")}, {}, "ConfigError"),
    "a config of no steps": ({"config": config(steps=None)}, {}, "config"),
    "a config of more steps": ({"config": config(steps=4)}, {}, "loss"),
    "data without classes": ({"data": {"name": "x"}}, {}, "data"),
    "data of one class": ({"data": data(classes=["cat"])}, {}, "data"),
    "classes that are numbers": ({"data": data(classes=[1, 2])}, {}, "data"),
    "sizes that are text": ({"data": data(sizes={"train": "8", "test": 2})}, {}, "data"),
    "more test images": ({"data": data(sizes={"train": 8, "test": 3})}, {}, "predictions"),
    "an environment that is a list": ({"environment": []}, {}, "environment"),
    "a source that is null": ({"source": None}, {}, "source"),
    "negative seconds": ({"seconds": -1.0}, {}, "times"),
    "endless seconds": ({"seconds": math.inf}, {}, "times"),
    "a speed that is text": ({"steps_per_second": "fast"}, {}, "times"),
    "layers that are a string": ({"layers": "conv1"}, {}, "layers"),
    "layers that are numbers": ({"layers": [1]}, {}, "layers"),
    "broken at a step that it has not": ({"broken": 3}, {}, "nonfinite_step"),
    "broken, and nothing is": ({}, {"loss": np.ones(3)}, "loss, not finite"),
    "not broken, and something is": (
        {"broken": None, "legs": [{"backend": "torch", "stop": 3}]},
        {},
        "loss, not finite",
    ),
    "NaN before it broke": ({"broken": 2, "legs": []}, {}, "loss, not finite"),
    "numbers after it broke": ({}, {"loss": np.array([2.0, math.inf, 2.0])}, "loss, not finite"),
    "a rate that is NaN": ({}, {"lr": np.array([math.nan, 0.1, 0.1])}, "lr, not finite"),
    "a negative norm": ({}, {"gradient_norm": np.array([-1.0, 1.0, 1.0])}, "gradient_norm"),
    "legs of another backend": ({"legs": [{"backend": "caffe", "stop": 1}]}, {}, "segments"),
    "legs beyond the run": ({"legs": [{"backend": "torch", "stop": 4}]}, {}, "segments"),
    "legs that go back": (
        {"legs": [{"backend": "torch", "stop": 2}, {"backend": "flax", "stop": 1}]},
        {},
        "segments",
    ),
    "differences of ranks that are text": ({"rank_differences": "all"}, {}, "rank_differences"),
    "a difference of a rank without a gap": (
        {"rank_differences": [{"step": 0, "rank": 1, "tensor": "a", "gap": -1.0}]},
        {},
        "rank_differences",
    ),
    "legs that are text": ({"legs": "torch"}, {}, "segments"),
    "a loss in float32": ({}, {"loss": make().loss.astype(np.float32)}, "loss"),
    "a loss of two dimensions": ({}, {"loss": make().loss[np.newaxis]}, "loss"),
    "a rate too few": ({}, {"lr": np.ones(2)}, "lr"),
    "a digest too few": ({}, {"batch_digests": np.ones(2, np.int64)}, "batch_digests"),
    "digests that are no integers": ({}, {"batch_digests": np.ones(3)}, "batch_digests"),
    "a norm too many": ({}, {"gradient_norm": np.ones(4)}, "gradient_norm"),
    "a test loss that is null": ({"test_loss": None}, {}, "test_loss"),
    "predictions in float64": ({}, {"predictions": np.array([1.0, 0.0])}, "predictions"),
    "a prediction of no class": ({}, {"predictions": np.array([2, 0])}, "predictions"),
    "a prediction below zero": ({}, {"predictions": np.array([-1, 0])}, "predictions"),
    "no weights": ({}, {"weights__conv1.kernel": None, "weights__conv1.bias": None}, "weights"),
    "weights of another precision": ({}, {"weights__conv1.bias": np.ones(2)}, "weights"),
    "weights that are not finite": (
        {},
        {"weights__conv1.bias": np.array([math.nan, 1.0], BFLOAT16)},
        "weights, not",
    ),
    "a final parameter too few": ({}, {"final__conv1.bias": None}, "final"),
    "a final parameter of another shape": (
        {},
        {"final__conv1.bias": np.ones(3, BFLOAT16)},
        "final",
    ),
    "a first step without tensors": (
        {},
        dict.fromkeys(["opening__" + n.replace("/", "__") for n in make().first_steps]),
        "first_steps",
    ),
    "a tensor of a step that is not recorded": (
        {},
        {"opening__2__data__labels": np.ones(2)},
        "first_steps",
    ),
    "a tensor of a stage that there is not": (
        {},
        {"opening__0__magic__x": np.ones(2)},
        "first_steps",
    ),
    "a tensor of nothing": ({}, {"opening__0": np.ones(2)}, "ValueError"),
    "a tensor of truth values": ({}, {"opening__0__data__labels": np.ones(2, bool)}, "first_steps"),
    "an activation too few": ({}, {"opening__0__forward__logits": None}, "layers, of"),
    "an activation too many": ({}, {"opening__0__forward__x": np.ones(2)}, "layers, of"),
    "a parameter after no step": ({}, {"along__0__conv1.bias": np.ones(2, BFLOAT16)}, "ValueError"),
    "a parameter after the run": ({}, {"along__4__conv1.bias": np.ones(2, BFLOAT16)}, "ValueError"),
    "a parameter after some step": (
        {},
        {"along__x__conv1.bias": np.ones(2, BFLOAT16)},
        "ValueError",
    ),
    "a parameter missing on the way": ({}, {"along__1__conv1.bias": None}, "parameter_history"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_no_record_is_refused_though_its_digest_is_right(name: str) -> None:
    changed_facts, changed_arrays, said = UNFIT[name]
    content = archive(facts(**changed_facts), tensors(**changed_arrays))
    with pytest.raises(
        RecordError, match=rf"cannot be used \({said}.*\): delete it and run"
    ) as caught:
        reread(content)
    assert str(caught.value).isprintable()


FIT: dict[str, Callable[[], Record]] = {
    "broken at once": lambda: dataclasses.replace(
        make(),
        nonfinite_step=0,
        segments=[],
        loss=np.full(3, math.nan),
        lr=np.array([0.1, math.nan, math.nan]),
    ),
    "nothing broken": lambda: dataclasses.replace(
        make(),
        nonfinite_step=None,
        segments=[{"backend": "flax", "stop": 2}, {"backend": "torch", "stop": 3}],
        loss=np.ones(3),
        gradient_norm=np.array([0.0, math.inf, math.nan]),  # the next loss would have shown it
        lr=np.zeros(3),
    ),
    "no speed": lambda: dataclasses.replace(make(), steps_per_second=math.nan),
    "nothing along the run": lambda: dataclasses.replace(make(), parameter_history={}),
}


@pytest.mark.parametrize("name", FIT)
def test_an_unusual_record_is_read_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    assert same(read(write(FIT[name](), tmp_path)), FIT[name]())
