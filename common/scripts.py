"""Training scripts of the user's own: `record` runs one, `diff` compares the recordings of two,
`check` does both.

The command line, `lockstep.record`, `lockstep.diff` and `lockstep.check` are the callers.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.common.errors import ConfigError
from lockstep.common.recorder import script as scripts
from lockstep.common.recorder.settings import DEFAULT_LIMIT
from lockstep.common.recorder.sides import BOTH, RunOptions, Side, two_sides

# What follows imports NumPy and more; a command that only checks its options does without.
if TYPE_CHECKING:
    from lockstep.common.recorder.checking import Checked
    from lockstep.common.report import Terminal
    from lockstep.common.report.scripts import ScriptResult
    from lockstep.common.request import Result
    from lockstep.common.verdict.scripts import ScriptRuns

RUNS = Path("results/runs")  # where reports go unless the user names a folder
STARTS = ("A", "B")
Text = str | Path


def record(
    script: Text,
    out: Text | None = None,
    *,
    arguments: Sequence[str] = (),
    steps: int | None = None,
    timeout: float | None = None,
    precision: str = "float64",
    twins: int | None = None,
    seed: int = 0,
    record_limit: int = DEFAULT_LIMIT,
    processes: int | None = None,
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
        processes: that run the script together, with torchrun's variables; None: one, without them.
        terminal: where progress is printed; None: nowhere.

    Returns:
        The recordings by precision.

    Raises:
        LockstepError: if the script fails or cannot be recorded; the message says what to do.
    """
    options = RunOptions(
        tuple(arguments), steps, timeout, seed, record_limit, precision, twins, processes
    )
    found = scripts.find(str(script))
    side = Side(found, found.name, record_folder(found.stem) if out is None else Path(out))

    from lockstep.common.recorder import folder as folders
    from lockstep.common.recorder.launch import run_scripts
    from lockstep.common.system import storage
    from lockstep.common.verdict.scripts import ScriptRuns

    say = (terminal or silent()).line
    made: dict[str, ScriptRuns] = {}
    with storage.lock_folder(side.folder):
        for name in options.precisions:
            folders.remove(side.folder, name)
        for name in options.precisions:
            twin_numbers = range(1, options.twins_in(name) + 1)
            starts = [side.start(options, name, twin) for twin in (None, *twin_numbers)]
            made[name] = ScriptRuns.of(
                run_scripts(starts, options.timeout, say, at_once=min(2, len(starts)))
            )
    return made


def check(
    a: Text,
    b: Text,
    *,
    arguments: Sequence[str] = (),
    steps: int | None = None,
    timeout: float | None = None,
    precision: str = BOTH,
    twins: int | None = None,
    seed: int = 0,
    names: Text | None = None,
    start_from: str | None = None,
    record_limit: int = DEFAULT_LIMIT,
    processes: int | None = None,
    out: Text | None = None,
    terminal: Terminal | None = None,
    command: Sequence[str] = (),
) -> ScriptResult:
    """Run two training scripts and find out whether they are the same run.

    Both run in float64, at the same time, each in a process of its own; if they agree there, in
    their own precision, next to twins. For a test: `assert lockstep.check("a.py", "b.py")`.

    Args:
        a, b: files, or "module:function".
        arguments: of both scripts.
        steps: end the scripts after so many; None: let them end by themselves.
        timeout: seconds that one run may take.
        precision: "both", "float64" or "own" (what the scripts choose themselves).
        twins: in each precision, to begin with; None: two in their own, none in float64.
        seed: of the twins and of `Run.random`.
        names: a file that says which tensor of A is which of B, where Lockstep does not find it.
        start_from: "A" or "B": both start from the initial weights of this one.
        record_limit: bytes of one recording; larger tensors are kept as fingerprints.
        processes: that run the script together, with torchrun's variables; None: one, without them.
        out: the folder of the report and the recordings; None: `results/runs/check-<a>-<b>`.
        terminal: where progress and the verdict are printed; None: nowhere.
        command: the command line, for the report.

    Returns:
        The result. It is true if the two agree; if not, its `repr` names the place where they
        differ first.

    Raises:
        LockstepError: if a script fails, or nothing can be said; the message says what to do.
    """
    options = RunOptions(
        tuple(arguments), steps, timeout, seed, record_limit, precision, twins, processes
    )
    if start_from is not None and start_from not in STARTS:
        raise ConfigError("--start-from must be A or B: the script that gives the initial weights")
    found = scripts.find(str(a)), scripts.find(str(b))
    folder = RUNS / f"check-{found[0].stem}-{found[1].stem}" if out is None else Path(out)
    sides = two_sides(*found, folder)
    given = names_file(names)

    from lockstep.common.recorder.checking import Checker
    from lockstep.common.system import storage

    terminal = terminal or silent()
    start = None if start_from is None else STARTS.index(start_from)
    with storage.lock_folder(folder):
        checked = Checker(sides, options, given, start, terminal.line).run()
        return report(checked, folder, terminal, command)


