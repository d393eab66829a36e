"""`lockstep.compare`, called from Python: one call that trains, judges, locates and reports."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.backends import faults
from lockstep.common.data import Dataset
from tests.conftest import draw_nothing

CONFIG = lockstep.Config(model="mlp", steps=3, batch_size=8, lr=0.01)


compared = functools.partial(
    lockstep.compare, CONFIG, data="digits", dtypes=["float64"], device="cpu"
)


@pytest.mark.usefixtures("built_once")
def test_one_call_trains_judges_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = compared(out=tmp_path / "run")
    assert result and result.verdict == "agree"
    assert (result.place, result.causes, result.interrupted_at) == (None, (), None)
    assert result.sentence.startswith("The two runs agree: float64 within ")
    assert result.folder == tmp_path / "run"
    assert json.loads((result.folder / "report.json").read_text()) == result.report
    assert (result.folder / "report.html").exists()
    assert capsys.readouterr() == ("", ""), "it is quiet unless asked"
    draw_nothing(monkeypatch)
    compared(out=tmp_path / "loud", quiet=False)  # control
    assert "The two runs agree" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("undrawn")
def test_a_broken_port_disagrees_and_is_located(tmp_path: Path, digits: Dataset) -> None:
    """The control of the test above."""
    config = CONFIG.resolve(len(digits.train_images))
    with faults.inject(faults.named("labels-from-one"), config, digits):
        result = compared(out=tmp_path)
    assert not result and result.verdict == "disagree"
    assert result.place is not None and result.place.startswith("data: step 0: labels")
    assert result.causes
    assert "The two runs disagree." in result.sentence


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"recipe": "quik"}, "did you mean quick"),
        ({"dtypes": ["float16"]}, "float64"),
        ({"dtypes": ["float32"], "twins": 0}, "--twins"),
        ({"data": "nowhere"}, "nowhere"),
        ({"weights": "weights.txt"}, "weights.txt"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_a_wrong_request_is_a_lockstep_error_and_leaves_nothing(
    tmp_path: Path, settings: dict[str, Any], word: str
) -> None:
    with pytest.raises(lockstep.LockstepError, match=word) as raised:
        compared(out=tmp_path / "run", **settings)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
