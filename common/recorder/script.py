"""A training script of the user's: a file, or a function of a file or a module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lockstep.common.errors import ScriptError

SYNTAX = "SCRIPT.py or MODULE:FUNCTION"


@dataclass(frozen=True)
class Script:
    """What is run: `path`, or `function` of `path` or `module`, called without arguments."""

    text: str  # as it was given
    path: Path | None = None
    module: str | None = None
    function: str | None = None

    @property
    def name(self) -> str:
        """For messages: "train.py", or "train:main" of "package.train:main"."""
        if self.path is not None:
            return self.path.name + (f":{self.function}" if self.function else "")
        return f"{str(self.module).rpartition('.')[2]}:{self.function}"

    @property
    def stem(self) -> str:
        """For names of folders."""
        stem = str(self.module).rpartition(".")[2] if self.path is None else self.path.stem
        return stem if self.function is None else f"{stem}-{self.function}"


def find(text: str) -> Script:
    """The script that `text` names. A module is not imported, and so not looked for, here.

    Raises:
        ScriptError: if there is no such file, or it is no Python.
    """
    path, function = Path(text), None
    if not path.exists() and ":" in text:
        place, _, function = text.rpartition(":")
        if not function.isidentifier():
            raise ScriptError(f"{text!r} names no function: give {SYNTAX}")
        if not place.endswith(".py"):
            if not all(part.isidentifier() for part in place.split(".")):
                raise ScriptError(f"{text!r} names no module: give {SYNTAX}")
            return Script(text, module=place, function=function)
        path = Path(place)
    if path.is_dir():
        raise ScriptError(f"{path} is a folder: give {SYNTAX}")
    if not path.is_file():
        raise ScriptError(f"there is no script {path}: give {SYNTAX}")
    check_python(path)
    return Script(text, path=path, function=function)


def check_python(path: Path) -> None:
    """Raise ScriptError if Python cannot read the file; asked before anything is started."""
    try:
        compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
    except OSError as error:
        raise ScriptError(f"{path} cannot be read ({error.strerror or error})") from error
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte
        line = getattr(error, "lineno", None)
        what = getattr(error, "msg", None) or str(error)
        place = f"line {line}: {what}" if line else what
        raise ScriptError(f"{path} is not Python ({place}): give {SYNTAX}") from error
