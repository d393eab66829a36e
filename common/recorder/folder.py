"""The recordings of one script in one folder: a run in each precision, and its twins."""

from __future__ import annotations

import re
from pathlib import Path

from lockstep.common.errors import RecordError
from lockstep.common.recorder import recording
from lockstep.common.recorder.recording import Recording
from lockstep.common.recorder.settings import OWN
from lockstep.common.verdict.scripts import ScriptRuns

PRECISIONS = ("float64", OWN)  # in the order in which they are compared
AGAIN = 0  # the number of the twin that nothing is moved in
FILE = re.compile(r"(float64|own)(-from\d+)?(?:-again|-twin[1-9]\d*)?(?:-short)?\.safetensors")


def file_name(
    precision: str, twin: int | None, short: bool = False, replay: int | None = None
) -> str:
    """ "float64.safetensors", "own-twin1.safetensors", "float64-again-short.safetensors".

    Args:
        short: of a run that was ended after its first steps.
        replay: of one that was recorded from this step on: "float64-from105.safetensors".
    """
    suffix = "" if replay is None else f"-from{replay}"
    suffix += "" if twin is None else "-again" if twin == AGAIN else f"-twin{twin}"
    return f"{precision}{suffix}{'-short' if short else ''}.safetensors"


def remove(folder: Path, precision: str) -> None:
    """Remove the recordings of one precision, before new ones are made.

    Raises:
        RecordError: if they cannot be removed.
    """
    try:
        for path in folder.glob("*.safetensors"):
            found = FILE.fullmatch(path.name)
            if found and found[1] == precision:
                path.unlink()
                path.with_suffix(".log").unlink(missing_ok=True)
                for log in folder.glob(f"{path.stem}.rank*.log"):
                    log.unlink()
    except OSError as error:
        raise RecordError(
            f"cannot remove {error.filename} ({error.strerror}): choose another folder with --out"
        ) from error


def read(folder: Path) -> dict[str, ScriptRuns]:
    """The recordings in `folder`, by precision.

    Raises:
        RecordError: if there are none, one of them is damaged, or they are of several scripts.
    """
    if not folder.exists():
        raise RecordError(f"there is no folder {folder}: make it with record SCRIPT --out {folder}")
    if not folder.is_dir():
        raise RecordError(
            f"{folder} is a file: give the folder of its recordings; record SCRIPT --out DIR makes one"
        )
    found: dict[str, ScriptRuns] = {}
    for precision in PRECISIONS:
        path = folder / file_name(precision, None)
        if not path.is_file():
            continue
        runs = ScriptRuns.of([recording.read(path)])
        names = (path.name for path in folder.glob(f"{precision}-*.safetensors"))
        for name in sorted(filter(is_of_run, names), key=lambda n: (len(n), n)):
            twin = recording.read(folder / name)
            check_same_script(runs.run, twin, folder)
            runs = runs.add([twin])
        found[precision] = runs
    if not found:
        raise RecordError(
            f"{folder} holds no recording: make one with record SCRIPT --out {folder}"
        )
    first, *others = found.values()
    for other in others:
        check_same_script(first.run, other.run, folder)
    return found


def is_of_run(name: str) -> bool:
    """Whether a file is of a run from its first step on."""
    found = FILE.fullmatch(name)
    return found is not None and found[2] is None


def side_names(
    runs: tuple[dict[str, ScriptRuns], dict[str, ScriptRuns]], paths: tuple[Path, Path]
) -> tuple[str, str]:
    """What the two are called: as their scripts, or, if these are called alike, as the folders."""
    names = [next(iter(found.values())).run.name for found in runs]
    if names[0] != names[1]:
        return names[0], names[1]
    return (str(paths[0]), str(paths[1])) if paths[0] != paths[1] else ("A", "B")


def check_same_script(one: Recording, other: Recording, folder: Path) -> None:
    """Raise RecordError if one folder's recordings are of two scripts, or of two versions."""
    if (one.source, one.arguments) != (other.source, other.arguments):
        raise RecordError(
            f"{folder} holds recordings of two versions of {one.name}, or with other arguments: "
            "record the script again"
        )
