"""Which cases of a test are slow, and how the fast run compiles."""

from __future__ import annotations

import os

import pytest

from tests.marks import slow_except


def test_only_the_named_cases_are_fast() -> None:
    first, second, third = slow_except(["a", ("b", 1), "c"], "a", "c")
    assert (first.values, second.values, third.values) == (("a",), ("b", 1), ("c",))
    assert not first.marks and not third.marks
    assert [mark.name for mark in second.marks] == ["slow"]


def test_a_case_that_is_not_there_is_an_error() -> None:
    with pytest.raises(LookupError, match="'d'"):
        slow_except(["a", "b"], "a", "d")


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_only_the_fast_run_leaves_out_optimizations(
    slow: bool, pytestconfig: pytest.Config
) -> None:
    if pytestconfig.option.markexpr not in ("slow", "not slow"):
        pytest.skip("another choice of tests")
    assert os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == (None if slow else "1")
