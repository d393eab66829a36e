"""The result of a comparison of two scripts on the terminal."""

from __future__ import annotations

from lockstep.common.report import tables
from lockstep.common.report.script_json import (
    ScriptComparisonJson,
    ScriptPlaceJson,
    ScriptReportJson,
    names_lines,
    remarks,
    shape_text,
    start_sentence,
)
from lockstep.common.report.summary import tensor_text, worst_per_stage
from lockstep.common.report.tables import Table
from lockstep.common.report.terminal import Terminal
from lockstep.common.report.text import number, ok, plural, share

MAX_REMARKS = 4  # without `verbose`
MAX_LINES = 3  # of a names file, likewise


def print_script_report(terminal: Terminal, report: ScriptReportJson, path: object = None) -> None:
    """Print the result. The last lines are the verdict, the place where the scripts differ first,
    the likely cause, and the path of the report; `verbose` prints all tables before them.

    Args:
        path: of the report, for the last line.
    """
    style = {"agree": "bold green", "disagree": "bold red"}.get(report["verdict"], "bold")
    if terminal.quiet:
        terminal.paragraph(report["sentence"], style)
        return
    if start := start_sentence(report):
        terminal.paragraph(start, "bold")
    for found in report["precisions"]:
        if terminal.verbose:
            _details(terminal, found)
        else:
            terminal.paragraph(in_short(found))
    if terminal.verbose:
        table = tensor_table(report)
        terminal.table(table.columns, table.rows)
        terminal.line("")
    _remarks(terminal, report)
    terminal.paragraph(verdict_line(report), style)
    for found in report["precisions"]:
        if place := found["first_divergence"]:
            _place(terminal, found["dtype"], place)
    if path is not None:
        terminal.line(f"Report: {path}")


def verdict_line(report: ScriptReportJson) -> str:
    """The verdict; the place stands in lines of its own."""
    return report["sentence"] if report["verdict"] != "disagree" else "The two scripts disagree."


def in_short(found: ScriptComparisonJson) -> str:
    """One precision in one line."""
    verdict = {"agree": "agree", "disagree": "DISAGREE", "diverged": "blow up together"}
    text = f"{found['dtype']}, {plural(found['steps'], 'step')}: {verdict[found['verdict']]}"
    if found["max_abs_loss_gap"] is not None:
        text += f"; losses within {number(found['max_abs_loss_gap'])}"
    if found["verdict"] == "agree" and found["score"] is not None:
        text += f"; the closest check uses {share(found['score'])} of its bound"
    return f"{text}{twins_text(found)}."


def twins_text(found: ScriptComparisonJson) -> str:
    """As `; 2 and 2 twins`; empty where none were run."""
    short = " of the first steps" if not any(found["twins"]) else ""
    twins = found["twins"] if any(found["twins"]) else found["beginners"]
    return f"; twins{short}: {twins[0]} and {twins[1]}" if any(twins) else ""


def tensor_table(report: ScriptReportJson) -> Table:
    """Which tensor was compared with which."""
    a, b = (script["name"] for script in report["scripts"])
    rows = [
        [*each["names"], shape_text(each["shape"]), each["layout"] or "alike", each["how"]]
        for each in report["tensors"]
    ]
    caption = "Which tensor is which: the layout is how that of B becomes that of A"
    return Table(caption, [a, b, "shape", "layout", "found by"], rows)


def _details(terminal: Terminal, found: ScriptComparisonJson) -> None:
    """All tables of one precision."""
    terminal.line("")
    terminal.paragraph(in_short(found), "bold")
    rows = [
        [
            f"{row['stage']}, {when}",
            tensor_text(row),
            f"{row['step']:,}",
            number(row["gap"]),
            number(row["bound"], "none"),
            ok(agrees, row.get("power", True)),
        ]
        for when, row, agrees in worst_per_stage(found["ladder"])
    ]
    if rows:
        terminal.table(["stage", "worst tensor", "step>", "gap>", "bound>", "ok"], rows)
    windows = tables.windows(found)
    if windows.rows:
        terminal.table(windows.columns, windows.rows)
    terminal.line("")
    terminal.paragraph(f"How large a gap may be: {found['bound'].get('rule', '').rstrip('.')}.")


def _remarks(terminal: Terminal, report: ScriptReportJson) -> None:
    texts, lines = remarks(report), names_lines(report)
    shown = texts if terminal.verbose else texts[:MAX_REMARKS]
    for text in shown:
        terminal.paragraph(f"{text}.")
    if len(texts) > len(shown):
        terminal.paragraph(f"{plural(len(texts) - len(shown), 'more remark')}: see the report.")
    if lines:
        terminal.paragraph("For a --names FILE, a line each:")
        for line in lines if terminal.verbose else lines[:MAX_LINES]:
            terminal.line(f"  {line}")


def _place(terminal: Terminal, dtype: str, place: ScriptPlaceJson) -> None:
    terminal.paragraph(f"Where they differ first: {dtype}: {place['message']}.", "bold")
    seen = [text for text in (place["pattern"], place["extent"]) if text]
    if seen:
        terminal.paragraph(f"There: {'; '.join(seen)}.")
    if lines := [line for line in place["lines"] if line]:
        terminal.paragraph(f"In the source: {' and '.join(lines)}.")
    for cause in place["causes"]:
        terminal.paragraph(f"A likely cause: {cause}.")
