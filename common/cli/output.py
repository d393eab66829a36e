"""The report on standard output."""

from __future__ import annotations

from collections.abc import Mapping


def print_json(report: Mapping[str, object]) -> None:
    """Print the report as report.json has it."""
    from lockstep.common.report import to_json

    print(to_json(report), end="", flush=True)
