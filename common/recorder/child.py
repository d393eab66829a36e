"""Runs a user's script so that it is recorded:
`python -P -m lockstep.common.recorder.child SETTINGS.json SCRIPT [arguments]`.

`launch` starts it. Standard input is a pipe that closes when the process that started this one is
gone; the script gets an empty standard input. Next to the settings, `outcome.json` says how the
script ended, and `steps` how many steps it has taken.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import NoReturn, TypedDict

from lockstep.common.errors import LockstepError, ScriptError, did_you_mean
from lockstep.common.recorder import run
from lockstep.common.recorder.script import Script, find
from lockstep.common.recorder.settings import VARIABLE, Settings, active
from lockstep.common.system import environment

OUTCOME = "outcome.json"
STEPS = "steps"
INTERVAL = 0.25  # seconds between two writings of the number of steps


class Outcome(TypedDict):
    """How a script ended."""

    status: int  # as the script's own exit status would be
    refusal: str | None  # of Lockstep, one line
    traceback: str  # as Python prints it; empty if the script did not crash


def main() -> NoReturn:
    path, text, *arguments = sys.argv[1:]
    os.environ[VARIABLE] = f"{os.getpid()}:{path}"
    settings = active()
    assert settings is not None
    folder = Path(path).parent
    prepare(settings)
    steps = os.open(folder / STEPS, os.O_CREAT | os.O_WRONLY, 0o600)
    threading.Thread(target=watch, args=(take_stdin(), steps), daemon=True).start()
    outcome = finish(lambda: execute(find(text), arguments))
    write_steps(steps)
    temporary = folder / f"{OUTCOME}.part"
    temporary.write_text(json.dumps(outcome), encoding="utf-8")
    temporary.replace(folder / OUTCOME)
    environment.exit_fast(outcome["status"])


def prepare(settings: Settings) -> None:
    """Set the precision of either framework, before the script imports it."""
    for stream in (sys.stdout, sys.stderr):  # a script that is killed has printed its last line
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)
    if settings.dtype == "float64":
        os.environ["JAX_ENABLE_X64"] = "1"
        sys.meta_path.insert(0, DefaultFloat64())


class DefaultFloat64(MetaPathFinder):
    """Makes float64 PyTorch's default dtype as soon as the script has imported PyTorch."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._wrap(spec)
        return spec

    @staticmethod
    def _wrap(spec: ModuleSpec) -> None:
        loader = spec.loader
        assert loader is not None
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            module.set_default_dtype(module.float64)

        vars(loader)["exec_module"] = exec_module


# --- The script


def execute(script: Script, arguments: list[str]) -> None:
    """Run the script as Python would: as `__main__`, with its own folder first in `sys.path`."""
    at = Path.cwd() if script.path is None else script.path.resolve().parent
    if not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(0, str(at))
    if script.function is not None:
        function_of(script, arguments)()
        return
    assert script.path is not None
    sys.argv = [str(script.path), *arguments]
    path = os.path.abspath(script.path)
    main = ModuleType("__main__")
    main.__file__ = path
    main.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main
    exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), main.__dict__)


def function_of(script: Script, arguments: list[str]) -> Callable[[], object]:
    """The function, of a module that is imported here.

    Raises:
        ScriptError: if there is no such module or function.
    """
    assert script.function is not None
    if script.path is not None:
        name = script.path.stem
        spec = importlib.util.spec_from_file_location(name, os.path.abspath(script.path))
        assert spec is not None and spec.loader is not None
        sys.argv = [str(script.path), *arguments]
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    else:
        assert script.module is not None
        sys.argv = [script.text, *arguments]
        try:
            module = importlib.import_module(script.module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{script.module}.".startswith(f"{error.name}."):
                raise  # the module is there, and imports one that is not
            raise ScriptError(
                f"there is no module {error.name} in {Path.cwd()} or on Python's path"
            ) from None
        sys.argv[0] = getattr(module, "__file__", None) or script.text
    found = getattr(module, script.function, None)
    if not callable(found):
        names = [name for name, value in vars(module).items() if callable(value)]
        hint = did_you_mean(script.function, names) if names else "it has none"
        raise ScriptError(f"{script.text}: there is no function {script.function} ({hint})")
    return found


def finish(execute: Callable[[], None]) -> Outcome:
    """Run `execute`, write the recording, wait for the script's threads, and say how it ended."""
    outcome = ended(execute)
    for thread in threading.enumerate():  # as Python does in the end
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    if outcome["status"] == 0 and outcome["refusal"] is None:
        outcome = ended(run.close)
    return outcome


def ended(function: Callable[[], None]) -> Outcome:
    try:
        function()
    except LockstepError as error:
        return {"status": 2, "refusal": f"{error}{line_of(error)}", "traceback": ""}
    except SystemExit as error:
        code = error.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
        return {"status": code or 0, "refusal": None, "traceback": ""}
    except BaseException as error:
        error.__traceback__ = without_own_frames(error.__traceback__)
        sys.excepthook(type(error), error, error.__traceback__)
        text = "".join(traceback.format_exception(error))
        return {"status": 1, "refusal": None, "traceback": text}
    return {"status": 0, "refusal": None, "traceback": ""}


def line_of(error: BaseException) -> str:
    """Where in the script an error of Lockstep was raised, in brackets."""
    lines = [
        f" ({os.path.basename(frame.f_code.co_filename)}:{line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if is_users(frame)
    ]
    return lines[-1] if lines else ""


def is_users(frame: FrameType) -> bool:
    """Whether a frame is in one of the user's own files."""
    file = frame.f_code.co_filename
    own = file == __file__ or str(frame.f_globals.get("__name__")).startswith("lockstep.")
    return not own and not file.startswith("<") and "site-packages" not in file


def without_own_frames(found: TracebackType | None) -> TracebackType | None:
    """The traceback from the script's own first frame on."""
    own = (__file__, "<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")
    while found is not None and (
        found.tb_frame.f_code.co_filename in own
        or found.tb_frame.f_code.co_filename == importlib.__file__
    ):
        found = found.tb_next
    return found


# --- The process that started this one


def take_stdin() -> int:
    """The pipe that was standard input, which is empty from now on."""
    pipe = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return pipe


def watch(pipe: int, steps: int) -> None:
    """Count the steps, until the other end of the pipe is closed: then end this process, and all
    that it started."""
    while True:
        if select.select([pipe], [], [], INTERVAL)[0] and not os.read(pipe, 1):
            os.killpg(0, signal.SIGKILL)
        write_steps(steps)


def write_steps(file: int) -> None:
    """Write how many steps the script has taken, in one call, so that no half of it is read."""
    with contextlib.suppress(OSError):  # a full disk: the recording itself will say so
        os.pwrite(file, b"%12d" % run.steps_taken(), 0)


if __name__ == "__main__":
    main()
