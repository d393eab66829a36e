"""The README says what the sources and results/ say. `python -m tests.test_readme` writes its marked passages anew."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.report import sentence

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"


def report_of(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "results" / name / "report.json").read_text())


def verdict() -> str:
    report = report_of("quick")
    shown = "".join(f"\n{line}" for line in textwrap.wrap(sentence(report), 78))
    lens = report["lenses"][1]
    accuracy = ", ".join(f"{name} {100 * value:.1f} %" for name, value in lens["accuracy"].items())
    return f"```text\n$ python compare.py{shown}\n```\n\nfloat32, {lens['steps']:,} steps, test accuracy: {accuracy}.\n"


def table() -> str:
    """The loss gaps of the tutorial's run, up to the end of each stretch of steps."""
    proof, production = (report_of(f"tutorial-{dtype}")["lenses"][0] for dtype in ("float64", "float32"))
    rows = [[row for row in lens["stretches"] if row["quantity"] == "loss"] for lens in (proof, production)]
    lines = [
        "| loss gap up to step | float64, torch and flax | float32, torch and flax | float32, twins |",
        "|--:|--:|--:|--:|",
    ]
    gaps = [0.0, 0.0]
    for one, other in zip(*rows, strict=True):
        gaps = [max(gaps[0], one["gap"]), max(gaps[1], other["gap"])]
        if one["stop"] >= 30:
            cells = (f"{gap:.2g}" if gap > 1e-3 else f"{gap:.1e}" for gap in (*gaps, other["drift"]))
            lines.append(f"| {one['stop']:,} | {' | '.join(cells)} |")
    equal, total = (f"{lens['predictions_equal']:,}" for lens in (proof, production)), proof["predictions_total"]
    twins = ", ".join(f"{t['predictions_equal']:,}" for group in production["twins"].values() for t in group)
    lines.append(f"| test predictions equal, of {total:,} | {' | '.join(equal)} | {twins} |")
    return "\n".join(lines) + "\n"


def step(name: str) -> Callable[[], str]:
    def excerpt() -> str:
        source = (REPOSITORY / "backends" / f"{name}_backend" / "backend.py").read_text()
        [method] = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == "_step"]
        lines = source.splitlines()[method.lineno - 1 : method.end_lineno]
        return "```python\n" + textwrap.dedent("\n".join(lines)) + "\n```\n"

    return excerpt


def grid() -> str:
    report = report_of("grid")
    rows = report["rows"]
    largest = max(row["loss_gap"] for row in rows)
    agreeing = sum(row["agrees"] for row in rows)
    return (
        f"Of {len(rows)} combinations {agreeing} agree; the largest gap between two losses is {largest:.1e} nats "
        f"(bound {report['bound']:g}).\n"
    )


PASSAGES: dict[str, Callable[[], str]] = {
    "verdict of results/quick": verdict,
    "table of results/tutorial-*": table,
    "step of backends/torch_backend/backend.py": step("torch"),
    "step of backends/flax_backend/backend.py": step("flax"),
    "summary of results/grid": grid,
}


def passage(text: str, title: str) -> re.Match[str]:
    found = re.search(rf"<!-- {re.escape(title)} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert found, f"the README has no passage {title!r}"
    return found


def rewritten(text: str) -> str:
    for title, write in PASSAGES.items():
        found = passage(text, title)
        text = text[: found.start(1)] + write() + text[found.end(1) :]
    return text


@pytest.mark.parametrize("title", PASSAGES)
def test_the_readme_says_what_the_sources_and_results_say(title: str) -> None:
    assert passage(README.read_text(), title)[1] == PASSAGES[title]()


def test_a_readme_that_says_something_else_is_noticed() -> None:
    text = README.read_text()
    assert rewritten(text) == text
    assert rewritten(text.replace("optimizer.step()", "optimizer.skip()")) == text


@pytest.mark.parametrize("name", ["quick", "tutorial-float64", "tutorial-float32", "basic-float64", "basic-float32"])
def test_each_committed_report_was_made_by_the_command_in_the_readme(name: str) -> None:
    report = report_of(name)
    command = " ".join(["python", *report["command"]])
    assert f"| `results/{name}` | `{command}` |" in README.read_text()
    assert report["verdict"] == "agree"
    for picture in ("samples", "predictions", "losses", "classes"):
        assert (REPOSITORY / "results" / name / f"{picture}.png").exists()


@pytest.mark.parametrize("recipe", ["tutorial", "basic"])
def test_the_committed_float64_runs_are_the_same_run_to_the_last_digits(recipe: str) -> None:
    lens = report_of(f"{recipe}-float64")["lenses"][0]
    assert lens["steps"] == 37500
    assert lens["max_abs_loss_gap"] <= 1e-12  # 7e-15 measured for the tutorial
    assert lens["predictions_equal"] == lens["predictions_total"] == 10000
    assert lens["per_class_accuracy"]["torch"] == lens["per_class_accuracy"]["flax"]


def test_links_in_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (REPOSITORY / target).exists(), target


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
