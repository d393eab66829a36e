"""The command that was typed, for hints, usage and reports."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable

INSTALLED = ("lockstep",)
MODULE = ("python", "-m", "lockstep")
CHECKOUT = ("python", "compare.py")


def words() -> tuple[str, ...]:
    """The program as typed: `lockstep`, `python -m lockstep` or `python compare.py`.

    Inside any other program, such as pytest or a user's script, it is `lockstep`.
    """
    path = sys.argv[0] if sys.argv else ""
    name = os.path.basename(path)
    if name == "compare.py":
        return CHECKOUT
    if name == "__main__.py" and os.path.basename(os.path.dirname(path)) in ("lockstep", "api"):
        return MODULE
    return INSTALLED


def name() -> str:
    return " ".join(words())


def command(*arguments: object) -> str:
    """A command line that the user can copy, quoted for the shell."""
    return f"{name()} {shlex.join(map(str, arguments))}"


def typed(arguments: Iterable[str]) -> list[str]:
    """The whole command line, for `command` of a report."""
    return [*words(), *arguments]
