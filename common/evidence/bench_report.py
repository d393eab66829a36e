"""The summary of `bench.measure`'s rows: medians, ratios, the share of the arithmetic limit, and
tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

import numpy as np

from lockstep.common.evidence.bench import FUSED, PATHS, Loader, Row, StartTime, TableName

COMPILED = ("torch fused", "flax", "flax fused")
PRODUCT_SIZE = 2048  # rows and columns
PRODUCT_FLOPS = 2 * PRODUCT_SIZE**3  # a multiplication and an addition for each of n^3 terms
# How many output pixels a kernel of `Net` computes for one image: a 5 x 5 convolution without
# padding turns 32 x 32 into 28 x 28, pooling gives 14 x 14, the next convolution 10 x 10. A dense
# layer is applied once.
OUTPUT_PIXELS = {"conv1": 28 * 28, "conv2": 10 * 10}
FIRST = "conv1"  # its input is the images, which need no gradient

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


class Quartiles(TypedDict):
    """Over the turns of one worker."""

    median: float
    low: float
    high: float


class StartSummary(TypedDict):
    """One start, in seconds."""

    first_step: float
    compile: float | None  # None where nothing is compiled


class Line(TypedDict):
    """The summary of one way to train."""

    table: TableName
    path: str
    batch_size: int
    images: int | None
    steps_per_second: Quartiles
    images_per_second: Quartiles
    to_tutorial: Quartiles | None  # as a multiple; None without the tutorial's loop
    to_eager: Quartiles | None
    # the share of the rate of matrix products in the same framework
    arithmetic: Quartiles | None
    gflops: float | None  # the median rate of those products
    flops_per_image: int | None
    starts: dict[str, StartSummary]
    memory: int  # bytes
    loader: Loader | None


# --- Arithmetic


def flops_per_image(shapes: Mapping[str, Sequence[int]]) -> int:
    """Floating-point operations of one training step for one image; a multiplication and an
    addition count as two.

    In each layer the forward pass, the gradient of the kernel and, except in the first layer, the
    gradient of the input are products with the same number of terms: the kernel's entries times
    its output pixels. Biases, rectifiers, pooling, softmax and the update are a few per cent and
    are not counted.

    Args:
        shapes: canonical, by name; only those of kernels are used.
    """
    kernels = {
        name.removesuffix(".kernel"): shape
        for name, shape in shapes.items()
        if name.endswith(".kernel")
    }
    terms = {
        layer: math.prod(shape) * OUTPUT_PIXELS.get(layer, 1) for layer, shape in kernels.items()
    }
    return sum(2 * (2 if layer == FIRST else 3) * number for layer, number in terms.items())


def quartiles(values: np.ndarray) -> Quartiles:
    """The median, and the quartiles `low` and `high`, interpolated linearly."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "low": low, "high": high}


def summary(rows: Sequence[Row]) -> list[Line]:
    """One line for each way to train, in the order of the rows."""
    groups: dict[tuple[TableName, int, int | None], dict[str, Row]] = {}
    for row in rows:
        key = (row["table"], row["batch_size"], row["images"] if row["table"] == "growth" else None)
        groups.setdefault(key, {})[row["path"]] = row
    flops = next(
        (row["facts"]["flops_per_image"] for row in rows if row["facts"]["flops_per_image"]), None
    )
    return [
        _line(row, group, flops)
        for group in groups.values()
        for row in group.values()
        if row["path"] in PATHS
    ]


def _line(row: Row, group: Mapping[str, Row], flops: int | None) -> Line:
    images = _rates(row, "images")

    def ratio_to(reference: str) -> Quartiles | None:
        return (
            quartiles(images / _rates(group[reference], "images")) if reference in group else None
        )

    framework = "flax" if row["path"].startswith("flax") else "torch"
    product = group.get(f"{framework} product")
    limit = None if product is None else _rates(product, "steps") * PRODUCT_FLOPS
    step = float(1 / np.median(_rates(row, "steps")))
    return {
        "table": row["table"],
        "path": row["path"],
        "batch_size": row["batch_size"],
        "images": row["images"],
        "steps_per_second": quartiles(_rates(row, "steps")),
        "images_per_second": quartiles(images),
        "to_tutorial": ratio_to("tutorial"),
        "to_eager": ratio_to("eager"),
        "arithmetic": None if limit is None or flops is None else quartiles(images * flops / limit),
        "gflops": None if limit is None else quartiles(limit / 1e9)["median"],
        "flops_per_image": flops,
        "starts": {name: _start(row["path"], found, step) for name, found in row["starts"].items()},
        "memory": row["facts"]["memory"],
        "loader": row["facts"]["loader"],
    }


