"""What is reported of a comparison of two scripts: report.json, the terminal, the page."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lockstep.common.recorder.matched import Difference, Matching
from lockstep.common.report.script_json import ScriptReportJson, make_report
from lockstep.common.report.script_terminal import print_script_report
from lockstep.common.report.scripts import ScriptResult, write, write_script_report
from lockstep.common.report.terminal import Terminal
from lockstep.common.verdict.script_comparison import ScriptComparison
from lockstep.common.verdict.scripts import ScriptRuns, compare_scripts
from tests.marks import slow_except
from tests.pages.browser import chromium, examine
from tests.recorder.made import matching, recording, with_twins


@dataclass
class Checked:
    sides: tuple[str, str]
    matching: Matching
    comparisons: list[ScriptComparison]
    runs: list[tuple[ScriptRuns, ScriptRuns]]


def checked(fault: str = "", lacks: tuple[str, ...] = (), **changes: Any) -> Checked:
    """A comparison in float64, and in float32 if they agree there."""
    runs = [
        (ScriptRuns(recording("torch")), ScriptRuns(recording("jax", fault=fault, lacks=lacks)))
    ]
    which = matching(**changes)
    comparisons = [compare_scripts(*runs[0], which)]
    if not fault:
        a, b = (ScriptRuns.of(with_twins(name, "float32")) for name in ("torch", "jax"))
        runs.append((a, b))
        comparisons.append(compare_scripts(a, b, which))
    return Checked(comparisons[0].sides, which, comparisons, runs)


def report(fault: str = "", **changes: Any) -> ScriptReportJson:
    return make_report(checked(fault, **changes), ["compare.py", "check", "a.py", "b.py"])


def printed(found: ScriptReportJson, quiet: bool = False, verbose: bool = False) -> list[str]:
    out = io.StringIO()
    terminal = Terminal(quiet, out, io.StringIO(), verbose=verbose)
    print_script_report(terminal, found, "runs/x/report.html")
    return out.getvalue().splitlines()


# --- report.json


def test_the_report_holds_both_scripts_the_tensors_and_every_check() -> None:
    found = report()
    assert found["verdict"] == "agree" and found["kind"] == "script check"
    assert [each["name"] for each in found["scripts"]] == ["train_torch.py", "train_jax.py"]
    assert [each["dtype"] for each in found["precisions"]] == ["float64", "float32"]
    assert all(each["ladder"] and each["stretches"] for each in found["precisions"])
    kernel = found["tensors"][0]
    assert kernel["names"] == ["net.fc1.weight", "params.Dense_0.kernel"]
    assert (kernel["shape"], kernel["layout"], kernel["how"]) == ([8, 12], "transposed", "value")
    json.dumps(found, allow_nan=False)


def test_a_result_is_true_if_the_scripts_agree_and_shows_the_place_if_not(tmp_path: Path) -> None:
    terminal = Terminal(True, io.StringIO(), io.StringIO())
    assert write(checked(), tmp_path, terminal)
    result = write(checked("beta2"), tmp_path, terminal)
    assert isinstance(result, ScriptResult) and not result
    assert "second moment of net.fc1.weight" in repr(result) and "beta2" in repr(result)
    assert result.place is not None and result.place.startswith("update: step 0")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["verdict"] == "disagree"
    place = written["precisions"][0]["first_divergence"]
    assert place["names"][1] == "second moment of params.Dense_0.kernel"
    assert place["causes"] == list(result.causes)


# --- The terminal


def test_the_last_lines_are_verdict_place_cause_and_path() -> None:
    lines = printed(report("no bias correction"))
    assert len(lines) <= 15 and max(map(len, lines)) <= 80
    text = "\n".join(lines)
    order = ["The two scripts disagree.", "Where they differ first", "A likely cause", "Report: "]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert lines[-1] == "Report: runs/x/report.html"


def test_an_agreement_takes_a_line_for_each_precision() -> None:
    lines = printed(report())
    assert len(lines) <= 15 and max(map(len, lines)) <= 80
    assert any(line.startswith("float32, 24 steps: agree") for line in lines)
    [quiet] = [" ".join(printed(report(), quiet=True))]
    assert quiet.startswith("The two scripts agree: float64 within")


def test_verbose_prints_every_table_in_80_columns() -> None:
    lines = printed(report(), verbose=True)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for words in (
        "worst tensor",
        "twins' spread",
        "params.Dense_0.kernel",
        "How large a gap may be: ",
    ):
        assert words in text


def test_what_is_missing_is_said_with_the_line_of_a_names_file() -> None:
    found = make_report(
        checked(
            lacks=("backward",),
            unmatched_a=("net.extra",),
            unmatched_b=("params.more", "params.other"),
            proposals={"net.extra": "params.more"},
        )
    )
    text = " ".join(printed(found))
    assert "Not seen on train_jax.py: gradients (give them to run.step(..., grads=grads))." in text
    assert "net.extra params.more" in text
    assert "2 of train_jax.py's tensors have no counterpart: params.more, params.other" in text


def test_other_initial_weights_are_said_first() -> None:
    differing = (Difference("net.fc1.weight", "deviation 0.4 and 0.1"),)
    found = report("other weights", same_start=False, differing=differing)
    lines = printed(found)
    assert lines[0].startswith("The two start from other weights (net.fc1.weight: deviation 0.4")
    assert "--start-from A" in " ".join(lines[:3])


@pytest.mark.parametrize("hostile", ["<script>x</script>", "\x1b[31mred"])
def test_names_cannot_change_the_terminal(hostile: str) -> None:
    found = report("beta2")
    found["precisions"][0]["notes"].append(hostile)
    assert "\x1b" not in "".join(printed(found))


# --- The page


def page(folder: Path, found: Checked) -> str:
    write_script_report(folder, found, ["compare.py", "check", "a.py", "b.py"])
    return (folder / "report.html").read_text()


def test_the_page_has_the_place_the_causes_and_both_names_before_all_else(tmp_path: Path) -> None:
    text = page(tmp_path, checked("decay"))
    head = text[text.index("<header>") : text.index("</header>")]
    for words in (
        "The two scripts disagree.",
        "float64, step 0, update",
        "net.fc1.weight",
        "params.Dense_0.kernel",
        "times the parameter itself",
        "decoupled weight decay",
    ):
        assert words in head


def test_the_page_has_charts_checks_tensors_and_both_environments(tmp_path: Path) -> None:
    text = page(tmp_path, checked(unmatched_a=("net.extra",), proposals={"net.extra": "params.x"}))
    assert text.count("<svg") == 4, "loss and gap, in two precisions"
    assert "between twins, largest so far" in text
    for words in ("All 65 comparisons", "transposed", "net.extra params.x", "--epochs 2"):
        assert words in text
    assert "python compare.py check a.py b.py" in text


def test_equal_comparisons_give_equal_pages(tmp_path: Path) -> None:
    assert page(tmp_path, checked("decay")) == page(tmp_path, checked("decay"))
    assert page(tmp_path, checked("decay")) != page(tmp_path, checked("epsilon"))


def hostile() -> Checked:
    found = checked("labels shifted", unmatched_a=("<b>x</b>" * 30,))
    name = "<script>alert(1)</script>" + "x" * 200
    found.sides = (name, "train.py")
    runs = found.runs[0]
    found.comparisons = [compare_scripts(*runs, found.matching, found.sides)]
    return found


def test_names_are_text_in_a_page(tmp_path: Path) -> None:
    assert "<script>alert" not in page(tmp_path, hostile())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize("kind", slow_except(["agree", "disagree", "hostile"], "hostile"))
def test_the_page_opens_on_any_screen_for_any_reader(
    kind: str, tmp_path: Path, browser: Any
) -> None:
    makers = {"agree": checked, "disagree": lambda: checked("beta2"), "hostile": hostile}
    page(tmp_path, makers[kind]())
    assert examine(browser, tmp_path / "report.html") == []
