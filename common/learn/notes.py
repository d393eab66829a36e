"""Notes of the lesson, and the checks that tie them to the sources.

Each note names one line of each backend's source, and known faults (`backends/faults/`) or a test
that show what it says.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lockstep.common.learn.faults_report import FaultRow
from lockstep.common.learn.sources import Definition, Line, SourceError, find


class SourceLine(NamedTuple):
    """One line of one side."""

    definition: str  # as `models/net.py:Net.forward`
    snippet: str  # text of that line, and of no other line in the definition
    after: str = ""  # or the first such line below the one line with this text


@dataclass(frozen=True)
class Note:
    """One difference that matters. Its texts may hold code in backticks."""

    title: str
    torch: SourceLine
    flax: SourceLine
    what: str
    why: str
    if_ignored: str  # what goes wrong in a port that ignores it
    faults: tuple[str, ...] = ()  # names of the catalogue
    tests: tuple[str, ...] = ()  # `tests/file.py::name`


def locate(
    notes: Sequence[Note], backends: Mapping[str, Mapping[str, Definition]]
) -> list[tuple[Note, dict[str, Line]]]:
    """Each note with its line on each side.

    Raises:
        SourceError: if a definition or a line is gone, or if a line is not the only one.
    """
    return [
        (
            note,
            {
                side: line_of(backends, side, source_line, f"the note {note.title!r}")
                for side, source_line in (("torch", note.torch), ("flax", note.flax))
            },
        )
        for note in notes
    ]


def line_of(
    backends: Mapping[str, Mapping[str, Definition]], side: str, source_line: SourceLine, who: str
) -> Line:
    """The line that `who` names.

    Raises:
        SourceError: if its definition or the line is gone, or if the line is not the only one.
    """
    definition, snippet, after = source_line
    if definition not in backends[side]:
        raise SourceError(f"{side} has no {definition}, which {who} names: change it")
    return find(backends[side][definition], definition, snippet, after)


def check_faults(notes: Sequence[Note], names: Collection[str], rows: Sequence[FaultRow]) -> None:
    """Check that each note names a fault or a test, and that each fault is in the catalogue and was
    found when the faults were measured.

    Args:
        names: of all faults of the catalogue.
        rows: of the report of the command `faults`.

    Raises:
        SourceError: naming the first note for which that does not hold.
    """
    measured = {
        row["name"]: any(finding["caught"] for finding in row["lenses"].values()) for row in rows
    }
    for note in notes:
        if not note.faults and not note.tests:
            raise SourceError(
                f"the note {note.title!r} has neither a fault nor a test to show it: name one"
            )
        for fault in note.faults:
            if fault not in names:
                raise SourceError(
                    f"the note {note.title!r} names {fault!r}, which is no known fault: fix it"
                )
            if not measured.get(fault):
                why = "was not found" if fault in measured else "is not in the report"
                raise SourceError(
                    f"the fault {fault!r} of the note {note.title!r} {why}: run the faults again"
                )


def check_tests(notes: Sequence[Note], root: Path) -> None:
    """Check that each test that a note names exists.

    Raises:
        SourceError: naming the first that does not.
    """
    for note in notes:
        for test in note.tests:
            file, _, name = test.partition("::")
            try:
                tree = ast.parse((root / file).read_text(encoding="utf-8"))
            except OSError as error:
                raise SourceError(
                    f"the note {note.title!r} names {file}, which does not exist"
                ) from error
            if not any(
                isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body
            ):
                raise SourceError(
                    f"the note {note.title!r} names {test}, and {file} has no such test"
                )
