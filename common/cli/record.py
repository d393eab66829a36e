"""`record`: run a training script of the user's and keep what it computed."""

from __future__ import annotations

import argparse

from lockstep.common.cli import output, script_options
from lockstep.common.cli import parser as options_of
from lockstep.common.cli.parser import Invocation, Parser


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "script",
        nargs="?",
        metavar="SCRIPT",
        help="a training script that uses lockstep.Run: SCRIPT.py or MODULE:FUNCTION; what "
        "follows -- are its arguments",
    )
    script_options.add_precision(parser, "float64")
    script_options.add_script_twins(parser)
    script_options.add_script_run(parser)
    options_of.add_output(
        parser, "folder of the recordings (default: results/runs/record-<script>)"
    )


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    (script,) = script_options.given(options, "script")
    if not script_options.take_from_torchrun(options):
        return 0
    from lockstep.common import scripts
    from lockstep.common.recorder.script import find
    from lockstep.common.verdict.script_place import ranks_sentence

    terminal = output.terminal(options)
    folder = options.out or scripts.record_folder(find(script).stem)
    made = scripts.record(
        script,
        folder,
        precision=options.precision,
        terminal=terminal,
        **script_options.script_options(options),
    )
    recordings = [run for runs in made.values() for run in (runs.run, *runs.twins)]
    rows = [
        {
            "precision": run.dtype,
            "twin": run.twin,
            "steps": run.steps,
            "seconds": run.seconds,
            "processes": run.processes,
            "ranks_differ": ranks_sentence(run),
        }
        for run in recordings
    ]
    if options.json:
        output.print_json(
            {"schema": 1, "folder": str(folder), "recordings": rows}, invocation.stdout
        )
    terminal.print_always(f"Recorded: {folder}")
    differing = [text for run in recordings if (text := ranks_sentence(run)) is not None]
    for text in differing[:1]:
        terminal.paragraph(text, "bold red")
    return 1 if differing else 0
