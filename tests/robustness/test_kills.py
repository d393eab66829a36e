"""The harness that kills runs: its quick form finds all equal, and it notices what it is there to
notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lockstep.common.runs import checkpoint, record
from tests.robustness import kills
from tests.robustness.kills import Cell, Death, Run
from tests.runs.test_checkpoint import make
from tests.runs.test_record import make as make_record

REPOSITORY = Path(__file__).resolve().parents[2]
CELL = Cell("torch", "float32", 4, steps=60, every=15)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_runs_that_are_killed_and_resumed_are_equal_to_the_bit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.robustness.kills", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["schema"], report["equal"]) == (1, True)
    assert [(cell["backend"], cell["runs"], cell["equal"]) for cell in report["cells"]] == [
        ("torch", 1, 1),
        ("flax", 1, 1),
    ]
    assert all(cell["kills"] >= 1 for cell in report["cells"])
    found = {(row["call"], row["moment"]): set() for row in report["boundaries"]}
    for row in report["boundaries"]:
        found[row["call"], row["moment"]].add(row["found"])
    assert found["write", "half"] == found["replace", "before"] == {"old"}
    assert found["replace", "after"] == {"new"}
    assert found["fsync", "before"] == {"old", "new"}, "of the file, and of its folder"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run in whose folder two checkpoints lie, which it has told of."""
    made = Run(CELL, tmp_path / "place", tmp_path / "cache")
    made.notes = kills.Notes(made.place / "notes0")
    for step in (3, 4):
        checkpoint.write(make(step), made.folder)
        made.notes("kept", "torch-float32", step)
    assert made.damage() == []
    return made


def test_a_damaged_file_is_noticed(run: Run) -> None:
    path = checkpoint.found(run.folder, "torch-float32")[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert len(run.damage()) == 1 and "is damaged" in run.damage()[0]


@pytest.mark.parametrize(
    "name", ["report.json", "run.json", "losses.png", "losses.svg", "report.html", "strange.txt"]
)
def test_a_damaged_file_of_each_kind_is_noticed(run: Run, name: str) -> None:
    (run.folder / name).write_bytes(b"{")
    assert len(run.damage()) == 1 and run.damage()[0].startswith(f"{name} is damaged")


def test_what_is_not_whole_yet_is_no_damage_while_it_is_called_so(run: Run) -> None:
    (run.folder / ".report.json.abcdefgh.part").write_bytes(b"{")
    assert run.damage() == []
    assert ".report.json.abcdefgh.part is left over" in run.outcome({})


def test_a_checkpoint_that_is_lost_is_noticed(run: Run) -> None:
    checkpoint.found(run.folder, "torch-float32")[0].unlink()
    assert run.damage() == [
        "the checkpoint of torch-float32 after step 4, which was finished, is lost"
    ]


def test_a_record_that_is_lost_is_noticed(run: Run) -> None:
    run.notes("recorded", "torch-float32")
    assert run.damage() == ["the record of torch-float32, which was finished, is lost"]


def test_checkpoints_that_pile_up_are_noticed(run: Run) -> None:
    for step in (5, 6, 7):
        path = checkpoint.write(make(step), run.folder.parent / "elsewhere")
        path.rename(run.folder / checkpoint.FOLDER / path.name)
    assert run.damage() == ["5 checkpoints of torch-float32"]


def test_a_record_that_differs_by_one_bit_is_noticed(tmp_path: Path) -> None:
    run = Run(CELL, tmp_path / "place", tmp_path / "cache")
    mine = make_record()
    record.write(mine, run.folder)
    expected = kills.digests_in(run.folder)
    assert run.outcome(expected) == []
    bias = mine.final["conv1.bias"]
    bias[-1] = np.nextafter(bias[-1], np.asarray(9, bias.dtype))
    record.write(mine, run.folder)
    assert run.outcome(expected) == ["torch-bfloat16 final differs"]
    (run.folder / "torch-bfloat16.safetensors").unlink()
    assert len(run.outcome(expected)) == len(expected)


def test_what_is_left_of_a_finished_run_is_noticed(run: Run) -> None:
    assert "checkpoints is left over" in run.outcome({})


def test_each_call_for_the_last_two_checkpoints_is_a_boundary() -> None:
    calls = [
        (0, "mkstemp", "run.json"),
        (1, "write", "checkpoint 2"),
        (2, "write", "checkpoint 4"),
        (3, "fsync", "checkpoint 6"),
    ]
    assert kills.boundaries_of(calls) == [
        (Death(0, "before"), "mkstemp", "run.json"),
        (Death(0, "after"), "mkstemp", "run.json"),
        (Death(2, "before"), "write", "checkpoint 4"),
        (Death(2, "half"), "write", "checkpoint 4"),
        (Death(2, "after"), "write", "checkpoint 4"),
        (Death(3, "before"), "fsync", "checkpoint 6"),
        (Death(3, "after"), "fsync", "checkpoint 6"),
    ]


def test_the_exit_status_says_whether_all_are_equal() -> None:
    cell = {"runs": 2, "equal": 2, "problems": []}
    found = {
        "cells": [cell],
        "boundaries": [{"equal": True}],
        "signals": [{"equal": True}],
        "pieces": [{"differs": {}}],
    }
    assert kills.equal(found)
    for worse in (
        {"cells": [cell | {"equal": 1}]},
        {"cells": [cell | {"problems": ["the reference differs"]}]},
        {"boundaries": [{"equal": False}]},
        {"signals": [{"equal": False}]},
        {"pieces": [{"differs": {"3": ["loss"]}}]},
    ):
        assert not kills.equal(found | worse)


def test_what_was_found_is_committed_and_all_of_it_is_equal() -> None:
    report = json.loads((REPOSITORY / "results" / "kills" / "report.json").read_text())
    assert report["equal"] and kills.equal(report)
    assert sum(cell["runs"] for cell in report["cells"]) >= 200
    kinds = {(cell["backend"], cell["dtype"], cell["batch_size"]) for cell in report["cells"]}
    assert {
        (b, d, n) for b in ("torch", "flax") for d in ("float64", "float32") for n in (4, 128)
    } <= kinds
    assert {row["moment"] for row in report["boundaries"]} == {"before", "half", "after"}
    assert {row["steps"] for row in report["pieces"]} == {kills.PIECES}