def _rates(row: Row, unit: Literal["steps", "images"]) -> np.ndarray:
    """Steps, or images, per second of each turn."""
    return np.array([run[unit] / run["seconds"] for run in row["runs"]])


def _start(path: str, found: StartTime, step: float) -> StartSummary:
    """The compile time is what the first calls took longer than as many later steps."""
    first = found["opening"]
    compiled = max(0.0, first["seconds"] - first["steps"] * step) if path in COMPILED else None
    return {"first_step": found["first_step"], "compile": compiled}


# --- Tables


def speed_table(lines: Sequence[Line]) -> Table:
    """Column names (`>` for numbers) and lines: medians, the range between the quartiles of
    images/s, and ratios."""
    columns = (
        "batch>",
        "loop",
        "steps/s>",
        "images/s>",
        "spread>",
        "/tutorial>",
        "/eager>",
        "limit>",
    )
    cells = []
    for line in lines:
        if line["table"] == "speed":
            images, limit = line["images_per_second"], line["arithmetic"]
            between = (images["high"] - images["low"]) / images["median"]
            cells.append(
                (
                    str(line["batch_size"]),
                    line["path"],
                    count(line["steps_per_second"]["median"]),
                    count(images["median"]),
                    f"{100 * between:.0f} %",
                    _times(line["to_tutorial"]),
                    _times(line["to_eager"]),
                    "-" if limit is None else f"{100 * limit['median']:.1f} %",
                )
            )
    return columns, cells


def start_table(lines: Sequence[Line]) -> Table:
    """For each start: the seconds to the end of the first step, and those spent in the compiler.
    Last, the peak memory."""
    lines = [line for line in lines if line["table"] == "speed"]
    names = _starts(lines)
    columns = (
        "batch>",
        "loop",
        *(c for n in names for c in (f"{n} start>", "compile>")),
        "peak MB>",
    )
    cells = []
    for line in lines:
        times: list[str] = []
        for name in names:
            start = line["starts"][name]
            times += [_seconds(start["first_step"]), _seconds(start["compile"])]
        cells.append((str(line["batch_size"]), line["path"], *times, _memory(line)))
    return columns, cells


def scaling_table(lines: Sequence[Line]) -> Table:
    """Speed, start and memory of the fused ways to train, for more and more images."""
    lines = [line for line in lines if line["table"] == "growth"]
    names = _starts(lines)
    columns = (
        "images>",
        "loop",
        "batch>",
        "steps/s>",
        *(f"{name} start>" for name in names),
        "peak MB>",
    )
    cells = []
    for line in lines:
        times = (_seconds(line["starts"][name]["first_step"]) for name in names)
        steps = count(line["steps_per_second"]["median"])
        cells.append(
            (
                f"{line['images']:,}",
                line["path"],
                str(line["batch_size"]),
                steps,
                *times,
                _memory(line),
            )
        )
    return columns, cells


def _starts(lines: Sequence[Line]) -> list[str]:
    return list({name: None for line in lines for name in line["starts"]})


def sentence(lines: Sequence[Line]) -> str:
    """The result in plain words: how many times as fast as the tutorial's loop the fused ways
    are."""
    parts = []
    for size, group in itertools.groupby(
        (line for line in lines if line["table"] == "speed"), lambda line: line["batch_size"]
    ):
        ratios = {line["path"]: line["to_tutorial"] for line in group}
        said = " and ".join(f"{path} {_times(ratios[path])}" for path in FUSED)
        parts.append(f"at batch {size} {said}")
    return f"Images per second, as multiples of the tutorial's loop: {'; '.join(parts)}."


def count(value: float) -> str:
    """A rate with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(ratio: Quartiles | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f}x"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _memory(line: Line) -> str:
    """Megabytes of the process and of each process of its loader."""
    loader = line["loader"]
    more = f" + {loader['processes']}x{loader['memory'] / 1e6:.0f}" if loader else ""
    return f"{line['memory'] / 1e6:.0f}{more}"
