"""`lesson.html`, "From PyTorch to JAX in ten minutes": the two plain programs of backends/lesson
next to each other, with notes in the margin."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from lockstep.common.config import BACKENDS, FRAMEWORKS
from lockstep.common.learn import alignment
from lockstep.common.learn.faults_report import FaultRow, FaultsReport
from lockstep.common.learn.lesson_text import (
    DIFFERENCES,
    SECTIONS,
    Difference,
    LessonNote,
    LessonSection,
)
from lockstep.common.learn.side_by_side import Cell, prose
from lockstep.common.learn.sources import (
    Definition,
    SourceError,
    find,
    read_backends,
    read_file,
)
from lockstep.common.report.template import write_page

FILES = {name: f"backends/lesson/{name}_train.py" for name in BACKENDS}
DTYPE = "float64"  # whose findings are told
LEFT_OUT = "for a bare checkout"  # a line that says nothing about training


# --- What the template is given


@dataclass(frozen=True)
class ShownNote:
    number: int
    title: Markup
    text: Markup
    missed: Markup
    fault: str | None
    found: str  # what Lockstep said of the fault
    question: Markup  # that it answers; empty of most


@dataclass(frozen=True)
class ShownSection:
    key: str
    title: str
    text: Markup
    code: dict[str, list[list[Cell]]]  # by side: a list of lines for each definition
    notes: list[ShownNote]


@dataclass(frozen=True)
class ShownDifference:
    title: Markup
    text: Markup
    where: str
    code: list[list[Cell]]


def write_lesson_page(
    path: Path,
    sources: Path,
    faults_report: FaultsReport,
    sections: Sequence[LessonSection] = SECTIONS,
) -> Path:
    """Write the page to `path`; equal sources and reports give equal bytes.

    Args:
        sources: the folder that holds `backends`.
        faults_report: `report.json` of the command `faults`.

    Raises:
        SourceError: if the programs, the notes and the report do not fit together; the message is
            one line.
        RecordError: if the page cannot be written.
    """
    programs = {side: read_file(sources, file) for side, file in FILES.items()}
    backend = read_backends(sources)["flax"]
    rows = {row["name"]: row for row in faults_report["rows"]}
    shown, number = [], 1
    for section in sections:
        shown.append(_section(section, programs, rows, number))
        number += len(section.notes)
    return write_page(
        path,
        "lesson.html.jinja",
        sections=shown,
        questions=[note for section in shown for note in section.notes if note.question],
        differences=[_difference(one, backend) for one in DIFFERENCES],
        files=FILES,
        names=FRAMEWORKS,
        data=" and ".join(data["name"] for data in faults_report["data"]),
        highlight=alignment.stylesheet(),
    )


def _section(
    section: LessonSection,
    programs: Mapping[str, Mapping[str, Definition]],
    rows: Mapping[str, FaultRow],
    first: int,
) -> ShownSection:
    """A section whose notes are numbered from `first` on."""
    at: dict[tuple[str, int], list[int]] = {}  # the numbers of the notes at each side's lines
    notes = []
    for number, note in enumerate(section.notes, first):
        for side, snippet in (("torch", note.torch), ("flax", note.flax)):
            if snippet is not None:
                line = _line(section, side, programs[side], snippet)
                at.setdefault((side, line), []).append(number)
        notes.append(_note(number, note, rows))
    code = {
        side: [_lines(programs[side][name], side, at) for name in section.names[side]]
        for side in BACKENDS
    }
    return ShownSection(section.key, section.title, prose(section.text), code, notes)


def _line(
    section: LessonSection, side: str, program: Mapping[str, Definition], snippet: str
) -> int:
    """The number of the one line of a section that holds `snippet`."""
    missing = [name for name in section.names[side] if name not in program]
    if missing:
        raise SourceError(f"{FILES[side]} has no {missing[0]}: change lesson_text.py")
    lines = [line for name in section.names[side] for line in program[name].lines]
    whole = Definition(FILES[side], tuple(lines))
    return find(whole, f"the section {section.title!r}", snippet).number


def _lines(
    definition: Definition, side: str, at: Mapping[tuple[str, int], Collection[int]]
) -> list[Cell]:
    tokens = alignment.highlight(definition)
    return [
        Cell(
            line.number,
            len(line.text) - len(line.text.lstrip()),
            alignment.markup(tokens[line.number]),
            list(at.get((side, line.number), ())),
        )
        for line in definition.lines
        if LEFT_OUT not in line.text
    ]


def _difference(one: Difference, backend: Mapping[str, Definition]) -> ShownDifference:
    if missing := [name for name in one.code if name not in backend]:
        raise SourceError(f"the Flax backend has no {missing[0]}: change lesson_text.py")
    shown = [backend[name] for name in one.code]
    where = ", ".join(f"{found.file}, {found.span}" for found in shown)
    code = [_lines(found, "flax", {}) for found in shown]
    return ShownDifference(prose(one.title), prose(one.text), where, code)


def _note(number: int, note: LessonNote, rows: Mapping[str, FaultRow]) -> ShownNote:
    text, missed = prose(note.text), prose(note.missed)
    found = "" if note.fault is None else found_text(note.fault, note.title, rows)
    question = prose(note.question)
    return ShownNote(number, prose(note.title), text, missed, note.fault, found, question)


def found_text(fault: str, title: str, rows: Mapping[str, FaultRow]) -> str:
    """What the float64 check says of a fault."""
    finding = rows[fault]["lenses"].get(DTYPE) if fault in rows else None
    if finding is None or not finding["caught"]:
        raise SourceError(
            f"the note {title!r} names {fault!r}, which is not found in the report of the faults: "
            "name another"
        )
    tensor = "" if finding["tensor"] == finding["stage"] else f", {finding['tensor']}"
    gap = "" if finding["gap"] is None else f", off by {finding['gap']:.2g}"
    return f"found in step {finding['step']:,}, at {finding['stage']}{tensor}{gap}"
