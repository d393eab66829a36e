"""Fixtures of the data tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_home_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.delenv("LOCKSTEP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("LOCKSTEP_OFFLINE", "1")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def lines() -> list[str]:
    return []
