"""Two recordings become two records of one layout: names, axes, batches, fingerprints, and what one
side lacks."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lockstep.common.recorder.align import align
from lockstep.common.recorder.layouts import find_layout
from lockstep.common.recorder.matched import Match
from lockstep.common.recorder.modules import corresponding, layer_of
from lockstep.common.recorder.recording import Recording, batch_digest, fingerprint, means
from tests.recorder.made import STEPS, matching, recording

KERNEL = "net.fc1.weight"


@pytest.fixture
def pair() -> tuple[Recording, Recording]:
    return recording("torch"), recording("jax")


# --- Parameters


def test_every_tensor_of_b_has_the_name_and_the_layout_of_a(
    pair: tuple[Recording, Recording],
) -> None:
    a, b = align(*pair, matching())
    for group in ("weights", "first_steps", "parameter_history", "final", "results"):
        ours, theirs = getattr(a, group), getattr(b, group)
        assert list(ours) == list(theirs) and ours, group
        for name, array in ours.items():
            assert array.shape == theirs[name].shape and array.dtype == theirs[name].dtype
            np.testing.assert_allclose(array, theirs[name], rtol=1e-9, atol=1e-12, err_msg=name)
    assert a.weights[KERNEL].shape == (8, 12)
    for key in (f"0/backward/{KERNEL}", f"1/update/{KERNEL}", f"0/update/first moment of {KERNEL}"):
        assert key in a.first_steps
    assert f"3/{KERNEL}" in a.parameter_history
    assert (a.backend, b.backend) == ("train_torch.py", "train_jax.py")
    assert a.steps == b.steps == STEPS


def test_what_one_side_lacks_is_in_neither(pair: tuple[Recording, Recording]) -> None:
    ours, theirs = pair
    del theirs.first_steps["0/backward/params.Dense_0.kernel"]
    a, b = align(ours, theirs, matching())
    assert f"0/backward/{KERNEL}" not in a.first_steps
    assert f"1/backward/{KERNEL}" in a.first_steps and a.first_steps.keys() == b.first_steps.keys()


def test_state_that_is_not_kept_entry_by_entry_is_left_out(
    pair: tuple[Recording, Recording],
) -> None:
    ours, theirs = pair
    for side, name in ((ours, KERNEL), (theirs, "params.Dense_0.kernel")):
        side.first_steps[f"0/update/row of {name}"] = np.ones(8)
    a, _ = align(ours, theirs, matching())
    assert not any("row of" in key for key in a.first_steps)


def test_the_twins_of_a_packed_tensor_are_its_parts() -> None:
    """A kernel of A that holds two of B, one below the other."""
    ours = recording("torch")
    kernel = ours.weights[KERNEL]
    halves = {"upper": kernel[:4], "lower": kernel[4:]}
    theirs = dataclasses.replace(
        ours, weights=dict(halves), final=dict(halves), first_steps={}, parameter_history={}
    )

    class Part(Match):
        def of_a(self, array: np.ndarray) -> np.ndarray:
            return array[:4] if self.b == "upper" else array[4:]

    parts = [Part(KERNEL, b, f"{KERNEL} [{b}]", "value", None, None, "") for b in halves]
    found = matching(matches=tuple(parts))
    a, b = align(ours, theirs, found)
    assert list(a.weights) == [f"{KERNEL} [upper]", f"{KERNEL} [lower]"]
    np.testing.assert_array_equal(a.weights[f"{KERNEL} [lower]"], b.weights[f"{KERNEL} [lower]"])
    marked = dataclasses.replace(
        ours,
        weights={**ours.weights, KERNEL: fingerprint(kernel)},
        fingerprints=[f"weights/{KERNEL}"],
    )
    a, _ = align(marked, theirs, found)
    assert not a.weights, "a fingerprint has no parts"


# --- Fingerprints


@pytest.mark.parametrize("side", [0, 1])
def test_where_one_side_kept_a_fingerprint_both_are_compared_as_such(
    pair: tuple[Recording, Recording], side: int
) -> None:
    key = ("net.fc1.weight", "params.Dense_0.kernel")[side]
    marked = dataclasses.replace(
        pair[side],
        weights={**pair[side].weights, key: fingerprint(pair[side].weights[key])},
        fingerprints=[f"weights/{key}"],
    )
    sides = list(pair)
    sides[side] = marked
    a, b = align(sides[0], sides[1], matching())
    assert a.weights[KERNEL].shape == b.weights[KERNEL].shape == (5,)
    np.testing.assert_allclose(a.weights[KERNEL], b.weights[KERNEL], rtol=1e-14)
    sides[1 - side].weights[("net.fc1.weight", "params.Dense_0.kernel")[1 - side]][0, 0] += 1e-6
    a, b = align(sides[0], sides[1], matching())
    assert np.abs(a.weights[KERNEL] - b.weights[KERNEL]).max() > 1e-9


def test_the_means_of_a_fingerprint_have_the_size_of_the_entries() -> None:
    array = np.array([[1.0, -2.0], [3.0, 0.5]])
    np.testing.assert_allclose(
        means(fingerprint(array)), [0.625, 1.625, np.sqrt(14.25 / 4), -2.0, 3.0]
    )


# --- Batches


def test_images_of_either_order_of_axes_are_the_same_batch(
    pair: tuple[Recording, Recording],
) -> None:
    a, b = align(*pair, matching())
    for name in ("batch[0]", "batch[1]"):
        np.testing.assert_array_equal(
            a.first_steps[f"0/data/{name}"], b.first_steps[f"0/data/{name}"]
        )
        np.testing.assert_array_equal(a.batches[name], b.batches[name])
    assert a.first_steps["0/data/batch[0]"].shape == (16, 3, 2, 2)


def test_rows_in_another_order_are_another_batch(pair: tuple[Recording, Recording]) -> None:
    ours, theirs = pair
    for key in ("0/data/batch[0]", "1/data/batch[0]"):
        theirs.first_steps[key] = theirs.first_steps[key][::-1]
    theirs.batch_digests["batch[0]"][7] = batch_digest(theirs.first_steps["0/data/batch[0]"])
    a, b = align(ours, theirs, matching())
    assert (a.first_steps["0/data/batch[0]"] != b.first_steps["0/data/batch[0]"]).any()
    assert list(np.flatnonzero(a.batches["batch[0]"] != b.batches["batch[0]"])) == [7]


def test_a_text_that_is_rolled_along_its_rows_is_another_batch() -> None:
    tokens, images = np.arange(12).reshape(3, 4), np.arange(12.0).reshape(3, 4)
    zeros = np.zeros((2, 3), np.float32)
    assert batch_digest(zeros) == batch_digest(-zeros) != batch_digest(zeros + 1)
    assert batch_digest(tokens)[0] != batch_digest(np.roll(tokens, 1, axis=1))[0]
    assert batch_digest(images)[0] == batch_digest(np.roll(images, 1, axis=1))[0]


def test_where_the_batch_is_another_axis_the_order_of_the_rows_does_not_count() -> None:
    """(batch, time) against (time, batch)."""
    sides = [recording("torch"), recording("jax")]
    tokens = np.random.default_rng(0).integers(0, 50, (STEPS, 6, 9))
    for n, side in enumerate(sides):
        for step in (0, 1):
            side.first_steps[f"{step}/data/batch[0]"] = tokens[step].T if n else tokens[step]
        rows = [batch_digest(each.T if n else each) for each in tokens]
        side.batch_digests["batch[0]"] = np.array(rows, np.int64)
    a, b = align(sides[0], sides[1], matching())
    np.testing.assert_array_equal(
        a.first_steps["1/data/batch[0]"], b.first_steps["1/data/batch[0]"]
    )
    np.testing.assert_array_equal(a.batches["batch[0]"], b.batches["batch[0]"])


def test_arrays_given_in_another_order_or_by_other_names_meet_by_their_digests(
    pair: tuple[Recording, Recording],
) -> None:
    ours, theirs = pair
    names = {"batch[0]": "batch[0].label", "batch[1]": "batch[0].image"}
    swapped = {"batch[0]": names["batch[1]"], "batch[1]": names["batch[0]"]}
    renamed = dataclasses.replace(
        theirs,
        batch_digests={swapped[name]: rows for name, rows in theirs.batch_digests.items()},
        first_steps={
            (f"{key[:7]}{swapped[key[7:]]}" if "/data/" in key else key): array
            for key, array in theirs.first_steps.items()
        },
    )
    a, b = align(ours, renamed, matching())
    assert list(a.batches) == ["batch[0]", "batch[1]"]
    np.testing.assert_array_equal(a.batches["batch[0]"], b.batches["batch[0]"])


# --- Activations


def test_modules_correspond_that_hold_the_same_parameters_the_innermost_first() -> None:
    parameters = {
        "body.one.weight": ("body.one.weight", "params.Block_0.Dense_0.kernel"),
        "body.two.weight": ("body.two.weight", "params.Block_0.Dense_1.kernel"),
        "head.weight": ("head.weight", "params.Dense_0.kernel"),
    }
    ours = ["body.one", "body.one.act", "body.two", "body", "head"]
    theirs = ["Block_0.Dense_0", "Block_0.Dense_1", "Block_0", "Dense_0", "Dropout_0"]
    assert corresponding(ours, theirs, parameters) == {
        "body.one": "Block_0.Dense_0",
        "body.two": "Block_0.Dense_1",
        "body": "Block_0",
        "head": "Dense_0",
    }
    assert layer_of("params.Block_0.Dense_1.kernel", theirs) == "Block_0.Dense_1"
    haiku = {"x": ("fc.weight", "mlp/~/linear_0.w")}
    assert corresponding(["fc"], ["mlp/~/linear_0"], haiku) == {"fc": "mlp/~/linear_0"}


def test_taps_correspond_by_their_names(pair: tuple[Recording, Recording]) -> None:
    for side in pair:
        side.first_steps["0/forward/scores"] = np.ones((2, 3))
        side.layers.append("scores")
    a, _ = align(*pair, matching())
    assert a.layers == ["net.fc1", "net.fc2", "output", "scores"]
    assert "0/forward/scores" in a.first_steps


# --- Layouts


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((4, 3, 5, 6), (0, 2, 3, 1)),
        ((4, 3, 3, 3), (0, 2, 3, 1)),
        ((7, 9), (1, 0)),
        ((5, 5), (1, 0)),
    ],
)
def test_an_order_of_axes_is_found_by_value(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    a = np.random.default_rng(0).normal(size=shape)
    layout = find_layout(a, a.transpose(axes) + 1e-9)
    assert layout is not None
    np.testing.assert_allclose(layout.of(a.transpose(axes)), a)


def test_merged_axes_are_split_if_that_makes_the_two_equal() -> None:
    a = np.random.default_rng(0).normal(size=(4, 3, 6))
    layout = find_layout(a, a.reshape(12, 6))
    assert layout is not None
    np.testing.assert_array_equal(layout.of(a.reshape(12, 6)), a)
    assert find_layout(a, np.random.default_rng(1).normal(size=(12, 6))) is None
    assert find_layout(a, a[:2]) is None


def test_equal_shapes_stay_as_they_are_where_nothing_makes_them_equal() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 5, 5))
    layout = find_layout(a, b)
    assert layout is not None and layout.axes == (0, 1)
