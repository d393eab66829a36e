"""The first line of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.common.config import Config
from lockstep.common.request import Request
from lockstep.common.runs.estimate import announcement


@pytest.mark.parametrize("weights", [None, Path("mine.pt")])
@pytest.mark.parametrize("model", ["net", "port.py:PAIR"])
@pytest.mark.parametrize("init", [None, "numpy"])
def test_a_pair_is_told_what_it_starts_from(
    model: str, weights: Path | None, init: str | None
) -> None:
    config = Config(model=model, pair="0" * 64 if ":" in model else None, steps=3, init=init)
    said = announcement(Request(config, data="digits", weights=weights))
    assert said.startswith(f"Training {model} in PyTorch and Flax on the digits")
    own = model != "net" and weights is None
    assert ("from the initial weights of your PyTorch module" in said) == (own and init is None)
    assert ("from weights that Lockstep draws" in said) == (own and init == "numpy")
    assert "3 steps of batch 4" in said
