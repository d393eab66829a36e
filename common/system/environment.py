"""The machine that a run was made on, and this program's process there."""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NoReturn, TypedDict

# The files of `common` on which a run depends.
SOURCE_FILES = (
    "config.py",
    "dtypes.py",
    "protocol.py",
    "data/*.py",
    "model/initial_weights.py",
    "model/names.py",
    "model/pair.py",
    "model/perturb.py",
    "runs/chunks.py",
    "runs/training.py",
)

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of mallopt, from glibc's malloc.h


class Machine(TypedDict):
    processor: str
    cores: int
    system: str
    python: str
    commit: str | None  # of the checkout; None outside one


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def relax_gc() -> None:
    """Make Python's full garbage collection a hundred times rarer.

    Each one looks through the frameworks' own objects, which stay; results/bench/LOG.md has the
    measurements.
    """
    gc.set_threshold(*gc.get_threshold()[:2], 1_000)


def keep_memory() -> None:
    """Have the C library keep freed memory for the next step, where it can (glibc).

    By default it gives blocks of 32 MB and more back to the system, which clears each page at its
    next use. That takes up to a third of a step. Called before a framework starts its threads, which then
    share one heap: those of their own would be limited to 64 MB. results/bench/LOG.md has the
    measurements.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)


def exit_fast(status: int) -> NoReturn:
    """End this process without deleting its modules one by one, which takes PyTorch's a second.

    `atexit` functions are called.
    """
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(status)  # the usual way: Python reports what could not be written
    os._exit(status)


def describe() -> Machine:
    """The machine, for a report."""
    return {
        "processor": _processor(),
        "cores": cores(),
        "system": platform.system(),
        "python": platform.python_version(),
        "commit": _commit(),
    }


def cache_folder() -> Path:
    """The folder of downloads and compiled programs: `lockstep` in $XDG_CACHE_HOME, or in
    ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "lockstep"


def jax_cache() -> dict[str, str]:
    """The variables with which JAX caches compiled programs on disk; none if the user has chosen a
    folder, or there is no place for one: then programs are compiled each time.

    Whoever can write a program can have it run, so the folder is the user's alone.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return {}
    folder = cache_folder() / "jax"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return {}
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        # bytes; JAX removes the least recently used programs
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def source_digest(backend: str) -> str:
    """SHA-256, hexadecimal, of the code that a run of `backend` depends on: its folder and
    SOURCE_FILES."""
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
