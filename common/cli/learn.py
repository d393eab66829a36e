"""`learn`: pages to learn from: a lesson, the two backends side by side, and one step in numbers.
In `results/read`, their place in the checkout, the index of all results as well."""

from __future__ import annotations

import argparse
from pathlib import Path

from lockstep.common.cli import parser as options_of
from lockstep.common.cli.evidence import EvidenceCommand
from lockstep.common.cli.parser import Invocation, Parser
from lockstep.common.errors import ConfigError
from lockstep.common.system import program

ROOT = Path(__file__).resolve().parents[2]  # of the checkout


def add_arguments(parser: Parser) -> None:
    options_of.add_shared(parser, "learn")


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    if not (ROOT / "results").is_dir() or not (ROOT / "compare.py").exists():
        raise ConfigError(
            "learn shows the source files and the measured results of a checkout: clone the "
            f"repository and run {program.CHECKOUT[0]} {program.CHECKOUT[1]} learn there"
        )

    from lockstep.common.learn import (
        read_report,
        walk_through,
        write_lesson_notebook,
        write_lesson_page,
        write_read_page,
        write_walk_page,
    )
    from lockstep.common.report.index import write_index_page

    catalogue = invocation.backends.module("faults")
    study = EvidenceCommand(options, invocation, folder="learn")
    # What goes wrong if a difference is missed.
    report = read_report(ROOT / "results" / "faults" / "report.json")
    dataset = study.load("digits" if options.data == "auto" else options.data)
    write_lesson_page(study.folder / "lesson.html", ROOT, report)
    write_lesson_notebook(study.folder / "lesson.ipynb", ROOT, report)
    write_read_page(
        study.folder / "read.html", ROOT, report, [fault.name for fault in catalogue.FAULTS]
    )
    walked = walk_through(study.build, dataset, ROOT, study.terminal.line)
    write_walk_page(study.folder / "walk.html", walked)
    study.terminal.line(f"Pages: {study.folder}")
    if study.folder.resolve() == (ROOT / "results" / "read").resolve():
        index = write_index_page(ROOT / "results")
        study.terminal.line(f"Index: {index}")
    return 0
