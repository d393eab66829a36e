"""The machine a run was made on, for its report."""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

# Of `common`, the files on which a run depends.
SOURCE_FILES = (
    "config.py",
    "dtypes.py",
    "protocol.py",
    "data/*.py",
    "model/initial_weights.py",
    "model/pair.py",
    "model/perturb.py",
    "runs/training.py",
)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def relax_gc() -> None:
    """Have Python look for cycles among all its objects a hundred times less often.

    The frameworks' own objects stay, and looking through them takes 0.2 s: 2 of the quick recipe's
    27 seconds.
    """
    gc.set_threshold(*gc.get_threshold()[:2], 1_000)


def exit_fast(status: int) -> NoReturn:
    """End this process, when all is done, without taking its modules apart one by one.

    That takes PyTorch's a second of the quick recipe's 25. What `atexit` is to do is done.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(status)  # the usual way: Python says what could not be written
    os._exit(status)


def describe() -> dict[str, Any]:
    """Processor, cores, system and Python, and the commit of the checkout that ran (None outside
    one)."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "system": platform.system(),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def cache_folder() -> Path:
    """Where what need not be fetched or compiled twice is kept: `lockstep` in $XDG_CACHE_HOME, or
    in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lockstep"


def source_digest(backend: str) -> str:
    """SHA-256, hexadecimal, of the code that a run of `backend` depends on: its folder and what
    trains and feeds it."""
    root = Path(__file__).resolve().parents[2]
    shared = [path for pattern in SOURCE_FILES for path in sorted((root / "common").glob(pattern))]
    digest = hashlib.sha256()
    for path in [*shared, *sorted((root / "backends" / f"{backend}_backend").rglob("*.py"))]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = [
            "git",
            "-C",
            str(root),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=12",
            "--exclude=*",
        ]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
