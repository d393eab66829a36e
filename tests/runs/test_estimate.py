"""The first line of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.common.config import Config
from lockstep.common.request import Request
from lockstep.common.runs.estimate import announcement


@pytest.mark.parametrize("weights", [None, Path("mine.pt")])
@pytest.mark.parametrize("model", ["net", "port.py:PAIR"])
def test_a_pair_that_does_not_start_from_its_own_weights_is_told_so(
    model: str, weights: Path | None
) -> None:
    config = Config(model=model, pair="0" * 64 if ":" in model else None, steps=3)
    said = announcement(Request(config, data="digits", weights=weights))
    assert said.startswith(f"Training {model} in PyTorch and Flax on the digits")
    told = "from weights that Lockstep draws, not your modules' own" in said
    assert told == (model != "net" and weights is None)
    assert "3 steps of batch 4" in said
