"""The wheel: it adds `lockstep/` and nothing else, and works next to a user's own `common/`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import lockstep

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
COMPARISON = """
import lockstep
config = lockstep.Config(steps=3, batch_size=8)
result = lockstep.compare(config, data="digits", dtypes=["float64"], out="run")
print(result.verdict, bool(result), result.place)
"""
BROKEN = """
from lockstep.backends import faults
data = lockstep.load_data("digits")
with faults.inject(faults.named("sum-for-mean"), config.resolve(len(data.train_images)), data):
    result = lockstep.compare(config, data="digits", dtypes=["float64"], out="broken")
print(result.verdict, bool(result), result.place)
"""


def strangers(names: list[str]) -> set[str]:
    """What stands at the top of site-packages besides `lockstep` and its metadata."""
    tops = {name.partition("/")[0] for name in names}
    return {
        top
        for top in tops
        if top != "lockstep" and not re.fullmatch(r"lockstep-.*\.dist-info", top)
    }


def entries(folder: Path) -> set[str]:
    """All files and folders below `folder`, without what Python compiles."""
    paths = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {path for path in paths if "__pycache__" not in path}


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


class Environment:
    """A virtual environment with the present one's libraries and the wheel."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        venv.create(folder, with_pip=False)
        self.programs = folder / "bin"
        self.python = self.programs / "python"
        self.site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        theirs = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        # A path only, so that an editable installation of the checkout does not come with it.
        (self.site / "libraries.pth").write_text("\n".join(theirs))
        before = entries(folder)
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "-q"]
        options = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
        subprocess.run([*command, *options, str(wheel)], check=True, timeout=300)
        self.added = entries(folder) - before

    def variables(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return kept | {"OMP_NUM_THREADS": "1", "VIRTUAL_ENV": str(self.programs.parent)}

    def run(self, folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `python` or `lockstep` of this environment in `folder`."""
        return subprocess.run(
            [str(self.programs / program), *arguments],
            cwd=folder,
            env=self.variables(),
            capture_output=True,
            text=True,
            timeout=300,
        )


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"), wheel)


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


# --- What is installed


def test_the_wheel_adds_lockstep_and_nothing_else(installed: Environment) -> None:
    added = installed.added
    site = str(installed.site.relative_to(installed.programs.parent))
    inside = [path.removeprefix(f"{site}/") for path in added if path.startswith(f"{site}/")]
    assert not strangers(inside)
    assert {path for path in added if not path.startswith(f"{site}/")} == {"bin/lockstep"}
    assert {"lockstep/__init__.py", "lockstep/py.typed", "lockstep/cli.py"} <= set(inside)
    assert "lockstep/common/report/templates/report.html.jinja" in inside
    [metadata] = {path.partition("/")[0] for path in inside if ".dist-info" in path}
    points = (installed.site / metadata / "entry_points.txt").read_text()
    assert "lockstep = lockstep.cli:run_and_exit" in points
    assert "lockstep = lockstep.common.pytest_plugin" in points
    assert strangers([*inside, "common/__init__.py"]) == {"common"}  # control


def test_importing_lockstep_imports_no_numpy_and_no_framework(
    installed: Environment, tmp_path: Path
) -> None:
    code = (
        "import sys, lockstep; print(lockstep.__version__, lockstep.__file__); print(*sys.modules)"
    )
    first, modules = installed.run(tmp_path, "python", "-c", code).stdout.splitlines()
    assert str(installed.site) in first
    assert not {"numpy", "torch", "jax", "flax"} & set(modules.split())
    names = "import lockstep\nfor n in lockstep.__all__: getattr(lockstep, n)"
    assert installed.run(tmp_path, "python", "-c", names).returncode == 0
    wrong = installed.run(tmp_path, "python", "-c", "import lockstep; lockstep.nothing")  # control
    assert "no attribute 'nothing'" in wrong.stderr


# --- Next to a user's own `common/`, `backends/` and `compare.py`


@pytest.mark.slow
def test_the_command_works_next_to_modules_of_the_same_names(
    installed: Environment, project: Path
) -> None:
    version = installed.run(project, "lockstep", "--version")
    assert version.stdout == f"lockstep {lockstep.__version__}\n", version
    assert installed.run(project, "python", "-m", "lockstep", "--version").stdout == version.stdout
    assert installed.run(project, "python", "compare.py").returncode == 1  # control: the user's own
    pair = ("pair", "networks.py:PAIR", "--data", "digits")
    found = installed.run(project, "lockstep", *pair)
    assert found.returncode == 0, found.stdout + found.stderr
    (project / "common" / "sizes.py").write_text("WIDTH = 4\n")  # control: it is the user's own
    assert installed.run(project, "lockstep", *pair).returncode == 2


def test_the_fixture_is_there_in_a_users_own_tests(installed: Environment, project: Path) -> None:
    (project / "test_port.py").write_text("def test_it(same_run):\n    assert callable(same_run)\n")
    tests = ("-m", "pytest", "-q", "test_port.py")  # the entry point loads the plug-in
    assert "1 passed" in installed.run(project, "python", *tests).stdout
    (project / "test_port.py").write_text("def test_it(same_runs): ...\n")  # control
    assert "1 error" in installed.run(project, "python", *tests).stdout


def test_pages_to_learn_from_need_a_checkout_and_say_so(
    installed: Environment, project: Path
) -> None:
    said = installed.run(project, "lockstep", "learn")
    assert said.returncode == 2 and said.stderr.count("\n") == 1, said
    assert said.stderr.startswith("error: learn shows the source files")
    assert "clone the repository" in said.stderr
    assert sorted(path.name for path in project.iterdir()) == [
        "backends",
        "common",
        "compare.py",
        "networks.py",
    ]


@pytest.mark.slow
def test_the_example_of_the_readme_passes(installed: Environment, project: Path) -> None:
    example = re.search(
        r"<!-- example -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    assert example is not None
    (project / "test_port.py").write_text(example[1])
    done = installed.run(project, "python", "-m", "pytest", "-q", "test_port.py")
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    other = 'replace(config, momentum=0.9 if name == "torch" else 0.8), 10,'
    broken = "from dataclasses import replace\n" + example[1].replace("config, 10,", other)
    (project / "test_port.py").write_text(broken)  # control
    done = installed.run(project, "python", "-m", "pytest", "-q", "test_port.py")
    assert "1 failed" in done.stdout and "the float64 runs diverge: update: step 1" in done.stdout


@pytest.mark.slow
def test_a_run_agrees(installed: Environment, project: Path) -> None:
    options = ("--data", "digits", "--dtype", "float64", "--steps", "4", "--out", "run")
    done = installed.run(project, "lockstep", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The two runs agree" in " ".join(done.stdout.split())
    assert json.loads((project / "run" / "report.json").read_text())["verdict"] == "agree"
    assert (project / "run" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are others here")
@pytest.mark.parametrize(
    ("typed", "named"),
    [(["lockstep"], "lockstep"), (["python", "-m", "lockstep"], "python -m lockstep")],
    ids=["lockstep", "python -m lockstep"],
)
def test_a_run_that_is_stopped_says_how_to_resume_it(
    installed: Environment, project: Path, typed: list[str], named: str
) -> None:
    """Each is the other's control: the name is that of the command that was typed."""
    options = ["--data", "digits", "--steps", "15000", "--batch-size", "4", "--dtype", "float64"]
    with subprocess.Popen(
        [str(installed.programs / typed[0]), *typed[1:], *options, "--out", "run"],
        cwd=project,
        env=installed.variables(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("Training torch float64"):
                process.send_signal(signal.SIGINT)
                break
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert said.splitlines()[-1].endswith(f"resume with: {named} --resume run"), said


@pytest.mark.slow
def test_python_compares_without_the_command_line(installed: Environment, project: Path) -> None:
    done = installed.run(project, "python", "-c", COMPARISON + BROKEN)
    agreed, broken = done.stdout.splitlines()
    assert agreed == "agree True None", done.stderr
    assert broken.startswith("disagree False loss: step 0: torch="), broken  # control
    assert (project / "run" / "report.html").exists()
