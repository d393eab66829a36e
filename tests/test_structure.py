"""The house: who imports whom, how soon --help answers, and whether the two backends still mirror
each other."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = ("torch", "torchvision", "jax", "jaxlib", "flax", "optax")
FOLDERS = ("torch_backend", "flax_backend")
FILES = (
    "__init__.py",
    "activations.py",
    "backend.py",
    "compiled.py",
    "convert.py",
    "device.py",
    "inputs.py",
    "kernels.py",
    "layers.py",
    "losses.py",
    "models/net.py",
    "optimizer.py",
    "recorder.py",
    "state.py",
    "tuning.py",
    "user_module.py",
    "weight_files.py",
)
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "backends",
    "common",
    "tests",
    "compare.py",
    "results",
}

# Imports modules, or every module of a package, or runs a script, and prints what has been imported
# at the end.
PROBE = """
import contextlib, importlib, io, pkgutil, runpy, sys
kind, name = sys.argv[1:3]
with contextlib.redirect_stdout(io.StringIO()):
    if kind == "help":
        sys.argv = [name, "--help"]
        with contextlib.suppress(SystemExit):
            runpy.run_path(name, run_name="__main__")
    else:
        module = importlib.import_module(name)
        if kind == "package":
            for found in pkgutil.walk_packages(module.__path__, name + "."):
                importlib.import_module(found.name)
print(*sys.modules)
"""


def imported(kind: str, name: str, folder: Path = ROOT) -> set[str]:
    """The modules that a new process holds after it has imported `name` or shown its help."""
    command = [sys.executable, "-c", PROBE, kind, name]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())


def module_names(file: Path) -> set[str]:
    """All modules that a file imports anywhere, inside functions too; relative ones with their
    leading dots."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def reaches(names: Iterable[str], *packages: str) -> set[str]:
    """Those of `names` that lie in one of `packages`."""
    return {name for name in names if any(name == p or name.startswith(p + ".") for p in packages)}


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def tracked() -> list[str]:
    try:
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        listed = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError):
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    return [name for name in listed.split("\0") if name]


# --- Who imports whom


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("module", "lockstep"),
        ("module", "lockstep.cli"),
        ("package", "lockstep.common"),
        ("module", "lockstep.backends.weight_files"),
    ],
)
def test_no_framework_is_imported_before_it_is_asked_for(kind: str, name: str) -> None:
    modules = imported(kind, name)
    assert name in modules
    assert not reaches(modules, *FRAMEWORKS)


def test_every_module_of_common_was_among_them() -> None:
    expected = {
        ".".join(("lockstep", *file.relative_to(ROOT).with_suffix("").parts))
        for file in sources(ROOT / "common")
        if file.parent.name != "api"
    }
    expected = {name.removesuffix(".__init__") for name in expected}
    assert expected <= imported("package", "lockstep.common")


def test_help_imports_nothing_that_is_slow() -> None:
    modules = imported("help", "compare.py")
    assert "argparse" in modules
    assert not reaches(
        modules,
        *FRAMEWORKS,
        "rich",
        "matplotlib",
        "numpy",
        "scipy",
        "sklearn",
        "PIL",
        "safetensors",
    )


