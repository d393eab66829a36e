"""What a command of Lockstep asks of the script that it starts: one JSON file, named in the
environment."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

# "<process id>:<path of the settings>". The number keeps processes that the script starts itself,
# such as those of a data loader, from recording.
VARIABLE = "LOCKSTEP_RECORD"
OWN = "own"  # the precision that the script chooses itself
FIRST = ".first"  # after the name of a recording: its first steps alone
DEFAULT_LIMIT = 10**9  # bytes of one recording


@dataclass(frozen=True)
class Settings:
    """How one run of a script is recorded."""

    out: str  # the file to write
    name: str  # of the side, for messages: the script's file name
    dtype: str = OWN  # or "float64"
    twin: int | None = None  # 1, 2, ...: weights and batches are moved by an ulp
    seed: int = 0  # of the twins and of `Run.random`
    steps: int | None = None  # end the script after so many
    limit: int = DEFAULT_LIMIT
    start_from: str | None = None  # a file of weights by this script's own names
    replay: int | None = None  # record from this step on, as if the script began there
    state: str | None = None  # a file of the state that `Run.sync` then returns; None: its own
    early: bool = False  # write the first steps to "<out>.first" as soon as they are done
    processes: int | None = None  # that run the script together; None: one, which is told nothing
    rank: int = 0  # of this process; rank 0 writes the recording

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")


def active() -> Settings | None:
    """The settings of this process; None outside a command of Lockstep."""
    process, _, path = os.environ.get(VARIABLE, "").partition(":")
    if process != str(os.getpid()):
        return None
    return Settings(**json.loads(Path(path).read_text(encoding="utf-8")))
