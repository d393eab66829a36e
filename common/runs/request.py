"""run.json: the options a run was started with, for --resume."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.common.config import BACKENDS, DTYPES, MAX_COUNT, Config
from lockstep.common.errors import ConfigError, RecordError
from lockstep.common.recipes import RECIPES, Recipe
from lockstep.common.request import MAX_PROCESSES, Request
from lockstep.common.system.storage import JsonObject, write_atomic

if TYPE_CHECKING:
    from lockstep.common.runs.trainer import Trainer

SCHEMA = 1
FILE = "run.json"
MAX_BYTES = 2**20


@dataclass(frozen=True)
class RunRequest:
    """The options that decide a run's numbers, and the runs they are compared with."""

    recipe: str  # a name in RECIPES
    config: JsonObject  # Config.to_json() of the resolved run
    dtypes: tuple[str, ...]
    twins: int
    backend: str  # "both", "torch" or "flax"
    data: str  # the option --data
    digest: str  # of the data
    device: str  # the option --device
    compile: str  # the option --compile
    checkpoint_every: int  # steps; 0: only where the run is stopped
    weights: str | None  # the option --weights
    processes: int = 1  # the option --processes

    def to_recipe(self) -> Recipe:
        """The recipe that is trained."""
        return Recipe(
            RECIPES[self.recipe].summary, Config.from_json(self.config), self.dtypes, self.twins
        )


def of(request: Request, trainer: Trainer) -> RunRequest:
    """The request of a run, as --resume needs it."""
    return RunRequest(
        recipe=request.recipe,
        config=trainer.config.to_json(),
        dtypes=request.dtypes,
        twins=request.twins,
        backend="both" if request.backends == BACKENDS else request.backends[0],
        data=request.data,
        digest=trainer.dataset.digest,
        device=request.device,
        compile=request.compile,
        checkpoint_every=trainer.checkpoint_every,
        weights=None if request.weights is None else str(request.weights.absolute()),
        processes=request.processes,
    )


def write(request: RunRequest, folder: Path) -> None:
    """Keep `request` in the run's folder, whole or not at all.

    Raises:
        RecordError: if the folder cannot be written.
    """
    facts = {"schema": SCHEMA} | dataclasses.asdict(request)
    text = json.dumps(facts | {"sha256": _digest(facts)}, indent=1, sort_keys=True) + "\n"
    write_atomic(folder / FILE, text.encode())


def read(folder: Path) -> RunRequest:
    """The request that started the run in `folder`, checked.

    Raises:
        RecordError: if there is none, or it is damaged, or of another version.
    """
    path, hint = folder / FILE, "start the run again"
    if not os.path.isfile(path):  # `path.is_file()` raises if the name is too long
        raise RecordError(
            f"{folder} holds no run ({FILE} is missing): name the folder of a run, or start one"
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        facts = json.loads(path.read_bytes())
        if facts.pop("schema") != SCHEMA:
            raise RecordError(f"{path} is of another version of Lockstep: {hint}")
        if facts.pop("sha256") != _digest({"schema": SCHEMA} | facts):
            raise RecordError(f"{path} is damaged (its digest does not match): {hint}")
        request = RunRequest(**facts | {"dtypes": tuple(facts["dtypes"])})
        problem = _problem(request)
    except (
        ConfigError,
        OSError,
        RecursionError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        problem = type(error).__name__
    if problem:
        raise RecordError(f"{path} cannot be used ({problem}): {hint}")
    return request


def _problem(request: RunRequest) -> str | None:
    """The first problem of a request; None if there is none."""
    Config.from_json(request.config)
    texts = (
        request.data,
        request.digest,
        request.device,
        request.compile,
        request.recipe,
        request.backend,
        request.weights or "",
    )
    wrong = {
        "types": not all(isinstance(text, str) for text in texts),
        "recipe": request.recipe not in RECIPES,
        "dtypes": not request.dtypes
        or not set(request.dtypes) <= set(DTYPES)
        or len(set(request.dtypes)) < len(request.dtypes),
        "twins": type(request.twins) is not int or not 0 <= request.twins <= MAX_COUNT,
        "backend": request.backend not in ("both", *BACKENDS),
        "device": request.device not in ("auto", "cpu", "cuda"),
        "compile": request.compile not in ("auto", "on", "off"),
        "processes": type(request.processes) is not int
        or not 1 <= request.processes <= MAX_PROCESSES,
        "checkpoint_every": type(request.checkpoint_every) is not int
        or request.checkpoint_every < 0,
    }
    return next((name for name, applies in wrong.items() if applies), None)


def _digest(facts: JsonObject) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
