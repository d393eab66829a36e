"""Numbers as the walk-through shows them."""

from __future__ import annotations

import itertools

import numpy as np
from markupsafe import Markup


def format_number(value: float | int, dtype: str = "float64") -> str:
    """A number with all the digits that its precision needs."""
    return str(np.float32(value) if dtype == "float32" else value).replace("-", "−")


def gap_text(value: float) -> str:
    """A gap in two digits, as `0.68` or `2.4e−7`."""
    if value == 0 or value >= 1e-3:
        return f"{value:.2g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e−{abs(int(exponent))}"


def pair_text(
    one: float | int, other: float | int, dtype: str = "float64"
) -> tuple[Markup, Markup]:
    """Two numbers in full, with their digits marked from the first difference on."""
    first, second = format_number(one, dtype), format_number(other, dtype)
    pairs = zip(first, second, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda letters: letters[0] == letters[1], pairs))
    return _marked(first, same), _marked(second, same)


def _marked(text: str, same: int) -> Markup:
    mark = Markup('{}<span class="x">{}</span>')
    return mark.format(text[:same], text[same:]) if text[same:] else Markup(text)
