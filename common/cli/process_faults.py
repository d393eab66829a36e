"""`faults --processes N`: mistakes of training in several processes, put into PyTorch's ranks."""

from __future__ import annotations

import argparse
import functools
import math
from typing import TYPE_CHECKING

from lockstep.common.cli.evidence import EvidenceCommand
from lockstep.common.cli.parser import Invocation
from lockstep.common.errors import ConfigError

if TYPE_CHECKING:
    from lockstep.common.config import Config
    from lockstep.common.evidence.faults import Fault
    from lockstep.common.runs.rank_process import BuildRank


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    """Measure the faults that were chosen; status 1 if one is missed, or a correct run disagrees."""
    count, catalogue = options.processes, invocation.backends.module("faults.processes")
    if options.list:
        for fault in catalogue.PROCESS_FAULTS:
            print(f"{fault.name:<36} {fault.stage}")
        return 0
    if count < 2:
        raise ConfigError("faults of several processes need --processes 2 or more")
    if options.quick or options.cluster is not None or options.twins is not None:
        raise ConfigError("--quick, --cluster and --twins do not go with faults of --processes")
    chosen = [catalogue.process_fault_named(name) for name in options.only or ()]
    chosen = chosen or list(catalogue.PROCESS_FAULTS)

    from lockstep.common.evidence import fault_summary
    from lockstep.common.evidence import faults as matrix
    from lockstep.common.evidence import process_faults as study_of
    from lockstep.common.runs import prepare
    from lockstep.common.runs.ranks import Ranks

    study = EvidenceCommand(options, invocation, folder="faults-processes")
    dataset = study.load(options.data).first_test_images(study_of.TEST_IMAGES)
    images = len(dataset.train_images)
    precisions = matrix.PRECISIONS if options.dtype is None else (options.dtype,)
    device = prepare.choose_device(
        invocation.backends,
        study_of.config_of(None, images),
        dataset,
        matrix.BACKENDS,
        study.terminal.line,
        options.device,
    )
    rows, alarms = [], []

    def build_for(fault: Fault | None, config: Config) -> BuildRank:
        # Uncompiled steps: the faults are mistakes in the loop that calls DDP.
        build = functools.partial(invocation.backends.build, config, dataset.task, device, "off")
        name = None if fault is None else fault.name
        return functools.partial(catalogue.build_with_fault, name, config, dataset, build)

    with (
        study.terminal.progress("faults", len(chosen) + options.clean) as advance,
        Ranks(build_for(None, study_of.config_of(None, images)), count, study_of.HINT) as ranks,
    ):
        for fault in [*chosen, *[None] * options.clean]:
            config = study_of.config_of(fault, images, len(alarms) if fault is None else 0)
            found = {
                dtype: study_of.measure(
                    fault, config, dataset, dtype, ranks, build_for(fault, config)
                )
                for dtype in precisions
            }
            if fault is None:
                caught = {dtype: finding["caught"] for dtype, finding in found.items()}
                alarms.append({"seed": config.seed, "alarms": caught})
            else:
                rows.append(study_of.row(fault, config, images, found))
            study.free_programs()
            advance(1, math.nan)
    summary = fault_summary.summary(rows)
    false = sum(any(each["alarms"].values()) for each in alarms)
    clean = f" {false} of {len(alarms)} correct runs disagree." if alarms else ""
    study.report(
        {"processes": count, "summary": summary, "clean": alarms},
        rows,
        fault_summary.sentence(summary) + clean,
        fault_summary.table(rows),
    )
    return 0 if not summary["missed"] and not false else 1
