"""Data sets, their normalisation, and the order of the batches."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.data import cifar10, dataset, sources, user_data
from lockstep.common.errors import DataError

GENUINE = Path(os.environ.get("LOCKSTEP_DATA") or "absent")
needs_cifar10 = pytest.mark.skipif(
    not (GENUINE / cifar10.CIFAR10_FOLDER).is_dir(), reason="needs CIFAR-10: set LOCKSTEP_DATA"
)


@pytest.fixture(autouse=True)
def no_home_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.delenv("LOCKSTEP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("LOCKSTEP_OFFLINE", "1")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def lines() -> list[str]:
    return []


def refusal(choice: str | Path, data_dir: Path | None = None) -> str:
    """The message of the DataError that loading must end in, which must be one printable line."""
    with pytest.raises(DataError) as caught:
        data.load(str(choice), data_dir, announce=lambda line: None, progress=False)
    assert str(caught.value).isprintable()
    return str(caught.value)


def explode(*_: Any, **__: Any) -> Any:
    raise AssertionError("something was unpickled")


# Normalisation


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, ml_dtypes.bfloat16], ids=["float64", "float32", "bfloat16"]
)
def test_normalisation_is_the_float64_formula_rounded_once(dtype: Any) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(2, 4, 32)
    got = data.normalise(pixels, dtype)
    assert (got.dtype, got.shape) == (np.dtype(dtype), pixels.shape)
    np.testing.assert_array_equal(
        got, ((pixels.astype(np.float64) / 255 - 0.5) / 0.5).astype(dtype)
    )
    wrong = (pixels.astype(np.float64) / 256 - 0.5) / 0.5
    assert (got != wrong.astype(dtype)).any()


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, ml_dtypes.bfloat16], ids=["float64", "float32", "bfloat16"]
)
@pytest.mark.parametrize("count", [0, 1, 2 * dataset._BLOCK, 2 * dataset._BLOCK + 7])
def test_normalisation_gives_a_pixel_the_same_bits_wherever_it_stands(
    dtype: Any, count: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3), np.uint8)
    bits = f"u{np.dtype(dtype).itemsize}"
    expected = data.normalise(np.arange(256, dtype=np.uint8), dtype)[pixels].view(bits)
    for images, values in ((pixels, expected), (pixels.T[::-1], expected.T[::-1])):
        got = data.normalise(images, dtype)
        assert got.shape == images.shape
        np.testing.assert_array_equal(got.view(bits), values)


def test_bfloat16_normalisation_is_the_nearest_bfloat16_to_the_exact_value() -> None:
    positive = (
        np.arange(0x4000, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
    )  # all below 2
    grid = np.concatenate([-positive, positive])
    for pixel, got in enumerate(
        data.normalise(np.arange(256, dtype=np.uint8), ml_dtypes.bfloat16).astype(np.float64)
    ):
        exact = Fraction(2 * pixel - 255, 255)
        near = grid[np.abs(grid - float(exact)) < 0.02]
        assert abs(Fraction(got) - exact) == min(abs(Fraction(value) - exact) for value in near)


def test_normalisation_is_the_tutorials_transform() -> None:
    from torchvision import transforms

    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
    )
    theirs: Any = transform(Image.fromarray(pixels))
    theirs = theirs.numpy().transpose(1, 2, 0)
    # The tutorial divides in float32 and then subtracts 0.5, which cancels, so its error is one of
    # 0.5 to 1 and is doubled: half an ulp of 1 (6.0e-08) measured. Dividing by 256 is off by
    # 7.8e-03.
    gap = np.abs(theirs - data.normalise(pixels, np.dtype(np.float32))).max()
    assert gap <= np.finfo(np.float32).eps
    assert np.abs(theirs - (pixels / 256 - 0.5) / 0.5).max() > 1e-3


# Order


def test_every_epoch_has_its_own_permutation() -> None:
    first, second = data.permutation(0, 0, 100), data.permutation(0, 1, 100)
    for order in (first, second):
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(100))
    assert (first != second).any()


def test_the_permutation_is_a_pure_function_of_seed_and_epoch() -> None:
    first = data.permutation(7, 3, 50)
    np.random.default_rng(1).random(10)
    np.testing.assert_array_equal(first, data.permutation(7, 3, 50))
    assert (first != data.permutation(8, 3, 50)).any()
    assert (first != data.permutation(3, 7, 50)).any()


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        pytest.param({"epochs": 2}, [4, 4, 2, 4, 4, 2], id="a smaller last batch"),
        pytest.param({"epochs": 2, "drop_last": True}, [4, 4, 4, 4], id="drop_last"),
        pytest.param({"epochs": 2, "batch_size": 5}, [5, 5, 5, 5], id="whole batches"),
        pytest.param({"epochs": 3, "steps": 2}, [4, 4], id="steps end within the first epoch"),
        pytest.param({"steps": 4}, [4, 4, 2, 4], id="steps go beyond the epochs"),
    ],
)
def test_batches_are_the_slices_of_each_epochs_permutation(
    options: dict[str, Any], sizes: list[int]
) -> None:
    config = Config(seed=5, **options).resolve(10)
    batches = list(data.batch_indices(config, 10))
    assert [len(batch) for batch in batches] == sizes
    assert len(batches) == config.total_steps
    assert all(batch.dtype == np.int64 for batch in batches)
    per_epoch = config.batches_per_epoch(10)
    for epoch in range(config.epochs):
        seen = np.concatenate(batches[epoch * per_epoch : (epoch + 1) * per_epoch])
        np.testing.assert_array_equal(seen, data.permutation(5, epoch, 10)[: len(seen)])


def test_the_order_digest_changes_with_whatever_changes_the_order() -> None:
    config = Config(epochs=2).resolve(10)
    digest = data.order_digest(config, 10)
    assert digest == data.order_digest(replace(config, lr=0.5), 10)
    others = [
        replace(config, seed=1),
        Config(epochs=3).resolve(10),
        Config(epochs=2, drop_last=True).resolve(10),
        Config(epochs=2, batch_size=5).resolve(10),  # the same indices, cut elsewhere
    ]
    assert len({digest, *(data.order_digest(other, 10) for other in others)}) == 5


# Digits, and the digest


def test_digits_are_scaled_and_repeated() -> None:
    from sklearn.datasets import load_digits

    digits = data.load("digits")
    theirs: Any = load_digits()
    assert (len(digits.train_images), len(digits.test_images)) == (1437, 360)
    assert (digits.train_images.dtype, digits.train_labels.dtype) == (np.uint8, np.int64)
    assert digits.train_images.shape[1:] == (32, 32, 3)
    assert digits.classes == tuple("0123456789")
    images = np.concatenate([digits.train_images, digits.test_images])
    assert (images.min(), images.max()) == (0, 255)
    for row, column, channel in ((0, 0, 0), (3, 3, 2), (1, 2, 1)):
        np.testing.assert_allclose(
            images[:, row::4, column::4, channel] / 255 * 16, theirs["images"], atol=0.04
        )
    np.testing.assert_array_equal(
        np.concatenate([digits.train_labels, digits.test_labels]), theirs["target"]
    )


def tiny() -> data.Dataset:
    pixels = (
        (np.arange(5 * 32 * 32 * 3) % 251).astype(np.uint8).reshape(5, 32, 32, 3)
    )  # no two images are equal
    return data.Dataset(
        "tiny", pixels[:3], np.array([0, 1, 0]), pixels[3:], np.array([1, 0]), ("a", "b")
    )


def one_pixel(images: np.ndarray) -> np.ndarray:
    changed = images.copy()
    changed[0, 31, 31, 2] ^= 1
    return changed


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda d: {"train_images": one_pixel(d.train_images)}, id="one training pixel"
        ),
        pytest.param(lambda d: {"test_images": one_pixel(d.test_images)}, id="one test pixel"),
        pytest.param(lambda d: {"train_labels": np.array([0, 1, 1])}, id="one label"),
        pytest.param(lambda d: {"classes": ("a", "c")}, id="one class name"),
        pytest.param(lambda d: {"classes": ("b", "a")}, id="the order of the classes"),
        pytest.param(
            lambda d: {"train_images": d.train_images[::-1]}, id="the order of the images"
        ),
        pytest.param(
            lambda d: {
                "train_images": d.train_images[:2],
                "test_images": np.concatenate([d.train_images[2:], d.test_images]),
                "train_labels": d.train_labels[:2],
                "test_labels": np.concatenate([d.train_labels[2:], d.test_labels]),
            },
            id="the place of the split",
        ),
    ],
)
def test_the_digest_changes_with(change: Any) -> None:
    assert replace(tiny(), **change(tiny())).digest != tiny().digest


def test_the_digest_is_of_the_content_alone() -> None:
    strided = tiny().train_images.transpose(0, 3, 1, 2).copy().transpose(0, 2, 3, 1)
    assert replace(tiny(), name="other", train_images=strided).digest == tiny().digest


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


@needs_cifar10
@pytest.mark.parametrize("choice", ["auto", "cifar10"])
@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
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
    """Let torchvision take `archive` for the genuine one."""
    import io

    from torchvision.datasets import CIFAR10

    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    sums = {
        file.name: md5(file.read_bytes()) for file in (folder / cifar10.CIFAR10_FOLDER).iterdir()
    }
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(archive))
    monkeypatch.setattr(
        CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)]
    )
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


@pytest.mark.parametrize("extra", ["", "import torch"], ids=["data alone", "control"])
def test_importing_the_module_imports_no_framework(extra: str) -> None:
    heavy = "{'torch', 'torchvision', 'jax', 'sklearn', 'PIL', 'rich'}"
    code = f"import sys, lockstep.common.data\n{extra}\nsys.exit(bool({heavy} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == bool(extra)
