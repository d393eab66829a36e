"""A user's own data: an archive or a folder of pictures."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lockstep.common import data
from lockstep.common.data import user_data
from tests.data.helpers import explode, refusal

pytestmark = pytest.mark.usefixtures("no_home_no_network")


# Archives


def arrays(**changes: Any) -> dict[str, Any]:
    """What a good archive holds, with changes; None leaves an array out."""
    made = {
        "x_train": np.full((6, 32, 32, 3), 7, np.uint8),
        "y_train": np.array([0, 1, 2, 0, 1, 2], np.int32),
        "x_test": np.full((2, 32, 32, 3), 9, np.uint8),
        "y_test": np.array([[0], [1]], np.uint8),
        **changes,
    }
    return {name: array for name, array in made.items() if array is not None}


@pytest.mark.parametrize(
    ("changes", "classes"),
    [
        pytest.param({}, ("0", "1", "2"), id="no class names"),
        pytest.param(
            {"classes": np.array(["a", "\x1b[31m\n", "c", "d"])},
            ("a", "\x1b[31m\n", "c", "d"),
            id="named",
        ),
        pytest.param(
            {"y_train": np.zeros(6, int), "y_test": np.zeros(2, int)},
            ("0", "1"),
            id="at least two classes",
        ),
    ],
)
def test_an_archive_is_loaded(
    tmp_path: Path, changes: dict[str, Any], classes: tuple[str, ...]
) -> None:
    np.savez_compressed(tmp_path / "some.npz", **arrays(**changes))
    dataset = data.load(str(tmp_path / "some.npz"))
    assert (dataset.name, dataset.classes) == ("some.npz", classes)
    assert dataset.train_images.shape == (6, 32, 32, 3)
    assert (dataset.test_labels.dtype, dataset.test_labels.shape) == (np.int64, (2,))


BAD_ARCHIVES: dict[str, tuple[dict[str, Any], str]] = {
    "no y_test": ({"y_test": None}, "has no y_test"),
    "float pixels": ({"x_train": np.zeros((6, 32, 32, 3), np.float32)}, "x_train is float32"),
    "28 by 28": ({"x_test": np.zeros((2, 28, 28, 3), np.uint8)}, "x_test is uint8"),
    "channels first": ({"x_test": np.zeros((2, 3, 32, 32), np.uint8)}, "x_test is uint8"),
    "float labels": ({"y_train": np.zeros(6)}, "y_train is float64"),
    "one-hot labels": ({"y_train": np.zeros((6, 3), int)}, "y_train is int64"),
    "a label too few": ({"y_train": np.zeros(5, int)}, "y_train is int64"),
    "a scalar label": ({"y_train": np.array(3)}, "y_train is int64"),
    "a negative label": ({"y_test": np.array([0, -1])}, "labels must lie between"),
    "a label without class": ({"classes": np.array(["a", "b"])}, "labels must lie between 0 and 1"),
    "a huge label": ({"y_test": np.array([0, 2**63], np.uint64)}, "labels must lie between"),
    "an empty split": (
        {"x_test": np.zeros((0, 32, 32, 3), np.uint8), "y_test": np.zeros(0, int)},
        "x_test is empty",
    ),
    "one class name": ({"classes": np.array(["a"])}, "classes must be"),
    "class names that are numbers": ({"classes": np.arange(3)}, "classes must be"),
    "pickled class names": ({"classes": np.array(["a", "b", "c"], object)}, "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD_ARCHIVES)
def test_a_bad_archive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    changes, expected = BAD_ARCHIVES[kind]
    np.savez(tmp_path / "bad\n.npz", **arrays(**changes))
    monkeypatch.setattr(pickle, "load", explode)
    message = refusal(tmp_path / "bad\n.npz")
    assert expected in message
    assert "bad\\n.npz" in message


@pytest.mark.parametrize(
    "kind", ["text", "empty", "truncated", "flipped", "npy", "pickle", "not arrays"]
)
def test_a_corrupt_archive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    good = tmp_path / "good.npz"
    np.savez(good, **arrays())
    content = bytearray(good.read_bytes())
    content[len(content) // 3] ^= 255
    bad = tmp_path / "bad.npz"
    if kind == "npy":
        with open(bad, "wb") as file:
            np.save(file, np.zeros(3))
    elif kind == "not arrays":
        import zipfile

        with zipfile.ZipFile(bad, "w") as members:
            for name in arrays():
                members.writestr(name, b"text")
    else:
        texts = {"text": b"x_train", "empty": b"", "pickle": pickle.dumps({"x_train": 1})}
        bad.write_bytes(
            {**texts, "truncated": good.read_bytes()[:-40], "flipped": bytes(content)}[kind]
        )
    monkeypatch.setattr(pickle, "load", explode)
    assert "bad.npz" in refusal(bad)
    assert len(data.load(str(good)).train_images) == 6


# Folders


def paint(
    file: Path, colour: tuple[int, int, int] = (200, 100, 50), size: tuple[int, int] = (40, 20)
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


def paint_classes(folder: Path, count: int = 6) -> None:
    for name in ("cat", "ant"):
        for index in range(count):
            paint(folder / name / f"{index}.png", (10 * index, 0, 255 * (name == "ant")))


def test_every_fifth_picture_of_a_folder_without_splits_is_for_testing(
    tmp_path: Path, lines: list[str]
) -> None:
    paint_classes(tmp_path / "pets", 10)
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("no picture")
    pets = data.load(str(tmp_path / "pets"), announce=lines.append)
    assert (pets.name, pets.classes) == ("pets", ("ant", "cat"))
    assert pets.train_labels.tolist() == [0] * 8 + [1] * 8
    assert pets.test_labels.tolist() == [0, 0, 1, 1]
    assert pets.test_images[:, 0, 0].tolist() == [
        [40, 0, 255],
        [90, 0, 255],
        [40, 0, 0],
        [90, 0, 0],
    ]
    assert pets.train_images.shape == (16, 32, 32, 3)
    assert len(lines) == 1
    assert "every fifth" in lines[0]


def test_the_folders_train_and_test_are_the_splits(tmp_path: Path, lines: list[str]) -> None:
    paint_classes(tmp_path / "train", 2)
    paint_classes(tmp_path / "test", 1)
    pets = data.load(str(tmp_path), announce=lines.append)
    assert pets.classes == ("ant", "cat")
    assert pets.train_labels.tolist() == [0, 0, 1, 1]
    assert pets.test_labels.tolist() == [0, 1]
    assert lines == []


def test_pictures_of_every_kind_are_converted_and_resized(tmp_path: Path) -> None:
    for suffix in user_data.IMAGE_SUFFIXES:
        paint(tmp_path / "a" / f"one{suffix.upper()}")
    palette = Image.new("P", (3, 3))
    palette.save(tmp_path / "a" / "palette.png", transparency=b"\x00\x80")
    paint(tmp_path / "b\x1b\n" / "one.png")
    images = data.load(str(tmp_path), announce=lambda line: None)
    assert images.classes == ("a", "b\x1b\n")
    assert len(images.train_images) + len(images.test_images) == len(user_data.IMAGE_SUFFIXES) + 2
    assert (np.abs(images.train_images[0, ..., :].astype(int) - (200, 100, 50)) < 4).all()


def not_a_picture(folder: Path) -> None:
    paint_classes(folder)
    (folder / "cat" / "3.png").write_bytes(b"GIF89a, or so")


def a_truncated_picture(folder: Path) -> None:
    paint_classes(folder)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(noise).save(folder / "cat" / "3.png")
    content = (folder / "cat" / "3.png").read_bytes()
    (folder / "cat" / "3.png").write_bytes(content[: len(content) // 2])


def a_postscript_picture(folder: Path) -> None:
    paint_classes(folder)
    Image.new("RGB", (8, 8)).save(folder / "cat" / "3.png", format="EPS")


def a_class_without_pictures(folder: Path) -> None:
    paint_classes(folder)
    (folder / "dog").mkdir()


def different_classes(folder: Path) -> None:
    paint_classes(folder / "train")
    paint_classes(folder / "test")
    paint(folder / "test" / "dog" / "0.png")


BAD_FOLDERS = {
    "no classes": (lambda folder: None, "0 class folders"),
    "one class": (lambda folder: paint(folder / "cat" / "0.png"), "1 class folders"),
    "no class in train": (
        lambda folder: [(folder / split).mkdir() for split in ("train", "test")],
        "0 class folders",
    ),
    "a class without pictures": (a_class_without_pictures, "/dog' has no pictures"),
    "classes that differ": (different_classes, "only one has 'dog'"),
    "too few pictures to test on": (
        lambda folder: paint_classes(folder, 4),
        "no class of five pictures",
    ),
    "not a picture": (not_a_picture, "cat/3.png' cannot be read"),
    "a truncated picture": (a_truncated_picture, "cat/3.png' cannot be read"),
    "another format than its name says": (a_postscript_picture, "cat/3.png' cannot be read"),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_bad_folder_is_refused(tmp_path: Path, kind: str) -> None:
    make, expected = BAD_FOLDERS[kind]
    folder = tmp_path / "set\n"
    folder.mkdir()
    make(folder)
    message = refusal(folder)
    assert expected in message
    assert "set\\n" in message


@pytest.mark.parametrize("factor", [1.5, 3], ids=["warning", "error"])
def test_a_decompression_bomb_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    paint_classes(tmp_path)
    data.load(str(tmp_path), announce=lambda line: None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(40 * 20 / factor))
    assert "ant/0.png' cannot be read" in refusal(tmp_path)


def test_a_folder_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", deny)
    assert "cannot be listed" in refusal(tmp_path)
