"""Training scripts of the user's own: `record` runs one, `diff` compares the recordings of two,
`check` does both.

The command line, `lockstep.record`, `lockstep.diff` and `lockstep.check` are the callers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.common.recorder import script as scripts
from lockstep.common.recorder.settings import DEFAULT_LIMIT
from lockstep.common.recorder.sides import RunOptions, Side

# What follows imports NumPy and more; a command that only checks its options does without.
if TYPE_CHECKING:
    from lockstep.common.recorder.folder import ScriptRuns
    from lockstep.common.report import Terminal

RUNS = Path("results/runs")  # where reports go unless the user names a folder


def record(
    script: str | Path,
    out: str | Path | None = None,
    *,
    arguments: Sequence[str] = (),
    steps: int | None = None,
    timeout: float | None = None,
    precision: str = "float64",
    twins: int | None = None,
    seed: int = 0,
    record_limit: int = DEFAULT_LIMIT,
    terminal: Terminal | None = None,
) -> dict[str, ScriptRuns]:
    """Run a training script and keep recordings of it in a folder.

    Args:
        script: a file, or "module:function".
        out: the folder; None: `results/runs/record-<script>`.
        arguments: of the script.
        steps: end the script after so many; None: let it end by itself.
        timeout: seconds that one run may take.
        precision: "float64", "own" (what the script chooses itself) or "both".
        twins: in each precision; None: two in its own, none in float64.
        seed: of the twins and of `Run.random`.
        record_limit: bytes of one recording; larger tensors are kept as fingerprints.
        terminal: where progress is printed; None: nowhere.

    Returns:
        The recordings by precision.

    Raises:
        LockstepError: if the script fails or cannot be recorded; the message says what to do.
    """
    from lockstep.common.recorder import folder as folders
    from lockstep.common.recorder.launch import run_scripts
    from lockstep.common.system import storage

    options = RunOptions(tuple(arguments), steps, timeout, seed, record_limit, precision, twins)
    terminal = terminal or silent()
    found = scripts.find(str(script))
    side = Side(found, found.name, record_folder(found.stem) if out is None else Path(out))
    made: dict[str, ScriptRuns] = {}
    with storage.lock_folder(side.folder):
        for name in options.precisions:
            folders.remove(side.folder, name)
        for name in options.precisions:
            twin_numbers = range(1, options.twins_in(name) + 1)
            starts = [side.start(options, name, twin) for twin in (None, *twin_numbers)]
            at_once = min(2, len(starts))
            run, *others = run_scripts(starts, options.timeout, terminal.line, at_once)
            made[name] = folders.ScriptRuns(run).add(others)
    return made


def record_folder(stem: str) -> Path:
    return RUNS / f"record-{stem}"


def silent() -> Terminal:
    from lockstep.common.report import Terminal

    return Terminal(quiet=True, stdout=io.StringIO(), stderr=io.StringIO())
