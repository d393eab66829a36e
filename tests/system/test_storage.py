"""A file is written whole, or not at all, and checked before it is used; a folder has one run at a
time."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from lockstep.common.errors import RecordError
from lockstep.common.protocol import Arrays
from lockstep.common.system import storage
from lockstep.common.system.storage import (
    TEMP_SUFFIX,
    lock_folder,
    read_tensors,
    write_atomic,
    write_tensors,
)

FACTS = {"schema": 1, "name": "猫\udce9", "numbers": [1, 2.5]}
ARRAYS: Arrays = {
    "a/of no dimension": np.array(2.25, np.float32),
    "in no C order": np.arange(6.0).reshape(2, 3).T,
    "empty": np.zeros((0, 2)),
    "small": np.array([-0.0, 5e-324]),
    "bfloat16": np.array([np.nan, 1.5], ml_dtypes.bfloat16),
}


# --- Writing


def test_writing_replaces_the_file_that_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        write_atomic(tmp_path / "a.json", text)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": text}


def test_a_file_in_the_folders_place_is_an_error_and_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").write_bytes(b"precious")
    for path in (tmp_path / "folder" / "a.json", tmp_path / "folder" / "deeper" / "a.json"):
        with pytest.raises(
            RecordError, match=r"^cannot write .*: choose another folder with --out"
        ):
            write_atomic(path, b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"folder": b"precious"}


def test_a_folder_in_the_files_place_is_an_error_and_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(RecordError, match="cannot write"):
        write_atomic(tmp_path / "a.json", b"new")
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
        patch.setattr(storage.os, call, full)
        with pytest.raises(RecordError, match=r"\(No space left on device\).* free some space$"):
            write_atomic(path, b"new")
    assert {found.name: found.read_bytes() for found in tmp_path.iterdir()} == (
        {"a.json": before} if before else {}
    )
    write_atomic(path, b"new")  # the control: nothing else stood in its way
    assert path.read_bytes() == b"new"


def test_an_interrupt_halfway_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    write_atomic(tmp_path / "a.json", b"old")
    monkeypatch.setattr(storage.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a.json", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": b"old"}


# --- Tensors


def read(path: Path) -> tuple[dict, Arrays]:
    return read_tensors(path, 1, "record", "delete it")


def test_facts_and_arrays_are_read_back_bit_by_bit(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", FACTS, ARRAYS)
    facts, arrays = read(tmp_path / "a")
    assert facts | {"schema": 1} == FACTS
    assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in ARRAYS.items()
    }


def signed(text: str, arrays: Arrays) -> bytes:
    """A file whose digest is right, whatever it holds."""
    return save(arrays, metadata={"facts": text, "digest": storage._digest(text, arrays)})


@pytest.mark.parametrize("name", list(ARRAYS))
def test_the_digest_is_of_every_array(name: str, tmp_path: Path) -> None:
    plain = {key: np.asarray(array, order="C") for key, array in ARRAYS.items()}
    array = plain[name]
    others: list[Arrays] = [{key: array for key, array in plain.items() if key != name}]
    others += [plain | {name: array[np.newaxis]}, plain | {name: array.astype(np.float16)}]
    if plain[name].size:
        changed = plain[name].copy()
        changed.reshape(-1)[-1] = np.nextafter(
            changed.reshape(-1)[-1], np.asarray(9, changed.dtype)
        )
        others.append(plain | {name: changed})
    for other in others:
        assert (
            storage._digest("x", other)
            != storage._digest("x", plain)
            != storage._digest("y", plain)
        )
    (tmp_path / "a").write_bytes(signed(json.dumps(FACTS), plain))
    read(tmp_path / "a")  # the control


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def an_endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_huge_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def a_huge_header(path: Path) -> None:
    with path.open("wb") as file:
        file.write((2**27).to_bytes(8, "little") + b"{" + b" " * 100)
        file.truncate(2**28)


def deep_facts(path: Path) -> None:
    path.write_bytes(signed("[" * 100_000, {"a": np.zeros(1)}))


def an_endless_number(path: Path) -> None:
    path.write_bytes(signed(f'{{"schema": {"9" * 5000}}}', {"a": np.zeros(1)}))


HOSTILE: list[tuple[Callable[[Path], None], str]] = [
    (a_pipe, "there is no record"),
    (a_link_to_itself, "there is no record"),
    (an_endless_device, "there is no record"),
    (a_huge_file, "larger than the limit"),
    (a_huge_header, "a header of"),
    (deep_facts, "RecursionError"),
    (an_endless_number, "ValueError"),
]


@pytest.mark.parametrize(("make", "said"), HOSTILE, ids=[make.__name__ for make, _ in HOSTILE])
def test_what_is_no_file_or_claims_too_much_is_refused_at_once(
    make: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    make(tmp_path / "a")
    with pytest.raises(RecordError, match=said) as caught:
        read(tmp_path / "a")
    assert str(caught.value).isprintable() and str(caught.value).endswith(": delete it")


# --- Folders


def test_a_folder_that_is_claimed_cannot_be_claimed_again(tmp_path: Path) -> None:
    with (
        lock_folder(tmp_path / "new"),
        pytest.raises(RecordError, match=r"another run is writing to .* with --out"),
        lock_folder(tmp_path / "new"),
    ):
        pytest.fail("it was claimed twice")
    with lock_folder(tmp_path / "new"):
        pass  # the control: it is free again


def test_what_was_left_half_written_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    own = f".a.json.abcd1234{TEMP_SUFFIX}"  # as `write_atomic` calls it
    others = {f".mine.txt{TEMP_SUFFIX}", f"mine{TEMP_SUFFIX}", ".hidden", "a.json"}
    for name in (own, f"deeper/{own}", *others):
        (tmp_path / name).touch()
    with lock_folder(tmp_path):
        left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == others | {storage.LOCK}


def test_a_file_in_the_place_of_a_run_is_an_error_that_names_the_option(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"precious")
    with (
        pytest.raises(RecordError, match=r"cannot write to .* with --somewhere"),
        lock_folder(tmp_path / "taken", "--somewhere"),
    ):
        pytest.fail("it was claimed")
    assert (tmp_path / "taken").read_bytes() == b"precious"
