"""How fast: the plan of the measurement, its arithmetic, and its tables. What trains is handed
over.

Every way to train has a process of its own. They take turns, a few seconds each, several times
over, so that what slows the machine down for a while slows all of them; ratios are taken turn by
turn.

Where a step's time goes (batch 4, float32, one thread; `jax.profiler` and `perf`): in JAX 58 % is
matrix products, 14 % pooling and its gradient, 4 % the update, 3 % each the gradient norm and the
biases' gradients, the rest a hundred small loops that lay out rows and kernels. In PyTorch 56 % is
products, a sixth of it laying out what is multiplied; 20 % rows and the kernel's matrix, and the
pooling between; 10 % asking for memory, 11 % calling, 3 % gathering images.

Tried, and not kept: steps per second at batch 4 in float32 on two cores, without it and with it.
Measured with sketches of the step, mostly in turn in one process; the load differed from line to
line, so each is to be read by itself.

    JAX
    1 x 2, 1 x 4, 2 x 4 pixels a row, in place of 2 x 2      1,303   1,056, 1,137, 1,268
    patches along x only, and a sum of products              1,303   1,093
    pooling with a gradient of its own                       1,762   1,643
    the kernel's matrix as a product with zeros and ones     1,774   1,684
    images last in memory                                    1,538   1,368
      the same at batch 128 (51 where the model stays NHWC)     90   109
    four steps unrolled in the scan                          1,303   1,165
    512-bit vectors; XLA's fast math                         1,793   1,813; 1,797
    no gradient norm, which the verdict needs                1,793   1,932
    batch 128 in pieces of 32, of 16                            91   68, 57
    PyTorch
    one pixel a row; every window by `unfold`                  877   608, 638
    the transposed product; a product for each image         1,029   870, 1,013
    the bias as a column of the product                      1,183   857
    pooling by `where`                                       1,034   990
    five steps unrolled (a minute and a half to compile)     1,034   961
    within C++: pooling by `where`, by `torch.maximum`        1,566   1,356, 1,153
    batch 128, before inductor kept what is read often:
      compiled; channels last; pooling by `where`            63; 48; 50   48; 32; 33
    keeping what reads two or three values, too              2,219   1,978
    four ways of pooling by `where`                          1,948   1,479 to 1,624
    all four pixels of a window compared at once             2,219   1,958
    lines of pixels first copied beside one another          1,870   1,765
    the bias added to the product                            2,005   1,988

XLA's options and pooling were tried again on another processor (AMD EPYC), with 2,083 steps per
second at batch 4 without any: products by YNNPACK 1,766, by oneDNN 1,863; no fusion emitters 1,884;
no parallel code generation 1,960; tiling propagation 2,003; scheduled for memory 2,040; pooling by
`jnp.maximum` 1,868, behind a barrier 2,086; the gradient norm summed by rows 2,101, none 2,205.
With rows by lines of pixels and pooling split in four, 2,262 to 2,282: the norm by `vdot` 2,198, by
rows 2,231, of one long array 2,161, none 2,425; a kernel's gradient as the product of a transposed
copy 2,071 to 2,120; YNNPACK for sums only 2,137, for products only 2,112, for neither 1,983; lines
copied side by side first, 2,247 to 2,282 in place of 2,225. With features first in the matrix of a
kernel, whose gradient XLA then takes as the product of a smaller transposed matrix, and the norm by
halves, 2,580 to 2,630 in place of 2,290 to 2,340: the gradient transposed by a rule of its own
2,485; lines copied first 2,531; all gradients behind a barrier 2,612, pooled pixels 2,661 (in turn
with 2,630); the norm in parts of 8 or 16 2,534 and 2,456, by `einsum` 2,459. With two threads the
halves cost 3 % of a step at batch 32, the features first save 8 %.

The second convolution alone with 1 x 2 pixels a row, 2,431 in place of 2,594; with one, 1,994. No
weight is copied in a step (`backend.py`): 2,730 in place of 2,660; the same by an update that waits
for the gradient norm, 2,748. With that: all gradients behind a barrier 2,740; no bias in
convolutions 2,701; fusions of several results 1,700; fusions flattened 2,527; loops not unrolled
2,624; 512-bit vectors, or scheduled for memory, 1.01 times as fast; 340 or 500 steps a call in
place of 170 1.005 and 1.01. Pixels by arithmetic, not from a table, 1.01, but XLA divides by a
constant by multiplying, which is not always the same number.

In PyTorch at batch 32, eager steps by the matrix product took 4.4 to 6.2 ms in place of 3.2 in
float32, and 7.1 to 11.5 in place of 6.3 to 7.6 in float64. Of inductor's options none but what it
keeps in memory (`backend.py`) moved its loop by more than 3 % once it is called from C++:
contracted products, no assertions, other limits of fusion, no padding; its planning of memory
fails.

On the CPU `torch.use_deterministic_algorithms`, which changes nothing there, brings the compiled
loop from about 2.8 times eager steps down to 1.6.

Three twins at once under `vmap`, each with images of its own as twins have them, against one after
the other, steps per second of all three: JAX 2,455 and 2,268 at batch 4, 432 and 541 at batch 32;
PyTorch, eager, 651 and 690, 209 and 299. On a GPU it was not tried.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

T = TypeVar("T")

PATHS = {  # the ways to train, and how they are called in pictures
    "tutorial": "the tutorial's loop",  # as it is written: a loader with two processes, eager, loss.item() every step
    "eager": "the same, data in memory",  # normalised beforehand; no loader, no loss.item()
    "torch": "torch, single steps",  # Lockstep's PyTorch side, one train_step after the other
    "torch fused": "torch, fused steps",  # its train_steps, compiled where `--compile auto` does, in long runs
    "flax": "flax, single steps",  # Lockstep's Flax side, likewise
    "flax fused": "flax, fused steps",
}
REFERENCES = ("tutorial", "eager")  # what ratios are taken to
FUSED = ("torch fused", "flax fused")
COMPILED = ("torch fused", "flax", "flax fused")
PRODUCTS = ("torch product", "flax product")  # the arithmetic limit: large matrices multiplied
PRODUCT_SIZE = 2048  # rows and columns
PRODUCT_FLOPS = 2 * PRODUCT_SIZE**3  # a multiplication and an addition for each of n^3 terms
BATCH_SIZES = (4, 32, 128, 512)
GROWTH_BATCH = 32
GROWTH_IMAGES = (1000, 10000)  # and all
UNCOUNTED = "uncounted"  # a start
# Where a kernel of `Net` is applied to one image: a 5 x 5 convolution without padding makes 28 x 28
# of 32 x 32, pooling 14 x 14, the next one 10 x 10. A dense layer is applied once.
PLACES = {"conv1": 28 * 28, "conv2": 10 * 10}
FIRST = "conv1"  # whose input is the images: they need no gradient


class Worker(Protocol):
    """A process that has taken its first step, and waits to be asked; see
    `lockstep.backends.benchmark.worker.Worker`."""

    seconds: float  # from its start to the end of the first step

    def ask(self, method: str, *arguments: Any) -> Any: ...


# Its way to train, batch size, number of training images, and a name for the folder of what it
# compiles, None for the usual one.
Start = Callable[[str, int, int, str | None], AbstractContextManager[Worker]]


# --- The plan


@dataclass(frozen=True)
class Plan:
    """What is measured, and for how long."""

    batch_sizes: tuple[int, ...]
    images: int  # training images
    growth_batch: int
    growth: tuple[int, ...]  # training images
    seconds: float  # of one turn
    repetitions: int  # turns of each way to train
    # "cold", with nothing compiled; "warm", with what earlier starts compiled; "kept", with
    # whatever this machine has.
    starts: tuple[str, ...]
    # likewise; UNCOUNTED ones are to compile what the next one finds
    growth_starts: tuple[str, ...]

    @property
    def turns(self) -> int:
        """All that there are."""
        cells = len(self.batch_sizes) * (len(PATHS) + len(PRODUCTS)) + len(self.growth) * len(FUSED)
        return cells * self.repetitions


def make_plan(images: int, batch_size: int | None, quick: bool) -> Plan:
    """Of so many training images.

    Args:
        batch_size: the only one; None for all of BATCH_SIZES that fit.
        quick: to see that it works.
    """
    sizes = (
        tuple(size for size in BATCH_SIZES if size <= images)
        if batch_size is None
        else (batch_size,)
    )
    growth_batch = GROWTH_BATCH if batch_size is None else batch_size
    growth = tuple(number for number in GROWTH_IMAGES if growth_batch <= number < images)
    if quick:
        return Plan(sizes, images, growth_batch, (), 0.2, 3, ("kept",), ())
    return Plan(
        sizes,
        images,
        growth_batch,
        (*growth, images),
        1.5,
        7,
        ("cold", "warm"),
        (UNCOUNTED, "warm"),
    )


def round_robin(cells: Sequence[T], repetitions: int) -> Iterator[T]:
    """Each cell once in every repetition; every other one backwards, so that none has always the
    same before it."""
    for repetition in range(repetitions):
        yield from cells if repetition % 2 == 0 else reversed(cells)


def load() -> float | None:
    """How many processes wanted to run at a time, over the last minute; None where the system does
    not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def slug(name: str) -> str:
    """A processor's or a card's name as that of a folder."""
    return (
        re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-") or "unknown"
    )


