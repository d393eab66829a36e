"""Shared by all pictures: an empty figure, the colours, names that are safe to draw, PNG and SVG.

A figure is drawn once, in the colours of a light page. `to_inline` replaces each colour by a CSS
variable of the page, so that the figure can be read on a dark page, too.
"""

from __future__ import annotations

import contextlib
import functools
import html
import io
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from lockstep.common.config import BACKENDS
from lockstep.common.report.text import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

NAME_WIDTH = 16  # letters of a class name in a picture
COLOURS = {"torch": "#0072B2", "flax": "#D55E00"}  # Okabe and Ito's blue and vermillion
LINES = {"torch": "-", "flax": (0, (3, 2))}  # both can be seen where they coincide
RIGHT, WRONG, GREY = "#00694A", "#A3003C", "#555555"
INK, GRID, BAND, BOUND = "#1B1F24", "#D0D7DE", "#DDDDDD", "#009E73"
VARIABLES = {  # the pages' CSS variable of each colour
    COLOURS["torch"]: "--torch",
    COLOURS["flax"]: "--flax",
    RIGHT: "--good",
    WRONG: "--bad",
    GREY: "--faint",
    INK: "--text",
    GRID: "--line",
    BAND: "--band",
    BOUND: "--bound",
}
DPI = 120


def like_backends(names: Iterable[str]) -> dict[str, str]:
    """By name, the backend in whose colour and line each of two sides is drawn: its own, or where
    they have other names, the two after each other."""
    names = list(names)
    own = COLOURS.keys() >= set(names)
    return {name: name if own else BACKENDS[place] for place, name in enumerate(names)}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw in this project's style, whatever a matplotlibrc or the caller has set."""
    import matplotlib
    import matplotlib.style

    style: dict[RcKeyType, object] = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    style |= {
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "font.sans-serif": ["DejaVu Sans"],
    }
    # Text stays text, and the ids in an SVG are the same each time.
    style |= {"svg.fonttype": "none", "svg.hashsalt": "lockstep", "image.composite_image": False}
    with (
        matplotlib.style.context("default"),
        matplotlib.rc_context(style),
        np.errstate(all="ignore"),
    ):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` by `height` inches. It has its own canvas; pyplot is not used."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Figure) -> bytes:
    """Equal figures give equal bytes."""
    content = io.BytesIO()
    _lay_out(figure)
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def to_svg(figure: Figure, transparent: bool = False) -> str:
    """Equal figures give equal texts, within `drawing`. Coordinates are rounded to a hundredth of a
    point."""
    content = io.StringIO()
    nobody = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    _lay_out(figure)
    figure.savefig(content, format="svg", metadata=nobody, transparent=transparent)

    def rounded(tag: str) -> str:
        return re.sub(
            r' (?:d|x|y)="[^"]*"', lambda m: re.sub(r"-?\d+\.\d{3,}", two_digits, m[0]), tag
        )

    def two_digits(number: re.Match[str]) -> str:
        return f"{float(number[0]):.2f}"

    return _in_tags(content.getvalue(), rounded)


def to_inline(figure: Figure, prefix: str, text: str) -> str:
    """The figure as an SVG element for a page, in the page's colours, with `text` for screen
    readers.

    Args:
        prefix: letters and digits; different for each figure of a page, so that no two share an id.
    """
    svg = to_svg(figure, transparent=True)
    svg = re.sub(r">\s+<", "><", svg[svg.index("<svg") :])
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', svg))
    variables = {colour.lower(): f"var({name})" for colour, name in VARIABLES.items()}

    def at_home(tag: str) -> str:
        # A reference must not find an id of another figure; ids without references are removed.
        tag = re.sub(
            r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", tag
        )
        tag = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", tag)
        return re.sub(r"#[0-9a-f]{6}\b", lambda m: variables.get(m[0], m[0]), tag)

    return _in_tags(svg, at_home).replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(text)}"', 1
    )


def _lay_out(figure: Figure) -> None:
    """Lay the figure out once: `savefig` would do so for each format, and draw it an extra time."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine(None)


def _in_tags(svg: str, change: Callable[[str], str]) -> str:
    """Change the tags only: the text between them holds names."""
    return re.sub(r"<[^<>]*>", lambda tag: change(tag[0]), svg)


def label(text: object, width: int = NAME_WIDTH) -> str:
    """`text` for a picture: truncated, never read as a formula, and with letters escaped that
    cannot be printed or are not in the font."""
    letters = escape(text)
    glyphs = _glyphs()
    drawn = "".join(
        c if c == " " or ord(c) in glyphs else c.encode("unicode_escape").decode("ascii")
        for c in letters
    )
    if len(drawn) > width:
        drawn = drawn[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return drawn.replace("$", r"\$")


@functools.cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def style_axes(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Spines on the left and below only, and a grid in the background."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid)
