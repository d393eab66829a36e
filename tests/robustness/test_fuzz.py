"""Damaged and hostile inputs are read or refused; and what reads them badly is caught."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests import flawed
from tests.robustness import inputs
from tests.robustness.fuzz import Tally, main, report_of, run, shares, table

REPORT = Path(__file__).resolve().parents[2] / "results" / "fuzz" / "report.json"
QUICK = 200  # inputs, of all kinds but those for which JAX is loaded in each process
KINDS = [
    name
    for name, kind in inputs.KINDS.items()
    if kind.missing() is None and name not in ("plan", "orbax")
]


# --- The program


@pytest.fixture(scope="module")
def quick() -> dict[str, Tally]:
    return run(QUICK, 7, KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_input_is_read_or_refused_in_one_line(kind: str, quick: dict[str, Tally]) -> None:
    assert quick[kind].failures == []
    assert quick[kind].inputs == quick[kind].refused + quick[kind].accepted >= 5
    assert quick[kind].refused > 0


def test_the_committed_report_is_of_ten_thousand_inputs_without_a_failure() -> None:
    report = json.loads(REPORT.read_text())
    assert report["inputs"] >= 10_000
    assert report["failures"] == 0
    assert report["command"] == ["-m", "tests.robustness.fuzz", "--out", "results/fuzz"]
    assert report["kinds"].keys() == inputs.KINDS.keys()
    assert report["inputs"] == sum(
        kind["refused"] + kind["accepted"] for kind in report["kinds"].values()
    )


# --- The inputs


def content_of(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else os.fsencode(path.name)
        found[os.fspath(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


@pytest.mark.parametrize("kind", ["npz", "folder", "record", "report"])
def test_an_input_is_made_again_by_its_number_and_the_valid_one_is_another(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = []
    for attempt in range(2):
        maker = inputs.KINDS[kind]()
        maker.prepare()
        for number in range(4):
            (tmp_path / f"{attempt}-{number}").mkdir()
            said = maker.make(np.random.default_rng([0, number]), tmp_path / f"{attempt}-{number}")
            made.append((said, content_of(tmp_path / f"{attempt}-{number}")))
    assert made[:4] == made[4:]
    (tmp_path / "valid").mkdir()
    maker.valid(tmp_path / "valid")
    assert content_of(tmp_path / "valid") not in [content for _, content in made]


# --- The control: what reads badly is caught


@pytest.fixture(scope="module")
def caught() -> dict[str, Tally]:
    return run(2 * len(flawed.KINDS), 0, list(flawed.KINDS), module="tests.flawed", patience=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flaw", "said"), flawed.FLAWS.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_a_flaw_is_caught_and_the_next_input_is_read(
    flaw: object, said: str, caught: dict[str, Tally]
) -> None:
    tally = caught[getattr(flaw, "__name__", "")]
    assert [failure["number"] for failure in tally.failures] == [0, 1]
    assert all(said in failure["detail"] for failure in tally.failures)
    assert (tally.inputs, tally.refused, tally.accepted) == (2, 0, 0)


@pytest.mark.slow
def test_what_has_no_flaw_is_no_failure(caught: dict[str, Tally]) -> None:
    assert (caught["accept"].accepted, caught["accept"].failures) == (2, [])
    assert (caught["refuse_well"].refused, caught["refuse_well"].failures) == (2, [])


@pytest.mark.slow
def test_the_report_counts_what_was_caught(caught: dict[str, Tally]) -> None:
    report = report_of(["--seed", "0"], 0, caught, {"other": "it is missing"}, 1.0)
    assert (report["inputs"], report["failures"]) == (2 * len(flawed.KINDS), 2 * len(flawed.FLAWS))
    assert (report["refused"], report["accepted"]) == (2, 2)
    assert report["kinds"]["warn"]["failures"][0]["detail"].startswith("UserWarning")
    lines = table(report).splitlines()
    assert len(lines) == len(flawed.KINDS) + 3 and lines[-1] == "Seed 0, 1 s."
    assert json.loads(json.dumps(report)) == report


def test_the_inputs_are_shared_out_among_the_kinds() -> None:
    assert shares(100, {"a": 1, "b": 3}) == {"a": 25, "b": 75}
    assert shares(1, {"a": 1, "b": 3}) == {"a": 1, "b": 1}
    assert (
        sum(shares(10_500, {name: kind.share for name, kind in inputs.KINDS.items()}).values())
        >= 10_500
    )


def test_one_input_can_be_read_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "tests.robustness.fuzz.again", lambda only, seed: seen.append((only, seed)) or 1
    )
    assert main(["--only", "npz:17", "--seed", "3"]) == 1
    assert seen == [("npz:17", 3)]