@pytest.mark.parametrize(
    ("name", "own", "foreign"),
    [
        ("lockstep.backends.torch_backend.backend", ("torch",), ("jax", "jaxlib", "flax", "optax")),
        (
            "lockstep.backends.flax_backend.backend",
            ("jax", "flax", "optax"),
            ("torch", "torchvision"),
        ),
    ],
    ids=["torch", "flax"],
)
def test_a_backend_imports_its_own_framework_and_not_the_others(
    name: str, own: tuple[str, ...], foreign: tuple[str, ...]
) -> None:
    modules = imported("module", name)
    assert set(own) <= modules
    assert not reaches(modules, *foreign)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\n", True),
        ("from torch import nn\n", True),
        ("def late():\n    import torch\n", False),
    ],
    ids=["import", "from", "inside a function"],
)
@pytest.mark.parametrize("kind", ["module", "package", "help"])
def test_the_proof_fails_where_a_framework_is_imported(
    tmp_path: Path, kind: str, source: str, found: bool
) -> None:
    """On a made package, with a made `torch`: what is imported inside a function is not imported
    yet."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    (tmp_path / "torch" / "nn.py").write_text("")
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").write_text(source if kind == "module" else "")
    (tmp_path / "house" / "cellar.py").write_text(source)
    name = "house/cellar.py" if kind == "help" else "house"
    assert bool(reaches(imported(kind, name, tmp_path), *FRAMEWORKS)) == found
    # The walk over the source finds both.
    assert reaches(module_names(tmp_path / "house" / "cellar.py"), "torch")


def test_the_walk_over_the_source_sees_every_way_to_import(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "import a.b as c\nfrom lockstep.backends import flax_backend\nfrom .. import d\nfrom ..e import f\n"
    )
    assert module_names(file) == {
        "a.b",
        "lockstep.backends",
        "lockstep.backends.flax_backend",
        "..",
        "...d",
        "..e",
        "..e.f",
    }
    assert reaches(module_names(file), "lockstep.backends.flax_backend") == {
        "lockstep.backends.flax_backend"
    }
    assert not reaches({"torchlike", "flaxen.a"}, "torch", "flax")


@pytest.mark.parametrize(
    "file",
    [f for f in sources(ROOT / "common") if f.parent.name != "api"],
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_common_imports_no_backend_and_no_framework_but_torchvision_to_fetch_cifar10(
    file: Path,
) -> None:
    names = module_names(file)
    assert not reaches(
        names, "lockstep.backends", "lockstep.cli", "torch", "jax", "jaxlib", "flax", "optax"
    )
    assert not any(name.startswith("..") for name in names), "imports are absolute"
    if file.name != "cifar10.py":
        assert not reaches(names, "torchvision")


@pytest.mark.parametrize(("folder", "other"), [FOLDERS, FOLDERS[::-1]], ids=FOLDERS)
def test_the_two_backends_never_import_each_other_nor_each_others_framework(
    folder: str, other: str
) -> None:
    foreign = {
        "torch_backend": ("jax", "jaxlib", "flax", "optax"),
        "flax_backend": ("torch", "torchvision"),
    }[folder]
    for file in sources(ROOT / "backends" / folder):
        names = module_names(file)
        assert not reaches(names, f"lockstep.backends.{other}", "lockstep.cli", *foreign), file
        assert not any(name.startswith("..") for name in names), "imports are absolute"


def processor_seconds(*command: str, times: int = 5) -> float:
    """What a command takes of the processor; the least of several, since other tests run at the same
    time."""

    def taken() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command_line = [sys.executable, *command]
        subprocess.run(command_line, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(taken() for _ in range(times))


@pytest.fixture(scope="module")
def most_seconds() -> float:
    """Three tenths of the time to import JAX, which a slow processor takes longer for, too."""
    return 0.3 * processor_seconds("-c", "import jax")


@pytest.mark.parametrize("command", [(), ("run",), ("faults",)], ids=lambda words: " ".join(words))
def test_help_imports_little(command: tuple[str, ...], most_seconds: float) -> None:
    # Measured: 0.12 to 0.17 of the time to import JAX.
    assert processor_seconds("compare.py", *command, "--help") <= most_seconds


def test_the_time_of_help_sees_an_import_that_is_slow(most_seconds: float) -> None:
    # Measured: 0.8 to 1.0 of that time.
    assert processor_seconds("-c", "import matplotlib.pyplot", times=1) > most_seconds


# --- The mirrors


def public(body: Iterable[ast.stmt]) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def methods(source: str, name: str) -> list[str]:
    [found] = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name]
    return [node.name for node in found.body if isinstance(node, ast.FunctionDef)]


def in_both(one: list[str], other: list[str]) -> tuple[list[str], list[str]]:
    """What stands in both lists, in the order of each."""
    return [name for name in one if name in other], [name for name in other if name in one]


def sections(source: str) -> list[str]:
    return [line.strip() for line in source.splitlines() if line.strip().startswith("# --- ")]


def files_of(folder: str) -> list[str]:
    """The sources of one backend, as paths below its folder."""
    root = ROOT / "backends" / folder
    return [str(file.relative_to(root)) for file in sources(root)]


def mirrored(file: str) -> tuple[str, str]:
    one, other = (
        (ROOT / "backends" / folder / file).read_text(encoding="utf-8") for folder in FOLDERS
    )
    return one, other


def test_the_two_backend_folders_hold_the_same_files() -> None:
    one, other = (set(files_of(folder)) for folder in FOLDERS)
    assert one == other
    assert set(FILES) <= one


@pytest.mark.parametrize("file", files_of(FOLDERS[0]))
def test_what_both_mirrors_define_stands_in_the_same_order(file: str) -> None:
    torch, flax = (public(ast.parse(source).body) for source in mirrored(file))
    # The two classes are partners under names of their own.
    one, other = in_both(
        [name.replace("TorchBackend", "Backend") for name in torch],
        [name.replace("FlaxBackend", "Backend") for name in flax],
    )
    assert one == other
    assert one or file.endswith(("__init__.py", "backend.py")), "mirrors with nothing in common"


def test_the_methods_and_sections_of_both_backends_stand_in_the_same_order() -> None:
    torch, flax = mirrored("backend.py")
    one, other = in_both(methods(torch, "TorchBackend"), methods(flax, "FlaxBackend"))
    assert one == other
    protocol = methods((ROOT / "common" / "protocol.py").read_text(encoding="utf-8"), "Backend")
    assert {"__init__", *protocol} <= set(one)
    own = {"In and out of PyTorch's layout": "In and out of JAX's layout"}
    assert [
        own.get(s.removeprefix("# --- "), s.removeprefix("# --- ")) for s in sections(torch)
    ] == [s.removeprefix("# --- ") for s in sections(flax)]


def test_the_comparison_of_orders_sees_two_functions_that_changed_places() -> None:
    source = "def a(): ...\ndef _hidden(): ...\nclass B: ...\ndef c(): ...\n"
    swapped = "class B: ...\ndef a(): ...\ndef only_here(): ...\ndef c(): ...\n"
    one, other = in_both(*(public(ast.parse(text).body) for text in (source, swapped)))
    assert (one, other) == (["a", "B", "c"], ["B", "a", "c"])


# --- State


def state_writes(source: str) -> list[str]:
    """Where functions write module-level state: a `global` statement, or a module of this project
    to whose attribute something is assigned."""
    tree = ast.parse(source)
    modules: set[str] = set()  # names that are modules of this project, or may be
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lockstep"):
            modules |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {
                alias.asname or "lockstep" for alias in node.names if alias.name[:8] == "lockstep"
            }
    written = []
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                written += node.names
                continue
            target = None
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)):
                target = node
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                target = node.args[0]
            if target is not None and ast.unparse(target).partition(".")[0] in modules:
                written.append(ast.unparse(node))
    return sorted(set(written))


@pytest.mark.parametrize(
    "file",
    sources(ROOT / "common") + sources(ROOT / "backends"),
    ids=lambda file: str(file.relative_to(ROOT)),
)
def test_no_function_writes_module_level_state(file: Path) -> None:
    assert state_writes(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("body", "written"),
    [
        ("global count\n    count = 1", ["count"]),
        ("environment.sharing = 2", ["environment.sharing"]),
        ("environment.count += 1", ["environment.count"]),
        ("short.x, y = 1, 2", ["short.x"]),
        ("lockstep.cli.main = None", ["lockstep.cli.main"]),
        ("setattr(environment, 'cores', None)", ["setattr(environment, 'cores', None)"]),
        ("del environment.cores", ["environment.cores"]),
        ("count = environment.cores()", []),
        ("self.environment = 1\n    os.environ['A'] = 'b'", []),
    ],
)
def test_the_search_for_module_level_state_sees_every_way_to_write_it(
    body: str, written: list[str]
) -> None:
    imports = (
        "import os, lockstep.cli, lockstep.common.config as short\n"
        "from lockstep.common.system import environment\n"
    )
    assert state_writes(f"{imports}def f(self):\n    {body}\n") == written
    assert state_writes(f"{imports}if True:\n    environment.cores = 1\n") == []


# --- The top level


def packages(folder: Path, *tops: str) -> set[str]:
    """The packages that lie in `tops`, by dotted name."""
    found = (
        file.parent.relative_to(folder)
        for top in tops
        for file in (folder / top).rglob("__init__.py")
    )
    return {".".join(path.parts) for path in found}


def installed_name(folder: str) -> str:
    """The dotted name under which a package of the checkout is installed."""
    return "lockstep" if folder == "common.api" else f"lockstep.{folder}"


def test_what_is_installed_is_every_package_there_is() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    listed = settings["packages"]
    assert "py-modules" not in settings
    assert sorted(listed) == sorted(map(installed_name, packages(ROOT, "common", "backends")))
    for file in sources(ROOT / "common") + sources(ROOT / "backends"):
        assert installed_name(".".join(file.parent.relative_to(ROOT).parts)) in listed, file


def test_the_list_of_packages_sees_one_that_is_missing(tmp_path: Path) -> None:
    for name in ("a", "a/b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    assert packages(tmp_path, "a") == {"a", "a.b"}
    assert packages(tmp_path, "a", "c") == {"a", "a.b", "c"}


def test_nothing_stands_at_the_top_level_but_what_belongs_there() -> None:
    top = {name.partition("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL
    assert {"pyproject.toml", "LICENSE", "backends", "common", "tests", "compare.py"} <= top
