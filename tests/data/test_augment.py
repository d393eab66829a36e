"""Augmented images are those of torchvision's transforms, and a pure function of seed, epoch and
place."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip
from torchvision.transforms import functional as vision

from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.data import Dataset, augment
from lockstep.common.data.augment import (
    PADDING,
    CropFlip,
    crop_flip,
    draw_parameters,
    parameters_for,
)
from lockstep.common.runs import training
from tests.conftest import SilentObserver
from tests.robustness import kills
from tests.runs.test_training import Notebook, dataset

IMAGES = 10
CONFIG = Config(steps=12, batch_size=3, drop_last=True, augment="crop-flip", seed=5)
OFFSETS = range(2 * PADDING + 1)
EVERY = CropFlip(
    *map(np.array, zip(*itertools.product(OFFSETS, OFFSETS, (False, True)), strict=True))
)


@pytest.fixture
def picture(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(1, 256, (32, 32, 3), np.uint8)  # nothing of it is black


def fed(config: Config = CONFIG, twin: int | None = None, dtype: str = "float64") -> Notebook:
    """What a backend is given by the training loop."""
    backend = Notebook(dtype)
    training.train(
        backend, config.resolve(IMAGES), dataset(IMAGES), dtype, SilentObserver(), twin, log_every=0
    )
    return backend


# --- What is done to an image


def test_every_offset_and_flip_gives_what_torchvision_gives(picture: np.ndarray) -> None:
    planes = torch.from_numpy(picture).permute(2, 0, 1)
    ours = crop_flip(np.broadcast_to(picture, (162, 32, 32, 3)), EVERY)
    assert ours.dtype == np.uint8
    for top, left, flip, image in zip(*EVERY, ours, strict=True):
        theirs = vision.crop(vision.pad(planes, [PADDING]), int(top), int(left), 32, 32)
        theirs = vision.hflip(theirs) if flip else theirs
        np.testing.assert_array_equal(image, theirs.permute(1, 2, 0).numpy())
        if flip and left != PADDING:  # control: the other order
            other = vision.crop(
                vision.pad(vision.hflip(planes), [PADDING]), int(top), int(left), 32, 32
            )
            assert not torch.equal(other, theirs)


def test_torchvisions_own_transforms_give_the_same_images_and_no_others(
    picture: np.ndarray,
) -> None:
    torch.manual_seed(0)
    planes = torch.from_numpy(picture).permute(2, 0, 1)
    transform = Compose([RandomCrop(32, padding=PADDING), RandomHorizontalFlip()])
    theirs = {transform(planes).permute(1, 2, 0).numpy().tobytes() for _ in range(4000)}
    ours = {
        image.tobytes() for image in crop_flip(np.broadcast_to(picture, (162, 32, 32, 3)), EVERY)
    }
    assert ours == theirs and len(ours) == 162


def test_what_is_padded_is_black_before_it_is_normalised() -> None:
    images = np.full((1, 32, 32, 3), 255, np.uint8)
    config = dataclasses.replace(CONFIG, batch_size=1).resolve(1)
    shown = np.concatenate(
        [augment.batches(config, images, np.array([[0]]), step, np.float32) for step in range(9)]
    )
    assert set(np.unique(shown)) == {
        -1.0,
        1.0,
    }  # zeros, where images are padded after that, would be grey


# --- What is drawn


def test_all_offsets_and_flips_are_drawn_about_as_often() -> None:
    top, left, flip = draw_parameters(0, 0, 50_000)
    counts = np.zeros((9, 9, 2), int)
    np.add.at(counts, (top, left, flip.astype(int)), 1)
    # 162 cells of 309 expected: a deviation of 5 standard ones is 87
    assert counts.sum() == 50_000 and counts.min() > 220 and counts.max() < 400


def test_draws_hang_on_the_seed_the_epoch_and_the_place_alone() -> None:
    def cells(*arguments: int) -> bytes:
        return np.stack(draw_parameters(*arguments)).tobytes()

    first = cells(0, 0, 100)
    for other in ((1, 0, 100), (0, 1, 100)):
        assert cells(*other) != first
    draw_parameters.cache_clear()
    assert cells(0, 0, 100) == first


def test_a_step_has_the_draws_of_its_epoch_however_the_steps_are_cut_into_calls() -> None:
    config = CONFIG.resolve(IMAGES)
    indices = np.stack(list(data.batch_indices(config, IMAGES)))  # three steps to an epoch
    whole = parameters_for(config, IMAGES, indices, 0)
    for step, row in enumerate(indices):
        alone = parameters_for(config, IMAGES, row[np.newaxis], step)
        expected = draw_parameters(config.seed, step // 3, IMAGES)
        for one, other, of_epoch in zip(whole, alone, expected, strict=True):
            assert one[step].tolist() == other[0].tolist() == of_epoch[row].tolist()
    late = parameters_for(config, IMAGES, indices, 3)  # control: another epoch
    assert not np.array_equal(whole.top, late.top)


# --- Training


@pytest.mark.parametrize(
    "drop_last", [True, False], ids=["last batch dropped", "smaller last batch"]
)
def test_a_backend_is_fed_augmented_training_images_and_test_images_as_they_are(
    drop_last: bool,
) -> None:
    config = dataclasses.replace(CONFIG, drop_last=drop_last)
    backend, plain = fed(config), fed(dataclasses.replace(config, augment=None))
    given, config = dataset(IMAGES), config.resolve(IMAGES)
    assert len(backend.fed) == config.total_steps
    for step, (images, labels) in enumerate(backend.fed):
        expected = augment.batches(
            config, given.train_images, labels[np.newaxis], step, np.float64
        )[0]
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(labels, plain.fed[step][1])  # in the same order
        assert not np.array_equal(images, plain.fed[step][0])  # control
    assert backend.evaluated is not None and plain.evaluated is not None
    np.testing.assert_array_equal(
        backend.evaluated[0], data.normalise(given.test_images, np.float64)
    )
    np.testing.assert_array_equal(backend.evaluated[0], plain.evaluated[0])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_twins_see_the_same_crops_and_flips_moved_by_one_ulp(dtype: str) -> None:
    run, twin = fed(dtype=dtype), fed(twin=1, dtype=dtype)
    for (images, labels), (moved, same) in zip(run.fed, twin.fed, strict=True):
        assert labels.tolist() == same.tolist()
        apart = np.abs(images.astype(np.float64) - moved.astype(np.float64))
        assert 0 < apart.max() <= np.finfo(dtype).eps


@pytest.mark.parametrize("twin", [None, 1], ids=["run", "twin"])
def test_a_run_that_is_gone_on_with_sees_the_same_images(
    name: str,
    twin: int | None,
    digits: Dataset,
    build: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = dataclasses.replace(
        digits, train_images=digits.train_images[:20], train_labels=digits.train_labels[:20]
    )
    few = dataclasses.replace(
        few, test_images=digits.test_images[:9], test_labels=digits.test_labels[:9]
    )
    config = dataclasses.replace(kills.small("constant"), augment="crop-flip").resolve(
        20
    )  # five steps to an epoch
    backend: Any = build(name, config)
    assert (
        kills.pieces(backend, config, few, "float64", tmp_path, twin, stops=range(3, 12, 4)) == {}
    )
    # control: draws that hang on how far this call of the loop has come
    right, calls = augment.parameters_for, itertools.count()
    monkeypatch.setattr(
        augment, "parameters_for", lambda c, n, indices, step: right(c, n, indices, next(calls))
    )
    assert kills.pieces(backend, config, few, "float64", tmp_path, twin, stops=range(3, 4)) != {}


def test_both_backends_train_alike_on_augmented_images(digits: Dataset, build: Callable) -> None:
    config = Config(steps=8, batch_size=8, lr=0.01, momentum=0.9, augment="crop-flip").resolve(
        len(digits.train_images)
    )
    few = dataclasses.replace(
        digits, test_images=digits.test_images[:9], test_labels=digits.test_labels[:9]
    )
    one, other, plain = (
        training.train(build(name, c), c, few, "float64", SilentObserver(), log_every=0)
        for name, c in (
            ("torch", config),
            ("flax", config),
            ("flax", dataclasses.replace(config, augment=None)),
        )
    )
    np.testing.assert_array_equal(
        one.first_steps["0/data/images"], other.first_steps["0/data/images"]
    )
    assert np.abs(one.loss - other.loss).max() <= 1e-14  # measured 4.4e-16
    assert np.abs(one.loss - plain.loss).max() > 1e-3  # control
