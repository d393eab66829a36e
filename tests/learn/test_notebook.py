"""The notebook of the lesson: made from the same sources as the page, and it runs."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from lockstep.common.learn import SourceError, read_report, write_lesson_notebook
from lockstep.common.learn.faults_report import FaultsReport
from lockstep.common.learn.lesson import FILES
from lockstep.common.learn.lesson_text import SECTIONS

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "results" / "read" / "lesson.ipynb"


@pytest.fixture(scope="module")
def report() -> FaultsReport:
    return read_report(ROOT / "results" / "faults" / "report.json")


@pytest.fixture(scope="module")
def path(report: FaultsReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lesson_notebook(tmp_path_factory.mktemp("notebook") / "a.ipynb", ROOT, report)


def cells(notebook: Any, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def run(notebook: Any) -> str:
    """Execute the cells in order, as a kernel does, and return what they print."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, source in enumerate(cells(notebook, "code")):
            exec(compile(source, f"cell {number}", "exec"), names)
    return printed.getvalue()


def test_the_notebook_has_the_form_of_nbformat(path: Path) -> None:
    notebook = json.loads(path.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(ids) == len(set(ids)) and all(re.fullmatch(r"[\w-]{1,64}", i) for i in ids)
    own = {"markdown": set(), "code": {"execution_count", "outputs"}}
    for cell in notebook["cells"]:
        assert cell.keys() == {"id", "cell_type", "metadata", "source"} | own[cell["cell_type"]]
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        assert cell["source"] and not cell["source"][-1].endswith("\n")


def test_the_notebook_is_the_program_and_the_notes_of_the_lesson(path: Path) -> None:
    notebook = json.loads(path.read_text("utf-8"))
    code, text = ("\n".join(cells(notebook, kind)) for kind in ("code", "markdown"))
    flax, torch = ((ROOT / FILES[side]).read_text("utf-8") for side in ("flax", "torch"))
    body = flax[flax.index("BATCH_SIZE") : flax.index("if __name__")]
    for line in filter(None, body.splitlines()):
        assert code.count(line) >= 1, line
    for line in ("optimizer.zero_grad()", "x = x.flatten(1)  # channels, height, width"):
        assert line in torch and line in text and line not in code
    assert text.count("def batches(") == 0 and code.count("def batches(") == 1
    for number, note in enumerate((n for section in SECTIONS for n in section.notes), 1):
        assert f"**{number}. {note.title}.** {note.text}" in text


def test_the_committed_notebook_is_made_from_the_sources_as_they_are(
    path: Path, report: FaultsReport, tmp_path: Path
) -> None:
    assert COMMITTED.read_bytes() == path.read_bytes(), (
        "make it again: python compare.py learn --out results/read"
    )
    shutil.copytree(ROOT / "backends" / "lesson", tmp_path / "backends" / "lesson")
    program = tmp_path / FILES["flax"]
    program.write_text(program.read_text().replace("nnx.relu", "nnx.gelu"))
    other = write_lesson_notebook(tmp_path / "other.ipynb", tmp_path, report)  # the control
    assert other.read_bytes() != path.read_bytes()


def test_a_definition_that_is_gone_is_named(report: FaultsReport, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "backends" / "lesson", tmp_path / "backends" / "lesson")
    program = tmp_path / FILES["flax"]
    program.write_text(program.read_text().replace("def train_step(", "def one_step("))
    with pytest.raises(SourceError, match=r"flax_train.py has no train_step"):
        write_lesson_notebook(tmp_path / "a.ipynb", tmp_path, report)
    program.unlink()
    with pytest.raises(SourceError, match=r"flax_train.py cannot be read"):
        write_lesson_notebook(tmp_path / "a.ipynb", tmp_path, report)


@pytest.mark.slow
def test_the_notebook_runs_from_the_first_cell_to_the_last(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCKSTEP_DATA", raising=False)
    text = path.read_text("utf-8")
    assert text.count("steps=2000") == 1
    printed = run(json.loads(text.replace("steps=2000", "steps=300")))  # all cells, in less time
    assert re.search(r"^digits, steps 0 on: mean loss \d\.\d+$", printed, re.MULTILINE)
    assert re.search(r"^PyTorch: .* \d\.\d+\nJAX: .* \d\.\d+\nagree$", printed, re.MULTILINE)
    assert "the float64 runs diverge: update: step 1: momentum of conv1.bias" in printed


def test_a_cell_that_fails_is_noticed(path: Path) -> None:
    notebook = copy.deepcopy(json.loads(path.read_text("utf-8")))
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"][-1:]
    with pytest.raises(NameError, match="load_backend"):
        run(notebook)
