"""`bench`: the speed of the tutorial's loop and of both backends, step by step and fused."""

from __future__ import annotations

import argparse
import functools
import math
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from lockstep.common.cli import parser as options_of
from lockstep.common.cli.evidence import EvidenceCommand
from lockstep.common.cli.parser import Invocation, Parser
from lockstep.common.config import DTYPES, Config
from lockstep.common.system import environment


def add_arguments(parser: Parser) -> None:
    options_of.add_batch_size(parser)
    # The tutorial's loop, with which it compares, has no mixed precision.
    plain = [dtype for dtype in DTYPES if not dtype.startswith("mixed")]
    options_of.add_choice(parser, "--dtype", plain, "(default: float32)")
    options_of.add_seed(parser)
    parser.add_argument("--quick", action="store_true", help="a minute")
    options_of.add_data(parser)
    options_of.add_choice(parser, "--device", ("auto", "cpu", "cuda"), "(default: auto)", "auto")
    options_of.add_output(parser, "folder of the report (default: results/runs/bench/<processor>)")


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    config = Config(
        batch_size=4 if options.batch_size is None else options.batch_size, seed=options.seed or 0
    )

    from lockstep.common.evidence import bench, bench_report, plots

    loops, worker = (
        invocation.backends.module("benchmark.loops"),
        invocation.backends.module("benchmark.worker"),
    )
    busy, found = bench.load(), environment.describe()
    device, card = worker.find_device(options.device)
    where = card or f"{found['processor']}, {found['cores']} cores"
    study = EvidenceCommand(options, invocation, folder=f"bench/{bench.slug(where)}")
    dataset = study.load(options.data)
    images = len(dataset.train_images)
    config.resolve(images)  # a batch that is larger than the data is refused
    if busy is not None and busy > found["cores"] / 4:
        study.terminal.line(
            f"This machine is busy (load {busy:.1f}, {found['cores']} cores): the speeds "
            "will be too low"
        )
    plan = bench.make_plan(images, options.batch_size, options.quick)
    dtype = options.dtype or "float32"
    with tempfile.TemporaryDirectory(
        prefix="lockstep-bench-", ignore_cleanup_errors=True
    ) as folder:
        loops.write_images(dataset.train_images, dataset.train_labels, Path(folder))

        def start(
            path: str, batch_size: int, images: int, cache: str | None
        ) -> AbstractContextManager[bench.Worker]:
            classes = len(dataset.classes)
            job = loops.BenchmarkJob(
                path, batch_size, images, classes, dtype, device, config.seed, Path(folder)
            )
            return worker.start(job, cache)

        with study.terminal.progress("turns", plan.turns) as advance:
            rows = bench.measure(plan, start, lambda turns: advance(turns, math.nan))
    lines = bench_report.summary(rows)
    facts = {
        "dtype": dtype,
        "device": device,
        "card": card,
        "load": busy,
        "plan": plan.to_json(),
    }
    facts["summary"] = lines
    tables = [bench_report.speed_table(lines), bench_report.start_table(lines)]
    if plan.scaling:
        tables.append(bench_report.scaling_table(lines))
    draw = functools.partial(plots.draw_bench, lines, f"{where}, {dtype}")
    study.report(facts, rows, bench_report.sentence(lines), *tables, draw=draw)
    return 0
