"""What the commands that make evidence print: the result last, and tables only if asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import pytest

from lockstep.common.backends import BackendPackage
from lockstep.common.cli.evidence import EvidenceCommand
from lockstep.common.cli.parser import Invocation, parse
from lockstep.common.evidence import optimizer_grid, sensitivity
from lockstep.common.evidence.optimizer_grid import Row
from lockstep.common.system.interrupt import SignalHandler

LINES = 15
SENTENCE = "2 of 2 known faults are found."
TABLE = (("fault", "lies in"), [(f"fault-{number}", "loss") for number in range(100)])
COMMANDS = ["faults", "alarms", "sensitivity", "grid", "handover", "bench"]


class Printed(NamedTuple):
    out: str
    err: str


@pytest.fixture
def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """Report a result of a hundred rows, and return what was printed."""

    def report(command: str, *more: str) -> Printed:
        arguments = [command, "--out", str(tmp_path), *more]
        invocation = Invocation(arguments, cast(BackendPackage, None), SignalHandler(), sys.stdout)
        study = EvidenceCommand(parse(arguments), invocation, folder=command)
        study.report({"summary": {}}, [{"name": "a"}], SENTENCE, TABLE)
        said = capsys.readouterr()
        return Printed(said.out, said.err)

    return report


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_the_result_last_and_no_table(
    printed: Callable[..., Printed], command: str
) -> None:
    lines = printed(command).out.splitlines()
    assert lines[-1] == SENTENCE and len(lines) <= LINES
    assert any(line.startswith("Report: ") and "--verbose" in line for line in lines)
    assert not any("fault-" in line for line in lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_its_tables_with_verbose(
    printed: Callable[..., Printed], command: str
) -> None:
    lines = printed(command, "--verbose").out.splitlines()
    assert lines[-1] == SENTENCE
    assert sum("fault-" in line for line in lines) == 100


def test_with_quiet_a_command_prints_the_result_alone(
    printed: Callable[..., Printed],
) -> None:
    assert printed("faults", "--quiet").out == SENTENCE + "\n"


def test_with_json_standard_output_is_the_report(
    printed: Callable[..., Printed], tmp_path: Path
) -> None:
    said = printed("faults", "--json", "--verbose")
    assert json.loads(said.out) == json.loads((tmp_path / "report.json").read_text())
    assert SENTENCE in said.err and "fault-99" in said.err


def combination(gap: float | None, agrees: bool) -> Row:
    row = dict.fromkeys(Row.__annotations__, 0.0) | {"schedule": "constant"}
    return cast(Row, row | {"loss_gap": gap, "agrees": agrees})


def test_the_grid_says_how_many_combinations_do_not_agree() -> None:
    good, bad = combination(2e-16, True), combination(None, False)
    assert optimizer_grid.sentence([good, good]) == (
        "2 combinations: all agree; the largest gap of two losses is 2.0e-16 (bound 1e-12)."
    )
    assert optimizer_grid.sentence([good, bad]).startswith("2 combinations: 1 do NOT agree")
    assert "not finite" in optimizer_grid.sentence([good, bad])


def test_the_sensitivity_is_the_smallest_error_that_is_seen() -> None:
    def row(error: float, caught: bool) -> sensitivity.Row:
        finding = cast(sensitivity.Finding, {"caught": caught})
        return {"error": error, "steps": 3, "lenses": {"float64": finding}}

    seen = [row(1e-2, True), row(1e-6, True), row(1e-14, False)]
    assert sensitivity.sentence(seen).endswith(": float64 1e-06.")
    assert sensitivity.sentence(seen[2:]).endswith(": float64 none.")
