"""The parts of a page: charts of one panel, and text that is safe in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup

from lockstep.common.report.figures import new_figure, to_inline
from lockstep.common.report.tables import Table
from lockstep.common.report.text import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 4.4  # of a chart, in inches: its labels can be read on a phone


class Chart(NamedTuple):
    """A picture with its text for screen readers, and its numbers."""

    caption: str
    svg: Markup
    table: Table | None


def escaped(value: object) -> object:
    """`value` with every text in it escaped (`text.escape`), except markup."""
    if isinstance(value, str):
        return value if isinstance(value, Markup) else escape(value)
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, tuple) and (make := getattr(value, "_make", None)):  # a named one
        return make(map(escaped, value))
    return [escaped(item) for item in value] if isinstance(value, (list, tuple)) else value


def panel(
    key: str,
    caption: str,
    text: str,
    height: float,
    draw: Callable[[Axes], None],
    table: Table | None,
    legend: int = 0,
) -> Chart:
    """A chart of one panel.

    Args:
        legend: the number of columns of the legend below it; 0 for none.
    """
    figure = new_figure(WIDTH, height)
    draw(figure.subplots())
    if legend:
        figure.legend(loc="outside lower center", ncols=legend, frameon=False, fontsize=8)
    return Chart(caption, Markup(to_inline(figure, f"x-{key}", escape(text))), table)
