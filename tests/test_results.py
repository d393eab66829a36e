"""results/: the way in leads everywhere, and only what a README shows is kept as a picture."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lockstep.common.report.index import write_index_page
from tests.learn.test_side_by_side import words_of

MAX_BYTES = 1_500_000
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("[bcrt]*/README.md"))]


def committed(pattern: str) -> list[Path]:
    return [p for p in sorted(RESULTS.rglob(pattern)) if "runs" not in p.relative_to(RESULTS).parts]


def links(page: str) -> set[str]:
    return set(re.findall(r'(?:href|src)="([^"#:]+)"', page))


def missing_links(page: str, folder: Path) -> set[str]:
    """The links of a page that lead nowhere."""
    return {link for link in links(page) if not (folder / link).exists()}


def unlisted(page: str) -> set[str]:
    """The committed results that a page does not link to."""
    folders = {str(path.parent.relative_to(RESULTS)) for path in committed("report.json")}
    return folders - {link.rpartition("/")[0] for link in links(page)}


def unused_pictures(documents: str) -> set[str]:
    """The committed PNG files that no README shows."""
    return {p.parent.name + "/" + p.name for p in committed("*.png")} - {
        "/".join(link.split("/")[-2:]) for link in re.findall(r"[\w./-]+\.png", documents)
    }


def test_the_index_leads_to_every_committed_result() -> None:
    page = (RESULTS / "index.html").read_text(encoding="utf-8")
    assert not missing_links(page, RESULTS)
    assert not unlisted(page)
    assert not re.search(r"https?://", page), "the page asks the network for nothing"


@pytest.mark.parametrize("name", ["quick", "alarms-float64"])
def test_the_checks_of_the_index_see_a_run_that_is_missing(name: str) -> None:
    page = (RESULTS / "index.html").read_text(encoding="utf-8").replace(f'"{name}/', '"gone/')
    assert name in unlisted(page)
    assert missing_links(page, RESULTS)


def test_the_committed_index_says_what_the_reports_say_now(tmp_path: Path) -> None:
    page = (RESULTS / "index.html").read_text(encoding="utf-8")
    made = tmp_path / "results"
    for path in {*committed("report.json"), *committed("*.png"), *committed("read/*")}:
        copy = made / path.relative_to(RESULTS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    again = write_index_page(made).read_text(encoding="utf-8")
    assert words_of(page) == words_of(again), (
        "make it again: python compare.py learn --out results/read"
    )
    assert page.count('role="img"') == again.count('role="img"') >= 20
    (made / "quick" / "report.json").unlink()  # the control
    assert words_of(write_index_page(made).read_text(encoding="utf-8")) != words_of(page)


@pytest.mark.parametrize("path", committed("*.html"), ids=lambda path: path.parent.name)
def test_no_page_is_larger_than_it_should_be(path: Path) -> None:
    assert 1000 < path.stat().st_size <= MAX_BYTES


def test_every_picture_is_shown_in_a_readme() -> None:
    documents = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    assert not unused_pictures(documents)
    assert unused_pictures(documents.replace("faults.png", "")) == {"faults/faults.png"}  # control
