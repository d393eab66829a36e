"""Numbers and names as a reader sees them: short, and safe to print."""

from __future__ import annotations

import math
from collections.abc import Sequence


def escape(text: object, encoding: str = "utf-8") -> str:
    r"""`text` with everything that is not printable, or not in `encoding`, as an escape such as
    `\x1b`."""
    letters = (
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in str(text)
    )
    return "".join(letters).encode(encoding, "backslashreplace").decode(encoding)


def truncate(text: str, width: int, ellipsis: str = "...") -> str:
    """`text` in at most `width` terminal columns."""
    from rich.cells import cell_len

    if cell_len(text) <= width:
        return text
    while text and cell_len(text) + len(ellipsis) > width:
        text = text[:-1]
    return text + ellipsis


def number(value: float | None, missing: str = "not finite") -> str:
    """Two digits of a gap or a bound; None stands for what JSON cannot hold."""
    if value is None:
        return missing
    if value == int(value) and abs(value) < 1e6:
        return f"{value:,.0f}"  # counts, such as of predictions
    if 0.1 <= abs(value) < 100:
        return f"{value:.2g}"
    return f"{value:.1e}".replace(".0e", "e")


def four_digits(value: float | None) -> str:
    """Four digits of a measured value."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"


def loss(value: float | None) -> str:
    """Four decimals of a loss."""
    if value is None:
        return "not finite"
    return f"{value:.4f}" if abs(value) < 1e6 else number(value)


def rate(speed: float | None) -> str:
    """Steps per second."""
    if speed is None:
        return "not measured"
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def share(value: float) -> str:
    """A share of a bound, as `71 %` or `0.15 %`."""
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.2g} %"


def percent(value: float | None) -> str:
    """An accuracy; None stands for a class without test images."""
    return "no images" if value is None else f"{100 * value:.1f} %"


def plural(count: int, thing: str) -> str:
    """As `3 steps` or `1 step`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def steps_text(start: int, stop: int) -> str:
    """The steps from `start` to `stop` - 1, as `3 to 9` or `3`."""
    last = max(start, stop - 1)
    return f"{start:,} to {last:,}" if last > start else f"{start:,}"


def ok(agrees: bool, has_power: bool = True) -> str:
    """The mark of a check.

    Args:
        has_power: whether some run would fail it; if none could, it is no evidence.
    """
    return "NO" if not agrees else "ok" if has_power else "no power"


def listed(words: Sequence[str]) -> str:
    """As `a`, `a and b`, or `a, b and c`."""
    *most, last = words or [""]
    return f"{', '.join(most)} and {last}" if most else last
