"""Figures: laid out once, and names in them that are text and nothing else."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lockstep.common.report import escape
from lockstep.common.report.figures import COLOURS, drawing, label, new_figure, to_png, to_svg
from tests.report.helpers import HOSTILE


def test_a_figure_is_laid_out_once_and_as_matplotlib_would(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    def drawn() -> Any:
        figure = new_figure(3, 2)
        for axes in figure.subplots(1, 2):
            axes.set_title("a title\nof two lines")
            axes.set_ylabel("a label")
        return figure

    execute, laid_out = ConstrainedLayoutEngine.execute, []
    monkeypatch.setattr(
        ConstrainedLayoutEngine,
        "execute",
        lambda engine, figure: (laid_out.append(figure), execute(engine, figure)),
    )
    with drawing():
        figure, theirs, without = drawn(), io.BytesIO(), drawn()
        png, svg = to_png(figure), to_svg(figure)
        assert laid_out == [figure]
        drawn().savefig(theirs, metadata={"Software": None})
        without.set_layout_engine(None)
        assert png == theirs.getvalue() != to_png(without)
        assert svg != to_svg(without)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_a_picture_is_never_a_formula_nor_a_missing_glyph(name: str) -> None:
    assert "$" not in label(name).replace(r"\$", "") and label(name).isprintable()
    assert len(label("w" * 50)) == 16


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_an_svg_is_text_and_no_markup(name: str) -> None:
    with drawing():
        figure = new_figure(3, 2)
        figure.subplots().set_title(label(name, 60))
        svg = to_svg(figure)
    texts = [
        element.text
        for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert label(name, 60).replace(r"\$", "$") in texts and "<script" not in svg


def test_one_svg_differs_from_another_where_the_figures_do() -> None:
    def drawn(colour: str) -> str:
        with drawing():
            figure = new_figure(3, 2)
            figure.subplots().plot([0, 1], [0, 1], color=colour)
            return to_svg(figure)

    assert drawn(COLOURS["torch"]) == drawn(COLOURS["torch"]) != drawn(COLOURS["flax"])


def test_escapes_show_what_a_terminal_would_obey() -> None:
    assert escape("a\x1b[0m\u202e\t\u00e9") == "a\\x1b[0m\\u202e\\t\u00e9"
    assert escape("\u00e9", "ascii") == r"\xe9"


def test_neither_rich_nor_matplotlib_is_loaded_before_it_is_used() -> None:
    code = (
        "import sys, lockstep.common.config, lockstep.common.report; print([m for m in ('rich', "
        "'matplotlib') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
