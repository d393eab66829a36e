"""The mutants of a file, and that tests without a hold on a line are seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.robustness.mutants import main, mutants

SOURCE = """def bound(spread, scale):
    if spread is None or scale < 0:
        return min(spread, 8.0 * scale)
    return scale
"""
TEST = """from small import bound
def test_bound():
    assert bound(1.0, 2.0) == 2.0
"""


def test_each_decision_is_changed_once() -> None:
    changes = [mutant.change for mutant in mutants(SOURCE)]
    assert "spread is None -> spread is not None" in changes
    assert "scale < 0 -> scale <= 0" in changes
    assert "spread is None or scale < 0 -> spread is None and scale < 0" in changes
    assert {"min -> max", "8.0 -> 12.0", "8.0 * scale -> 8.0 / scale"} <= {*changes}
    assert "return scale -> return None" in changes
    assert len(changes) == len({*changes}) == 9
    sources = [mutant.source for mutant in mutants(SOURCE)]
    assert len({*sources}) == len(sources)  # one change each, and no two alike
    assert [mutant.change for mutant in mutants(SOURCE, range(4, 5))] == [changes[-1]]


@pytest.mark.slow
def test_a_line_that_no_test_holds_is_printed_and_the_file_is_as_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.py").write_text(SOURCE)
    (tmp_path / "test_small.py").write_text(TEST)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.chdir(tmp_path)
    assert main(["small.py", "--tests", "test_small.py", "--lines", "2-4"]) == 1
    said = capsys.readouterr().out
    assert "small.py:3: min -> max" in said and "return scale -> return None" not in said
    assert (tmp_path / "small.py").read_text() == SOURCE
    assert main(["small.py", "--tests", "test_small.py", "--lines", "4"]) == 0  # the control
