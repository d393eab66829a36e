"""The recordings of one script in one folder: a run in each precision, and its twins."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from lockstep.common.errors import RecordError
from lockstep.common.recorder import recording
from lockstep.common.recorder.recording import Recording
from lockstep.common.recorder.settings import OWN

PRECISIONS = ("float64", OWN)  # in the order in which they are compared
AGAIN = 0  # the number of the twin that nothing is moved in
FILE = re.compile(r"(float64|own)(?:-again|-twin[1-9]\d*)?\.safetensors")


@dataclass(frozen=True)
class ScriptRuns:
    """One script in one precision: its run and its twins."""

    run: Recording
    twins: tuple[Recording, ...] = ()
    replicate: Recording | None = None  # the same run again, with nothing moved

    @property
    def records(self) -> list[Recording]:
        """The run, then its twins."""
        return [self.run, *self.twins]

    def add(self, recordings: list[Recording]) -> ScriptRuns:
        """With these twins, too, and the replicate, if it is among them."""
        replicate = next((r for r in recordings if r.twin == AGAIN), self.replicate)
        moved = [r for r in recordings if r.twin]
        return replace(self, twins=(*self.twins, *moved), replicate=replicate)


def file_name(precision: str, twin: int | None) -> str:
    """ "float64.safetensors", "own-twin1.safetensors"."""
    suffix = "" if twin is None else "-again" if twin == AGAIN else f"-twin{twin}"
    return f"{precision}{suffix}.safetensors"


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
    found: dict[str, ScriptRuns] = {}
    for precision in PRECISIONS:
        path = folder / file_name(precision, None)
        if not path.is_file():
            continue
        runs = ScriptRuns(recording.read(path))
        names = (path.name for path in folder.glob(f"{precision}-*.safetensors"))
        for name in sorted((n for n in names if FILE.fullmatch(n)), key=lambda n: (len(n), n)):
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


def check_same_script(one: Recording, other: Recording, folder: Path) -> None:
    """Raise RecordError if one folder's recordings are of two scripts, or of two versions."""
    if (one.source, one.arguments) != (other.source, other.arguments):
        raise RecordError(
            f"{folder} holds recordings of two versions of {one.name}, or with other arguments: "
            "record the script again"
        )
