"""A record is read back bit by bit, or refused; a file is written whole, or not at all."""

from __future__ import annotations

import errno
import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from common import record as records
from common.errors import RecordError
from common.protocol import Arrays
from common.record import Record, file_stem, read, write, write_whole

SERIES = ("loss", "gradient_norm", "lr", "predictions")


def make(twin: int | None = None) -> Record:
    generator = np.random.default_rng(0)
    return Record(
        backend="torch",
        dtype="bfloat16",
        twin=twin,
        config={"lr": 0.1, "schedule": {"kind": "constant"}},
        data={"name": "猫\udce9", "digest": "d1", "classes": ["plane", "<b>"]},
        environment={"device": "cpu", "threads": 2},
        source="s1",
        loss=np.array([2.3, math.nan, math.inf]),
        gradient_norm=np.array([1.0, -0.0, 5e-324]),
        lr=np.full(3, 0.1),
        predictions=np.array([1, 0]),
        test_loss=math.nan,
        seconds=1.5,
        steps_per_second=2.0,
        weights={"conv1.kernel": generator.normal(size=(2, 1, 3, 2)).astype(ml_dtypes.bfloat16)},
        opening={
            "0/data/labels": np.array([3, 1]),
            "0/loss/loss": np.array(2.25, np.float32),  # of no dimension, as the backends give it
            "0/forward/logits": generator.normal(size=(2, 3)).T,  # in no C order
            "0/backward/nothing": np.zeros((0, 2)),
        },
        layers=["logits", "a, of no order"],
        along={"3/conv1.kernel": np.array([[1.0], [5e-324]]), "10/fc1.bias": np.array([-0.0], np.float32)},
        final={"conv1.kernel": np.array([math.nan, 1.0], ml_dtypes.bfloat16)},
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


@pytest.mark.parametrize("twin", [None, 1, 12])
def test_a_record_is_read_back_bit_by_bit(tmp_path: Path, twin: int | None) -> None:
    path = write(make(twin), tmp_path / "new" / "folders")
    assert path.name == f"{file_stem('torch', 'bfloat16', twin)}.safetensors"
    assert same(read(path), make(twin))


def test_the_comparison_of_records_that_this_file_uses_sees_one_bit() -> None:
    groups = {"weights": "conv1.kernel", "opening": "0/loss/loss", "along": "10/fc1.bias", "final": "conv1.kernel"}
    for group, name in groups.items():
        other = make()
        array = getattr(other, group)[name]
        array.flat[-1] = np.nextafter(array.flat[-1], np.asarray(9, array.dtype))
        assert not same(make(), other)


# The first 8 bytes are the header's length, then comes the header, then the arrays: all of them are drawn.
@settings(max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
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
    arrays = {name: np.ones(3) for name in SERIES} if arrays is None else arrays
    text = facts if isinstance(facts, str) else json.dumps(facts)
    return save(arrays, metadata={"facts": text, "digest": digest or records._digest(text, arrays)})


def facts(**changes: Any) -> dict[str, Any]:
    kept = {name: value for name, value in vars(make()).items() if not isinstance(value, np.ndarray)}
    kept = {name: value for name, value in kept.items() if name not in ("weights", "opening", "along", "final")}
    return {"schema": 1} | kept | changes


ONES = {name: np.ones(3) for name in SERIES}
FILES = {
    "empty": b"",
    "zeros": bytes(64),
    "text": b"not a record\n",
    "JSON": b'{"schema": 1}',
    "safetensors without metadata": save({"loss": np.ones(3)}),
    "safetensors with other metadata": save({"loss": np.ones(3)}, metadata={"format": "pt"}),
    "wrong digest": archive(facts(), digest="0" * 64),
    "facts that are no JSON": archive("{"),
    "facts that are a list": archive([]),
    "facts that are a string": archive('"abc"'),
    "facts that are a number": archive("1"),
    "facts that are null": archive("null"),
    "no schema": archive({}),
    "an older schema": archive(facts(schema=0)),
    "a newer schema": archive(facts(schema=2)),
    "a fact too few": archive({"schema": 1, "backend": "torch"}),
    "a fact too many": archive(facts(novelty=1)),
    "a series too few": archive(facts(), {"loss": np.ones(3)}),
    "a group that there is not": archive(facts(), ONES | {"novelty/x": np.ones(3)}),
    "a fact in place of a group": archive(facts(), ONES | {"backend/x": np.ones(3)}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_record_is_refused_in_one_line_that_names_the_remedy(name: str) -> None:
    with pytest.raises(RecordError, match=r"^the record .* (is|cannot be read).*: delete it and run") as caught:
        reread(FILES[name])
    assert "\n" not in str(caught.value)


def test_the_archive_that_these_refusals_vary_is_itself_a_record() -> None:
    assert reread(archive(facts())).backend == "torch"


def test_a_record_of_another_version_is_said_to_be_one() -> None:
    with pytest.raises(RecordError, match="another version"):
        reread(FILES["a newer schema"])


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(RecordError, match="cannot be read"):
            read(path)


# --- Writing


def test_writing_replaces_the_file_that_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        write_whole(tmp_path / "a.json", text)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": text}


def test_a_file_in_the_folders_place_is_an_error_and_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").write_bytes(b"precious")
    for path in (tmp_path / "folder" / "a.json", tmp_path / "folder" / "deeper" / "a.json"):
        with pytest.raises(RecordError, match=r"^cannot write .*: choose another folder with --out"):
            write_whole(path, b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"folder": b"precious"}


def test_a_folder_in_the_files_place_is_an_error_and_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(RecordError, match="cannot write"):
        write_whole(tmp_path / "a.json", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("before", [None, b"old"], ids=["no file before", "a file before"])
def test_a_write_that_fails_halfway_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, before: bytes | None
) -> None:
    path = tmp_path / "a.json"
    if before is not None:
        path.write_bytes(before)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records.os, call, full)
        with pytest.raises(RecordError, match=r"\(No space left on device\).* free some space$"):
            write_whole(path, b"new")
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == ({"a.json": before} if before else {})
    write_whole(path, b"new")  # the control: nothing else stood in its way
    assert path.read_bytes() == b"new"


def test_an_interrupt_halfway_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    path = write(make(), tmp_path)
    monkeypatch.setattr(records.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(make(), tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert same(read(path), make())
