"""Compiled programs are kept on disk, for the user alone, and where that cannot be, all works
without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
from lockstep import backends
backends.load("flax")
import jax
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
print(jax.config.jax_compilation_cache_dir)
"""


def start(home: Path, **settings: str) -> str:
    """What a fresh process prints that compiles a program with its home there."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XDG_"))
    }
    environment |= {"HOME": str(home), **settings}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    process = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def programs(folder: Path) -> dict[str, int]:
    """The entries of a cache, and when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*-cache")}


@pytest.mark.skipif(os.name != "posix", reason="folders have other permissions here")
def test_a_program_is_compiled_once_and_kept_where_no_other_user_can_write(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "lockstep" / "jax"
    assert start(tmp_path) == str(folder)
    kept = programs(folder)
    assert kept and folder.stat().st_mode & 0o777 == 0o700
    start(tmp_path)
    assert programs(folder) == kept, "the second start compiled nothing"


@pytest.mark.slow
def test_a_folder_that_the_user_chose_is_used(tmp_path: Path) -> None:
    assert start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == str(
        tmp_path / "mine"
    )
    assert start(tmp_path, XDG_CACHE_HOME=str(tmp_path / "xdg")) == str(
        tmp_path / "xdg" / "lockstep" / "jax"
    )


def test_without_a_place_for_them_programs_are_compiled_each_time(tmp_path: Path) -> None:
    (tmp_path / ".cache").write_text("not a folder")
    assert start(tmp_path) == "None"
