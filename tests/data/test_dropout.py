"""Dropout: both backends leave out the same units, step by step, and what a library's own layer
would leave of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from lockstep import backends
from lockstep import cli as compare
from lockstep.backends.flax_backend import layers as flax_layers
from lockstep.backends.torch_backend import layers as torch_layers
from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.data.dropout import masks
from lockstep.common.errors import ConfigError
from lockstep.common.model.checks import check_dropout
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.model.pair import source_digest
from lockstep.common.protocol import Backend, Dropout, Snapshot
from lockstep.common.testing import same_run
from tests.model.test_pair import said

LAYERS = {"a.mask": Dropout(0.25, (7, 5)), "b.mask": Dropout(0.5, (1, 1, 1))}

# On channels (PyTorch's first axis, Flax's last), on tokens, and on whole images.
PAIR = """
import torch
from flax import nnx
from lockstep.backends.flax_backend import layers as flax_layers
from lockstep.backends.torch_backend import layers as torch_layers
from lockstep.common.model.pair import Pair

class Torch(torch.nn.Module):
    def __init__(self, classes, channels_first=True):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 4, stride=4)
        self.pixels = torch_layers.Dropout(0.3, (4, 8, 8) if channels_first else (8, 8, 4), channels_first)
        self.images = torch_layers.Dropout(0.2, (1, 1, 1))
        self.features = torch.nn.Sequential(torch.nn.Linear(256, 16), torch_layers.Dropout(0.5, (16,)))
        self.fc = torch.nn.Linear(16, classes)

    def forward(self, x):
        x = self.images(torch.relu(self.pixels(self.conv(x))))
        return self.fc(torch.tanh(self.features(x.flatten(1))))

