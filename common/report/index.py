"""`index.html` of a folder of results: every run with its verdict and a small picture of the gap
between its losses, the pages to learn from, and the evidence."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from markupsafe import Markup

from lockstep.common.config import FRAMEWORKS
from lockstep.common.errors import RecordError
from lockstep.common.report.first_screen import VERDICTS, Verdict, ran
from lockstep.common.report.json import ComparedJson, ReportJson, WindowJson
from lockstep.common.report.script_json import ScriptReportJson
from lockstep.common.report.template import write_page
from lockstep.common.report.text import listed, number, percent, plural

LEFT_OUT = "runs"  # the folder of what is not committed
FIRST = "net"  # the tutorial's network
# Below the folder, where it is there: its title, and what it is about.
PAGES = {
    "read/lesson.html": (
        "From PyTorch to JAX in ten minutes",
        "The same training in sixty plain lines of each, with notes in the margin.",
    ),
    "read/walk.html": (
        "What one step of SGD does",
        "Every number of one training step, in both frameworks and by hand.",
    ),
    "read/read.html": (
        "The two backends side by side",
        "A reference: all of both backends, line by line.",
    ),
    "read/lesson.ipynb": (
        "The lesson as a notebook",
        "Both programs to run and to change, and a comparison of the two frameworks.",
    ),
}
# What a folder of evidence shows, by its name or the first word of that.
EVIDENCE = {
    "alarms": "Correct runs, compared: how often was the verdict wrong?",
    "bench": "Speed, next to the tutorial's own loop",
    "cluster": "Correct runs that the workers of a cluster trained",
    "faults": "Known mistakes: which are found, and where?",
    "fuzz": "Damaged files and options: each is refused in one line",
    "grid": "Every combination of the optimizer's options",
    "handover": "Runs that one framework starts and the other finishes",
    "kills": "Runs that are killed and resumed",
    "pairs": "Networks in the style of their authors: checked and trained",
    "rank": "Ranks of a run that are killed, and the run resumed",
    "overhead": "What recording a script costs",
    "overhead-processes": "What training by several processes costs on two cores",
    "sensitivity": "The smallest error of the learning rate that is seen",
}

# The picture: its size in pixels, and the gaps at its lower and upper edge.
WIDTH, HEIGHT = 150, 64
LOWEST, HIGHEST = 1e-17, 1e2
LINES = (1e-15, 1e-10, 1e-5, 1.0)
Column = Literal["drift", "bound", "gap"]
COLUMNS: tuple[Column, ...] = ("drift", "bound", "gap")  # the last one lies on top


@dataclass(frozen=True)
class Picture:
    """The gap of the losses in one precision."""

    dtype: str
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Run:
    """A run that was compared."""

    name: str
    model: str  # empty of scripts
    verdict: Verdict
    ran: str
    accuracy: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Evidence:
    """A folder with a report of something else than a run."""

    name: str
    text: str
    pictures: Sequence[str]


def write_index_page(folder: Path) -> Path:
    """Write `index.html` of all reports in `folder`, except those below `runs`.

    Raises:
        RecordError: if a report cannot be read, or the page cannot be written.
    """
    runs: list[Run] = []
    scripts: list[Run] = []
    evidence: list[Evidence] = []
    for path, report in _reports(folder):
        name = path.parent.relative_to(folder).as_posix()
        try:
            if "lenses" in report:
                runs.append(_run(name, cast(ReportJson, report)))
            elif report.get("kind") == "script check":
                scripts.append(_scripts(name, cast(ScriptReportJson, report)))
            else:
                evidence.append(_evidence(name, path.parent))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise RecordError(
                f"{path} is not a report of this version of Lockstep ({type(error).__name__}): "
                "make it again, or move it away"
            ) from error
    pages = [(link, *said) for link, said in PAGES.items() if (folder / link).exists()]
    return write_page(
        folder / "index.html",
        "index.html.jinja",
        pages=pages,
        groups=[
            ("Runs in PyTorch and in JAX", sorted(runs, key=lambda run: run.model != FIRST)),
            ("Two versions of one script", scripts),
        ],
        evidence=evidence,
        lowest=number(LOWEST),
        highest=number(HIGHEST),
    )


def _reports(folder: Path) -> Iterator[tuple[Path, Mapping[str, object]]]:
    for path in sorted(folder.rglob("report.json")):
        if LEFT_OUT in path.relative_to(folder).parts:
            continue
        try:
            report = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RecordError(
                f"{path} cannot be read ({type(error).__name__}): make it again, or move it away"
            ) from error
        if not isinstance(report, dict):
            raise RecordError(f"{path} is no report: move it away")
        yield path, report


def _run(name: str, report: ReportJson) -> Run:
    return Run(
        name=name,
        model=str(report["config"].get("model", FIRST)),
        verdict=VERDICTS["cut short" if report.get("cut_short") else report["verdict"]],
        ran=ran(report),
        accuracy="; ".join(
            f"{each['dtype']}: "
            + listed(
                [
                    f"{FRAMEWORKS.get(side, side)} {percent(v)}"
                    for side, v in each["accuracy"].items()
                ]
            )
            for each in report["lenses"]
            if report["data"]["classes"]
        ),
        pictures=[_picture(each, "loss") for each in report["lenses"]],
    )


def _scripts(name: str, report: ScriptReportJson) -> Run:
    compared = [Path(script["name"]).name for script in report["scripts"]]
    files = list(dict.fromkeys(Path(script["script"]).name for script in report["scripts"]))
    precisions = report["precisions"]
    steps = max((each["steps"] for each in precisions), default=0)
    return Run(
        name=name,
        model="",
        verdict=VERDICTS[report["verdict"]],
        ran=f"{listed(files)}, {listed(compared)}: {plural(steps, 'step')}",
        accuracy="",
        pictures=[_picture(each, each["losses"][0]) for each in precisions if each["losses"]],
    )


def _evidence(name: str, folder: Path) -> Evidence:
    kind = name.partition("/")[0].partition("-")[0]
    pictures = sorted(path.name for path in folder.glob("*.png"))
    return Evidence(name, EVIDENCE.get(name, EVIDENCE.get(kind, "")), pictures)


# --- The picture


def _picture(compared: ComparedJson, quantity: str) -> Picture:
    """The gap of one series, as a step function on logarithmic axes.

    It is drawn by hand: twenty of them from matplotlib are as large as the rest of the page.
    """
    rows = [row for row in compared["stretches"] if row["quantity"] == quantity]
    largest = [row["gap"] for row in rows if row["gap"] is not None]
    bounds = [row["bound"] for row in rows if row["bound"] is not None]
    text = f"{compared['dtype']}: no finite loss"
    if largest:
        text = f"{compared['dtype']}: gap {number(max(largest))}"
    if largest and bounds:
        text += f", bound {number(max(bounds))}"
    parts = [f'<path class="grid" d="{"".join(f"M0 {_y(v)}H{WIDTH}" for v in LINES)}"/>']
    for key in COLUMNS:
        if path := _steps(rows, key):
            closed = f"V{HEIGHT}H{path[1:].split(' ')[0]}Z" if key == "drift" else ""
            parts.append(f'<path class="{key}" d="{path}{closed}"/>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{{}}">{"".join(parts)}</svg>'
    return Picture(compared["dtype"], Markup(svg).format(_alternative(text, rows)), text)


def _alternative(text: str, rows: Sequence[WindowJson]) -> str:
    """The picture in words."""
    if not rows:
        return text
    text = text.replace("gap", "the losses' gap is at most", 1).replace("bound", "its bound", 1)
    ends = [number(row["gap"]) for row in (rows[0], rows[-1])]
    spread = [row["drift"] for row in rows if row["drift"] is not None]
    twins = f"; between twins at most {number(max(spread))}" if spread else ""
    return (
        f"{text}{twins}. The gap begins at {ends[0]} and is {ends[1]} in the last steps, "
        f"{rows[-1]['start']:,} to {rows[-1]['stop'] - 1:,}"
    )


def _steps(rows: Sequence[WindowJson], key: Column) -> str:
    """A path along one column of the rows."""
    last = max((row["stop"] for row in rows), default=1)
    path = ""
    for row in rows:
        value = row[key]
        if value is None:
            continue
        left, right = (_x(step, last) for step in (row["start"], row["stop"]))
        path += f"L{left} {_y(value)}H{right}" if path else f"M{left} {_y(value)}H{right}"
    return path


def _x(step: int, last: int) -> str:
    return f"{WIDTH * math.log(1 + step) / math.log(1 + last):.4g}"


def _y(value: float) -> str:
    """A gap of 0 lies at the lower edge."""
    low, high = math.log(LOWEST), math.log(HIGHEST)
    place = (math.log(min(max(value, LOWEST), HIGHEST)) - low) / (high - low)
    return f"{HEIGHT * (1 - place):.4g}"
