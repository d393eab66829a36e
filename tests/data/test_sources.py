"""Where data come from: CIFAR-10 on disk, downloaded, or the digits in its place."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.common import data
from lockstep.common.data import cifar10, sources
from tests.data.helpers import explode, refusal
from tests.marks import slow_except

pytestmark = pytest.mark.usefixtures("no_home_no_network")
GENUINE = Path(os.environ.get("LOCKSTEP_DATA") or "absent")
needs_cifar10 = pytest.mark.skipif(
    not (GENUINE / cifar10.CIFAR10_FOLDER).is_dir(), reason="needs CIFAR-10: set LOCKSTEP_DATA"
)


@pytest.mark.parametrize("choice", ["cifar100", "", "absent.npz", "new\nline", "x" * 5000])
def test_a_path_that_does_not_exist_is_refused_with_the_choices(choice: str) -> None:
    assert sources.CHOICES in refusal(choice)


def test_a_file_that_is_no_archive_is_refused_with_the_choices(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2")
    assert sources.CHOICES in refusal(tmp_path / "data.csv")


# CIFAR-10


@needs_cifar10
@pytest.mark.parametrize("how", ["data_dir", "environment", "cache"])
def test_genuine_cifar10_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "lockstep").symlink_to(GENUINE if how == "cache" else tmp_path)
    monkeypatch.setenv("LOCKSTEP_DATA", str(GENUINE if how == "environment" else tmp_path))
    loaded = data.load("auto", GENUINE if how == "data_dir" else None)
    assert (loaded.name, loaded.classes) == ("cifar10", cifar10.CIFAR10_CLASSES)
    assert (loaded.train_images.shape, loaded.test_images.shape) == (
        (50_000, 32, 32, 3),
        (10_000, 32, 32, 3),
    )
    assert loaded.train_images.dtype == loaded.test_images.dtype == np.uint8
    assert loaded.train_labels.dtype == loaded.test_labels.dtype == np.int64
    assert np.bincount(loaded.train_labels).tolist() == [5000] * 10
    assert np.bincount(loaded.test_labels).tolist() == [1000] * 10
    assert loaded.train_images[0, 0, 0].tolist() == [59, 62, 63]  # a frog; NHWC, red first
    assert loaded.classes[loaded.train_labels[0]] == "frog"


@needs_cifar10
@pytest.mark.slow
def test_genuine_cifar10_is_what_torchvision_reads() -> None:
    from torchvision.datasets import CIFAR10

    cifar10 = data.load("cifar10", GENUINE)
    for train, images, labels in (
        (True, cifar10.train_images, cifar10.train_labels),
        (False, cifar10.test_images, cifar10.test_labels),
    ):
        theirs = CIFAR10(GENUINE, train=train)
        np.testing.assert_array_equal(images, theirs.data)
        assert labels.tolist() == theirs.targets
        assert images.flags.c_contiguous


def test_the_checksums_are_torchvisions() -> None:
    from torchvision.datasets import CIFAR10

    meta = [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]
    theirs = [*CIFAR10.train_list, *CIFAR10.test_list, meta]
    assert [[*item] for item in cifar10.CIFAR10_FILES.items()] == theirs


@needs_cifar10
@pytest.mark.parametrize("choice", ["auto", "cifar10"])
@pytest.mark.parametrize(
    "name", slow_except(["data_batch_3", "test_batch", "batches.meta"], "batches.meta")
)
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_cifar10_is_refused_and_not_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, name: str, choice: str
) -> None:
    folder = tmp_path / cifar10.CIFAR10_FOLDER
    folder.mkdir()
    for file in (GENUINE / cifar10.CIFAR10_FOLDER).iterdir():
        if file.name != name:
            (folder / file.name).symlink_to(file)
    content = bytearray((GENUINE / cifar10.CIFAR10_FOLDER / name).read_bytes())
    content[-2] ^= 1
    if damage != "missing":
        (folder / name).write_bytes(content if damage == "altered" else content[:-100])
    monkeypatch.setattr(pickle, "load", explode)
    message = refusal(choice, tmp_path)
    assert repr(str(folder / name)) in message
    assert cifar10.HINT in message
    with pytest.raises(
        AssertionError, match="unpickled"
    ):  # the control: undamaged files do reach pickle
        data.load(choice, GENUINE)


def test_a_data_dir_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refusal("auto", tmp_path / "absent\n")


def test_without_a_network_auto_falls_back_to_digits_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setenv("LOCKSTEP_OFFLINE", "0")
    monkeypatch.setattr(cifar10, "CIFAR10_URL", "http://127.0.0.1:1/cifar")
    assert data.load("auto", tmp_path, announce=lines.append).name == "digits"
    assert len(lines) == 1
    assert all(
        text in lines[0] for text in ("digits", "refused", "--data-dir", cifar10.CIFAR10_FOLDER)
    )
    assert lines[0].isprintable()
    assert "--data digits" in refusal("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_offline_no_download_is_tried(monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    monkeypatch.setattr(cifar10.urllib.request, "urlopen", explode)
    assert data.load("auto", announce=lines.append).name == "digits"
    assert "LOCKSTEP_OFFLINE" in lines[0]
    assert "LOCKSTEP_OFFLINE" in refusal("cifar10")
    monkeypatch.delenv("LOCKSTEP_OFFLINE")
    with pytest.raises(AssertionError):
        data.load("auto")


# Downloads, from a server of our own


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`serve(body, length, pause)` answers from now on, with a pause before each thousand bytes."""
    answer: dict[str, Any] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["status"])
            if answer["length"] is not None:
                self.send_header("Content-Length", str(answer["length"]))
            self.end_headers()
            for start in range(0, len(answer["body"]), 1000 if answer["pause"] else 1 << 20):
                time.sleep(answer["pause"])
                try:
                    self.wfile.write(
                        answer["body"][start : start + (1000 if answer["pause"] else 1 << 20)]
                    )
                except OSError:
                    return

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.delenv("LOCKSTEP_OFFLINE")
    monkeypatch.setattr(
        cifar10, "CIFAR10_URL", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz"
    )

    def set_answer(
        body: bytes, length: int | None = None, pause: float = 0.0, status: int = 200
    ) -> None:
        answer.update(body=body, length=length, pause=pause, status=status)

    yield set_answer
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small archive of the genuine one's form, two images to a batch."""
    folder = tmp_path_factory.mktemp("made") / cifar10.CIFAR10_FOLDER
    folder.mkdir()
    for name in [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]:
        batch = {"data": np.full((2, 3072), 3, np.uint8), "labels": [4, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with tarfile.open(folder.parent / "made.tar.gz", "w:gz") as tar:
        tar.add(folder, cifar10.CIFAR10_FOLDER)
    return (folder.parent / "made.tar.gz").read_bytes()


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def accept(archive: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Lockstep and torchvision take `archive` for the genuine one."""
    import io

    from torchvision.datasets import CIFAR10

    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    sums = {
        file.name: md5(file.read_bytes()) for file in (folder / cifar10.CIFAR10_FOLDER).iterdir()
    }
    assert sums.keys() == cifar10.CIFAR10_FILES.keys()
    for name, md5_sum in sums.items():
        monkeypatch.setitem(cifar10.CIFAR10_FILES, name, md5_sum)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    train = [[name, sums[name]] for name, _ in CIFAR10.train_list]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})


def test_what_is_unpickled_are_the_bytes_that_were_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: bytes
) -> None:
    """Whoever changes a file after its check changes nothing."""
    from torchvision.datasets import CIFAR10

    accept(archive, tmp_path, monkeypatch)
    genuine, batch = pickle.load, tmp_path / cifar10.CIFAR10_FOLDER / "test_batch"

    def load_after_a_change(*arguments: Any, **options: Any) -> Any:
        batch.write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 0]}))
        return genuine(*arguments, **options)

    checked = batch.read_bytes()
    monkeypatch.setattr(pickle, "load", load_after_a_change)
    loaded = data.load("cifar10", tmp_path)
    assert loaded.test_labels.tolist() == [4, 9]
    assert (loaded.test_images == 3).all()
    batch.write_bytes(
        checked
    )  # the control: torchvision checks a file, and opens it again after that
    assert CIFAR10(tmp_path, train=False).targets == [0, 0]


@pytest.mark.parametrize("announced", [True, False], ids=["with its length", "without its length"])
def test_a_download_is_unpacked_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Any, archive: bytes, announced: bool
) -> None:
    accept(archive, tmp_path / "made", monkeypatch)
    serve(archive, len(archive) if announced else None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    first = data.load("auto", announce=explode)
    assert (first.name, first.train_labels.tolist()) == ("cifar10", [4, 9] * 5)
    assert os.listdir(tmp_path / "new" / "lockstep") == [cifar10.CIFAR10_FOLDER]
    monkeypatch.setenv("LOCKSTEP_OFFLINE", "1")
    assert data.load("cifar10").digest == first.digest


@pytest.mark.parametrize("choice", ["auto", "cifar10"])
def test_a_download_with_a_wrong_checksum_is_refused_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Any, archive: bytes, choice: str
) -> None:
    serve(archive, len(archive))
    monkeypatch.setattr(pickle, "load", explode)
    assert "checksum" in refusal(choice, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "limits", "reason"),
    [
        pytest.param({"length": 10**6}, {}, "closed after", id="the connection closes early"),
        pytest.param({"status": 404}, {}, "404", id="not there"),
        pytest.param({"pause": 0.4}, {"SOCKET_SECONDS": 0.1}, "timed out", id="silence"),
        pytest.param({"pause": 0.1}, {"DOWNLOAD_SECONDS": 0.15}, "not done after", id="too slow"),
    ],
)
def test_a_download_that_breaks_off_counts_as_no_network(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    serve: Any,
    lines: list[str],
    answer: dict[str, Any],
    limits: dict[str, float],
    reason: str,
) -> None:
    serve(b"x" * 4000, **{"length": 4000, **answer})
    for name, value in limits.items():
        monkeypatch.setattr(cifar10, name, value)
    assert data.load("auto", tmp_path, announce=lines.append, progress=False).name == "digits"
    assert len(lines) == 1
    assert reason in lines[0]
    assert reason in refusal("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_is_an_error_that_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Any, archive: bytes
) -> None:
    serve(archive, len(archive))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    (tmp_path / "a file").write_text("")
    assert "cannot be written to" in refusal("auto")
    full = Path("/dev/full")
    if full.exists():
        monkeypatch.setattr(cifar10, "open", lambda path, mode: full.open(mode), raising=False)
        message = refusal("cifar10", tmp_path)
        assert "No space left" in message
        assert "cannot be written to" in message
        assert [file.name for file in tmp_path.iterdir()] == ["a file"]
