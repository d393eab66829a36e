"""The wheel: it adds `lockstep/` and nothing else, and works next to a user's own `common/`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OWN = "raise SystemExit('a module of the user was imported in place of Lockstep')\n"
PAIR = """
import torch
from flax import nnx
from common.sizes import WIDTH
from lockstep import Pair


class Port(nnx.Module):
    def __init__(self, classes, rngs):
        self.head = nnx.Linear(WIDTH, classes, rngs=rngs)

    def __call__(self, x):
        return self.head(x.mean((1, 2)))


class Original(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = torch.nn.Linear(WIDTH, classes)

    def forward(self, x):
        return self.head(x.mean((2, 3)))


PAIR = Pair(torch=Original, flax=Port)
"""


def strangers(names: list[str]) -> set[str]:
    """What a wheel would put into site-packages besides `lockstep` and its metadata."""
    tops = {name.partition("/")[0] for name in names}
    return {
        top
        for top in tops
        if top != "lockstep" and not re.fullmatch(r"lockstep-.*\.dist-info", top)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("common", "backends"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(sources)], check=True, timeout=300)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's contents, as pip would lay them into site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder with modules that have the names of the checkout's."""
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("")
    (tmp_path / "common" / "sizes.py").write_text("WIDTH = 3\n")
    (tmp_path / "backends").mkdir()
    (tmp_path / "backends" / "__init__.py").write_text(OWN)
    (tmp_path / "compare.py").write_text(OWN)
    (tmp_path / "networks.py").write_text(PAIR)
    return tmp_path


def run(installed: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_wheel_holds_lockstep_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert not strangers(names)
    assert {"lockstep/__init__.py", "lockstep/py.typed", "lockstep/cli.py"} <= set(names)
    assert "lockstep/common/report/templates/report.html.jinja" in names
    assert strangers([*names, "common/__init__.py"]) == {"common"}  # control


def test_importing_lockstep_imports_no_numpy_and_no_framework(
    installed: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, lockstep; print(lockstep.__version__, lockstep.__file__); print(*sys.modules)"
    )
    first, modules = run(installed, tmp_path, "-c", code).stdout.splitlines()
    assert str(installed) in first
    assert not {"numpy", "torch", "jax", "flax"} & set(modules.split())
    names = "for n in lockstep.__all__: getattr(lockstep, n)"
    assert run(installed, tmp_path, "-c", f"import lockstep\n{names}").returncode == 0


def test_the_command_works_next_to_modules_of_the_same_names(
    installed: Path, project: Path
) -> None:
    version = run(installed, project, "-m", "lockstep", "--version")
    assert re.fullmatch(r"lockstep \d+\.\d+\.\d+\n", version.stdout), version
    pair = ("pair", "networks.py:PAIR", "--data", "digits")
    found = run(installed, project, "-m", "lockstep", *pair)
    assert found.returncode == 0, found.stdout + found.stderr
    (project / "common" / "sizes.py").write_text("WIDTH = 4\n")  # control: it is the user's own
    assert run(installed, project, "-m", "lockstep", *pair).returncode == 2


def test_the_fixture_is_there_in_a_users_own_tests(installed: Path, project: Path) -> None:
    (project / "test_port.py").write_text("def test_it(same_run):\n    assert callable(same_run)\n")
    tests = ("-m", "pytest", "-q", "test_port.py")  # the entry point loads the plug-in
    assert "1 passed" in run(installed, project, *tests).stdout
    (project / "test_port.py").write_text("def test_it(same_runs): ...\n")  # control
    assert "1 error" in run(installed, project, *tests).stdout
