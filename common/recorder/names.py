"""Names files: which tensor is which, where values and names do not say it.

A line has A's name and B's, with a space between; what follows `#` is a comment:

    encoder.layers.*.self_attn.in_proj_weight   params.Block_*.attn.query.kernel
    head                                        params.Dense_0

`*` stands for a number. The numbers of both sides count by their order where there are as many of
them, so that `layers.0, layers.2` meet `Dense_0, Dense_1`; else they must be equal. A name of a
module stands for the tensors in it. A line for each part says how a packed tensor is divided, in
the order in which the parts lie in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lockstep.common.errors import ConfigError, nearest, printable
from lockstep.common.model.names import shortened
from lockstep.common.recorder.likeness import likeness, paths
from lockstep.common.recorder.recording import Recording

MAX_LINES = 10**5


def read_names(path: str | Path, a: Recording, b: Recording) -> dict[str, str]:
    """The names file `path`, for these two recordings: A's tensors, and B's.

    A packed tensor of A that has several lines is "a [b]" in the result, once for each part.

    Raises:
        ConfigError: if the file cannot be read, or a line names what is not there.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(
            f"the names file {printable(path)} cannot be read ({type(error).__name__})"
        ) from error
    lines = []
    for number, line in enumerate(text.splitlines()[:MAX_LINES], 1):
        words = line.partition("#")[0].split()
        where = f"{printable(path)}, line {number}: "
        if words and len(words) != 2:
            raise ConfigError(f"{where}write two names, {a.name}'s and {b.name}'s")
        if words:
            lines.append((where, words[0], words[1]))
    return expand(lines, a, b)


def expand(lines: Iterable[tuple[str, str, str]], a: Recording, b: Recording) -> dict[str, str]:
    """Lines of names, with `*` and modules, as tensors.

    Args:
        lines: for each, how a message about it begins, A's name and B's.
        a: one recording.
        b: the other.

    Raises:
        ConfigError: if there are no such tensors or modules.
    """
    found: dict[str, str] = {}
    sides = [list(a.weights), list(b.weights)]
    for where, one, other in lines:
        if one.count("*") != other.count("*"):
            raise ConfigError(f"{where}write as many stars in the one name as in the other")
        for first, second in _numbered(where, (one, other), (a.name, b.name), sides):
            for mine, theirs in _tensors(where, (first, second), sides):
                part = mine in found and found[mine] != theirs
                found[f"{mine} [{theirs}]" if part else mine] = theirs
    return found


def split_key(key: str) -> str:
    """A's tensor, of a name that `expand` made."""
    return key.partition(" [")[0]


def _numbered(
    where: str, patterns: Sequence[str], owners: Sequence[str], sides: Sequence[list[str]]
) -> Iterator[tuple[str, str]]:
    """Both names with numbers in place of the stars."""
    matched = [_matching(p, names) for p, names in zip(patterns, sides, strict=True)]
    for pattern, owner, there, names in zip(patterns, owners, matched, sides, strict=True):
        if not there:
            proposal = nearest(pattern, _all(names))
            hint = f"did you mean {proposal}?" if proposal else "see the report's table of tensors"
            raise ConfigError(f"{where}{owner} has no {printable(pattern)}: {hint}")
    order = [
        [sorted({numbers[star] for numbers in there}) for star in range(patterns[0].count("*"))]
        for there in matched
    ]
    for numbers, name in matched[0].items():
        wanted = tuple(
            theirs[mine.index(number)] if len(mine) == len(theirs) else number
            for number, mine, theirs in zip(numbers, *order, strict=True)
        )
        if wanted not in matched[1]:
            filled = _filled(patterns[1], wanted)
            raise ConfigError(f"{where}{owners[1]} has no {filled} for {owners[0]}'s {name}")
        yield name, matched[1][wanted]


def _matching(pattern: str, names: Sequence[str]) -> dict[tuple[int, ...], str]:
    """The modules and tensors that `pattern` names, by the numbers that its stars stand for."""
    wanted = re.compile(r"(\d+)".join(map(re.escape, pattern.split("*"))))
    found = {name: wanted.fullmatch(name) for name in _all(names)}
    return {tuple(map(int, m.groups())): name for name, m in found.items() if m}


def _all(names: Iterable[str]) -> list[str]:
    """All tensors and modules."""
    parts = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(p[: i + 1]) for p in parts for i in reversed(range(len(p)))))


def _filled(pattern: str, numbers: Iterable[int]) -> str:
    left = iter(numbers)
    return "".join(str(next(left)) if part == "*" else part for part in re.split(r"(\*)", pattern))


def _tensors(
    where: str, names: tuple[str, str], sides: Sequence[list[str]]
) -> Iterator[tuple[str, str]]:
    """The tensors that two names stand for: themselves, or those of equal roles in two modules."""
    inside = [
        [t for t in tensors if t == name or t.startswith(f"{name}.")]
        for name, tensors in zip(names, sides, strict=True)
    ]
    if inside[0] == [names[0]] and inside[1] == [names[1]]:
        yield names
        return
    cut = [
        paths([t.removeprefix(f"{name}.") for t in tensors])
        for name, tensors in zip(names, inside, strict=True)
    ]
    alike = likeness(*cut)
    left = set(range(len(cut[1])))
    matched = False
    for i, path in enumerate(cut[0]):
        fitting = [j for j in left if cut[1][j].role == path.role]
        if fitting:
            best = max(fitting, key=lambda j: alike[i, j])
            left.discard(best)
            matched = True
            yield inside[0][i], inside[1][best]
    if not matched:
        raise ConfigError(f"{where}{names[0]} and {names[1]} have no tensors of one role in common")


def lines(proposals: Mapping[str, str]) -> list[str]:
    """Proposed matches as lines of a names file, with stars where several differ in numbers
    only."""
    return [f"{one} {other}" for one, other in shortened(proposals).items()]
