"""The reports of a comparison of two scripts, and its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.common.report.json import write_json
from lockstep.common.report.script_json import (
    Checked,
    ScriptPlaceJson,
    ScriptReportJson,
    make_report,
)
from lockstep.common.report.script_page import write_script_page
from lockstep.common.report.script_terminal import print_script_report
from lockstep.common.report.terminal import Terminal


@dataclass(frozen=True, repr=False)
class ScriptResult:
    """The outcome of a comparison of two scripts. It is true if they agree, and shown as the place
    where they differ if not."""

    report: ScriptReportJson
    folder: Path  # with report.json and report.html

    def __bool__(self) -> bool:
        return self.verdict == "agree"

    def __repr__(self) -> str:
        causes = "".join(f" Likely {cause}." for cause in self.causes[:1])
        return f"{self.sentence}{causes} Report: {self.folder}"

    @property
    def verdict(self) -> str:
        """ "agree", "disagree", or "diverged": both reach a loss that is not finite at the same
        step, and agree up to it."""
        return self.report["verdict"]

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        return self.report["sentence"]

    @property
    def place(self) -> str | None:
        """Where the scripts differ first: stage, step and tensor. None if they agree."""
        return found["message"] if (found := self._place()) else None

    @property
    def causes(self) -> tuple[str, ...]:
        """Likely causes of the difference, the likeliest first."""
        return tuple(found["causes"]) if (found := self._place()) else ()

    def _place(self) -> ScriptPlaceJson | None:
        places = (each["first_divergence"] for each in self.report["precisions"])
        return next((place for place in places if place is not None), None)


def write_script_report(
    folder: Path, checked: Checked, command: Sequence[str] = ()
) -> ScriptResult:
    """Write report.json and report.html to `folder`.

    Raises:
        RecordError: if it cannot be written.
    """
    report = make_report(checked, command)
    write_json(report, folder)
    write_script_page(folder, report, checked)
    return ScriptResult(report, folder)


def write(
    checked: Checked, folder: Path, terminal: Terminal, command: Sequence[str] = ()
) -> ScriptResult:
    """Write the reports, and print the result."""
    result = write_script_report(folder, checked, command)
    print_script_report(terminal, result.report, folder / "report.html")
    return result
