"""`read.html`: the two backends beside each other, section by section, with notes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from lockstep.common.config import BACKENDS
from lockstep.common.learn import alignment, outline
from lockstep.common.learn import annotations as notes
from lockstep.common.learn.alignment import Row, Token
from lockstep.common.learn.outline import Definition, Line
from lockstep.common.report.template import write_page

NAMES = {"torch": "PyTorch", "flax": "Flax"}
# What the sign between two lines says, as it is seen and as it is read out.
SIGNS = {
    "same": ("=", "the same in both"),
    "alike": ("≈", "the same in other words"),
    "torch": ("←", "in PyTorch only"),
    "flax": ("→", "in Flax only"),
    "apart": ("←→", "two lines without a partner"),
}


def write_read_page(
    path: Path,
    sources: Path,
    faults_report: Mapping[str, Any],
    names: Collection[str],
    page_notes: Sequence[notes.Note] = notes.NOTES,
) -> Path:
    """Write the page to `path`; equal sources and reports give equal bytes.

    Args:
        sources: the folder that holds `backends` and `common`.
        faults_report: `report.json` of `compare.py faults`.
        names: of all faults of the catalogue.

    Raises:
        SourceError: if the sources, the notes and the report do not fit together; the message is
            one line.
        RecordError: if the page cannot be written.
    """
    backends = outline.read_backends(sources)
    outline.check(backends)
    rows = faults_report["rows"]
    notes.check_faults(page_notes, names, rows)
    if (sources / "tests").is_dir():
        notes.check_tests(page_notes, sources)
    shown = _numbered(page_notes, backends)
    shared = outline.read_shared(sources)
    page = [_section(section, backends, shared, shown) for section in outline.SECTIONS]
    named = {fault for note in page_notes for fault in note.faults}
    return write_page(
        path,
        "read.html.jinja",
        sections=page,
        notes=len(shown),
        faults=[_fault(row, shown) for row in rows if row["name"] in named],
        data=" and ".join(data["name"] for data in faults_report["data"]),
        command=" ".join(["python", *faults_report["command"]]),
        signs=SIGNS,
        names=NAMES,
        highlight=alignment.stylesheet(),
    )


# --- Notes


def _numbered(
    page_notes: Sequence[notes.Note], backends: Mapping[str, Mapping[str, Definition]]
) -> list[dict[str, Any]]:
    """The notes in the order in which the page comes to them, with the lines that they are tied
    to."""
    order = {
        name: place
        for place, name in enumerate(name for name, _, _ in outline.sides(outline.SECTIONS))
    }
    found = notes.locate(page_notes, backends)
    found.sort(
        key=lambda entry: (
            order[entry[0].torch.definition],
            entry[1]["torch"].number,
            entry[1]["flax"].number,
        )
    )
    return [
        {
            "number": number,
            "title": note.title,
            "what": prose(note.what),
            "why": prose(note.why),
            "missed": prose(note.missed),
            "faults": note.faults,
            "tests": note.tests,
            "at": {
                side: (getattr(note, side).definition, line.number) for side, line in lines.items()
            },
        }
        for number, (note, lines) in enumerate(found, 1)
    ]


def prose(text: str) -> Markup:
    """Plain text as HTML, with what stands in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _fault(row: Mapping[str, Any], shown: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A known fault, what each lens said of it, and the notes that speak of it."""
    return {
        "name": row["name"],
        "sentence": prose(row["sentence"]),
        "source": row["source"],
        "notes": [note["number"] for note in shown if row["name"] in note["faults"]],
        "findings": [_finding(dtype, finding) for dtype, finding in row["lenses"].items()],
    }


def _finding(dtype: str, finding: Mapping[str, Any]) -> dict[str, str]:
    """One lens's answer, in words for a cell each."""
    if not finding["caught"]:
        return {"dtype": dtype, "step": "", "where": "nothing seen", "gap": "", "over": ""}
    return {
        "dtype": dtype,
        "step": f"{finding['step']:,}",
        "where": ", ".join(dict.fromkeys([finding["stage"], finding["tensor"]])),
        "gap": "undefined" if finding["gap"] is None else f"{finding['gap']:.2g}",
        "over": _over(finding),
    }


def _over(finding: Mapping[str, Any]) -> str:
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
    backends: Mapping[str, Mapping[str, Definition]],
    shared: Mapping[str, Definition],
    shown: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "key": section.key,
        "title": section.title,
        "text": prose(section.text),
        "shared": [_alone(name.partition(":")[2], shared[name]) for name in section.shared],
        "pairs": [_pair(pair, backends, shown) for pair in section.pairs],
    }


def _alone(title: str, definition: Definition) -> dict[str, Any]:
    """A definition that both sides are given."""
    tokens = alignment.highlight(definition)
    lines = [_cell(line, tokens[line.number], (), []) for line in definition.lines]
    return {"title": title, "where": f"{definition.file}, {definition.span}", "lines": lines}


def _pair(
    pair: outline.Pair,
    backends: Mapping[str, Mapping[str, Definition]],
    shown: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """A pair of definitions, or one that has no partner, with the notes that begin here."""
    names = {"torch": pair.torch, "flax": pair.flax}
    both = {side: backends[side][name] for side, name in names.items() if name}
    together = {
        (note["at"]["torch"][1], note["at"]["flax"][1])
        for note in shown
        if all(note["at"][side][0] == names[side] for side in BACKENDS)
    }
    heads = [head.number for definition in both.values() if (head := outline.head(definition))]
    if len(heads) == 2:
        together.add((heads[0], heads[1]))
    numbers: dict[tuple[str, int], list[int]] = {}  # of the notes at each line
    for note in shown:
        for side in both:
            if note["at"][side][0] == names[side]:
                numbers.setdefault((side, note["at"][side][1]), []).append(note["number"])
    lines = {side: definition.lines for side, definition in both.items()}
    return {
        "title": pair.title,
        "why": prose(pair.why),
        "where": {
            side: f"{definition.file}, {definition.span}" for side, definition in both.items()
        },
        "rows": _rows(
            alignment.align(lines.get("torch", ()), lines.get("flax", ()), together), both, numbers
        ),
        "notes": [
            note for note in shown if note["at"]["torch"][0] == pair.torch
        ],  # where its PyTorch line stands
    }


def _rows(
    rows: Sequence[Row],
    both: Mapping[str, Definition],
    numbers: Mapping[tuple[str, int], list[int]],
) -> list[dict[str, Any]]:
    """Rows of the table: the sign between the lines, and the lines as HTML."""
    tokens = {side: alignment.highlight(definition) for side, definition in both.items()}
    made = []
    for row in rows:
        marked: tuple[Collection[int], Collection[int]] = ((), ())
        if row.kind == "alike" and row.torch and row.flax:
            marked = alignment.differing(
                tokens["torch"][row.torch.number], tokens["flax"][row.flax.number]
            )
        cells = {
            side: _cell(
                line, tokens[side][line.number], places, numbers.get((side, line.number), [])
            )
            if line
            else None
            for side, line, places in zip(BACKENDS, (row.torch, row.flax), marked, strict=True)
        }
        style = f"only-{row.kind}" if row.kind in BACKENDS else row.kind
        made.append({"kind": row.kind, "style": style, **cells})
    return made


def _cell(
    line: Line, tokens: Sequence[Token], marked: Collection[int], numbers: Sequence[int]
) -> dict[str, Any]:
    indent = len(line.text) - len(line.text.lstrip())
    return {
        "number": line.number,
        "indent": indent,
        "code": alignment.markup(tokens, marked),
        "notes": list(numbers),
    }