# --- The measurement


def measure(
    plan: Plan, start: Start, advance: Callable[[int], None] = lambda turns: None
) -> list[dict[str, Any]]:
    """One row for each way to train at each batch size, then one for each fused one at each number
    of images.

    Args:
        start: starts a worker; only one of all is ever at work.
        advance: told of each turn.

    Returns:
        table ("speed", "growth"), path (also those of PRODUCTS, with each batch size), batch_size,
        images, starts (by name: first_step, seconds, and the opening's steps and seconds), runs
        (steps, images and seconds of each turn), and facts (environment, memory, loader,
        flops_per_image).
    """
    rows = []
    with contextlib.ExitStack() as stack:
        # Started first, they also have the frameworks read from disk before any start counts.
        products = {path: stack.enter_context(start(path, 1, 0, None)) for path in PRODUCTS}
        for size in plan.batch_sizes:
            cells = [(path, size, plan.images) for path in PATHS]
            rows += _together("speed", cells, plan, plan.starts, start, advance, products)
        if cells := [(path, plan.growth_batch, images) for images in plan.growth for path in FUSED]:
            rows += _together("growth", cells, plan, plan.growth_starts, start, advance, {})
    return rows


def _together(
    table: str,
    cells: Sequence[tuple[str, int, int]],
    plan: Plan,
    starts: tuple[str, ...],
    start: Start,
    advance: Callable[[int], None],
    products: Mapping[str, Worker],
) -> list[dict[str, Any]]:
    """The rows of what is measured in turns with each other."""
    rows = []
    with contextlib.ExitStack() as stack:
        workers: list[Worker] = []
        for path, size, images in cells:
            cache = None if "kept" in starts else f"{path} {size}".replace(" ", "-")
            found = {}
            for name in starts[:-1]:
                with start(path, size, images, cache) as worker:
                    found[name] = _started(worker)
            # the last one goes on to train
            workers.append(stack.enter_context(start(path, size, images, cache)))
            found[starts[-1]] = _started(workers[-1])
            found.pop(UNCOUNTED, None)
            rows.append({"path": path, "batch_size": size, "images": images, "starts": found})
        for path, worker in products.items():
            workers.append(worker)
            rows.append({"path": path, "batch_size": cells[0][1], "images": None, "starts": {}})
        runs: list[list[dict[str, Any]]] = [[] for _ in rows]
        for mine, worker in round_robin(list(zip(runs, workers, strict=True)), plan.repetitions):
            mine.append(worker.ask("run", plan.seconds))
            advance(1)
        facts = [worker.ask("facts") for worker in workers]
    more = zip(rows, runs, facts, strict=True)
    return [{"table": table, **row, "runs": mine, "facts": known} for row, mine, known in more]


