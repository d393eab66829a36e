"""The pytest plug-in: a fixture for `same_run`. It imports no framework before a test uses it."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def same_run() -> Callable[..., object]:
    """`lockstep.same_run`: trains two backends and checks whether the two runs are the same run."""
    from lockstep.common.testing import same_run

    return same_run
