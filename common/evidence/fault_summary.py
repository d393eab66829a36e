"""The summary of `faults.measure`'s rows: counts, a table and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

from lockstep.common.evidence.faults import Row


class Share(TypedDict):
    yes: int
    of: int


class PrecisionSummary(TypedDict):
    """The counts in one precision."""

    caught: Share
    caught_of_those_that_change_the_function: Share
    missed: list[str]
    caught_without_having_it: list[str]


class Summary(TypedDict):
    """The counts over the faults that can show in a measured precision. Stage and tensor are those
    of the first precision that caught the fault."""

    faults: int
    caught: int
    missed: list[str]
    stage_right: Share
    tensor_right: Share
    held_out: Share  # caught, of those that no rule of the verdict was set with
    lenses: dict[str, PrecisionSummary]


def summary(rows: Sequence[Row]) -> Summary:
    """Count what was found."""
    rows = [row for row in rows if row["lens"] is None or row["lens"] in row["lenses"]]
    firsts = [next((f for f in row["lenses"].values() if f["caught"]), None) for row in rows]
    caught = [finding for finding in firsts if finding is not None]
    return {
        "faults": len(rows),
        "caught": len(caught),
        "missed": [
            row["name"] for row, finding in zip(rows, firsts, strict=True) if finding is None
        ],
        "stage_right": _share(finding["stage_right"] for finding in caught),
        "tensor_right": _share(f["tensor_right"] for f in caught if f["tensor_right"] is not None),
        "held_out": _share(
            finding is not None
            for row, finding in zip(rows, firsts, strict=True)
            if row.get("held_out", False)
        ),
        "lenses": {
            dtype: _precision_summary(rows, dtype)
            for dtype in {d: None for row in rows for d in row["lenses"]}
        },
    }


def _precision_summary(rows: Sequence[Row], dtype: str) -> PrecisionSummary:
    """In one precision: how many faults can show, and how many were caught."""
    has = [row for row in rows if dtype in row["lenses"] and row["lens"] in (None, dtype)]
    others = [row for row in rows if dtype in row["lenses"] and row not in has]
    changing = [row["lenses"][dtype]["caught"] for row in has if row["changes_function"]]
    return {
        "caught": _share(row["lenses"][dtype]["caught"] for row in has),
        "caught_of_those_that_change_the_function": _share(changing),
        "missed": [row["name"] for row in has if not row["lenses"][dtype]["caught"]],
        "caught_without_having_it": [
            row["name"] for row in others if row["lenses"][dtype]["caught"]
        ],
    }


def summary_lines(row: Row) -> list[str]:
    """A fault as a user would see it reported, in a few lines."""
    lines = [f"{row['name']}: {row['sentence']} ({row['source']})"]
    for dtype, finding in row["lenses"].items():
        said = finding["message"] or "" if finding["caught"] else "not detected"
        said += "".join(
            f"; {text}"
            for text in [finding["pattern"], finding["common"], *(finding["causes"] or ())]
            if text
        )
        lines.append(f"  {dtype}: {said}")
    return lines


def _share(verdicts: Iterable[bool | None]) -> Share:
    verdicts = list(verdicts)
    return {"yes": sum(map(bool, verdicts)), "of": len(verdicts)}


def _of(share: Share) -> str:
    return f"{share['yes']} of {share['of']}"


def sentence(summary: Summary) -> str:
    """The result in plain words."""
    counts = ", ".join(
        f"{dtype}: {_of(found['caught'])}" for dtype, found in summary["lenses"].items()
    )
    text = (
        f"{summary['caught']} of {summary['faults']} known faults are found ({counts}), "
        f"{_of(summary['stage_right'])} in the right stage, "
        f"{_of(summary['tensor_right'])} in the right tensor."
    )
    if (held_out := summary["held_out"])["of"]:
        text += f" Of those that no rule was set with, {_of(held_out)} are found."
    return text + (f" Missed: {', '.join(summary['missed'])}." if summary["missed"] else "")


def table(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Column names (`>` for numbers) and lines: per precision the step, and the gap as a multiple
    of its bound.

    A stage after the step means that the report named that stage, while the fault lies in another.
    `none` means that this precision has no such fault.
    """
    precisions = list({dtype: None for row in rows for dtype in row["lenses"]})
    columns = ("fault", "lies in", *(name for dtype in precisions for name in (dtype, "over>")))
    lines = [
        (row["name"], row["stage"], *(cell for d in precisions for cell in _cells(row, d)))
        for row in rows
    ]
    return columns, lines


def _cells(row: Row, dtype: str) -> tuple[str, str]:
    finding = row["lenses"].get(dtype)
    if finding is None:
        return "", ""
    if not finding["caught"]:
        return ("missed" if row["lens"] in (None, dtype) else "none"), ""
    place = f"{finding['step']}" + ("" if finding["stage_right"] else f" {finding['stage']}")
    return place, _multiple(finding["gap_over_bound"])


def _multiple(over: float | None) -> str:
    """A ratio in a few letters, as `1.2` or `3e12`; `inf` where the bound is zero or the gap is not
    finite."""
    if over is None:
        return "inf"
    if over < 10:
        return f"{over:.1f}"
    digit, exponent = f"{over:.0e}".split("e")
    return f"{digit}e{int(exponent)}"
