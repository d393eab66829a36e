"""`report.html` of two scripts: one page that opens from disk, from the verdict to the environments."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lockstep.common.config import BACKENDS
from lockstep.common.report import charts, first_screen, tables
from lockstep.common.report.alt_text import usage_text
from lockstep.common.report.chart_data import (
    loss_bounds,
    running_mean,
    series_gap,
    series_spread,
    window_of,
)
from lockstep.common.report.figures import drawing
from lockstep.common.report.html import typed_command
from lockstep.common.report.panels import Chart, escaped, panel
from lockstep.common.report.script_json import (
    Checked,
    ScriptComparisonJson,
    ScriptJson,
    ScriptPlaceJson,
    ScriptReportJson,
    names_lines,
    remarks,
    start_sentence,
)
from lockstep.common.report.script_terminal import in_short, tensor_table, verdict_line
from lockstep.common.report.tables import Table
from lockstep.common.report.template import write_page
from lockstep.common.report.text import four_digits, number, plural
from lockstep.common.verdict.comparison import format_distinct
from lockstep.common.verdict.scripts import ScriptRuns

MAX_LOSSES = 4  # that are drawn
Values = list[list[np.ndarray]]  # a loss: of each side, that of the run and of its twins


def write_script_page(folder: Path, report: ScriptReportJson, checked: Checked) -> Path:
    """Write `report.html`: one file that needs no network; equal comparisons give equal bytes.

    Raises:
        RecordError: if the file cannot be written.
    """
    names = [script["name"] for script in report["scripts"]]
    with drawing():
        sections = [
            _section(found, runs, names)
            for found, runs in zip(report["precisions"], checked.runs, strict=True)
        ]
    command = report["command"]
    values = {
        "names": names,
        "verdict": first_screen.VERDICTS[report["verdict"]],
        "sentence": verdict_line(report),
        "start": start_sentence(report) or "",
        "remarks": [f"{text}." for text in remarks(report)],
        "comparisons": sections,
        "tensors": tensor_table(report),
        "unmatched": _unmatched(report, names),
        "lines": names_lines(report),
        "command": shlex.join(typed_command(command)) if command else "",
        "facts": [_facts(script) for script in report["scripts"]],
    }
    page = {name: escaped(value) for name, value in values.items()}
    return write_page(Path(folder, "report.html"), "script.html.jinja", **page)


# --- One precision


def _section(
    found: ScriptComparisonJson, runs: tuple[ScriptRuns, ScriptRuns], names: Sequence[str]
) -> dict[str, object]:
    place = found["first_divergence"]
    return {
        "dtype": found["dtype"],
        "heading": in_short(found).partition(";")[0].rstrip(".").replace("DISAGREE", "disagree"),
        "place": _place(place, names) if place else None,
        "stages": first_screen.stages(found, place),
        "confidence": _confidence(found),
        "charts": [
            chart
            for loss in found["losses"][:MAX_LOSSES]
            for chart in _loss_charts(found, loss, _values(runs, loss), names)
        ],
        "worst_entries": _worst_entries(place, names, found["dtype"]) if place else None,
        "checks": [tables.worst_checks(found), tables.checks(found)],
        "windows": tables.windows(found),
    }


def _confidence(found: ScriptComparisonJson) -> list[str]:
    """How much was compared, how near to the bounds it came, and how the bounds were set."""
    twins, short = found["twins"], found["beginners"]
    text = f"{usage_text(found, found['score'])}."
    if any(twins):
        text += f" {twins[0]} and {twins[1]} twins show how far rounding alone takes each script."
    if any(short):
        text += f" Of {short[0]} and {short[1]} more, the first steps were run."
    return [text, f"How large a gap may be: {found['bound'].get('rule', '').rstrip('.')}."]


def _place(place: ScriptPlaceJson, names: Sequence[str]) -> dict[str, object]:
    values, lines = place["values"], place["lines"]
    a, b = values
    known = a is not None and b is not None
    shown = format_distinct(a, b) if a is not None and b is not None else ("", "")
    texts = [text for text in (place["pattern"], place["extent"]) if text]
    gap = f"Gap {number(place['gap'])}, bound {number(place['bound'], 'none')}."
    whole = place["stage"] == "data" and not known and place["pattern"] is None
    return {
        "step": f"{place['step']:,}",
        "stage": place["stage"],
        "shown": known,
        "has_lines": any(lines),
        "sides": [
            {
                "script": name,
                "colour": BACKENDS[side],
                "tensor": place["names"][side],
                "value": shown[side],
                "line": lines[side] or "-",
            }
            for side, name in enumerate(names)
        ],
        "gap": "The two trained on different batches." if whole else gap,
        "seen": f"There: {'; '.join(texts)}." if texts else "",
        "causes": place["causes"],
    }


def _worst_entries(place: ScriptPlaceJson, names: Sequence[str], dtype: str) -> Table | None:
    if not place["offenders"]:
        return None
    rows = []
    for entry in place["offenders"]:
        a, b = entry["values"]
        cells = ["not finite" if value is None else f"{value:.9g}" for value in (a, b)]
        if a is not None and b is not None and cells[0] == cells[1]:
            cells = list(format_distinct(a, b))
        rows.append([f"[{', '.join(map(str, entry['index']))}]", *cells])
    caption = f"Largest differences in {place['tensor']}, {dtype}"
    return Table(caption, ["entry", *(f"{name}>" for name in names)], rows)


# --- Charts


def _values(runs: tuple[ScriptRuns, ScriptRuns], loss: str) -> Values:
    """A loss of both sides, which may call it by other names, if it is their only one."""
    found: Values = []
    for side in runs:
        own = loss if loss in side.run.series else side.run.losses[0]
        found.append([each.series[own] for each in (side.run, *side.twins) if own in each.series])
    return found


def _loss_charts(
    found: ScriptComparisonJson, loss: str, values: Values, names: Sequence[str]
) -> list[Chart]:
    dtype, (ours, theirs) = found["dtype"], (side[0] for side in values)
    key = f"{dtype}-{found['losses'].index(loss)}"
    gap, spread = series_gap(ours, theirs), series_spread(values)
    bounds = loss_bounds(found, loss)
    window = window_of(max(len(ours), len(theirs)))
    series = dict(zip(names, (ours, theirs), strict=True))
    thick = (
        f": thin line, each step; thick line, the mean of {window:,} steps" if window > 1 else ""
    )
    band = ", the gap between twins of one script (grey)," if spread is not None else ""
    place = found["first_divergence"]
    return [
        panel(
            f"loss-{key}",
            f"{loss} of each script{thick}.",
            _series_text(loss, dtype, series, window),
            3.4,
            lambda axes: charts.draw_lines(axes, series, loss, window),
            _series_table(f"{loss}, {dtype}", series),
        ),
        panel(
            f"gap-{key}",
            f"Gap of {loss}{band} and its bound.",
            _gap_text(loss, dtype, gap, spread),
            3.4,
            lambda axes: charts.draw_gaps(axes, [charts.Gap(dtype, gap, spread, bounds)], place),
            tables.gap_table(f"Gap of {loss}, {dtype}", gap, spread, bounds),
            legend=2,
        ),
    ]


def _series_text(loss: str, dtype: str, series: Mapping[str, np.ndarray], window: int) -> str:
    texts = []
    for name, values in series.items():
        _, means = running_mean(values, window)
        known = means[np.isfinite(means)]
        if len(known):
            ends = four_digits(float(known[0])), four_digits(float(known[-1]))
            texts.append(f"{name} from {ends[0]} to {ends[1]}")
    return f"{loss}, {dtype}, over the steps: {'; '.join(texts) or 'not finite'}."


def _gap_text(loss: str, dtype: str, gap: np.ndarray, spread: np.ndarray | None) -> str:
    known = gap[np.isfinite(gap)]
    most = number(float(known.max())) if len(known) else "never finite"
    text = f"Gap of {loss} between the two scripts, {dtype}, on a logarithmic axis: at most {most}"
    if spread is not None and len(spread):
        text += f"; twins of one script differ by up to {number(float(spread[-1]))}"
    return f"{text}."


def _series_table(caption: str, series: Mapping[str, np.ndarray]) -> Table:
    steps = tables.steps_of(min(map(len, series.values())))
    rows = [
        [f"{step:,}", *(four_digits(float(values[step])) for values in series.values())]
        for step in steps
    ]
    return Table(caption, ["step>", *(f"{name}>" for name in series)], rows)


# --- The scripts


def _unmatched(report: ScriptReportJson, names: Sequence[str]) -> Table:
    proposals = report["proposals"]
    rows = [[names[0], name, proposals.get(name, "-")] for name in report["unmatched"][0]]
    rows += [[names[1], name, "-"] for name in report["unmatched"][1]]
    return Table("Tensors that were compared with none", ["script", "tensor", "nearest"], rows)


def _facts(script: ScriptJson) -> Table:
    rows = [
        ["script", script["script"]],
        ["arguments", shlex.join(script["arguments"]) or "none"],
        ["framework", script["framework"]],
        *([["processes", str(script["processes"])]] if script["processes"] > 1 else []),
        ["SHA-256", script["source"][:16] or "unknown"],
        ["time of a run", plural_seconds(script["seconds"])],
        *tables.flat(script["environment"]),
    ]
    return Table(script["name"], ["what", "value"], rows)


def plural_seconds(seconds: float) -> str:
    return plural(round(seconds), "second") if seconds >= 10 else f"{seconds:.1f} seconds"
