"""A disk that is full, fails, or cannot be written to: one line, status 2, and nothing that was
there is damaged."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep import cli as compare
from lockstep.common.errors import RecordError
from lockstep.common.runs import checkpoint, record
from lockstep.common.system import storage
from tests.conftest import draw_nothing
from tests.robustness import kills

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = [
    "--data", "digits", "--backend", "torch", "--dtype", "float64", "--steps", "8", "--batch-size", "128",
    "--checkpoint-every", "1", "--device", "cpu", "--quiet",
]  # fmt: skip
STEM = record.file_stem("torch", "float64")
CALLS = (
    "mkstemp",
    "write",
    "flush",
    "fsync",
    "chmod",
    "replace",
    "flush the folder",
)  # of `write_atomic`, in order
ERRORS = {
    errno.ENOSPC: "No space left on device",
    errno.EIO: "Input/output error",
    errno.EROFS: "Read-only file system",
}


def lockstep(*arguments: str | Path) -> int:
    return compare.main([str(argument) for argument in arguments])


class Disk:
    """Fails once, at one call for the file whose name begins so."""

    def __init__(self, name: str, call: str, error: int, times: int = 1) -> None:
        self.name, self.call, self.error, self.left = f".{name}", call, error, times
        self.writing, self.flushed = "", False

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for owner, name in (
            (tempfile, "mkstemp"),
            (os, "fsync"),
            (os, "chmod"),
            (os, "replace"),
            (os, "fdopen"),
        ):
            patch.setattr(owner, name, self._wrapped(name, getattr(owner, name)))

    def _wrapped(self, name: str, complete: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            what = name
            if name == "mkstemp":
                self.writing, self.flushed = str(options.get("prefix", "")), False
            elif name == "fsync":
                what, self.flushed = ("flush the folder" if self.flushed else "fsync"), True
            self.fail(what)
            made = complete(*arguments, **options)
            return File(made, self) if name == "fdopen" else made

        return call

    def fail(self, call: str) -> None:
        if self.left and call == self.call and self.writing.startswith(self.name):
            self.left -= 1
            raise OSError(self.error, os.strerror(self.error))


class File:
    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def write(self, content: bytes) -> None:
        half = len(content) // 2
        self.file.write(content[:half])
        self.disk.fail("write")
        self.file.write(content[half:])

    def flush(self) -> None:
        self.disk.fail("flush")
        self.file.flush()

    def fileno(self) -> int:
        return self.file.fileno()

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


# --- One file


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("before", [None, b"old"], ids=["no file before", "a file before"])
def test_a_write_that_fails_leaves_what_was_there_or_the_whole_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: int, before: bytes | None
) -> None:
    path = tmp_path / "a.json"
    if before is not None:
        path.write_bytes(before)
    with monkeypatch.context() as patch:
        (disk := Disk("a.json", call, error)).install(patch)
        with pytest.raises(RecordError) as caught:
            storage.write_atomic(path, b"new")
        assert disk.left == 0
    line = f"cannot write {path} ({ERRORS[error]}): choose another folder with --out or free some space"
    assert str(caught.value) == line
    content = {found.name: found.read_bytes() for found in tmp_path.iterdir()}
    if call == "flush the folder":  # it has its name, which a loss of power might take back
        assert content == {"a.json": b"new"}
    else:
        assert content == ({} if before is None else {"a.json": before})
    storage.write_atomic(path, b"new")  # the control: nothing else stood in its way
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_flush_folders_is_put_up_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    (disk := Disk("a.json", "flush the folder", error)).install(monkeypatch)
    storage.write_atomic(tmp_path / "a.json", b"new")
    assert disk.left == 0
    assert (tmp_path / "a.json").read_bytes() == b"new"


@pytest.mark.parametrize("call", ["mkdir", "TemporaryFile"])
def test_a_folder_that_cannot_be_claimed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(
        *((Path, "mkdir") if call == "mkdir" else (tempfile, "TemporaryFile")), refuse
    )
    with (
        pytest.raises(RecordError) as caught,
        storage.lock_folder(tmp_path / "new", "--tensorboard"),
    ):
        pass
    line = f"cannot write to {tmp_path / 'new'} (Read-only file system): choose another folder with --tensorboard"
    assert str(caught.value) == line


def test_a_system_without_locks_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import filelock

    def refuse(*_: object) -> None:
        raise NotImplementedError("no locks here")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with (
        pytest.raises(RecordError, match=r"\(no locks here\): choose another folder"),
        storage.lock_folder(tmp_path),
    ):
        pass


# --- A run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The record of the run whose disk did not fail."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        assert lockstep(*RUN, "--out", folder) == 0
    return kills.digests_in(folder)


def sane(folder: Path) -> list[str]:
    """The names in a folder, in which every file is whole."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != storage.LOCK]
    for path in paths:
        kills.whole(path)
    return sorted(path.name for path in paths)


