"""Which tensor of one recording is which of the other."""

from __future__ import annotations

import numpy as np
import pytest

from lockstep.common.protocol import Arrays
from lockstep.common.recorder.matching import Match, Matching, match
from tests.recorder.recordings import gpt, linen, pairs_of_gpt, recording


def pairs(found: Matching) -> set[tuple[str, str]]:
    return {(m.a, m.b) for m in found.matches}


def one(found: Matching) -> Match:
    assert len(found.matches) == 1, found
    return found.matches[0]


def numbered(weights: Arrays, seed: int) -> Arrays:
    """Other values for each tensor of the first side, as gradients are."""
    draw = np.random.default_rng(seed).normal
    return {name: draw(size=values.shape) for name, values in weights.items()}


def assert_alike(found: Matching, a: Arrays, b: Arrays) -> None:
    """Each match takes the same numbers out of both sides."""
    for m in found.matches:
        np.testing.assert_array_equal(m.of_a(a[m.a]), m.of_b(b[m.b]), m.name)


# --- A whole network


@pytest.mark.parametrize("linen_first", [False, True])
def test_a_gpt_of_pytorch_meets_that_of_linen(linen_first: bool):
    weights = gpt()
    sides = [recording(weights), recording(linen(weights), "jax")]
    a, b = reversed(sides) if linen_first else sides
    found = match(a, b)
    assert found.same_start
    assert not found.unmatched_a + found.unmatched_b + found.differing
    wanted = set(pairs_of_gpt().items())
    assert pairs(found) == (wanted if linen_first else {(b, a) for a, b in wanted})


@pytest.mark.parametrize("start", [0, 1])
def test_what_is_recorded_later_is_in_the_layout_that_was_found(start: int):
    # start 1: from other weights, so that names alone decide
    weights = gpt()
    others = linen(gpt(seed=start))
    found = match(recording(weights), recording(others, "jax"))
    assert found.same_start == (start == 0)
    later = numbered(weights, 5)
    assert_alike(found, later, linen(later))
    shifted = {name: np.roll(values, 1, -1) for name, values in linen(later).items()}
    with pytest.raises(AssertionError):  # the control
        assert_alike(found, later, shifted)


# --- Layouts

RANDOM = np.random.default_rng(3)
DENSE = RANDOM.normal(size=(6, 10))
SQUARE = RANDOM.normal(size=(6, 6))
CONV = RANDOM.normal(size=(4, 3, 5, 5))
FLAT = RANDOM.normal(size=(7, 3 * 4 * 5))
LAYOUTS = {
    "as it is": (DENSE, DENSE, ""),
    "transposed": (DENSE, DENSE.T, "transposed"),
    "square, transposed": (SQUARE, SQUARE.T, "transposed"),
    "OIHW as HWIO": (CONV, CONV.transpose(2, 3, 1, 0), "axes (3, 2, 0, 1)"),
    "heads split": (DENSE, DENSE.T.reshape(10, 2, 3), "heads split, axes (1, 2, 0)"),
    "heads merged": (DENSE.T.reshape(10, 2, 3), DENSE, "heads merged, axes (1, 0)"),
    "another shape": (DENSE, DENSE.reshape(2, 3, 10), "reshaped"),
    "after a flatten": (
        FLAT,
        FLAT.reshape(7, 3, 4, 5).transpose(2, 3, 1, 0).reshape(60, 7),
        "transposed, columns unrolled (3, 20) in the order (1, 0)",
    ),
    "rows in another order": (
        DENSE,
        DENSE[[3, 0, 5, 1, 2, 4]],
        "rows in another order",
    ),
    "reversed": (DENSE, DENSE[:, ::-1], "columns reversed"),
    "both in another order": (
        DENSE,
        DENSE[[3, 0, 5, 1, 2, 4]][:, [3, 9, 0, 5, 1, 8, 2, 4, 7, 6]].T,
        "transposed, rows in another order, columns in another order",
    ),
    "through float32": (DENSE, DENSE.T.astype(np.float32).astype(np.float64), "transposed"),
}


@pytest.mark.parametrize(("a", "b", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_equal_values_say_the_layout(a: np.ndarray, b: np.ndarray, layout: str):
    found = one(match(recording({"x": a}), recording({"y": b}, "jax")))
    assert (found.how, found.layout) == ("value", layout)
    np.testing.assert_array_equal(
        found.of_b(np.ascontiguousarray(b)).astype(np.float32), a.astype(np.float32)
    )


def test_the_same_numbers_in_no_layout_are_said_to_be_so():
    shuffled = np.random.default_rng(0).permutation(DENSE.ravel()).reshape(DENSE.shape)
    found = match(recording({"x.weight": DENSE}), recording({"x.weight": shuffled}))
    assert one(found).how == "name"
    assert found.differing[0].text == "the same numbers in another order"
