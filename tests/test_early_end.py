"""A comparison ends early where float64's first steps differ for certain, and says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.cli import main
from lockstep.common.config import Config
from lockstep.common.runs.record import Record
from lockstep.common.runs.watch import FirstStepsDiffer, FirstStepsWatch

# A port that forgets in which order PyTorch flattens; FLATTENED says it.
PAIR = """
import torch
from flax import nnx
from lockstep import Pair


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.head = nnx.Linear(32 * 32 * 3, classes, rngs=rngs)

    def __call__(self, x):
        return self.head(x.reshape(len(x), -1))


def original(classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, classes))


PAIR = Pair(torch=original, flax=Port, names={"1": "head"}, flattened=FLATTENED)
"""


def first_steps(backend: str, change: float = 0.0) -> Record:
    """The first steps of a run of one number, whose first loss is changed."""
    steps, weights = np.zeros(2), {"a": np.ones(1)}
    return Record(
        backend=backend,
        dtype="float64",
        twin=None,
        config=Config(steps=9).resolve(100).to_json(),
        data={},
        environment={},
        source="",
        loss=steps,
        gradient_norm=steps,
        lr=steps,
        predictions=np.zeros(0, np.int64),
        test_loss=0.0,
        seconds=0.0,
        steps_per_second=0.0,
        weights=weights,
        first_steps={"0/loss/loss": np.array(1.0 + change), "1/loss/loss": np.array(0.5)},
        final=weights,
        batch_digests=np.zeros(2, np.int64),
    )


@pytest.mark.parametrize(
    ("change", "differs"),
    [(0.0, False), (1e-13, False), (5e-10, False), (1e-8, True), (float("nan"), True)],
    ids=["equal", "rounding", "twins may explain it", "certain", "not a number"],
)
def test_only_a_difference_that_no_twin_explains_ends_the_training(
    change: float, differs: bool
) -> None:
    watch = FirstStepsWatch()
    watch.add(first_steps("flax", change))
    watch.check()  # one side alone says nothing
    watch.add(first_steps("torch"))
    assert watch.differs == differs
    assert bool(watch.records) == differs  # else nobody needs them
    if differs:
        with pytest.raises(FirstStepsDiffer):
            watch.check()


@pytest.mark.slow
def test_an_early_end_says_what_the_whole_run_says(tmp_path: Path) -> None:
    wrong, right = tmp_path / "wrong.py", tmp_path / "right.py"
    wrong.write_text(PAIR.replace("FLATTENED", "{}"))
    right.write_text(PAIR.replace("FLATTENED", '{"1": (3, 32, 32)}'))
    run = ["--data", "digits", "--steps", "250", "--quiet"]
    folder = tmp_path / "early"

    def report(folder: Path) -> dict[str, Any]:
        return json.loads((folder / "report.json").read_text())

    assert main([*run, "--model", f"{wrong}:PAIR", "--out", str(folder)]) == 1
    found = report(folder)
    assert "--keep-going trains it all" in str(found["ended_early"])
    assert not list(folder.glob("flax-*"))  # nothing that was begun, and no shorter run
    assert not list(folder.glob("*.png"))
    assert found["data"]["sizes"]["test"] > found["lenses"][0]["predictions_total"] == 50
    page = (folder / "report.html").read_text()
    assert "The rest was not trained" in page and "Confusion matrices" not in page

    assert main(["--resume", str(folder), "--keep-going", "--quiet"]) == 1  # it trains it all
    whole = report(folder)
    assert "ended_early" not in whole
    assert len(list(folder.glob("*.safetensors"))) == 8
    assert found["config"] == whole["config"]
    assert (folder / "losses.png").exists()
    assert "Confusion matrices" in (folder / "report.html").read_text()
    (first,), (long, _) = found["lenses"], whole["lenses"]
    assert (first["steps"], long["steps"]) == (2, 250)
    assert (first["located"], first["verdict"]) == (long["located"], long["verdict"])

    agreeing = tmp_path / "agreeing"  # the control: without the mistake nothing ends early
    assert main([*run, "--model", f"{right}:PAIR", "--out", str(agreeing)]) == 0
    assert "ended_early" not in report(agreeing)
