"""`Request`, a comparison that is asked for, and `Result`, its outcome."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.common.config import BACKENDS, DTYPES, Config
from lockstep.common.errors import ConfigError
from lockstep.common.model import pair as pairs
from lockstep.common.recipes import recipe_named

if TYPE_CHECKING:
    from lockstep.common.report.json import LocationJson, ReportJson
    from lockstep.common.runs.rank_group import StartRanks
    from lockstep.common.runs.request import RunRequest


MAX_PROCESSES = 1024


@dataclass(frozen=True)
class Request:
    """A comparison that is asked for: the run, the precisions, the folder of the reports."""

    config: Config
    dtypes: tuple[str, ...] = ("float64", "float32")
    twins: int = 2  # per backend, in every precision but float64
    backends: tuple[str, ...] = BACKENDS  # which to train
    recipe: str = "quick"  # the name in RECIPES that it started from, for the report
    data: str = "auto"  # as the option --data
    data_dir: Path | None = None
    device: str = "auto"  # auto, cpu or cuda
    compile: str = "auto"  # auto, on or off
    cluster: str | None = None  # the Dask scheduler whose workers train the twins
    processes: int = 1  # that train each run together
    start_ranks: StartRanks | None = None  # how these are started; None: here, by this process
    weights: Path | None = None  # the user's own initial weights
    out: Path | None = None  # None: a folder in results/runs
    resume: Path | None = None  # the folder of a run to resume; it is `out`, too
    resumed: RunRequest | None = None  # what that run was started with
    keep_going: bool = True  # train it all, even if the first float64 steps differ
    keep_records: bool = False  # use the folder's records, train only what is missing
    log_every: int = 0  # steps between log lines; 0: none
    checkpoint_every: int | None = None  # None: CHECKPOINT_EVERY in runs of LONG_RUN or more
    tensorboard: Path | None = None
    command: tuple[str, ...] = ()  # the arguments of the command line, for the report

    def __post_init__(self) -> None:
        if self.twins < 0 or (self.twins == 0 and self.dtypes != ("float64",)):
            raise ConfigError("--twins must be 1 or more: the bounds come from the twins")
        if not 1 <= self.processes <= MAX_PROCESSES:
            raise ConfigError(f"--processes must be between 1 and {MAX_PROCESSES}")
        if self.processes > 1 and self.cluster is not None:
            raise ConfigError("--cluster's workers train with one process: leave out --processes")
        for option, value in (
            ("--log-every", self.log_every),
            ("--checkpoint-every", self.checkpoint_every),
        ):
            if (value or 0) < 0:
                raise ConfigError(f"{option} must be 0 or more")


def make_request(
    config: Config | None = None,
    *,
    recipe: str = "quick",
    model: str | None = None,
    dtypes: Sequence[str] | None = None,
    twins: int | None = None,
    **settings: Any,
) -> Request:
    """A request that starts from a recipe.

    Args:
        config: in place of the recipe's.
        model: in place of the configuration's.
        dtypes, twins: None: the recipe's.
        settings: further fields of Request.

    Raises:
        ConfigError: if they describe no run.
    """
    base = recipe_named(recipe)
    dtypes = base.dtypes if dtypes is None else tuple(dtypes)
    if not dtypes or not set(dtypes) <= set(DTYPES):
        raise ConfigError(f"dtypes must be some of {', '.join(DTYPES)}")
    config = base.config if config is None else config
    if model is not None:
        config = dataclasses.replace(config, model=model, pair=pairs.source_digest(model))
    return Request(
        config=config,
        dtypes=dtypes,
        twins=base.twins if twins is None else twins,
        recipe=recipe,
        **settings,
    )


@dataclass(frozen=True)
class Result:
    """The outcome of a comparison. It is true if the runs agree."""

    report: ReportJson
    folder: Path  # with report.json, report.html and the records

    def __bool__(self) -> bool:
        return self.verdict == "agree"

    def __repr__(self) -> str:
        return f"{self.sentence} Report: {self.folder}"

    @property
    def verdict(self) -> str:
        """ "agree", "disagree", or "single": there was nothing to compare with."""
        return self.report["verdict"]

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        from lockstep.common.report import sentence

        return sentence(self.report)

    @property
    def interrupted_at(self) -> str | None:
        """Where the run was stopped, if it was."""
        return self.report.get("cut_short")

    @property
    def place(self) -> str | None:
        """Where the runs differ first: stage, step and tensor. None if they agree."""
        located = self._located()
        return located["message"] if located else None

    @property
    def causes(self) -> tuple[str, ...]:
        """Likely causes of the difference, the likeliest first."""
        located = self._located()
        return tuple(located["causes"]) if located else ()

    def _located(self) -> LocationJson | None:
        return next(
            (found["located"] for found in self.report["lenses"] if "located" in found), None
        )
