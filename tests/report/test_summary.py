"""The verdict in words, and the rows of a report that are merged or chosen."""

from __future__ import annotations

from typing import Any

import pytest

from lockstep.common.report import sentence
from lockstep.common.report.summary import (
    difference_cells,
    extreme,
    merge_equal,
    worst_per_stage,
)
from tests.report.helpers import make, printed


def test_the_verdict_of_runs_that_agree_names_each_precision_and_its_bound() -> None:
    assert sentence(make("agree", "agree")) == (
        "The two runs agree: float64 within 1.1e-15 over 40 steps (bound 1e-12); float32 within "
        "what rounding explains."
    )


def test_the_verdict_of_runs_that_disagree_says_where_they_diverge() -> None:
    assert sentence(make("disagree", "agree")) == (
        "The two runs disagree. float64: loss: step 17: torch=2.3019 flax=2.3044, gap 2.5e-03 > "
        "4.0e-07. float32 within what rounding explains."
    )


def test_without_a_named_divergence_the_verdict_falls_back_to_the_first_window_that_fails() -> None:
    report = make("disagree")
    report["lenses"][0]["first_divergence"] = None
    assert (
        sentence(report)
        == "The two runs disagree. float64: loss: steps 0 to 39: gap 1.1e-15 > 1e-12."
    )


def test_processes_of_one_run_that_differ_are_not_called_two_runs() -> None:
    report = make("disagree", backends=("torch",))
    assert sentence(report).startswith("The processes of the run disagree. float64: ")


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_the_verdict_of_a_single_run_compares_nothing(backend: str) -> None:
    report = make("single", "single", backends=(backend,))
    assert sentence(report) == f"Trained {backend} alone; nothing to compare it with."
    assert "Predictions equal" not in printed(report)


def test_float64_runs_that_needed_twins_say_that_rounding_was_amplified() -> None:
    report = make("agree")
    report["lenses"][0]["bound"]["twins"] = 4
    report["lenses"][0]["max_abs_loss_gap"] = 3e-9
    assert sentence(report) == (
        "The two runs agree: float64 within what rounding explains, which this run amplifies to "
        "3e-09."
    )


def test_neighbouring_windows_with_equal_numbers_are_one_row_and_others_are_not() -> None:
    row: Any = {
        "quantity": "lr",
        "start": 0,
        "stop": 1,
        "gap": 0.0,
        "drift": 0.0,
        "bound": 1e-13,
        "agrees": True,
    }
    rows = [row, row | {"start": 1, "stop": 3}, row | {"start": 3, "stop": 10, "gap": 1e-16}]
    rows += [
        row | {"start": 3, "stop": 10, "quantity": "loss"},
        row | {"start": 30, "stop": 40, "quantity": "loss"},
    ]
    assert [(each["quantity"], each["start"], each["stop"]) for each in merge_equal(rows)] == [
        ("lr", 0, 3),
        ("lr", 3, 10),
        ("loss", 3, 10),
        ("loss", 30, 40),
    ]


def test_the_worst_check_of_each_stage_is_kept() -> None:
    row: Any = {
        "step": 0,
        "stage": "forward",
        "tensor": "a",
        "gap": 1e-3,
        "bound": 1.0,
        "agrees": True,
    }
    rows = [
        row,
        row | {"tensor": "b", "gap": 1e-9, "bound": 1e-8},
        row | {"tensor": "c", "gap": 0.0, "bound": 0.0},
    ]
    rows += [
        row | {"stage": "loss", "gap": 2.0, "agrees": False},
        row | {"stage": "loss", "tensor": "d", "gap": None},
    ]
    rows += [
        row | {"stage": "update", "step": 9, "tensor": "e"},
        row | {"stage": "evaluate", "tensor": "f"},
    ]
    seen = [
        (when, worst["stage"], worst["tensor"], agrees)
        for when, worst, agrees in worst_per_stage(rows)
    ]
    assert seen == [
        ("first steps", "forward", "b", True),
        ("first steps", "loss", "a", False),
        ("whole run", "update", "e", True),
        ("whole run", "evaluate", "f", True),
    ]


def test_the_weakest_and_the_strongest_class_leave_out_classes_without_images() -> None:
    accuracy = {"a": None, "b": 0.4, "c": 0.9}
    assert (
        extreme(accuracy, ["a", "b", "c"], True),
        extreme(accuracy, ["a", "b", "c"], False),
    ) == ("b", "c")
    assert extreme({"a": None}, ["a"], True) is None


def test_runs_that_end_together_are_neither_the_same_nor_different() -> None:
    report = make("disagree", "agree")
    report["verdict"] = report["lenses"][0]["verdict"] = "diverged"
    report["lenses"][0]["diverged_at"] = 1_234
    assert sentence(report) == (
        "Both runs blow up at the same step: the loss is not finite, or so large that rounding "
        "decides it (float64: step 1,234). Up to there they agree: choose a smaller --lr. "
        "float32 within what rounding explains."
    )
    assert "float64, 40 steps: the runs blow up together" in printed(report)
    assert "float64: blow up together over 40 steps" in printed(report, verbose=False)


def test_what_only_twins_can_tell_is_called_open() -> None:
    report = make("disagree", "agree")
    report["cut_short"] = "torch float32 was interrupted at step 3 of 40"
    for each in (report, report["lenses"][0]):
        each["verdict"] = "undecided"
    assert sentence(report) == (
        "The run was cut short: torch float32 was interrupted at step 3 of 40. float64: not "
        "decided. The runs differ from step 17 on, and the twins that would tell rounding from a "
        "mistake were not trained. float32 within what rounding explains."
    )
    assert "float64: not decided over 40 steps" in printed(report, verbose=False)
    assert "float64, 40 steps: not decided" in printed(report)


def test_a_check_of_a_median_says_so() -> None:
    report = make("agree")
    assert "(median)" not in printed(report)
    for row in report["lenses"][0]["ladder"]:
        row["measure"] = "median"
    assert "(median)" in printed(report)


def test_a_class_is_shown_with_what_the_verdict_compares_and_not_with_an_interval() -> None:
    found: Any = {"difference": -0.125, "low": -0.3, "high": -0.01, "gap": 0.25, "bound": 0.5}
    without: Any = found | {"spread": None}
    found["spread"] = 0.2
    assert difference_cells(found) == ["-12.5", "25.0", "20.0", "50.0"]
    assert difference_cells(without) == ["-12.5", "25.0", "-", "50.0"]
    assert difference_cells(None) == ["-"] * 4
    older: Any = {"difference": 0.5, "low": 0.1, "high": 0.9}
    assert difference_cells(older) == ["+50.0", "-", "-", "-"]
