"""The summary of the speed evidence, from made timings."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from lockstep.common.config import Config
from lockstep.common.evidence import bench, bench_report
from lockstep.common.evidence.bench import PATHS, PRODUCTS, Row
from lockstep.common.evidence.bench_report import PRODUCT_FLOPS
from lockstep.common.evidence.plots import SPEEDS, draw_bench
from lockstep.common.report import Terminal
from tests.evidence.bench_helpers import FLOPS, line_of
from tests.shapes import NET


def test_the_operations_of_one_image_are_those_counted_by_hand() -> None:
    conv1 = 28 * 28 * 6 * (5 * 5 * 3)  # outputs, terms of each
    conv2 = 10 * 10 * 16 * (5 * 5 * 6)
    dense = 400 * 120 + 120 * 84 + 84 * 10
    forward, weights, inputs = conv1 + conv2 + dense, conv1 + conv2 + dense, conv2 + dense
    assert (conv1, conv2, dense) == (352_800, 240_000, 58_920)
    assert bench_report.flops_per_image(NET) == 2 * (forward + weights + inputs) == FLOPS
    assert bench_report.flops_per_image(NET | {"fc3.kernel": (84, 11)}) == FLOPS + 6 * 84, (
        "another class, another column"
    )


def test_both_backends_have_the_network_whose_operations_are_counted(
    name: str, build: Callable
) -> None:
    assert bench_report.flops_per_image(build(name, Config(), "float32", "off").shapes()) == FLOPS


SPEED = {
    "tutorial": 1000.0,
    "eager": 2000.0,
    "torch": 2500.0,
    "torch fused": 4000.0,
    "flax": 5000.0,
    "flax fused": 8000.0,
}
PRODUCT = {"torch product": 5.0, "flax product": 10.0}  # per second
SLOWED = (1.0, 0.5, 1.0, 0.25, 1.25)  # what the machine gives, turn by turn


def made_row(path: str, rates: Sequence[float], **other: Any) -> Row:
    """A row of `measure`: turns of two seconds in which so many images a second were trained on, 4
    to a step."""
    product = path in PRODUCTS
    steps, images = (1, 0) if product else (1 / 4, 1)
    runs = [
        {"steps": 2 * rate * steps, "images": 2 * rate * images, "seconds": 2.0} for rate in rates
    ]
    opening = {"steps": 252, "seconds": 3.0}
    starts = {} if product else {"cold": {"first_step": 7.0, "opening": opening}}
    loader = {"processes": 2, "memory": 300e6} if path == "tutorial" else None
    facts = {
        "memory": 500e6,
        "loader": loader,
        "flops_per_image": FLOPS if path == "torch" else None,
    }
    row: dict[str, Any] = {
        "table": "speed",
        "path": path,
        "batch_size": 4,
        "images": 50000,
        "starts": starts,
        "runs": runs,
    }
    return cast(Row, row | {"facts": facts} | other)


def made_rows(slowed: Sequence[float] = SLOWED) -> list[Row]:
    """Both tables at one batch size, on a machine that slows down all alike."""
    rows = [
        made_row(path, [rate * share for share in slowed])
        for path, rate in (SPEED | PRODUCT).items()
    ]
    scaling = {"table": "growth", "images": 1000}
    return rows + [
        made_row(path, [SPEED[path] * share for share in slowed], **scaling) for path in bench.FUSED
    ]


def test_the_median_and_the_quartiles_are_those_of_the_turns() -> None:
    line = line_of(bench_report.summary(made_rows()), "torch fused")
    assert line["images_per_second"] == {
        "median": 4000.0,
        "low": 2000.0,
        "high": 4000.0,
    }  # 1000 2000 4000 4000 5000
    assert line["steps_per_second"] == {"median": 1000.0, "low": 500.0, "high": 1000.0}
    assert (
        line_of(bench_report.summary(made_rows([1.0])), "torch fused")["images_per_second"]["high"]
        == 4000.0
    )


def test_a_machine_that_slows_all_down_changes_no_ratio() -> None:
    for slowed in (SLOWED, [1.0] * 5):
        lines = bench_report.summary(made_rows(slowed))
        for path, rate in SPEED.items():
            for reference in ("tutorial", "eager"):
                ratio = line_of(lines, path)[f"to_{reference}"]
                assert ratio == pytest.approx(
                    dict.fromkeys(("median", "low", "high"), rate / SPEED[reference])
                )


def test_a_loop_that_alone_is_slowed_down_changes_its_ratios() -> None:
    rows = made_rows()
    rows[0] = made_row("tutorial", [SPEED["tutorial"]] * 5)
    ratio = line_of(bench_report.summary(rows), "flax fused")["to_tutorial"]
    assert ratio == {"median": 8.0, "low": 4.0, "high": 8.0}


def test_the_share_of_the_arithmetic_is_taken_of_the_same_frameworks_products() -> None:
    lines = bench_report.summary(made_rows())
    assert PRODUCT_FLOPS == 17_179_869_184
    assert line_of(lines, "torch fused")["gflops"] == pytest.approx(5 * 17.179869184)
    share = line_of(lines, "torch fused")["arithmetic"]
    assert share == pytest.approx(dict.fromkeys(share, 4000 * FLOPS / (5 * PRODUCT_FLOPS)))
    assert line_of(lines, "flax fused")["arithmetic"] == pytest.approx(share), (
        "twice the speed, twice the limit"
    )
    assert line_of(lines, "flax fused", "growth")["arithmetic"] is None


def test_the_compile_time_is_what_the_first_calls_took_longer_than_later_steps() -> None:
    lines = bench_report.summary(made_rows())
    assert line_of(lines, "torch fused")["starts"]["cold"] == pytest.approx(
        {"first_step": 7.0, "compile": 3 - 0.252}
    )
    assert line_of(lines, "torch")["starts"]["cold"] == {"first_step": 7.0, "compile": None}, (
        "it compiles nothing"
    )
    at_once = made_rows()
    at_once[3]["starts"]["cold"]["opening"]["seconds"] = 0.2
    assert line_of(bench_report.summary(at_once), "torch fused")["starts"]["cold"]["compile"] == 0.0


@pytest.mark.parametrize(
    ("table", "row"),
    [
        (bench_report.speed_table, "4 flax fused 2,000 8,000 50 % 8.00x 4.00x 14.9 %"),
        (bench_report.start_table, "4 tutorial 7.0 s - 7.0 s - 500 + 2x300"),
        (bench_report.scaling_table, "1,000 flax fused 4 2,000 7.0 s 7.0 s 500"),
    ],
    ids=["speed", "start", "scaling"],
)
def test_tables_hold_what_was_measured_and_are_no_wider_than_a_page(
    table: Callable[..., bench_report.Table], row: str
) -> None:
    rows = made_rows()
    for made in rows:
        if made["starts"]:
            made["starts"]["warm"] = made["starts"]["cold"]
    output = io.StringIO()
    columns, lines = table(bench_report.summary(rows))
    Terminal(stdout=output).table(columns, lines)
    shown = [" ".join(line.split()) for line in output.getvalue().splitlines()]
    assert row in shown
    assert len(shown) == len(lines) + 3, "no cell takes a second line"


def test_the_sentence_has_the_ratios_of_the_fused_loops() -> None:
    said = bench_report.sentence(bench_report.summary(made_rows()))
    assert said.endswith("at batch 4 torch fused 4.00x and flax fused 8.00x.")


def test_the_picture_has_a_line_for_each_loop(tmp_path: Path) -> None:
    lines = bench_report.summary(made_rows())
    assert set(SPEEDS) == set(PATHS)
    draw_bench(lines, "a machine, 2 cores", tmp_path / "bench.png")
    first = (tmp_path / "bench.svg").read_bytes()
    drawn = first.decode()
    assert all(title in drawn for title in PATHS.values()) and "a machine, 2 cores" in drawn
    assert "172 GFLOP/s" in drawn
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    draw_bench(lines, "a machine, 2 cores", tmp_path / "bench.png")
    assert (tmp_path / "bench.svg").read_bytes() == first