def _started(worker: Worker) -> dict[str, Any]:
    return {"first_step": worker.seconds, "opening": worker.ask("opening")}


# --- Its arithmetic


def flops_per_image(shapes: Mapping[str, Sequence[int]]) -> int:
    """Floating-point operations of one training step for one image, a multiplication and an
    addition counting as two.

    Of each layer the forward pass, the gradient of its kernel and, but for the first, the gradient
    of its input are products with the same number of terms: the kernel's entries times the places
    where it is applied. Biases, rectifiers, pooling, softmax and the update are not counted; they
    are a few per cent.

    Args:
        shapes: canonical, by name; only those of kernels are looked at.
    """
    kernels = {
        name.removesuffix(".kernel"): shape
        for name, shape in shapes.items()
        if name.endswith(".kernel")
    }
    terms = {layer: math.prod(shape) * PLACES.get(layer, 1) for layer, shape in kernels.items()}
    return sum(2 * (2 if layer == FIRST else 3) * number for layer, number in terms.items())


def spread(values: np.ndarray) -> dict[str, float]:
    """The median, and the quartiles `low` and `high` (linearly between neighbours)."""
    low, median, high = np.percentile(values, [25, 50, 75]).tolist()
    return {"median": median, "low": low, "high": high}


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the rows of `measure` say, one line for each of a way to train.

    Returns:
        table, path, batch_size, images; steps_per_second, images_per_second, to_tutorial and
        to_eager (as multiples), arithmetic (the share of the rate of matrix products in the same
        framework), each a `spread` over the turns, None where there is nothing to take a ratio to;
        gflops, that rate's median; by start, first_step and compile, seconds (None where nothing is
        compiled); memory, bytes, and loader.
    """
    groups: dict[Any, dict[str, Mapping[str, Any]]] = {}
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


def _line(
    row: Mapping[str, Any], group: Mapping[str, Mapping[str, Any]], flops: int | None
) -> dict[str, Any]:
    images = _rates(row, "images")
    ratios = {}
    for reference in REFERENCES:
        ratios[f"to_{reference}"] = (
            spread(images / _rates(group[reference], "images")) if reference in group else None
        )
    framework = "flax" if row["path"].startswith("flax") else "torch"
    product = group.get(f"{framework} product")
    limit = None if product is None else _rates(product, "steps") * PRODUCT_FLOPS
    step = float(1 / np.median(_rates(row, "steps")))
    return {
        **{key: row[key] for key in ("table", "path", "batch_size", "images")},
        "steps_per_second": spread(_rates(row, "steps")),
        "images_per_second": spread(images),
        **ratios,
        "arithmetic": None if limit is None or flops is None else spread(images * flops / limit),
        "gflops": None if limit is None else spread(limit / 1e9)["median"],
        "flops_per_image": flops,
        "starts": {name: _start(row["path"], found, step) for name, found in row["starts"].items()},
        "memory": row["facts"]["memory"],
        "loader": row["facts"]["loader"],
    }


def _rates(row: Mapping[str, Any], thing: str) -> np.ndarray:
    """Steps, or images, per second of each turn."""
    return np.array([run[thing] / run["seconds"] for run in row["runs"]])


def _start(path: str, found: Mapping[str, Any], step: float) -> dict[str, Any]:
    """compile: how much longer the opening took than its steps do later on."""
    opening = found["opening"]
    compiled = max(0.0, opening["seconds"] - opening["steps"] * step) if path in COMPILED else None
    return {"first_step": found["first_step"], "compile": compiled}


# --- Tables

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def speed_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Column names (`>` for numbers) and lines: medians, how far apart images/s's quartiles are,
    and ratios."""
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
                    *(_times(line[f"to_{reference}"]) for reference in REFERENCES),
                    "-" if limit is None else f"{100 * limit['median']:.1f} %",
                )
            )
    return columns, cells


