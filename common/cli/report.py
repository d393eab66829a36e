"""`report`: the page and the pictures of a finished run, made again from its records."""

from __future__ import annotations

import argparse
from pathlib import Path

from lockstep.common.cli.parser import Invocation, Parser
from lockstep.common.errors import ConfigError, DataError
from lockstep.common.system import program


def add_arguments(parser: Parser) -> None:
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where CIFAR-10 is")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write them (default: RUN)"
    )


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    if options.run is None:
        raise ConfigError(f"report needs the folder of a run: {program.name()} report RUN")

    from lockstep.common import data, report
    from lockstep.common.config import Config
    from lockstep.common.report import saved
    from lockstep.common.runs import prepare, request

    started = request.read(options.run)
    found = saved.read(options.run)
    model = str(started.config["model"])
    dataset = data.load(started.data, options.data_dir, lambda line: None, model=model)
    if dataset.digest != started.digest:
        raise DataError(f"{options.run} was trained on other data than --data {started.data} now")
    folder = options.run if options.out is None else options.out
    if options.out is not None:
        prepare.check_folder(folder)
    config = Config.from_json(started.config)
    sample = data.first_seen(config, len(dataset.train_images))
    if folder != options.run:
        report.write_json(found.report, folder)
    report.write_pictures(folder, found.report, found.records, dataset, found.twins, sample)
    path = report.write_report_page(
        folder, found.report, found.records, dataset, found.twins, sample
    )
    print(f"Report: {path}")
    return 0