def assert_one_line(capsys: pytest.CaptureFixture[str], name: str, said: str) -> None:
    captured = capsys.readouterr()
    assert captured.out.count("\n") <= 1
    assert captured.err.startswith("error: cannot ") and captured.err.count("\n") == 1
    assert name in captured.err and f"({said}): " in captured.err


@pytest.mark.parametrize("call", CALLS)
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_the_one_before(
    tmp_path: Path,
    whole: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: str,
) -> None:
    draw_nothing(monkeypatch)
    number = CALLS.index(call) % len(ERRORS)
    with monkeypatch.context() as patch:
        (disk := Disk(f"{STEM}-0000000004.", call, list(ERRORS)[number])).install(patch)
        assert lockstep(*RUN, "--out", tmp_path) == 2
        assert disk.left == 0
    assert_one_line(capsys, f"{STEM}-0000000004", list(ERRORS.values())[number])
    kept = [checkpoint.read(path).step for path in checkpoint.found(tmp_path, STEM)]
    assert kept == ([4, 2, 1] if call == "flush the folder" else [2, 1])
    sane(tmp_path)
    assert lockstep("--resume", tmp_path, "--quiet") == 0
    assert kills.digests_in(tmp_path) == whole


FILES = {  # the name of the file, at which call, and what is whole afterwards
    "run.json": ("mkstemp", []),
    f"{STEM}.safetensors": ("write", ["run.json"]),
    "report.json": ("fsync", ["run.json", f"{STEM}.safetensors"]),
    "report.html": ("write", ["report.json", f"{STEM}.safetensors"]),
    "losses.png": ("replace", ["report.json", f"{STEM}.safetensors", "report.html"]),
    "events.out.tfevents": ("write", ["report.json", f"{STEM}.safetensors"]),
}


