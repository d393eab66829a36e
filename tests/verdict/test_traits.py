"""What failing tensors have in common is said where those that do not fail lack it."""

from __future__ import annotations

import pytest

from lockstep.common.verdict.traits import common_trait

NAMES = {
    name: (name, name.replace("weight", "kernel"))
    for name in (
        "a.fc.weight", "a.fc.bias", "a.norm.weight", "b.fc.weight", "b.fc.bias", "b.norm.weight"
    )
}  # fmt: skip
AXES = {name: 2 if name.endswith("fc.weight") else 1 for name in NAMES}


@pytest.mark.parametrize(
    ("failing", "trait"),
    [
        (list(NAMES), "every tensor"),
        (["a.fc.weight", "b.fc.weight"], "all kernels, no vector"),
        (["a.fc.bias", "b.fc.bias"], "all that end in bias, no other"),
        (["a.fc.weight", "a.fc.bias", "a.norm.weight"], "all of a, no other"),
        (["a.fc.bias", "b.norm.weight"], "a.fc.bias, b.norm.weight"),
        (["a.fc.bias", "a.norm.weight", "b.fc.bias"], "a.fc.bias, a.norm.weight, b.fc.bias"),
        ([], ""),
    ],
)
def test_the_trait_of_those_that_fail(failing: list[str], trait: str) -> None:
    passing = [name for name in NAMES if name not in failing]
    assert common_trait(failing, passing, NAMES, AXES) == trait
