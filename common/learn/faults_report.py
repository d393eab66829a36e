"""The report of the command `faults`, checked before a page is made from it.

Its keys are older than the names in the code: `lenses` are the precisions, `sentence` describes a
fault.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TypedDict

from lockstep.common.config import DTYPES, MAX_COUNT
from lockstep.common.errors import RecordError

SCHEMA = 1
MAX_BYTES = 2**24  # the whole catalogue's report takes 2**18
HINT = "make it with: python compare.py faults --data cifar10 --out results/faults"


class FindingJson(TypedDict):
    """Whether and where one precision shows one fault. Without `caught`, the rest is missing."""

    caught: bool
    step: int
    stage: str
    tensor: str
    gap: float | None  # None: not finite
    bound: float
    gap_over_bound: float | None


class FaultRow(TypedDict):
    """One fault of the catalogue."""

    name: str
    sentence: str
    source: str
    lenses: dict[str, FindingJson]  # by precision


class DataName(TypedDict):
    """A data set that the faults were measured on; its other keys do not matter here."""

    name: str


class FaultsReport(TypedDict):
    """The part of the report that the page shows."""

    command: list[str]
    data: list[DataName]
    rows: list[FaultRow]


def read_report(path: Path) -> FaultsReport:
    """The report in `path`: its command, its data, and a row of each fault.

    Raises:
        RecordError: if it is missing, damaged, or of another version.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe may never end
            raise ValueError("not a file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        report = json.loads(path.read_bytes().decode())
        if report["schema"] != SCHEMA:
            raise RecordError(f"{path} is of another version of Lockstep: {HINT}")
        found: FaultsReport = {
            "command": report["command"],
            "data": report["data"],
            "rows": report["rows"],
        }
        problem = _problem(found)
    except (OSError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise RecordError(f"{path} cannot be read ({type(error).__name__}): {HINT}") from error
    if problem:
        raise RecordError(f"{path} cannot be used ({problem}): {HINT}")
    return found


def _problem(report: FaultsReport) -> str | None:
    """The place of the first value that is wrong, if there is one."""
    command, data, rows = report["command"], report["data"], report["rows"]
    if not isinstance(command, list) or not all(map(_is_text, command)):
        return "command"
    if not isinstance(data, list) or not all(_is_text(entry["name"]) for entry in data):
        return "data"
    if not isinstance(rows, list) or len({row["name"] for row in rows}) < len(rows):
        return "rows"
    for number, row in enumerate(rows):
        if not all(map(_is_text, (row["name"], row["sentence"], row["source"]))):
            return f"row {number}"
        findings = row["lenses"]
        if not findings.keys() <= set(DTYPES) or not all(map(_is_finding, findings.values())):
            return f"row {number}, lenses"
    return None


def _is_finding(finding: FindingJson) -> bool:
    if not isinstance(finding["caught"], bool):
        return False
    if not finding["caught"]:
        return True
    step, stage, tensor = finding["step"], finding["stage"], finding["tensor"]
    gap, over = finding["gap"], finding["gap_over_bound"]
    return (
        (type(step) is int and 0 <= step <= MAX_COUNT and _is_text(stage) and _is_text(tensor))
        and all(value is None or _is_size(value) for value in (gap, over))
        and _is_size(finding["bound"])
    )


def _is_size(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 0 and math.isfinite(value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()
