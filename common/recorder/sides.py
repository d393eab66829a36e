"""The scripts of one command, what they are called, and how each run of them is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.common.errors import ConfigError
from lockstep.common.recorder.script import Script
from lockstep.common.recorder.settings import DEFAULT_LIMIT, OWN, Settings

if TYPE_CHECKING:
    from lockstep.common.recorder.launch import Start

BOTH = "both"
PRECISIONS = (BOTH, "float64", OWN)
OWN_TWINS = 2  # per script, in its own precision


@dataclass(frozen=True)
class RunOptions:
    """How each run of a script is made.

    Raises:
        ConfigError: if a number is out of range.
    """

    arguments: tuple[str, ...] = ()  # of the script
    steps: int | None = None  # end it after so many
    timeout: float | None = None  # seconds for one run
    seed: int = 0  # of twins and of `Run.random`
    record_limit: int = DEFAULT_LIMIT  # bytes of one recording
    precision: str = BOTH
    twins: int | None = None  # None: OWN_TWINS in the script's own precision, none in float64
    processes: int | None = None  # that run it together; None: one, without torchrun's variables

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"--precision must be one of {', '.join(PRECISIONS)}")
        for option, value, least in (
            ("--steps", self.steps, 1),
            ("--twins", self.twins, 0),
            ("--seed", self.seed, 0),
            ("--record-limit", self.record_limit, 0),
            ("--processes", self.processes, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{option} must be {least} or more")
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError("--timeout must be more than 0 seconds")

    @property
    def precisions(self) -> tuple[str, ...]:
        """In the order in which they are compared."""
        return ("float64", OWN) if self.precision == BOTH else (self.precision,)

    def twins_in(self, precision: str) -> int:
        return (OWN_TWINS if precision == OWN else 0) if self.twins is None else self.twins


@dataclass
class Side:
    """A script, what it is called, and the folder of its recordings."""

    script: Script
    name: str
    folder: Path
    start_from: dict[str, Path] = field(default_factory=dict)  # by precision: initial weights

    def start(
        self,
        options: RunOptions,
        precision: str,
        twin: int | None,
        steps: int | None = None,
        early: bool = False,
        replay: int | None = None,
        state: Path | None = None,
    ) -> Start:
        """One run to start.

        Args:
            steps: at most so many: a short run.
            early: its first steps are wanted as soon as they are done.
            replay: record from this step on, `steps` of them.
            state: a file of the state that the replay starts from; None: the script's own.
        """
        from lockstep.common.recorder import folder
        from lockstep.common.recorder.launch import Start

        short = steps is not None and replay is None
        last = None if steps is None else (replay or 0) + steps
        weights = self.start_from.get(precision)
        settings = Settings(
            out=str(self.folder / folder.file_name(precision, twin, short, replay)),
            name=self.name,
            dtype=precision,
            twin=twin,
            seed=options.seed,
            steps=options.steps if last is None else min(last, options.steps or last),
            limit=options.record_limit,
            start_from=None if weights is None else str(weights.absolute()),
            early=early,
            replay=replay,
            state=None if state is None else str(state.absolute()),
            processes=options.processes,
        )
        return Start(self.script, settings, options.arguments)


def two_sides(a: Script, b: Script, folder: Path) -> tuple[Side, Side]:
    """Both scripts, with names and folders that tell them apart."""
    names = (a.name, b.name)
    if a.name == b.name:
        names = (a.text, b.text) if a.text != b.text else (f"{a.name} (A)", f"{b.name} (B)")
    stems = (a.stem, b.stem) if a.stem != b.stem else (f"{a.stem}-a", f"{b.stem}-b")
    return Side(a, names[0], folder / stems[0]), Side(b, names[1], folder / stems[1])
