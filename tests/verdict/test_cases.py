"""Correct pairs that were called different, and a pair next to each that is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lockstep import backends
from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.evidence import judge, pair_check, train_ensemble
from lockstep.common.model.pair import source_digest
from lockstep.common.protocol import Backend

CASE = f"{Path(__file__).with_name('scale_before_norm.py')}:PAIR"


def resolved(digits: Dataset) -> Config:
    config = Config(model=CASE, pair=source_digest(CASE), steps=4, batch_size=16, lr=0.01)
    return config.resolve(len(digits.train_images))


@pytest.fixture(scope="module")
def sides(digits: Dataset) -> dict[str, Backend]:
    config = resolved(digits)
    return {name: backends.load(name)(config, 10, "float64", "cpu", "off") for name in BACKENDS}


@pytest.mark.slow
def test_a_gradient_that_cancels_is_judged_by_twins_in_the_first_step(
    digits: Dataset, sides: dict[str, Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, (torch, flax) = resolved(digits), sides.values()
    assert pair_check.measure(torch, flax, config, digits).first_difference is None
    ensembles = {
        name: train_ensemble(side, config, digits, "float64", 0) for name, side in sides.items()
    }
    found = judge(ensembles, sides, config, digits)
    assert found.verdict == "agree", found
    # The control: the same small share of a gradient that does not cancel.
    probe: Callable = flax.probe

    def wrong(state: object, images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        tensors = dict(probe(state, images, labels))
        tensors["backward/head.kernel"] = tensors["backward/head.kernel"] * (1 + 1e-11)
        return tensors

    monkeypatch.setattr(flax, "probe", wrong)
    first = pair_check.measure(torch, flax, config, digits).first_difference
    assert first is not None and first.divergence.stage == "backward"
    assert first.divergence.tensor == "head.kernel"
