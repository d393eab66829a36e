"""report.json: JSON that any parser reads, and a reader that refuses anything else."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lockstep.common.report import jsonable, sentence, write_json
from tests.report.helpers import HOSTILE, make


def test_numbers_that_are_not_finite_become_null_and_numpy_becomes_plain() -> None:
    value = {
        1: np.float32(0.5),
        "n": [math.nan, np.inf, np.int64(3), np.bool_(True)],
        "a": np.array([1.0, -np.inf]),
    }
    assert jsonable(value) == {"1": 0.5, "n": [None, None, 3, True], "a": [1.0, None]}
    assert jsonable((np.array(2), Path("x"), "text", None, True)) == [2, "x", "text", None, True]
    assert type(jsonable(np.bool_(True))) is bool and type(jsonable(np.array(2))) is int


def test_the_report_is_json_that_any_parser_reads(tmp_path: Path) -> None:
    path = write_json(make("agree", classes=HOSTILE) | {"x": math.nan}, tmp_path / "new")
    read = json.loads(path.read_text("ascii"), parse_constant=pytest.fail)
    assert (
        path.name == "report.json"
        and read["x"] is None
        and read["data"]["classes"] == list(HOSTILE)
    )


def test_a_report_is_read_as_it_was_written_and_older_ones_are_read_too(tmp_path: Path) -> None:
    report = make("disagree", "agree")
    assert json.loads(write_json(report, tmp_path).read_text()) == report
    [committed, *_] = sorted((Path(__file__).parents[2] / "results").glob("quick/report.json"))
    assert sentence(json.loads(committed.read_text())).startswith("The two runs ")
