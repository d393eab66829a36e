"""Mutation testing: each decision of a module is changed, one at a time, and the fast tests of that
module have to fail.

`PYTHONPATH=.package python -m tests.robustness.mutants common/verdict/statistics.py --tests
tests/verdict/test_statistics.py` prints a line for each mutant that the tests pass, and exits with
1 if there is one. `--lines 150-220` takes part of a file. The file is changed on disk and written
back at the end, also after Ctrl-C; run it in a clean checkout, in which nobody else works.
"""

from __future__ import annotations

import argparse
import ast
import copy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 300.0  # seconds for the tests of one mutant; one that never ends is killed, and counts
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}


@dataclass(frozen=True)
class Mutant:
    line: int
    change: str  # in words
    source: str  # of the whole file


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may take the place of a node, with a description."""
    changed = copy.deepcopy(node)
    if isinstance(changed, ast.Compare) and type(changed.ops[0]) in COMPARISONS:
        changed.ops[0] = COMPARISONS[type(changed.ops[0])]()
        yield f"{ast.unparse(node)} -> {ast.unparse(changed)}", changed
    elif isinstance(changed, ast.BoolOp):
        changed.op = ast.And() if isinstance(changed.op, ast.Or) else ast.Or()
        yield f"{ast.unparse(node)} -> {ast.unparse(changed)}", changed
    elif isinstance(changed, ast.BinOp) and type(changed.op) in OPERATORS:
        changed.op = OPERATORS[type(changed.op)]()
        yield f"{ast.unparse(node)} -> {ast.unparse(changed)}", changed
    elif isinstance(changed, ast.Name) and changed.id in NAMES:
        changed.id = NAMES[changed.id]
        yield f"{ast.unparse(node)} -> {changed.id}", changed
    elif isinstance(changed, ast.Constant) and isinstance(value := changed.value, int | float):
        other = not value if isinstance(value, bool) else 1.5 * value if value else 1
        changed.value = other
        yield f"{value} -> {other}", changed
    elif isinstance(changed, ast.Return) and changed.value is not None:
        changed.value = ast.Constant(None)
        yield f"{ast.unparse(node)} -> return None", changed


class Replace(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def mutants(source: str, lines: range | None = None) -> Iterator[Mutant]:
    """All mutants of a file, in the order of its lines; imports, annotations and docstrings are left
    alone."""
    places = [
        (node.lineno, index)
        for index, node in enumerate(ast.walk(ast.parse(source)))
        if isinstance(node, (ast.expr, ast.stmt)) and (lines is None or node.lineno in lines)
    ]
    for line, index in sorted(places):
        tree = ast.parse(source)
        node = list(ast.walk(tree))[index]
        for change, new in changes(node):
            mutated = Replace(node, ast.copy_location(new, node)).visit(tree)
            yield Mutant(line, change, ast.unparse(ast.fix_missing_locations(mutated)))
            tree = ast.parse(source)
            node = list(ast.walk(tree))[index]


def survives(tests: list[str]) -> bool:
    """Whether the tests pass; of a mutant, they should not."""
    command = [sys.executable, "-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def survivors(path: Path, tests: list[str], lines: range | None = None) -> Iterator[Mutant]:
    """The mutants that the tests pass, as they are found; the file is written back at the end.

    Raises:
        ValueError: if the tests fail without any change.
    """
    if not survives(tests):
        raise ValueError(f"the tests fail without a change: {' '.join(tests)}")
    source = path.read_text()
    try:
        for mutant in mutants(source, lines):
            path.write_text(mutant.source)
            if survives(tests):
                yield mutant
    finally:
        path.write_text(source)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--tests", nargs="+", required=True, help="what pytest is given")
    parser.add_argument("--lines", help="as 150-220: of these lines only")
    options = parser.parse_args(arguments)
    lines = None
    if options.lines is not None:
        first, _, last = options.lines.partition("-")
        lines = range(int(first), int(last or first) + 1)
    count = 0
    for mutant in survivors(options.path, options.tests, lines):
        count += 1
        print(f"{options.path}:{mutant.line}: {mutant.change}", flush=True)
    total = sum(1 for _ in mutants(options.path.read_text(), lines))
    print(f"{count} of {total} mutants survive")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
