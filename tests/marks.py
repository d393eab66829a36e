"""Which cases of a test are slow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(cases: Iterable[Any], *fast: object) -> list[Any]:
    """The cases of a test, of which only `fast` belong to the default run.

    Args:
        cases: for `pytest.mark.parametrize`. A case is called by its first value.
        fast: names of cases.
    """
    named = {_name(case): case for case in cases}
    missing = [name for name in fast if name not in named]
    if missing:
        raise LookupError(f"no such cases: {missing}")
    return [_case(case, name in fast) for name, case in named.items()]


def _name(case: Any) -> object:
    return case[0] if isinstance(case, tuple) else case


def _case(case: Any, fast: bool) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=() if fast else pytest.mark.slow)
