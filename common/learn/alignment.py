"""Two definitions line by line: which lines are the same, which are similar, and which have no
partner."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from markupsafe import Markup, escape

from lockstep.common.learn.sources import Definition, Line

# Two lines with this similarity or more do the same in other words. Of the pairs of both backends
# between 0.5 and 0.6 more than half were wrong when they were read; `pins.py` has those that are
# right, and what is wrong above.
SIMILAR = 0.6
PINNED = 30.0  # more than all lines between two pins could add up to
NOBODY: Mapping[str, Collection[int]] = {"torch": (), "flax": ()}
# PyTorch's name and Flax's name for the same thing: the same word when lines are compared.
SAME_WORDS = {
    "Tensor": "Array",
    "nn": "nnx",
    "forward": "__call__",
    "jnp": "jax",
    "TorchBackend": "FlaxBackend",
}
_WORD = re.compile(r"\w+|[^\w\s]")

# Colours of Pygments' token classes on light and on dark pages, with a contrast of at least 4.5
# (WCAG AA).
HIGHLIGHT = {
    "k": ("#8a1c5c", "#f28fc7"),  # keywords
    "s": ("#0a5c2e", "#8fd6a3"),  # strings
    "c": ("#57606a", "#a7b0b9"),  # comments
    "m": ("#7a3e00", "#f0b37a"),  # numbers
    "f": ("#0b4f9e", "#8ac4ff"),  # function and class names in definitions, decorators
    "b": ("#5b3fb0", "#c3aefc"),  # built-in names, self
}
Token = tuple[str, str]  # a class of HIGHLIGHT or "", and the text


class Row(NamedTuple):
    """Two lines next to each other; a side may be empty."""

    # "same", "similar", "torch" or "flax" alone, or "unmatched": two lines that have no partner
    kind: str
    torch: Line | None
    flax: Line | None


def words(text: str) -> list[str]:
    """A line's words and signs, with the names of one framework."""
    found: list[str] = _WORD.findall(text)
    return [SAME_WORDS.get(word, word) for word in found]


def similarity(one: str, other: str) -> float:
    """0 for nothing in common, 1 for the same words; a comment is never similar to code."""
    ours, theirs = words(one), words(other)
    if not (any(map(str.isidentifier, ours)) and any(map(str.isidentifier, theirs))):
        return float(ours == theirs)  # brackets and quotes alone
    if ours[:1] != theirs[:1] and "#" in (*ours[:1], *theirs[:1]):
        return 0.0
    # both set the same name, or call the same function
    target = 0.15 if ours[:2] == theirs[:2] else 0.0
    return min(1.0, SequenceMatcher(None, ours, theirs, autojunk=False).ratio() + target)


def align(
    torch: Sequence[Line],
    flax: Sequence[Line],
    together: Collection[tuple[int, int]] = (),
    alone: Mapping[str, Collection[int]] = NOBODY,
) -> list[Row]:
    """Pair the lines, in order, so that the sum of the similarities is largest.

    Args:
        together: pairs of line numbers that are paired whatever their similarity.
        alone: by side, the numbers of lines that have no partner and share no row.
    """
    n, m = len(torch), len(flax)
    similar = [
        [
            0.0
            if a.number in alone["torch"] or b.number in alone["flax"]
            else _weight(a, b, together)
            for b in flax
        ]
        for a in torch
    ]
    best = [[0.0] * (m + 1) for _ in range(n + 1)]  # sum over the lines from here on
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            here = similar[i][j] + best[i + 1][j + 1] if similar[i][j] else 0.0
            best[i][j] = max(here, best[i + 1][j], best[i][j + 1])
    rows, left, i, j = [], ([], []), 0, 0
    while i < n and j < m:
        if similar[i][j] and best[i][j] == similar[i][j] + best[i + 1][j + 1]:
            rows += _side_by_side(*left, alone)
            rows.append(
                Row("same" if torch[i].text == flax[j].text else "similar", torch[i], flax[j])
            )
            left, i, j = ([], []), i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            left[0].append(torch[i])
            i += 1
        else:
            left[1].append(flax[j])
            j += 1
    return rows + _side_by_side([*left[0], *torch[i:]], [*left[1], *flax[j:]], alone)


