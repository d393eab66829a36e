"""Which side's gradients are further from float64's, and the sentence that says so."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from lockstep.common.config import FRAMEWORKS
from lockstep.common.verdict.arithmetic import gradient_errors, in_words, larger_errors
from lockstep.common.verdict.comparison import Arithmetic
from tests.verdict.test_compare import make

LEAST = 0.03


def test_a_side_is_off_where_its_error_is_large_and_several_times_the_others() -> None:
    ours = {"a": 0.2, "b": 0.8, "close": 0.2, "small": 0.02, "alone": 0.9}
    theirs = {"a": 0.01, "b": 0.0, "close": 0.06, "small": 0.0}
    assert [error.tensor for error in larger_errors(ours, theirs, LEAST)] == ["b", "a"]
    assert larger_errors(theirs, ours, LEAST) == ()


def test_the_sentence_names_the_side_the_tensor_and_by_how_much() -> None:
    off = larger_errors({"norm.bias": 0.764}, {"norm.bias": 0.004}, LEAST)
    said = in_words(Arithmetic({"torch": off, "flax": ()}), "bfloat16", FRAMEWORKS)
    assert said.startswith("the arithmetic of bfloat16, and not the program: in float64, one step")
    assert said.endswith("PyTorch are off: norm.bias by 76 % of its largest (Flax 0.4 %)")
    large = larger_errors({"a": 1.14}, {"a": 0.004}, LEAST)  # larger than the largest entry
    assert "a by 110 % of" in in_words(Arithmetic({"torch": large}), "bfloat16", FRAMEWORKS)
    neither = in_words(Arithmetic({"torch": (), "flax": ()}), "bfloat16", FRAMEWORKS)
    assert neither.endswith(
        "neither side's first gradients are much further from it than the other's"
    )


@pytest.mark.parametrize(("size", "counts"), [(1e-17, False), (1e-6, True)])
def test_what_is_left_of_a_sum_that_is_zero_has_no_error(size: float, counts: bool) -> None:
    right = {"0/backward/fc.kernel": np.ones(2), "0/backward/fc.bias": np.full(2, size)}
    exact = dataclasses.replace(make("torch", "float64"), first_steps=right)
    off = {name: array.astype(np.float32) + 1e-7 for name, array in right.items()}
    found = gradient_errors(dataclasses.replace(make("torch", "float32"), first_steps=off), exact)
    assert "fc.kernel" in found and ("fc.bias" in found) == counts