def diff(
    a: Text,
    b: Text,
    *,
    names: Text | None = None,
    backend: str | None = None,
    data_dir: Text | None = None,
    out: Text | None = None,
    terminal: Terminal | None = None,
    command: Sequence[str] = (),
) -> ScriptResult | Result:
    """Compare the recordings in two folders, as `record` or `check` wrote them, or two runs of
    networks that Lockstep trained.

    Args:
        a, b: the folders.
        names, terminal, command: as for `check`.
        backend: of two folders that hold runs of both frameworks: whose to compare.
        data_dir: where CIFAR-10 is, which two runs were trained on.
        out: the folder of the report; None: `results/runs/diff-<a>-<b>`.

    Returns:
        The result, as that of `check` or of `lockstep.compare`.

    Raises:
        LockstepError: if a recording is missing or damaged, or nothing can be said.
    """
    from lockstep.common import run_diff
    from lockstep.common.recorder.checking import compare_folders
    from lockstep.common.system import storage

    of_runs = run_diff.are_runs(Path(a), Path(b))
    if of_runs and names is not None:
        raise ConfigError("--names is for recordings of scripts: leave it out to compare two runs")
    if not of_runs and (backend, data_dir) != (None, None):
        raise ConfigError("--backend and --data-dir are for two runs: leave them out")
    if of_runs:
        folder = diff_folder(a, b) if out is None else Path(out)
        with storage.lock_folder(folder):
            return run_diff.diff(
                Path(a),
                Path(b),
                folder,
                terminal or silent(),
                backend,
                None if data_dir is None else Path(data_dir),
                command,
            )
    checked = compare_folders(Path(a), Path(b), names_file(names))
    folder = diff_folder(a, b) if out is None else Path(out)
    with storage.lock_folder(folder):
        return report(checked, folder, terminal or silent(), command)


def report(
    checked: Checked, folder: Path, terminal: Terminal, command: Sequence[str]
) -> ScriptResult:
    """Write the report, and print the verdict."""
    from lockstep.common.report import scripts as reports

    return reports.write(checked, folder, terminal, command)


def names_file(names: Text | None) -> Path | None:
    """The file; raises ConfigError if it is not there, before anything is started."""
    if names is None:
        return None
    if not Path(names).is_file():
        raise ConfigError(f"there is no names file {names}")
    return Path(names)


def record_folder(stem: str) -> Path:
    return RUNS / f"record-{stem}"


def diff_folder(a: Text, b: Text) -> Path:
    stems = [Path(each).resolve().name for each in (a, b)]
    return RUNS / f"diff-{stems[0]}-{stems[1]}"


def silent() -> Terminal:
    from lockstep.common.report import Terminal

    return Terminal(quiet=True, stdout=io.StringIO(), stderr=io.StringIO())
