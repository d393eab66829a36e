"""What `compare.py faults` measured, as its report holds it, checked before a page is made of
it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lockstep.common.config import DTYPES, MAX_COUNT
from lockstep.common.errors import RecordError

SCHEMA = 1
MAX_BYTES = 2**24  # the whole catalogue's report takes 2**18
REMEDY = "make it with: python compare.py faults --data cifar10 --out results/faults"


def read_report(path: Path) -> dict[str, Any]:
    """The report in `path`: its command, its data, and a row of each fault.

    Raises:
        RecordError: if it is missing, damaged, or of another version.
    """
    try:
        # what is not a file, such as a pipe, may never end
        if path.exists() and not path.is_file():
            raise ValueError("not a file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        report = json.loads(path.read_bytes().decode())
        if report["schema"] != SCHEMA:
            raise RecordError(f"{path} is of another version of Lockstep: {REMEDY}")
        found = {name: report[name] for name in ("command", "data", "rows")}
        problem = _problem(found)
    except (OSError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise RecordError(f"{path} cannot be read ({type(error).__name__}): {REMEDY}") from error
    if problem:
        raise RecordError(f"{path} cannot be used ({problem}): {REMEDY}")
    return found


def _problem(report: dict[str, Any]) -> str | None:
    """What is wrong with it, if anything is."""
    command, data, rows = report["command"], report["data"], report["rows"]
    if not isinstance(command, list) or not all(map(_is_text, command)):
        return "command"
    if not isinstance(data, list) or not all(_is_text(entry["name"]) for entry in data):
        return "data"
    if not isinstance(rows, list) or len({row["name"] for row in rows}) < len(rows):
        return "rows"
    for number, row in enumerate(rows):
        if not all(_is_text(row[name]) for name in ("name", "sentence", "source")):
            return f"row {number}"
        lenses = row["lenses"]
        if not lenses.keys() <= set(DTYPES) or not all(map(_is_finding, lenses.values())):
            return f"row {number}, lenses"
    return None


def _is_finding(finding: Any) -> bool:
    """What one lens says of one fault; a gap or share that is not finite is null."""
    if not isinstance(finding["caught"], bool):
        return False
    if not finding["caught"]:
        return True
    step, stage, tensor = finding["step"], finding["stage"], finding["tensor"]
    return (
        (type(step) is int and 0 <= step <= MAX_COUNT and _is_text(stage) and _is_text(tensor))
        and all(
            finding[name] is None or _is_size(finding[name]) for name in ("gap", "gap_over_bound")
        )
        and _is_size(finding["bound"])
    )


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0 and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()
