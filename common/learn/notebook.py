"""`lesson.ipynb`: the lesson to run and to change, and one comparison of the two backends.

Its cells are cut from the same programs and the same notes as `lesson.html`. The file is plain
JSON of nbformat 4.5; nothing is executed when it is made.
"""

from __future__ import annotations

import ast
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from lockstep.common.config import BACKENDS
from lockstep.common.learn.faults_report import FaultRow, FaultsReport
from lockstep.common.learn.lesson import FILES, LEFT_OUT, found_text
from lockstep.common.learn.lesson_text import SECTIONS, LessonNote, LessonSection
from lockstep.common.learn.sources import SETTINGS, SourceError
from lockstep.common.system.storage import write_atomic

Cell = Mapping[str, object]

BEGINNING = """\
# From PyTorch to JAX in ten minutes, as a notebook

The training of `backends/lesson/flax_train.py`, cell by cell, with PyTorch's code for each above it; at the end, the \
same training in PyTorch and a comparison of two runs. [lesson.html](lesson.html) has both programs next to each other.

Run it in a checkout of Lockstep (`pip install -e . notebook`). It trains on CIFAR-10 in `$LOCKSTEP_DATA`, or without \
that on scikit-learn's digits."""
PATH = 'sys.path.insert(0, "../../.package")  # for a bare checkout'
SAME_IN_PYTORCH = """\
## The same in PyTorch

The losses are not the same numbers: each framework draws initial weights of its own. From the same weights, in float64, \
the two agree within 1e-12, which a test checks."""
PYTORCH_RUN = """\
import torch

from lockstep.backends.lesson import torch_train

torch.manual_seed(SEED)
torch_losses = torch_train.train(torch_train.Net(len(dataset.classes)), dataset, steps=len(losses))
for name, values in (("PyTorch", torch_losses), ("JAX", losses)):
    print(f"{name}: mean loss of the last 500 steps {np.mean(values[-500:]):.3f}")"""
COMPARISON = """\
## One comparison

Lockstep's two backends train 20 steps from the same weights on the same batches, in float64. `same_run` compares all \
that they compute: losses, gradients, weights and predictions."""
COMPARE = """\
from dataclasses import replace

from lockstep import Config, load_backend, load_data, same_run

digits = load_data("digits")
config = Config(steps=20, batch_size=16, lr=0.01, momentum=0.9).resolve(len(digits.train_images))
original = load_backend("torch")(config, 10, "float64", "cpu")
port = load_backend("flax")(config, 10, "float64", "cpu")
comparison = same_run(original, port, digits, config)
print(comparison.verdict)"""
MISTAKE = """\
A port with a mistake: its momentum is 0.89. Lockstep names the first step, stage and tensor that differ, and likely \
causes."""
COMPARE_MISTAKE = """\
mistaken = load_backend("flax")(replace(config, momentum=0.89), 10, "float64", "cpu")
found = same_run(original, mistaken, digits, config)
print(found)"""


def write_lesson_notebook(
    path: Path,
    sources: Path,
    faults_report: FaultsReport,
    sections: Sequence[LessonSection] = SECTIONS,
) -> Path:
    """Write the notebook to `path`; equal sources and reports give equal bytes.

    Args:
        sources: the folder that holds `backends`.
        faults_report: `report.json` of the command `faults`.

    Raises:
        SourceError: if a program cannot be read, or lacks a definition of the lesson.
        RecordError: if the notebook cannot be written.
    """
    programs = {side: _Program(sources, file) for side, file in FILES.items()}
    rows = {row["name"]: row for row in faults_report["rows"]}
    cells = [_markdown(BEGINNING), _code(programs["flax"].setup())]
    number, defined = 1, set[str]()
    for section in sections:
        torch, flax = (_names(section, side) for side in BACKENDS)
        # What is the same in both programs stands in the lesson once, in PyTorch's column.
        same = [name for name in torch if name != SETTINGS and _same(programs, name)]
        quoted = [n for n in torch if n != SETTINGS and n not in same]
        text = f"## {section.title}\n\n{section.text}"
        if quoted:
            code = "\n\n".join(map(programs["torch"].code, quoted))
            text += f"\n\nIn PyTorch:\n\n```python\n{code}\n```"
        new = [name for name in dict.fromkeys([*same, *flax]) if name not in defined]
        defined |= {*new}
        notes = [_note(number + place, note, rows) for place, note in enumerate(section.notes)]
        number += len(notes)
        code = "\n\n\n".join(programs["flax"].code(name) for name in new)
        cells += [_markdown(text), _code(code), _markdown("\n\n".join(notes))]
    cells += [
        _markdown(SAME_IN_PYTORCH),
        _code(PYTORCH_RUN),
        _markdown(COMPARISON),
        _code(COMPARE),
        _markdown(MISTAKE),
        _code(COMPARE_MISTAKE),
    ]
    notebook = {
        "cells": [{"id": f"cell-{place}", **cell} for place, cell in enumerate(cells)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    write_atomic(path, (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode())
    return path


class _Program:
    """A program of the lesson, cut into pieces of source text."""

    def __init__(self, sources: Path, file: str) -> None:
        try:
            self._text = (sources / file).read_text(encoding="utf-8")
            body = ast.parse(self._text).body
        except (OSError, SyntaxError) as error:
            raise SourceError(
                f"the source {file} cannot be read ({type(error).__name__}): "
                "make the notebook from a checkout of the project"
            ) from error
        self.file = file
        self.definitions = {
            node.name: node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        self._main = next((node.body for node in body if isinstance(node, ast.If)), [])

    def setup(self) -> str:
        """What stands before the first definition: imports, and constants."""
        lines = self._text[: self._text.index("\n\n\n")].splitlines()
        lines = lines[lines.index("from __future__ import annotations") + 2 :]
        # The notebook knows its place in the checkout, and needs no path of its own file.
        kept = (line for line in lines if line != "from pathlib import Path")
        return "\n".join(PATH if LEFT_OUT in line else line for line in kept)

    def code(self, name: str) -> str:
        """A definition; for `SETTINGS`, what the program does when it is run."""
        if name == SETTINGS:
            return textwrap.dedent("\n".join(map(self._source, self._main)))
        if name not in self.definitions:
            raise SourceError(f"{self.file} has no {name}: change lesson_text.py")
        return self._source(self.definitions[name])

    def _source(self, node: ast.stmt) -> str:
        first = min([node.lineno, *(found.lineno for found in getattr(node, "decorator_list", []))])
        return "\n".join(self._text.splitlines()[first - 1 : node.end_lineno])


def _names(section: LessonSection, side: str) -> list[str]:
    """The definitions of a section; of a class and its methods, the class alone."""
    return list(dict.fromkeys(name.partition(".")[0] for name in section.names[side]))


def _same(programs: Mapping[str, _Program], name: str) -> bool:
    return all(name in program.definitions for program in programs.values()) and (
        programs["torch"].code(name) == programs["flax"].code(name)
    )


def _note(number: int, note: LessonNote, rows: Mapping[str, FaultRow]) -> str:
    text = f"**{number}. {note.title}.** {note.text}\n\n*If you miss it:* {note.missed}"
    if note.fault is None:
        return text
    return f"{text} Known fault `{note.fault}`: {found_text(note.fault, note.title, rows)}."


def _markdown(text: str) -> Cell:
    return {"cell_type": "markdown", "metadata": {}, "source": text.splitlines(keepends=True)}


def _code(text: str) -> Cell:
    return {
        "cell_type": "code",
        "execution_count": None,
        "metadata": {},
        "outputs": [],
        "source": text.splitlines(keepends=True),
    }