def _weight(one: Line, other: Line, together: Collection[tuple[int, int]]) -> float:
    if (one.number, other.number) in together:
        return PINNED
    weight = similarity(one.text, other.text)
    return weight + 0.5 * (one.text == other.text) if weight >= SIMILAR else 0.0


def _side_by_side(
    torch: Sequence[Line], flax: Sequence[Line], alone: Mapping[str, Collection[int]]
) -> list[Row]:
    """Lines without a partner, next to each other to save space, but for those `alone`."""
    rows, i, j = [], 0, 0
    while i < len(torch) or j < len(flax):
        if i < len(torch) and (j == len(flax) or torch[i].number in alone["torch"]):
            rows.append(Row("torch", torch[i], None))
            i += 1
        elif j < len(flax) and (i == len(torch) or flax[j].number in alone["flax"]):
            rows.append(Row("flax", None, flax[j]))
            j += 1
        else:
            rows.append(Row("unmatched", torch[i], flax[j]))
            i, j = i + 1, j + 1
    return rows


def highlight(definition: Definition) -> dict[int, list[Token]]:
    """The tokens of each line, by line number; strings and comments word by word."""
    from pygments.lexers import PythonLexer

    text = "\n".join(line.text for line in definition.lines)
    lines: list[list[Token]] = [[]]
    for kind, value in PythonLexer(stripnl=False, ensurenl=False).get_tokens(text):
        name = _class_of(kind)
        first, *rest = ([(name, part) for part in _parts(name, text)] for text in value.split("\n"))
        lines[-1] += first
        lines += rest
    return {line.number: lines[place] for place, line in enumerate(definition.lines)}


def _parts(name: str, text: str) -> list[str]:
    return re.findall(r"\s+|\w+|[^\w\s]+", text) if name in ("s", "c") else [text] if text else []


def _class_of(kind: object) -> str:
    from pygments.token import Comment, Keyword, Name, Number, Operator, String

    families = {
        "k": (Keyword, Operator.Word),
        "s": (String,),
        "c": (Comment,),
        "m": (Number,),
        "f": (Name.Function, Name.Class, Name.Decorator),
        "b": (Name.Builtin,),
    }
    return next(
        (name for name, kinds in families.items() if any(kind in family for family in kinds)), ""
    )


def differing(one: Sequence[Token], other: Sequence[Token]) -> tuple[set[int], set[int]]:
    """The positions of the tokens in which two similar lines differ."""
    ours, theirs = ([text for _, text in tokens] for tokens in (one, other))
    blocks = SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    same = {block.a + k for block in blocks for k in range(block.size)}
    same_there = {block.b + k for block in blocks for k in range(block.size)}
    return set(range(len(ours))) - same, set(range(len(theirs))) - same_there


def markup(tokens: Sequence[Token], marked: Collection[int] = ()) -> Markup:
    """One line of code as HTML, with the tokens at the `marked` positions underlined."""
    places = [
        (name, "x" if place in marked and text.strip() else "")
        for place, (name, text) in enumerate(tokens)
    ]
    parts = []
    for (name, mark), run in itertools.groupby(
        zip(places, tokens, strict=True), key=lambda pair: pair[0]
    ):
        classes = " ".join(filter(None, [name and f"t-{name}", mark]))
        text = "".join(token[1] for _, token in run)
        parts.append(
            Markup('<span class="{}">{}</span>').format(classes, text) if classes else escape(text)
        )
    return Markup("").join(parts)


def stylesheet() -> Markup:
    """The colours of `markup`, for light and dark."""
    light, dark = (
        " ".join(
            f".code .t-{name} {{ color: {colours[theme]}; }}" for name, colours in HIGHLIGHT.items()
        )
        for theme in (0, 1)
    )
    return Markup(f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}")
