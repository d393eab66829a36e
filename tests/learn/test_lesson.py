"""The lesson: two plain programs, with notes at the lines that they are about."""

from __future__ import annotations

import copy
import dataclasses
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.common.config import BACKENDS
from lockstep.common.learn import SourceError, read_report, write_lesson_page
from lockstep.common.learn.faults_report import FaultsReport
from lockstep.common.learn.lesson import FILES
from lockstep.common.learn.lesson_text import SECTIONS, LessonSection
from tests.learn.test_side_by_side import words_of
from tests.pages.browser import HEIGHT, chromium, examine

ROOT = Path(__file__).resolve().parents[2]
MAX_SCREENS = 6  # of 1440 x 900 pixels


@pytest.fixture(scope="module")
def report() -> FaultsReport:
    return read_report(ROOT / "results" / "faults" / "report.json")


@pytest.fixture(scope="module")
def page(report: FaultsReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lesson_page(tmp_path_factory.mktemp("lesson") / "lesson.html", ROOT, report)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


def first_note(section: LessonSection, **changes: Any) -> list[LessonSection]:
    """This section alone, with its first note changed."""
    note = dataclasses.replace(section.notes[0], **changes)
    return [dataclasses.replace(section, notes=(note,))]


def test_the_page_has_every_line_of_the_network_and_of_the_step(page: Path) -> None:
    said = " ".join(words_of(page.read_text("utf-8")).split())
    for side, steps in (
        ("torch", "optimizer.zero_grad()"),
        ("flax", "nnx.value_and_grad(loss_of)"),
    ):
        assert FILES[side] in said and steps in said
    assert "sys.path" not in said


def test_each_note_is_referred_to_from_its_lines_and_numbered_once(page: Path) -> None:
    text = page.read_text("utf-8")
    notes = [note for section in SECTIONS for note in section.notes]
    assert re.findall(r'<li id="note-(\d+)">', text) == [str(n + 1) for n in range(len(notes))]
    for number, note in enumerate(notes, 1):
        lines = sum(snippet is not None for snippet in (note.torch, note.flax))
        asked = note.question != ""
        assert text.count(f'href="#note-{number}"') == lines + asked > asked, note.title


def test_the_page_says_where_each_fault_was_found(page: Path, report: FaultsReport) -> None:
    said = " ".join(words_of(page.read_text("utf-8")).split())
    [row] = [row for row in report["rows"] if row["name"] == "same-padding"]
    found = row["lenses"]["float64"]
    assert found["gap"] is not None
    assert (
        f"Known fault same-padding: found in step {found['step']}, at {found['stage']}, "
        f"{found['tensor']}, off by {found['gap']:.2g}." in said
    )


@pytest.mark.parametrize("side", BACKENDS)
def test_a_note_whose_line_is_gone_or_not_the_only_one_is_refused(
    side: str, report: FaultsReport, tmp_path: Path
) -> None:
    for snippet in ("no such line", "self.fc"):
        changed = first_note(SECTIONS[0], **{side: snippet})
        with pytest.raises(SourceError, match=rf"{side}_train.py: .*{snippet}.*in the section"):
            write_lesson_page(tmp_path / "page.html", ROOT, report, changed)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("file", "old", "said"),
    [
        (FILES["flax"], "def train_step(", "flax_train.py has no train_step"),
        (
            "backends/flax_backend/backend.py",
            "def _step(",
            "the Flax backend has no backend.py:Backend._step",
        ),
    ],
    ids=["of a program", "of the backend"],
)
def test_a_definition_that_is_gone_is_named(
    file: str, old: str, said: str, report: FaultsReport, tmp_path: Path
) -> None:
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "backends", tmp_path / "backends", ignore=skipped)
    program = tmp_path / file
    program.write_text(program.read_text().replace(old, "def another("))
    with pytest.raises(SourceError, match=re.escape(said)):
        write_lesson_page(tmp_path / "page.html", tmp_path, report)


def test_the_questions_of_someone_who_knows_pytorch_lead_to_the_notes_that_answer(
    page: Path,
) -> None:
    text = page.read_text("utf-8")
    [asked] = re.findall(r'<nav aria-label="Questions">.*?</nav>', text, re.DOTALL)
    for question, answer in (
        ("Where did zero_grad go?", "nothing to clear"),
        ("Where does the optimizer keep its state?", "opt_state"),
        ("When does jit run my Python again?", "the Python code runs again"),
        ("Why is the flatten permuted?", "rows of the next kernel have another order"),
    ):
        links = dict(re.findall(r'<a href="#(note-\d+)">(.*?)</a>', asked))
        [key] = [key for key, said in links.items() if words_of(said) == question]
        [note] = re.findall(rf'<li id="{key}">(.*?)</li>', text, re.DOTALL)
        assert answer in " ".join(words_of(note).split())
    assert 'href="#apart"' in asked and "A step without side effects" in text


@pytest.mark.parametrize("how", ["unknown", "not found"])
def test_a_fault_that_shows_nothing_is_refused(
    how: str, report: FaultsReport, tmp_path: Path
) -> None:
    changed, report = SECTIONS[0].notes[0].fault, copy.deepcopy(report)
    if how == "unknown":
        changed = "no-such-fault"
    else:
        [row] = [row for row in report["rows"] if row["name"] == changed]
        row["lenses"]["float64"]["caught"] = False
    sections = first_note(SECTIONS[0], fault=changed)
    with pytest.raises(SourceError, match=rf"names '{changed}', which is not found"):
        write_lesson_page(tmp_path / "page.html", ROOT, report, sections)


def test_the_committed_page_says_what_the_programs_and_the_evidence_say_now(page: Path) -> None:
    committed = (ROOT / "results" / "read" / "lesson.html").read_text("utf-8")
    text = page.read_text("utf-8")
    assert words_of(committed) == words_of(text), (
        "make it again: python compare.py learn --out results/read"
    )
    assert words_of(text.replace("zero_grad", "clear")) != words_of(text)  # the control


def test_the_page_is_six_screens_and_anyone_can_read_it(page: Path, browser: Any) -> None:
    assert examine(browser, page) == []
    with browser.new_context(viewport={"width": 1440, "height": HEIGHT}) as context:
        shown = context.new_page()
        shown.goto(page.as_uri())
        height = shown.evaluate("() => document.documentElement.scrollHeight")
    assert HEIGHT < height <= MAX_SCREENS * HEIGHT
