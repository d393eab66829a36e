"""The index of a folder of results: verdicts, pictures, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lockstep.common.errors import RecordError
from lockstep.common.report.first_screen import VERDICTS
from lockstep.common.report.index import HEIGHT, WIDTH, write_index_page
from tests.pages.browser import chromium, examine

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run, two scripts and some evidence, to change."""
    for name in ("quick", "versions/compiled", "alarms-mlp"):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(RESULTS / name / "report.json", tmp_path / name)
    return tmp_path


def change(path: Path, edit: Callable[[Any], object]) -> None:
    report = json.loads(path.read_text())
    edit(report)
    path.write_text(json.dumps(report))


def written(folder: Path) -> str:
    return write_index_page(folder).read_text("utf-8")


def paths(page: str, kind: str) -> list[str]:
    body = page[page.index("<main") :]
    return re.findall(rf'<path class="{kind}" d="([^"]+)"', body)


def test_a_run_has_its_verdict_and_a_picture_of_each_precision(folder: Path) -> None:
    page = written(folder)
    assert page.count("</span> The two runs agree</p>") == 2
    assert 'href="quick/report.html"' in page and 'href="alarms-mlp/report.json"' in page
    assert "<figcaption>float64: gap 8.9e-16, bound 2.4e-12</figcaption>" in page
    said = "float64: the losses&#39; gap is at most 8.9e-16, its bound 2.4e-12. The gap begins at"
    assert f'aria-label="{said} 4.4e-16' in page
    assert page.count('role="img"') == 4  # two precisions each


@pytest.mark.parametrize("verdict", [name for name in VERDICTS if name != "cut short"])
def test_each_verdict_is_said_in_words_and_with_a_sign(verdict: str, folder: Path) -> None:
    change(folder / "quick" / "report.json", lambda report: report.update(verdict=verdict))
    page = written(folder)
    said = VERDICTS[verdict]
    assert f'<span aria-hidden="true">{said.icon}</span> {said.words}' in page
    change(folder / "quick" / "report.json", lambda report: report.update(cut_short="stopped"))
    assert f"</span> {VERDICTS['cut short'].words}" in written(folder)


def test_the_line_of_the_gap_is_lower_for_a_smaller_gap_and_lies_in_the_picture(
    folder: Path,
) -> None:
    """The heights in float64 and float32; a gap of 0 lies at the lower edge, none is left out."""

    def heights(path: str) -> list[float]:
        return [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]

    drawn = [path for path in paths(written(folder), "gap") if " 6H26" not in path]
    float64, float32 = (heights(path) for path in drawn[:2])
    assert min(float64) > max(float32[1:]) > min(float32)  # further down: a smaller gap
    assert float32[0] == HEIGHT  # float32's first step has no gap at all
    for path in drawn:
        assert all(0 <= y <= HEIGHT for y in heights(path))
        assert max(float(x) for x in re.findall(r"H([\d.]+)", path)) == WIDTH

    def remove(report: Any) -> None:
        for row in report["lenses"][0]["stretches"]:
            row["gap"] = None

    change(folder / "quick" / "report.json", remove)
    page = written(folder)
    assert "float64: no finite loss" in page
    assert len([path for path in paths(page, "gap") if " 6H26" not in path]) == len(drawn) - 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "quick/report.json cannot be read"),
        ("[]", "quick/report.json is no report"),
        ('{"lenses": [{}], "verdict": "agree"}', "not a report of this version of Lockstep"),
    ],
    ids=["damaged", "a list", "without its keys"],
)
def test_a_report_that_cannot_be_used_is_named_in_one_line(
    content: str, said: str, folder: Path
) -> None:
    written(folder)  # the control
    (folder / "quick" / "report.json").write_text(content)
    with pytest.raises(RecordError, match=re.escape(said)) as raised:
        written(folder)
    assert "\n" not in str(raised.value)


def test_names_are_escaped_and_what_lies_below_runs_is_left_out(folder: Path) -> None:
    shutil.copytree(folder / "quick", folder / "runs" / "private")
    shutil.copytree(folder / "quick", folder / "<b>odd")
    page = written(folder)
    assert "private" not in page and "&lt;b&gt;odd" in page and "<b>odd" not in page


def test_the_tutorials_network_comes_first(folder: Path) -> None:
    shutil.copytree(folder / "quick", folder / "another")
    change(folder / "another" / "report.json", lambda report: report["config"].update(model="mlp"))
    page = written(folder)
    assert page.index("quick/report.html") < page.index("another/report.html")
    change(folder / "quick" / "report.json", lambda report: report["config"].update(model="vit"))
    page = written(folder)  # the control
    assert page.index("quick/report.html") > page.index("another/report.html")


@pytest.mark.slow
def test_an_index_of_every_kind_can_be_read_by_everyone(folder: Path) -> None:
    for number, verdict in enumerate(VERDICTS):
        copy = folder / f"copy-{number}"
        shutil.copytree(folder / "quick", copy)
        known = {"cut_short": "stopped"} if verdict == "cut short" else {"verdict": verdict}
        change(copy / "report.json", lambda report, known=known: report.update(known))
    with chromium() as browser:
        assert examine(browser, write_index_page(folder)) == []
