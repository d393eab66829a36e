"""`read.html`: the two backends next to each other, section by section, with notes: a reference."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from lockstep.common.config import BACKENDS, FRAMEWORKS
from lockstep.common.learn import alignment, contents, notes, outline, pins
from lockstep.common.learn.alignment import Row, Token
from lockstep.common.learn.annotations import NOTES
from lockstep.common.learn.faults_report import FaultRow, FaultsReport, FindingJson
from lockstep.common.learn.sources import (
    Definition,
    Line,
    SourceError,
    header,
    read_backends,
)
from lockstep.common.report.template import write_page

# The sign between two lines, and the same in words.
SIGNS = {
    "same": ("=", "the same in both"),
    "similar": ("≈", "the same in other words"),
    "torch": ("←", "in PyTorch only"),
    "flax": ("→", "in Flax only"),
    "unmatched": ("←→", "two lines without a partner"),
}

Backends = Mapping[str, Mapping[str, Definition]]  # by side, then by `file:name`


# --- What the template is given


@dataclass(frozen=True)
class ShownNote:
    """A note with its number on the page, and the lines that it is tied to."""

    number: int
    title: str
    what: Markup
    why: Markup
    if_ignored: Markup
    faults: tuple[str, ...]
    tests: tuple[str, ...]
    at: dict[str, tuple[str, int]]  # by side: the definition and the line's number


@dataclass(frozen=True)
class Finding:
    """Where one precision shows a fault, as texts of one row of a table."""

    dtype: str
    step: str
    where: str
    gap: str
    over: str


@dataclass(frozen=True)
class ShownFault:
    """A known fault, where each precision shows it, and the notes that name it."""

    name: str
    sentence: Markup
    source: str
    notes: list[int]
    findings: list[Finding]

    @property
    def first(self) -> Finding:
        """Where the first precision that sees it does."""
        return next(finding for finding in self.findings if finding.step)


@dataclass(frozen=True)
class Cell:
    """One line of code."""

    number: int
    indent: int
    code: Markup
    notes: list[int]


@dataclass(frozen=True)
class CodeRow:
    """One row of a table of code; a side may be empty."""

    kind: str  # of SIGNS
    style: str
    torch: Cell | None
    flax: Cell | None


@dataclass(frozen=True)
class ShownPair:
    """Two definitions next to each other, or one that has no partner."""

    key: str  # for links
    title: str
    file: str  # of the backend
    why: Markup
    where: dict[str, str]  # by side
    rows: list[CodeRow]
    notes: list[ShownNote]


@dataclass(frozen=True)
class SharedCode:
    """A definition of `common` that serves both sides."""

    title: str
    where: str
    lines: list[Cell]


@dataclass(frozen=True)
class ShownSection:
    """A section of the page."""

    key: str
    title: str
    text: Markup
    pairs: list[ShownPair]
    folded: list[ShownPair]


# --- The page


def write_read_page(
    path: Path,
    sources: Path,
    faults_report: FaultsReport,
    names: Collection[str],
    page_notes: Sequence[notes.Note] = NOTES,
    page_pins: Sequence[pins.Pin] = pins.PINS,
) -> Path:
    """Write the page to `path`; equal sources and reports give equal bytes.

    Args:
        sources: the folder that holds `backends` and `common`.
        faults_report: `report.json` of the command `faults`.
        names: of all faults of the catalogue.

    Raises:
        SourceError: if the sources, the notes, the pins and the report do not fit together; the
            message is one line.
        RecordError: if the page cannot be written.
    """
    backends = read_backends(sources)
    outline.check(backends)
    rows = faults_report["rows"]
    notes.check_faults(page_notes, names, rows)
    if (sources / "tests").is_dir():
        notes.check_tests(page_notes, sources)
    shown = _numbered(page_notes, backends)
    pinned = pins.locate(backends, page_pins)
    parts = {
        title: [_section(section, backends, pinned, shown) for section in sections]
        for title, sections in contents.ordered().items()
    }
    named = {fault for note in page_notes for fault in note.faults}
    return write_page(
        path,
        "read.html.jinja",
        parts=parts,
        shared=[
            _shared_code(name.partition(":")[2], definition)
            for name, definition in outline.read_shared(sources).items()
        ],
        notes=len(shown),
        faults=[_fault(row, shown) for row in rows if row["name"] in named],
        data=" and ".join(data["name"] for data in faults_report["data"]),
        command=" ".join(["python", *faults_report["command"]]),
        signs=SIGNS,
        names=FRAMEWORKS,
        highlight=alignment.stylesheet(),
    )


# --- Notes


def _numbered(page_notes: Sequence[notes.Note], backends: Backends) -> list[ShownNote]:
    """The notes with their numbers, in the order of the page."""
    sections = [section for part in contents.ordered().values() for section in part]
    pairs = [pair for section in sections for half in contents.halves(section) for pair in half]
    names = [name for pair in pairs for name in (pair.torch, pair.flax) if name]
    order = {name: place for place, name in enumerate(names)}
    found = notes.locate(page_notes, backends)
    found.sort(
        key=lambda entry: (
            order[entry[0].torch.definition],
            entry[1]["torch"].number,
            entry[1]["flax"].number,
        )
    )
    return [
        ShownNote(
            number=number,
            title=note.title,
            what=prose(note.what),
            why=prose(note.why),
            if_ignored=prose(note.if_ignored),
            faults=note.faults,
            tests=note.tests,
            at={
                "torch": (note.torch.definition, lines["torch"].number),
                "flax": (note.flax.definition, lines["flax"].number),
            },
        )
        for number, (note, lines) in enumerate(found, 1)
    ]


def prose(text: str) -> Markup:
    """Plain text as HTML; text in backticks becomes code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _fault(row: FaultRow, shown: Sequence[ShownNote]) -> ShownFault:
    return ShownFault(
        name=row["name"],
        sentence=prose(row["sentence"]),
        source=row["source"],
        notes=[note.number for note in shown if row["name"] in note.faults],
        findings=[_finding(dtype, finding) for dtype, finding in row["lenses"].items()],
    )