class Flax(nnx.Module):
    def __init__(self, classes, rngs, rate=0.5):
        self.conv = nnx.Conv(3, 4, (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.pixels = flax_layers.Dropout(0.3, (8, 8, 4))
        self.images = flax_layers.Dropout(0.2, (1, 1, 1))
        self.features = nnx.Sequential(nnx.Linear(256, 16, rngs=rngs), flax_layers.Dropout(rate, (16,)))
        self.fc = nnx.Linear(16, classes, rngs=rngs)

    def __call__(self, x):
        x = self.images(nnx.relu(self.pixels(self.conv(x))))
        return self.fc(nnx.tanh(self.features(x.reshape(len(x), -1))))

PAIR = Pair(Torch, Flax, flattened={"features.0": (4, 8, 8)})
OTHER_RATE = Pair(Torch, lambda classes, rngs: Flax(classes, rngs, rate=0.4), flattened={"features.0": (4, 8, 8)})
NO_RATE = Pair(Torch, lambda classes, rngs: Flax(classes, rngs, rate=1.0), flattened={"features.0": (4, 8, 8)})
OTHER_AXES = Pair(lambda classes: Torch(classes, False), Flax, flattened={"features.0": (4, 8, 8)})
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "dropping.py"
    path.write_text(PAIR)
    return path


@pytest.fixture
def build(file: Path) -> Callable[..., Backend]:
    def build(side: str, compile: str = "off", **changes: Any) -> Backend:
        model = f"{file}:PAIR"
        config = Config(
            model=model, pair=source_digest(model), steps=6, batch_size=8, lr=0.1, momentum=0.9
        )
        return backends.load(side)(
            dataclasses.replace(config, **changes), 10, "float64", "cpu", compile
        )

    return build


def batches(steps: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.standard_normal((steps, 8, 32, 32, 3)), generator.integers(0, 10, (steps, 8))


# --- What is drawn


def test_as_much_is_left_out_as_the_rate_says_and_each_layer_and_step_draws_anew() -> None:
    drawn = masks(LAYERS, 0, 0, (400, 16))
    assert drawn["a.mask"].shape == (400, 16, 7, 5) and drawn["b.mask"].shape == (400, 16, 1, 1, 1)
    for name, layer in LAYERS.items():
        kept, count = drawn[name], drawn[name].size
        assert kept.dtype == bool
        assert (
            abs(kept.mean() - (1 - layer.rate)) < 4 * (layer.rate * (1 - layer.rate) / count) ** 0.5
        )
        assert (
            len({step.tobytes() for step in kept}) > 390
        )  # of the images, two steps may leave out the same
    again, other = masks(LAYERS, 0, 0, (400, 16)), masks(LAYERS, 1, 0, (400, 16))
    assert all(np.array_equal(drawn[name], again[name]) for name in LAYERS)
    assert not any(np.array_equal(drawn[name], other[name]) for name in LAYERS)


def test_steps_in_one_call_are_the_steps_one_by_one_whatever_the_order_of_the_layers() -> None:
    together = masks(LAYERS, 3, 10, (4, 8))
    for number in range(4):
        alone = masks(dict(reversed(LAYERS.items())), 3, 10 + number, (8,))
        assert all(np.array_equal(together[name][number], alone[name]) for name in LAYERS)


# --- What is left


def test_what_is_left_is_what_the_libraries_own_layers_leave() -> None:
    x = np.random.default_rng(0).standard_normal((64, 32))
    own = torch.nn.Dropout(0.3)
    torch.manual_seed(0)
    theirs = own(torch.from_numpy(x)).numpy()
    ours = torch_layers.Dropout(0.3, (32,))
    ours.mask = torch.from_numpy(theirs != 0)
    np.testing.assert_allclose(ours(torch.from_numpy(x)).numpy(), theirs, rtol=1e-15)
    assert torch.equal(ours.eval()(torch.from_numpy(x)), torch.from_numpy(x))
    with jax.enable_x64(True):
        theirs = np.asarray(nnx.Dropout(0.3, rngs=nnx.Rngs(0))(jnp.asarray(x)))
        layer = flax_layers.Dropout(0.3, (32,))
        layer.mask = flax_layers.Mask(jnp.asarray(theirs != 0))
        np.testing.assert_allclose(np.asarray(layer(jnp.asarray(x))), theirs, rtol=1e-15)
        layer.eval()
        np.testing.assert_array_equal(np.asarray(layer(jnp.asarray(x))), x)
    assert 0.25 < (theirs == 0).mean() < 0.35


# --- Both backends


def test_both_say_what_they_leave_out_in_flaxs_layout(build: Callable[..., Backend]) -> None:
    expected = {
        "pixels.mask": Dropout(0.3, (8, 8, 4)),
        "images.mask": Dropout(0.2, (1, 1, 1)),
        "features.1.mask": Dropout(0.5, (16,)),
    }
    assert build("torch").dropout_layers() == build("flax").dropout_layers() == expected
    assert not any("mask" in name for name in build("torch").shapes() | build("flax").shapes())


def test_they_leave_out_the_same_units_in_every_step(build: Callable[..., Backend]) -> None:
    dataset = data.load("digits")
    torch_side, flax_side = build("torch"), build("flax")
    config: Config = torch_side.config.resolve(len(dataset.train_images))  # pyright: ignore[reportAttributeAccessIssue]
    assert same_run(torch_side, flax_side, dataset, config, dtype="float64")
    other = build("flax", seed=1)  # the control: other units, from the same weights and batches
    assert not same_run(torch_side, other, dataset, config, dtype="float64")


@pytest.mark.parametrize(
    ("side", "compile"),
    [("torch", "off"), pytest.param("torch", "on", marks=pytest.mark.slow), ("flax", "off")],
)
def test_many_steps_in_one_call_and_after_a_checkpoint_leave_out_what_single_steps_do(
    side: str, compile: str, build: Callable[..., Backend]
) -> None:
    backend, (images, labels) = build(side, compile), batches(5)
    start = Snapshot.start(initial_weights(backend.shapes(), 0, "float64"))
    state, singles = backend.init(start), []
    for batch, truth in zip(images, labels, strict=True):
        state, metrics = backend.train_step(state, batch, truth)
        singles.append(float(metrics.loss))
    _, together = backend.train_steps(backend.init(start), images, labels)
    np.testing.assert_allclose(together.loss, singles, rtol=1e-13)
    state, _ = backend.train_steps(backend.init(start), images[:2], labels[:2])
    _, rest = backend.train_steps(backend.init(backend.export(state)), images[2:], labels[2:])
    np.testing.assert_allclose(rest.loss, singles[2:], rtol=1e-13)
    shifted = backend.export(state)._replace(step=3)  # the control: what a later step leaves out
    _, other = backend.train_steps(backend.init(shifted), images[2:], labels[2:])
    assert abs(float(other.loss[0]) - singles[2]) > 1e-3  # measured: 0.054


def test_a_probe_and_evaluation_change_nothing(build: Callable[..., Backend]) -> None:
    images, labels = batches(1)
    for side in ("torch", "flax"):
        backend = build(side)
        start = Snapshot.start(initial_weights(backend.shapes(), 0, "float64"))
        state = backend.init(start)
        probed = backend.probe(state, images[0], labels[0])
        evaluated = backend.evaluate(state, images[0], labels[0])
        assert (
            abs(evaluated.loss - float(probed["loss/loss"])) > 1e-3
        )  # nothing is left out in evaluation; 0.025
        assert backend.evaluate(state, images[0], labels[0]).loss == evaluated.loss
        _, metrics = backend.train_step(state, images[0], labels[0])
        np.testing.assert_allclose(float(metrics.loss), float(probed["loss/loss"]), rtol=1e-13)


# --- What cannot be compared


@pytest.mark.slow
def test_dropout_that_differs_is_refused_in_one_line(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(["pair", f"{file}:PAIR", "--data", "digits", "--quiet"]) == 0
    capsys.readouterr()
    error = said(capsys, "pair", f"{file}:OTHER_RATE", "--data", "digits")
    assert (
        "dropout differs (features.1: PyTorch 0.5 of (16,), Flax 0.4 of (16,)): make it equal"
        in error
    )
    error = said(capsys, "--model", f"{file}:OTHER_AXES", "--data", "digits")
    assert "torch cannot take images (2, 3, 32, 32)" in error
    error = said(capsys, "--model", f"{file}:NO_RATE", "--data", "digits")
    assert "flax cannot build (ValueError: a rate of 1: give 0 or more, and less than 1)" in error
    with pytest.raises(ConfigError, match=r"a: PyTorch 0\.25 of \(7, 5\), Flax has none"):
        check_dropout({"a.mask": LAYERS["a.mask"]}, {})


# --- What is recorded of it


def test_a_digest_changes_with_one_unit_that_is_left_out_and_not_with_the_order_of_layers() -> None:
    images, labels = batches(3)
    drawn = masks(LAYERS, 0, 0, labels.shape)
    found = data.batch_digests(images, labels, drawn)
    assert (found != data.batch_digests(images, labels)).all()
    turned = dict(reversed(drawn.items()))
    np.testing.assert_array_equal(found, data.batch_digests(images, labels, turned))
    np.testing.assert_array_equal(
        data.batch_digests(images, labels, {}), data.batch_digests(images, labels)
    )
    for name, place in (("a.mask", (1, 7, 6, 4)), ("b.mask", (1, 0, 0, 0, 0))):
        other = drawn | {name: drawn[name].copy()}
        other[name][place] ^= True
        changed = data.batch_digests(images, labels, other) != found
        assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("side", ["torch", "flax"])
def test_a_backend_says_which_masks_it_trains_with_and_training_leaves_them(
    build: Callable[..., Backend], side: str
) -> None:
    backend = build(side)
    state = backend.init(Snapshot.start(initial_weights(backend.shapes(), 0, "float64")))
    images, labels = batches(2)
    said_before = backend.masks(state, labels.shape)
    expected = {name: mask.copy() for name, mask in said_before.items()}
    assert set(expected) == set(backend.dropout_layers())
    for name, layer in backend.dropout_layers().items():
        assert expected[name].shape == (2, 8, *layer.shape) and 0 < expected[name].mean() < 1
    state, _ = backend.train_steps(state, images, labels)
    for name, mask in said_before.items():
        np.testing.assert_array_equal(mask, expected[name])
    after = backend.masks(state, labels[0].shape)  # of the third step
    assert any((after[name] != mask[1]).any() for name, mask in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 4])
def test_a_mask_that_differs_is_named_by_its_step(
    file: Path, digits: data.Dataset, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    from lockstep.backends.flax_backend import backend as flax_backend

    def other(
        layers: Mapping[str, Dropout], seed: int, step: int, shape: tuple[int, ...]
    ) -> dict[str, np.ndarray]:
        found = {name: mask.copy() for name, mask in masks(layers, seed, step, shape).items()}
        for number in range(shape[0]) if len(shape) > 1 else ():
            if step + number >= late:
                found["features.1.mask"][number, 0, 0] ^= True
        return found

    model = f"{file}:PAIR"
    config = Config(model=model, pair=source_digest(model), steps=6, batch_size=8, lr=0.1)
    config = config.resolve(len(digits.train_images))
    torch, flax = (
        backends.load(side)(config, 10, "float64", "cpu", "off") for side in ("torch", "flax")
    )
    assert same_run(torch, flax, digits, config)  # the control
    monkeypatch.setattr(flax_backend, "draw_masks", other)
    found = same_run(torch, flax, digits, config)
    assert not found and found.first_divergence is not None and found.location is not None
    place = found.first_divergence
    assert (place.step, place.stage, place.tensor) == (late, "data", "batch")
    said = "images and labels are equal: the masks of dropout differ"
    assert found.location.pattern == (said if late < 2 else None)
