"""What the two modules of a user's pair start from: `--init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.common.config import Config
from lockstep.common.errors import ConfigError
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.runs import record
from tests.cli.test_main import lockstep

PAIR = """
from flax import nnx
from lockstep import Pair
from torch import nn


def build_torch(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))


class Head(nnx.Module):
    def __init__(self, classes, rngs):
        self.head = nnx.Linear(3072, classes, rngs=rngs, kernel_init=nnx.initializers.constant(0.01))

    def __call__(self, x):
        return self.head(x.transpose(0, 3, 1, 2).reshape(len(x), -1))


PAIR = Pair(build_torch, Head, names={"1": "head"})
"""


@pytest.fixture
def pair(tmp_path: Path) -> str:
    path = tmp_path / "pair.py"
    path.write_text(PAIR)
    return f"{path}:PAIR"


def start(pair: str, folder: Path, *options: str) -> record.Record:
    """The record of one step of PyTorch's, which holds what it started from."""
    length = ["--steps", "1", "--batch-size", "4", "--data", "digits", "--dtype", "float64"]
    run = [*length, "--backend", "torch", "--quiet", "--out", str(folder)]
    assert lockstep("--model", pair, *run, *options) == 0
    return record.read(folder / "torch-float64.safetensors")


@pytest.mark.slow
def test_a_pair_starts_from_its_pytorch_module_unless_told_otherwise(
    pair: str, tmp_path: Path
) -> None:
    bound = 1 / np.sqrt(3072)  # of nn.Linear's own uniform distribution
    own = start(pair, tmp_path / "own").weights
    assert 0.9 * bound < np.abs(own["head.kernel"]).max() <= bound and own["head.bias"].any()
    named = start(pair, tmp_path / "named", "--init", "torch").weights
    assert all(np.array_equal(own[name], named[name]) for name in own)
    flax = start(pair, tmp_path / "flax", "--init", "flax").weights
    assert (flax["head.kernel"] == np.float32(0.01)).all() and not flax["head.bias"].any()
    drawn = start(pair, tmp_path / "numpy", "--init", "numpy").weights
    shapes = {name: array.shape for name, array in own.items()}
    expected = initial_weights(shapes, 0, "float64")
    assert all(np.array_equal(drawn[name], expected[name]) for name in expected)
    other = start(pair, tmp_path / "other", "--seed", "1").weights
    assert not np.array_equal(own["head.kernel"], other["head.kernel"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": "torch"}, "--init torch is for a pair of your own"),
        ({"init": "keras", "pair": "x", "model": "f.py:P"}, "unknown --init 'keras'"),
        ({"init": "numpy", "weights": "x"}, "--init and --weights both say"),
    ],
)
def test_a_start_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**fields)


def test_the_configuration_says_whose_start_it_is() -> None:
    of_pair: Any = {"model": "f.py:P", "pair": "digest"}
    assert Config().starts_from == Config(init="numpy").starts_from == "numpy"
    assert Config(**of_pair).starts_from == "torch"
    assert Config(**of_pair, init="flax").starts_from == "flax"
    assert "init" not in Config(**of_pair).to_json()  # as reports of earlier versions