def _finding(dtype: str, finding: FindingJson) -> Finding:
    if not finding["caught"]:
        return Finding(dtype, "", "not found", "", "")
    return Finding(
        dtype=dtype,
        step=f"{finding['step']:,}",
        where=", ".join(dict.fromkeys([finding["stage"], finding["tensor"]])),
        gap="undefined" if finding["gap"] is None else f"{finding['gap']:.2g}",
        over=_over(finding),
    )


def _over(finding: FindingJson) -> str:
    """The gap as a multiple of its bound."""
    if finding["bound"] == 0:
        return "nothing may differ"
    over = finding["gap_over_bound"]
    if over is None:
        return "another data type, or not finite"
    digit, exponent = f"{over:.0e}".split("e")
    return f"{over:,.0f}" if over < 1e5 else f"{digit}e{int(exponent)}"


# --- Sources


def _section(
    section: outline.Section,
    backends: Backends,
    pinned: Mapping[tuple[str, str], pins.Pinned],
    shown: Sequence[ShownNote],
) -> ShownSection:
    reasons = _reasons(section.pairs)
    opened, folded = (
        [_pair(pair, reasons[pair], backends, pinned, shown) for pair in half]
        for half in contents.halves(section)
    )
    return ShownSection(
        key=section.key,
        title=section.title,
        text=prose(section.text),
        pairs=opened,
        folded=folded,
    )


def _shared_code(title: str, definition: Definition) -> SharedCode:
    tokens = alignment.highlight(definition)
    lines = [_cell(line, tokens[line.number], (), []) for line in definition.lines]
    return SharedCode(title, f"{definition.file}, {definition.span}", lines)


