"""What is wrong with a request is said before a framework is imported; and what a command costs."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lockstep import cli

REPOSITORY = Path(__file__).resolve().parents[2]
# Processor time of a run of two steps, in that of importing what it needs, measured in turn: an
# optimizer of PyTorch imports TorchDynamo. Five runs: 1.3 to 1.7.
MAX_IMPORTS = 2.0
IMPORTS = "import torch._dynamo, jax, flax.nnx, optax, matplotlib.figure"
PROGRAM = """
import runpy, sys
sys.argv = ["compare.py", *sys.argv[1:]]
from lockstep.cli import main
status = main()
heavy = ("torch", "jax", "sklearn", "scipy.stats", "torchvision", "orbax")
print("imported:", *(name for name in heavy if name in sys.modules))
sys.exit(status)
"""


def carried_out(*arguments: str | Path, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def processor_seconds(*command: str | Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "arguments",
    [
        ["--weights", "nope.pt"],
        ["--weights", "a.txt"],
        ["--out", "a.txt"],
        ["--out", "a.txt/b/c"],
        ["--resume", "nope"],
        ["locate", "nope"],
        ["export", "nope", "--to", "torch"],
        ["pair", "nope.py:PAIR"],
        ["--data", "nope"],
        ["--twins", "0"],
        ["faults", "--only", "nope"],
        ["--steps", "2", "--epochs", "2"],
    ],
    ids=" ".join,
)
def test_a_wrong_request_is_refused_before_a_framework_is_imported(
    arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("no weights")
    run = carried_out(*arguments, "--quiet", cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.startswith("error: "), run.stderr
    assert run.stderr.count("\n") == 1
    assert run.stdout.strip() == "imported:"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.slow
def test_a_short_run_says_what_it_trains_first_and_takes_little_time(tmp_path: Path) -> None:
    """The control of the test above, too: this run imports both frameworks."""
    options = ["--data", "digits", "--steps", "2", "--dtype", "float64", "--out", tmp_path / "run"]
    carried_out(*options)  # compiles what it needs, and keeps it
    for _ in range(3):  # other processes in the caches make it slower
        importing = processor_seconds("-c", IMPORTS)
        running = processor_seconds("compare.py", *options)
        if running <= MAX_IMPORTS * importing:
            break
    run = carried_out(*options)
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and lines[-1] == "imported: torch jax"
    assert lines[0].startswith(
        "Training net in PyTorch and Flax on the digits: 2 steps of batch 32, in float64"
    )
    assert len(lines) <= 15
    assert lines[-2] == f"Report: {tmp_path / 'run' / 'report.html'}"
    assert running <= MAX_IMPORTS * importing


@pytest.mark.slow
def test_evidence_goes_to_results_runs_unless_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--only", "classes-moved", "--data", "digits", "--dtype", "float64", "--quiet"]
    assert cli.main(["faults", *options]) == 0
    assert (tmp_path / "results" / "runs" / "faults" / "report.json").exists()
    assert not (tmp_path / "results" / "faults").exists()