def start_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """By start, seconds from nothing to the end of the first step, and of them in the compiler; and
    peak memory."""
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
        times = (
            _seconds(line["starts"][name][key])
            for name in names
            for key in ("first_step", "compile")
        )
        cells.append((str(line["batch_size"]), line["path"], *times, _memory(line)))
    return columns, cells


def growth_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """What the fused ways to train need for more images."""
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


def _starts(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list({name: None for line in lines for name in line["starts"]})


def sentence(lines: Sequence[Mapping[str, Any]]) -> str:
    """The result in plain words: how many times as fast as the tutorial's loop the fused ways
    are."""
    parts = []
    for size, group in itertools.groupby(
        (x for x in lines if x["table"] == "speed"), lambda x: x["batch_size"]
    ):
        ratios = {line["path"]: line["to_tutorial"] for line in group}
        said = " and ".join(f"{path} {_times(ratios[path])}" for path in FUSED)
        parts.append(f"at batch {size} {said}")
    return f"Images per second, as multiples of the tutorial's loop: {'; '.join(parts)}."


def count(value: float) -> str:
    """A rate with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(ratio: Mapping[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['median']:.2f}x"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _memory(line: Mapping[str, Any]) -> str:
    """Megabytes of the process and of each process of its loader."""
    loader = line["loader"]
    more = f" + {loader['processes']}x{loader['memory'] / 1e6:.0f}" if loader else ""
    return f"{line['memory'] / 1e6:.0f}{more}"
