"""A data set: its normalisation, the order of its batches, its digest; and the digits."""

from __future__ import annotations

import subprocess
import sys
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
from lockstep.common.data import dataset

pytestmark = pytest.mark.usefixtures("no_home_no_network")


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


@pytest.mark.parametrize("extra", ["", "import torch"], ids=["data alone", "control"])
def test_importing_the_module_imports_no_framework(extra: str) -> None:
    heavy = "{'torch', 'torchvision', 'jax', 'sklearn', 'PIL', 'rich'}"
    code = f"import sys, lockstep.common.data\n{extra}\nsys.exit(bool({heavy} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == bool(extra)