@pytest.mark.parametrize("name", FILES)
def test_another_file_that_cannot_be_written_ends_the_run_in_one_line(
    tmp_path: Path,
    whole: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    call, there = FILES[name]
    options: list[str | Path] = []
    if name.startswith("events"):
        pytest.importorskip("tensorboard", reason="tensorboard is not installed")
        options = ["--tensorboard", tmp_path / "events"]
    if name not in ("losses.png", "report.html"):
        draw_nothing(monkeypatch)
    with monkeypatch.context() as patch:
        (disk := Disk(name, call, errno.ENOSPC)).install(patch)
        assert lockstep(*RUN, "--out", tmp_path / "run", *options) == 2
        assert disk.left == 0
    assert_one_line(capsys, name, "No space left on device")
    names = sane(tmp_path / "run")
    assert set(there) <= set(names) and name not in names
    draw_nothing(monkeypatch)
    again = (
        ["--resume", tmp_path / "run", "--quiet", *options]
        if names
        else [*RUN, "--out", tmp_path / "run"]
    )
    assert lockstep(*again) == 0
    assert kills.digests_in(tmp_path / "run") == whole


def after_the_second_checkpoint(patch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    complete, calls = checkpoint.write, []

    def write(*arguments: Any) -> Path:
        made = complete(*arguments)
        calls.append(made)
        if len(calls) == 2:
            act()
        return made

    patch.setattr(checkpoint, "write", write)


def test_a_limit_on_the_size_of_files_is_one_line(
    tmp_path: Path,
    whole: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    resource = pytest.importorskip("resource", reason="no such limits here")
    draw_nothing(monkeypatch)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            limit = (100_000, before[1])
            after_the_second_checkpoint(
                patch, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            )
            assert lockstep(*RUN, "--out", tmp_path) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_line(capsys, f"{STEM}-0000000004", "File too large")
    sane(tmp_path)
    assert [checkpoint.read(path).step for path in checkpoint.found(tmp_path, STEM)] == [2, 1]
    assert lockstep("--resume", tmp_path, "--quiet") == 0
    assert kills.digests_in(tmp_path) == whole


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_becomes_read_only_is_one_line(
    tmp_path: Path,
    whole: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw_nothing(monkeypatch)
    folder = tmp_path / checkpoint.FOLDER
    try:
        with monkeypatch.context() as patch:
            after_the_second_checkpoint(patch, lambda: folder.chmod(0o500))
            assert lockstep(*RUN, "--out", tmp_path) == 2
    finally:
        folder.chmod(0o700)
    assert_one_line(capsys, f"{STEM}-0000000004", "Permission denied")
    assert lockstep("--resume", tmp_path, "--quiet") == 0
    assert kills.digests_in(tmp_path) == whole


# --- A small disk, in a name space of its own


@pytest.fixture
def unshared() -> Iterator[list[str]]:
    """The command that gives a process mounts of its own."""
    command = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    with tempfile.TemporaryDirectory() as folder:
        trial = [*command, "mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]
        tried = subprocess.run(trial, capture_output=True, text=True, timeout=60)
    if tried.returncode:
        pytest.skip(f"mounting is not allowed here: {tried.stderr.strip()}")
    yield command


@pytest.mark.slow
def test_a_small_disk_and_one_that_becomes_read_only_are_one_line_each(
    tmp_path: Path, whole: dict[str, str], unshared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    from lockstep.common.runs.checkpoint import CheckpointManager

    draw_nothing(monkeypatch)
    sizes: list[int] = []
    complete = CheckpointManager.save

    def save(self: CheckpointManager, found: Any) -> None:
        complete(self, found)
        assert self.last_path is not None
        sizes.append(self.last_path.stat().st_size)

    monkeypatch.setattr(CheckpointManager, "save", save)
    assert lockstep(*RUN, "--out", tmp_path / "measured") == 0
    room = sum(sizes[:2]) + sizes[2] // 2  # for two checkpoints and a half
    (tmp_path / "disk").mkdir()
    command = [*unshared, sys.executable, "-m", "tests.system.small_disk"]
    command += [str(tmp_path / "disk"), str(room), json.dumps(RUN), str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {name: found[name] for name in ("full", "full, resumed", "read-only", "read-only, resumed")} == {
        "full": 2, "full, resumed": 0, "read-only": 2, "read-only, resumed": 0,
    }  # fmt: skip
    checkpoints = [f"{STEM}-{step:010d}.safetensors" for step in (1, 2)]
    assert found["left"] == found["read-only, kept"] == ["run.json", *checkpoints]
    assert found["full, bits"] == found["read-only, bits"] == whole
    full, read_only = done.stderr.strip().splitlines()
    assert full.startswith("error: cannot write") and "(No space left on device)" in full
    assert read_only.startswith("error: cannot write") and "(Read-only file system)" in read_only


@pytest.mark.slow
@pytest.mark.parametrize(("size", "status"), [("40k", 2), ("10m", 0)])
def test_recordings_that_fill_a_disk_are_one_line(
    size: str, status: int, tmp_path: Path, unshared: list[str]
) -> None:
    disk, script = tmp_path / "disk", REPOSITORY / "tests" / "scripts" / "mlp_torch.py"
    disk.mkdir()
    check = [sys.executable, str(REPOSITORY / "compare.py"), "check", str(script), str(script)]
    check += ["--precision", "float64", "--steps", "3", "--quiet", "--out", str(disk / "out")]
    mount = f"mount -t tmpfs -o size={size} none {disk} && " + '"$@"'
    ran = subprocess.run(
        [*unshared, "sh", "-c", mount, "sh", *check], capture_output=True, text=True
    )
    assert ran.returncode == status, ran.stderr
    lines = ran.stderr.splitlines()
    assert len(lines) == (1 if status else 0), ran.stderr
    assert not status or "(No space left on device): choose another folder with --out" in lines[0]
