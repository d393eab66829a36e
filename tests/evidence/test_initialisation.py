"""Whether two modules draw their initial weights alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lockstep.common.evidence import initialisation
from lockstep.common.evidence.initialisation import (
    DRAWS,
    ENOUGH,
    LEVEL,
    MAX_ENTRIES,
    beyond,
    compare_starts,
    differ,
    distribution_level,
    in_words,
    sample,
    sentence,
    table,
)
from lockstep.common.protocol import Arrays

SHAPE = (3, 3, 3, 16)  # of a first kernel
Entries = Callable[[np.random.Generator], np.ndarray]


def normal(generator: np.random.Generator) -> np.ndarray:
    return generator.normal(0, 0.1, SHAPE)


def truncated(generator: np.random.Generator) -> np.ndarray:
    """At two deviations, and as wide as the other, as JAX's initialisers are."""
    entries = generator.normal(0, 1, SHAPE)
    while (outside := np.abs(entries) > 2).any():
        entries[outside] = generator.normal(0, 1, int(outside.sum()))
    return 0.1 * entries / 0.8796


STARTS: dict[str, Entries] = {
    "normal": normal,
    "gain": lambda g: np.sqrt(2) * normal(g),
    "fan out for fan in": lambda g: np.sqrt(3 / 16) * normal(g),
    "uniform": lambda g: g.uniform(-0.1, 0.1, SHAPE) * np.sqrt(3),
    "truncated": truncated,
    "zeros": lambda g: np.zeros(SHAPE),
    "ones": lambda g: np.ones(SHAPE),
    "one layer of two": lambda g: normal(g) + 0.02,
}


def draw(entries: Entries, side: int) -> initialisation.Draw:
    return lambda seed: {"conv.kernel": entries(np.random.default_rng([side, seed]))}


@pytest.mark.parametrize("theirs", STARTS)
@pytest.mark.parametrize("ours", STARTS)
def test_two_starts_differ_if_they_are_drawn_otherwise(ours: str, theirs: str) -> None:
    draws = {"torch": draw(STARTS[ours], 0), "flax": draw(STARTS[theirs], 1)}
    names = [start.name for start in compare_starts(draws)]
    assert names == ([] if ours == theirs else ["conv.kernel"])


def test_large_tensors_need_fewer_draws_and_small_ones_all() -> None:
    def counted(shape: tuple[int, ...], ours: float = 0.1) -> tuple[int, int]:
        """How many draws of the second side were taken, and how many tensors differ."""
        taken = []

        def theirs(seed: int) -> Arrays:
            taken.append(seed)
            return {"kernel": np.random.default_rng([1, seed]).normal(0, 0.1, shape)}

        def mine(seed: int) -> Arrays:
            return {"kernel": np.random.default_rng([0, seed]).normal(0, ours, shape)}

        found = compare_starts({"torch": mine, "flax": theirs})
        return len(taken), len(found)

    assert counted((10,)) == (DRAWS, 0) and counted((8, 625)) == (10, 0)
    assert counted((100, 1000)) == (ENOUGH // MAX_ENTRIES, 0)
    assert counted((100, 1000), ours=0.1 / 0.8796) == (
        5,
        1,
    )  # JAX's correction of a truncated normal
    assert counted((10,), ours=0.0) == (2, 1)  # a constant is one at once


def test_of_three_thousand_tensors_that_start_alike_none_is_called_different() -> None:
    generator = np.random.default_rng(0)
    kinds = [generator.normal, generator.uniform]
    for number in range(3000):
        size = DRAWS * int(generator.integers(1, 60))
        kind = kinds[number % 2]
        assert not differ(kind(0, 1, size), kind(0, 1, size)), (number, size)


def test_either_test_alone_sees_what_the_other_does_not() -> None:
    generator = np.random.default_rng(0)
    whole = generator.normal(0, 1, DRAWS * 432)
    cut = np.concatenate([STARTS["truncated"](generator).ravel() * 10 for _ in range(DRAWS)])
    assert distribution_level(whole, cut) > LEVEL  # another tail alone
    assert beyond(whole, cut) > 20 and beyond(cut, whole) == 0 and differ(whole, cut)
    shifted = np.clip(whole + 0.2, whole.min(), whole.max())
    assert beyond(shifted, whole) == 0 and distribution_level(whole, shifted) < LEVEL


def test_the_level_is_that_of_the_library() -> None:
    from scipy.special import kolmogorov
    from scipy.stats import ks_2samp

    generator = np.random.default_rng(0)
    a, b = generator.normal(0, 1, 500), generator.normal(0.1, 1, 500)
    largest, _ = ks_2samp(a, b, method="asymp")
    assert distribution_level(a, b) == pytest.approx(kolmogorov(largest * np.sqrt(250)))


def test_what_is_constant_is_compared_exactly() -> None:
    ones = np.ones(5)
    assert not differ(ones, np.ones(5))
    assert differ(ones, np.full(5, 1 + 1e-12)) and differ(ones, np.arange(5.0))
    assert differ(np.arange(5.0), ones)


def test_large_tensors_are_thinned_and_words_say_what_was_drawn() -> None:
    assert sample(np.arange(6.0).reshape(2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    assert sample(np.zeros((3, MAX_ENTRIES))).size == MAX_ENTRIES
    assert in_words(np.zeros(0)) == "empty" and in_words(np.full(3, 1000.0)) == "all 1e+03"
    assert in_words(np.array([-1.0, 1.0])) == "deviation 1, between -1 and 1"


def test_the_sentence_counts_and_the_table_names_them() -> None:
    none: Arrays = {}
    assert compare_starts({"torch": lambda _: none, "flax": lambda _: none}) == ()
    assert "draw their initial weights alike" in sentence((), 4)
    found = compare_starts({"torch": draw(STARTS["zeros"], 0), "flax": draw(STARTS["ones"], 0)})
    assert "different initial values for 1 of 4 tensors" in sentence(found, 4)
    columns, rows = table(found)
    assert columns[1:] == ("PyTorch", "Flax") and rows == [("conv.kernel", "all 0", "all 1")]
