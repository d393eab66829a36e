"""The command `report`: the page of a finished run, made again from its records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lockstep.common.errors import RecordError
from lockstep.common.report import saved
from tests.cli.test_main import lockstep

RUN = [
    "--data",
    "digits",
    "--steps",
    "3",
    "--batch-size",
    "4",
    "--dtype",
    "float32",
    "--twins",
    "1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both backends, with a twin of each."""
    folder = tmp_path_factory.mktemp("run")
    assert lockstep(*RUN, "--quiet", "--out", folder) == 0
    return folder


@pytest.mark.slow
def test_the_same_page_and_pictures_are_made_again_in_any_folder(run: Path, tmp_path: Path) -> None:
    assert lockstep("report", run, "--out", tmp_path / "again") == 0
    for path in (tmp_path / "again").iterdir():
        if path.name == "report.html":
            # The records lie next to the first page alone.
            page = path.read_text("utf-8")
            assert "torch-float32-twin1.safetensors</a>" in (run / path.name).read_text("utf-8")
            assert "safetensors</a>" not in page and "report.json</a>" in page
        else:
            assert path.read_bytes() == (run / path.name).read_bytes()
    before = (run / "report.html").read_bytes()
    (run / "report.html").unlink()
    assert lockstep("report", run) == 0
    assert (run / "report.html").read_bytes() == before


def test_what_is_missing_or_damaged_is_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "flax-float32-twin1.safetensors").unlink()
    assert lockstep("report", copy) == 2
    assert "flax-float32-twin1.safetensors" in capsys.readouterr().err
    (copy / "report.json").write_text("[]")
    assert lockstep("report", copy) == 2
    assert "is not the report of a run" in capsys.readouterr().err
    (copy / "report.json").unlink()
    assert lockstep("report", copy) == 2
    assert "holds no report.json" in capsys.readouterr().err
    assert lockstep("report") == 2
    assert "report needs the folder of a run" in capsys.readouterr().err
    assert lockstep("report", tmp_path / "nowhere") == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["{", "null", '{"lenses": 1}', '{"lenses": [1]}', '{"lenses": [{"dtype": "float8"}]}']
)
def test_what_is_not_a_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(RecordError, match=r"report\.json"):
        saved.read_report(tmp_path)
    good = {"lenses": [{"dtype": "float64", "accuracy": {}, "twins": {}}]}
    (tmp_path / "report.json").write_text(json.dumps(good))  # the control
    assert saved.read_report(tmp_path) == good
