"""What every picture is drawn with: an empty figure, the colours, names that are safe to draw, PNG
and SVG.

A figure is drawn once, in the colours of a light page. Put into a page of its own (`to_inline`),
each of them becomes one of that page's CSS variables, so that the same figure is readable in the
dark.
"""

from __future__ import annotations

import contextlib
import functools
import html
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lockstep.common.report.terminal import NAME_WIDTH, safe

COLOURS = {"torch": "#0072B2", "flax": "#D55E00"}  # Okabe and Ito's blue and vermillion
LINES = {"torch": "-", "flax": (0, (3, 2))}  # where the two coincide, both can be seen
RIGHT, WRONG, GREY = "#00694A", "#A3003C", "#555555"
INK, GRID, BAND, BOUND = "#1B1F24", "#D0D7DE", "#DDDDDD", "#009E73"
VARIABLES = {  # of the pages, by colour
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


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw in this project's style: neither a matplotlibrc nor what a caller has set changes the
    pictures."""
    import matplotlib
    import matplotlib.style

    style: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    style |= {
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "font.sans-serif": ["DejaVu Sans"],
    }
    # Text stays text, and what SVG needs names for gets the same ones each time.
    style |= {"svg.fonttype": "none", "svg.hashsalt": "lockstep", "image.composite_image": False}
    with (
        matplotlib.style.context("default"),
        matplotlib.rc_context(style),
        np.errstate(all="ignore"),
    ):
        yield


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, with a canvas of its own: pyplot and its state are left
    alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def to_png(figure: Any) -> bytes:
    """Equal figures give equal bytes."""
    content = io.BytesIO()
    _lay_out(figure)
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def to_svg(figure: Any, transparent: bool = False) -> str:
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


def to_inline(figure: Any, prefix: str, text: str) -> str:
    """The figure as an element for a page, in the page's colours, and read out as `text`.

    Args:
        prefix: letters and digits; different for each figure of a page, so that no two share an id.
    """
    svg = to_svg(figure, transparent=True)
    svg = re.sub(r">\s+<", "><", svg[svg.index("<svg") :])
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', svg))
    variables = {colour.lower(): f"var({name})" for colour, name in VARIABLES.items()}

    def at_home(tag: str) -> str:
        # What one figure refers to must not be found in another; other ids are of no use.
        tag = re.sub(
            r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", tag
        )
        tag = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", tag)
        return re.sub(r"#[0-9a-f]{6}\b", lambda m: variables.get(m[0], m[0]), tag)

    return _in_tags(svg, at_home).replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(text)}"', 1
    )


def _lay_out(figure: Any) -> None:
    """Give everything its place, once: `savefig` would do so for each format, and draw all in vain
    to that end."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine(None)


def _in_tags(svg: str, change: Callable[[str], str]) -> str:
    """Change what stands in tags and leave the text between them alone: names are written there."""
    return re.sub(r"<[^<>]*>", lambda tag: change(tag[0]), svg)


def label(text: object, width: int = NAME_WIDTH) -> str:
    """`text` for a picture: cut, what cannot be printed or is not in the font escaped, and never
    read as a formula."""
    letters = safe(text)
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


def plain(axes: Any, grid: str = "both") -> None:
    """Spines to the left and below only, and a grid behind what is drawn."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid)