def _reasons(pairs: Sequence[outline.Pair]) -> dict[outline.Pair, str]:
    """Why each has no partner, in full: on the page a pair may stand far from the one above it."""
    reasons, last = {}, ""
    for pair in pairs:
        reasons[pair] = pair.why.replace("As above", last.rstrip("."), 1)
        last = reasons[pair] if not pair.why.startswith("As above") else last
    return reasons


def _pair(
    pair: outline.Pair,
    why: str,
    backends: Backends,
    pinned: Mapping[tuple[str, str], pins.Pinned],
    shown: Sequence[ShownNote],
) -> ShownPair:
    """A pair of definitions, with the notes on its PyTorch lines."""
    names = {"torch": pair.torch, "flax": pair.flax}
    found = {side: backends[side][name] for side, name in names.items() if name}
    numbers: dict[tuple[str, int], list[int]] = {}  # of the notes at each line
    for note in shown:
        for side in found:
            if note.at[side][0] == names[side]:
                numbers.setdefault((side, note.at[side][1]), []).append(note.number)
    name = pair.torch or pair.flax or ""
    pins_here = pinned.get((pair.torch or "", pair.flax or ""), pins.Pinned())
    return ShownPair(
        key="def-" + re.sub(r"\W+", "-", name),
        title=pair.title,
        file=name.partition(":")[0],
        why=prose(why),
        where={side: f"{definition.file}, {definition.span}" for side, definition in found.items()},
        rows=_rows(aligned(pair.title, found, pins_here), found, numbers),
        notes=[note for note in shown if note.at["torch"][0] == pair.torch],
    )


def aligned(title: str, found: Mapping[str, Definition], pinned: pins.Pinned) -> list[Row]:
    """The lines of one or two definitions; their headers and the pinned lines are partners.

    Raises:
        SourceError: if pins cross.
    """
    lines = {side: definition.lines for side, definition in found.items()}
    headers = [line.number for definition in found.values() if (line := header(definition))]
    together = pinned.together | ({(headers[0], headers[1])} if len(headers) == 2 else set())
    rows = alignment.align(lines.get("torch", ()), lines.get("flax", ()), together, pinned.alone)
    paired = {(row.torch.number, row.flax.number) for row in rows if row.torch and row.flax}
    if crossing := sorted(together - paired):
        raise SourceError(
            f"the pin of lines {crossing[0]} in {title} crosses another one: change pins.py"
        )
    return rows


def _rows(
    rows: Sequence[Row],
    found: Mapping[str, Definition],
    numbers: Mapping[tuple[str, int], list[int]],
) -> list[CodeRow]:
    tokens = {side: alignment.highlight(definition) for side, definition in found.items()}

    def cell(side: str, line: Line | None, marked: Collection[int]) -> Cell | None:
        if line is None:
            return None
        return _cell(line, tokens[side][line.number], marked, numbers.get((side, line.number), []))

    made = []
    for row in rows:
        marked: tuple[Collection[int], Collection[int]] = ((), ())
        if row.kind == "similar" and row.torch and row.flax and is_similar(row.torch, row.flax):
            marked = alignment.differing(
                tokens["torch"][row.torch.number], tokens["flax"][row.flax.number]
            )
        style = f"only-{row.kind}" if row.kind in BACKENDS else row.kind
        torch, flax = cell("torch", row.torch, marked[0]), cell("flax", row.flax, marked[1])
        made.append(CodeRow(row.kind, style, torch, flax))
    return made


def is_similar(torch: Line, flax: Line) -> bool:
    """False of a pinned pair in which so much differs that marks would say nothing."""
    return alignment.similarity(torch.text, flax.text) >= alignment.SIMILAR


def _cell(
    line: Line, tokens: Sequence[Token], marked: Collection[int], numbers: Sequence[int]
) -> Cell:
    indent = len(line.text) - len(line.text.lstrip())
    return Cell(line.number, indent, alignment.markup(tokens, marked), list(numbers))
