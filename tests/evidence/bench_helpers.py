"""Helpers of the tests of the speed evidence."""

from __future__ import annotations

from typing import Any, cast

from lockstep.common.evidence.bench_report import Line

FLOPS = 3_204_720  # of one image, by hand; see `test_bench_report`


def line_of(lines: list[Line], path: str, table: str = "speed") -> dict[str, Any]:
    [line] = [line for line in lines if (line["path"], line["table"]) == (path, table)]
    return cast(dict[str, Any], line)
