"""Kill one of the processes that train a run together, at random moments, and resume the run.

    python -m tests.robustness.rank_kills [--kills N] [--out DIR]

Each time: the run has to end within 30 s with status 2 and a line that names the rank, no process may
be left, and the resumed run has to equal the uninterrupted one bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TypedDict

from lockstep.common.config import BACKENDS, FRAMEWORKS
from lockstep.common.runs import record

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--data", "digits", "--steps", "400", "--dtype", "float64", "--processes", "2"]
LIMIT = 30.0  # seconds


class Kill(TypedDict):
    backend: str
    rank: int
    after: float  # seconds after the training began
    ended: float  # seconds until the run had ended
    line: str
    left: int  # processes
    equal: bool  # the resumed run, to the bit


def command(*options: str) -> list[str]:
    return [sys.executable, "compare.py", *options]


def children(pid: int) -> list[int]:
    """The processes that `pid` has started, in that order."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and parent(int(folder.name)) == pid:
            found.append(int(folder.name))
    return sorted(found)


def parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return None


def digest(folder: Path, backend: str) -> list[bytes]:
    """The bytes of all that the run computed."""
    found = record.read(folder / f"{backend}-float64.safetensors")
    arrays = [getattr(found, name) for name in record.SERIES]
    for group in record.ARRAY_GROUPS:
        arrays += [array for _, array in sorted(getattr(found, group).items())]
    return [array.tobytes() for array in arrays]


def killed(backend: str, folder: Path, rank: int, after: float) -> tuple[float, str, int] | None:
    """Seconds until the run had ended, its last line, and how many processes were left; None if it
    had finished before."""
    run = subprocess.Popen(
        command("--backend", backend, *OPTIONS, "--out", str(folder)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("Training " + backend):
            break
    time.sleep(after)
    ranks = children(run.pid)
    if len(ranks) < 2:
        run.communicate()
        return None
    os.kill(ranks[rank], signal.SIGKILL)
    began = time.monotonic()
    said, _ = run.communicate(timeout=120)
    seconds = time.monotonic() - began
    left = sum(Path(f"/proc/{pid}").exists() for pid in ranks)
    return None if run.returncode == 0 else (seconds, said.strip().splitlines()[-1], left)


def kill(backend: str, number: int, most: float, expected: list[bytes]) -> Kill | None:
    """One kill, at a random moment within `most` seconds after the training began."""
    generator = random.Random(f"{backend} {number}")
    rank, after = generator.randrange(2), generator.uniform(0, most)
    with tempfile.TemporaryDirectory() as folder:
        found = killed(backend, Path(folder), rank, after)
        if found is None:
            return None
        seconds, line, left = found
        subprocess.run(command("--resume", folder), cwd=ROOT, capture_output=True, check=True)
        equal = digest(Path(folder), backend) == expected
    line = re.sub(r": resume with: .*", ": resume with: ...", line)
    return Kill(
        backend=backend,
        rank=rank,
        after=round(after, 2),
        ended=round(seconds, 2),
        line=line,
        left=left,
        equal=equal,
    )


def right(found: Kill) -> bool:
    named = f"rank {found['rank']} of 2 of {FRAMEWORKS[found['backend']]}" in found["line"]
    return named and found["equal"] and found["ended"] < LIMIT and not found["left"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "results/rank-kills")
    options = parser.parse_args()
    kills: list[Kill] = []
    for backend in BACKENDS:
        with tempfile.TemporaryDirectory() as folder:
            words = command("--backend", backend, *OPTIONS, "--out", folder)
            subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
            seconds = record.read(Path(folder) / f"{backend}-float64.safetensors").seconds
            expected = digest(Path(folder), backend)
        number, wanted = 0, len(kills) + options.kills // len(BACKENDS)
        while len(kills) < wanted and number < 5 * options.kills:
            found = kill(
                backend, number, seconds + 4, expected
            )  # 4 s: until the ranks have started
            number += 1
            if found is not None:
                kills.append(found)
                print(json.dumps(found), flush=True)
    wrong = [found for found in kills if not right(found)]
    options.out.mkdir(parents=True, exist_ok=True)
    report = {"command": ["python", "-m", "tests.robustness.rank_kills"], "options": OPTIONS}
    text = json.dumps(report | {"wrong": len(wrong), "kills": kills}, indent=1) + "\n"
    (options.out / "report.json").write_text(text)
    print(f"{len(kills)} kills, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
