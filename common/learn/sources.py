"""The definitions of the two backends, read from their sources with `ast`.

A definition is named by file and name, `backend.py:Backend.train_step`; both backend classes are
called `Backend` here.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lockstep.common.errors import LockstepError

# below the repository's root
FOLDERS = {"torch": "backends/torch_backend", "flax": "backends/flax_backend"}
# called `Backend` in the names of definitions
CLASSES = {"torch": "TorchBackend", "flax": "FlaxBackend"}
FILES = (
    "backend.py",
    "state.py",
    "inputs.py",
    "losses.py",
    "device.py",
    "tuning.py",
    "compiled.py",
    "models/net.py",
    "models/mlp.py",
    "models/resnet20.py",
    "models/convnext.py",
    "models/vit.py",
    "layers.py",
    "kernels.py",
    "optimizer.py",
    "adaptive.py",
    "user_module.py",
    "convert.py",
    "activations.py",
    "weight_files.py",
)
SETTINGS = "settings"  # the name of a module's own statements, except imports


class SourceError(LockstepError):
    """The sources have changed, and the lesson has not."""


class Line(NamedTuple):
    """One line of a source; the lines of a definition lose their common indent."""

    number: int  # in its file, from 1
    text: str


@dataclass(frozen=True)
class Definition:
    """A function, a method, a class without its methods, or a module's own statements."""

    file: str  # below the root, as `backends/torch_backend/models/net.py`
    lines: tuple[Line, ...]

    @property
    def span(self) -> str:
        first, last = self.lines[0].number, self.lines[-1].number
        return f"line {first}" if first == last else f"lines {first} to {last}"


def definitions(source: str, file: str) -> dict[str, Definition]:
    """The definitions of one file by name; lines between them belong to none."""
    text = source.splitlines()
    found: dict[str, list[Line]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and (methods := _methods(node)):
            found[node.name] = _lines(text, _first(node), _first(methods[0]) - 1)
            found |= {
                f"{node.name}.{m.name}": _lines(text, _first(m), m.end_lineno or 0) for m in methods
            }
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = _lines(text, _first(node), node.end_lineno or 0)
        elif not isinstance(node, ast.Import | ast.ImportFrom) and not _is_docstring(node):
            first = node.lineno
            while text[first - 2].startswith("#") and not text[first - 2].startswith("# --- "):
                first -= 1
            found.setdefault(SETTINGS, []).extend(_lines(text, first, node.end_lineno or 0))
    return {name: Definition(file, tuple(lines)) for name, lines in found.items()}


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [child for child in node.body if isinstance(child, ast.FunctionDef)]


def _first(node: ast.FunctionDef | ast.ClassDef) -> int:
    """The line of a definition's first decorator, or of the definition itself."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _lines(text: Sequence[str], first: int, last: int) -> list[Line]:
    """Lines `first` to `last` without their common indent, blank lines and headings of sections."""
    lines = [Line(number, text[number - 1]) for number in range(first, last + 1)]
    lines = [
        line for line in lines if line.text.strip() and not line.text.strip().startswith("# --- ")
    ]
    margin = len(lines[0].text) - len(lines[0].text.lstrip())
    return [Line(line.number, line.text[margin:]) for line in lines]


def read_backends(root: Path) -> dict[str, dict[str, Definition]]:
    """The definitions of each side, by `file:name`.

    Raises:
        SourceError: if a source is missing or cannot be parsed.
    """
    return {
        side: {
            f"{name}:{_renamed(key, CLASSES[side])}": definition
            for name in FILES
            for key, definition in read_file(root, f"{folder}/{name}").items()
        }
        for side, folder in FOLDERS.items()
    }


def _renamed(name: str, cls: str) -> str:
    header, dot, rest = name.partition(".")
    return ("Backend" if header == cls else header) + dot + rest


def read_file(root: Path, file: str) -> dict[str, Definition]:
    try:
        return definitions((root / file).read_text(encoding="utf-8"), file)
    except OSError as error:
        raise SourceError(
            f"the source {file} cannot be read: make the page from a checkout of the project"
        ) from error
    except SyntaxError as error:
        raise SourceError(
            f"the source {file} cannot be parsed (line {error.lineno}): fix it first"
        ) from error


def header(definition: Definition) -> Line | None:
    """The line with the name of a definition; a module's own statements have none."""
    return next(
        (line for line in definition.lines if line.text.startswith(("def ", "class "))), None
    )


def find(definition: Definition, name: str, snippet: str, after: str = "") -> Line:
    """The one line of `definition` that holds `snippet`; with `after`, the first one below the one
    line that holds that text.

    Raises:
        SourceError: if none does, or more than one.
    """
    lines = [line for line in definition.lines if snippet in line.text]
    if after:
        above = find(definition, name, after).number
        lines = [line for line in lines if line.number > above][:1]
    if len(lines) != 1:
        times = "nowhere" if not lines else f"{len(lines)} times"
        raise SourceError(
            f"{definition.file}: {snippet!r} stands {times} in {name}: change the lesson"
        )
    return lines[0]
