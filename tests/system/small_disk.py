"""Runs on a disk that fills and on one that becomes read-only.

    python -m tests.system.small_disk FOLDER BYTES OPTIONS REPORT

Mounts a disk of BYTES on FOLDER, so it needs mounts of its own (`unshare --map-root-user --mount`).
OPTIONS of `compare.py` are a list in JSON; what came of each run is written to REPORT, in JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lockstep import cli
from lockstep.common.runs import checkpoint
from tests.conftest import draw_nothing
from tests.robustness import kills
from tests.system.test_full_disk import sane


def mount(*words: str, on: Path) -> None:
    subprocess.run(["mount", *words, str(on)], check=True)


def a_disk_that_fills(disk: Path, options: list[str]) -> dict[str, Any]:
    full = disk / "full"
    found: dict[str, Any] = {"full": cli.main([*options, "--out", str(full)]), "left": sane(full)}
    mount("-o", "remount,size=100m", on=disk)
    found["full, resumed"] = cli.main(["--resume", str(full), "--quiet"])
    found["full, bits"] = kills.digests_in(full)
    return found


def a_folder_that_becomes_read_only(folder: Path, options: list[str]) -> dict[str, Any]:
    written: list[Path] = []
    complete = checkpoint.write

    def write(*arguments: Any) -> Path:
        written.append(complete(*arguments))
        if len(written) == 2:  # this folder only: the lock next to it is open for writing
            mount("--bind", str(written[-1].parent), on=written[-1].parent)
            mount("-o", "remount,bind,ro", on=written[-1].parent)
        return written[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write", write)
        status = cli.main([*options, "--out", str(folder)])
    found: dict[str, Any] = {"read-only": status, "read-only, kept": sane(folder)}
    subprocess.run(["umount", str(written[-1].parent)], check=True)
    found["read-only, resumed"] = cli.main(["--resume", str(folder), "--quiet"])
    found["read-only, bits"] = kills.digests_in(folder)
    return found


def main() -> None:
    disk, size, options, report = sys.argv[1:]
    mount("-t", "tmpfs", "-o", f"size={size}", "none", on=Path(disk))
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        found = a_disk_that_fills(Path(disk), json.loads(options))
        found |= a_folder_that_becomes_read_only(Path(disk, "read-only"), json.loads(options))
    Path(report).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
