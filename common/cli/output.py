"""What commands print besides the terminal's lines."""

from __future__ import annotations

from typing import Any


def print_json(report: dict[str, Any]) -> None:
    """The report, as its file holds it, on standard output."""
    from lockstep.common.report import to_json

    print(to_json(report), end="", flush=True)
