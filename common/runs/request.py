"""`run.json`: what a run was asked for, for --resume."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.common.config import BACKENDS, DTYPES, MAX_COUNT, RECIPES, Config, Recipe
from lockstep.common.errors import ConfigError, RecordError
from lockstep.common.system.storage import write_atomic

SCHEMA = 1
FILE = "run.json"
MAX_BYTES = 2**20


@dataclass(frozen=True)
class Plan:
    """A run as it was begun: what decides its numbers, and what it was to be compared with."""

    recipe: str  # a name in RECIPES
    config: dict[str, Any]  # Config.to_json() of the resolved run
    dtypes: tuple[str, ...]
    twins: int
    backend: str  # "both", "torch" or "flax"
    data: str  # the option --data
    digest: str  # of the data
    device: str  # the option --device
    compile: str  # the option --compile
    checkpoint_every: int  # steps; 0: none but where the run is stopped
    weights: str | None  # the option --weights

    def restored(self) -> Recipe:
        """The recipe that was trained."""
        return Recipe(
            RECIPES[self.recipe].summary, Config.from_json(self.config), self.dtypes, self.twins
        )


def write(plan: Plan, folder: Path) -> None:
    """Keep `plan` in the run's folder, whole or not at all.

    Raises:
        RecordError: if the folder cannot be written.
    """
    facts = {"schema": SCHEMA} | dataclasses.asdict(plan)
    text = json.dumps(facts | {"sha256": _digest(facts)}, indent=1, sort_keys=True) + "\n"
    write_atomic(folder / FILE, text.encode())


def read(folder: Path) -> Plan:
    """The plan in the run's folder, checked.

    Raises:
        RecordError: if there is none, or it is damaged, or of another version.
    """
    path, remedy = folder / FILE, "start the run again"
    if not os.path.isfile(
        path
    ):  # unlike `path.is_file()`, without an error where the name is too long
        raise RecordError(
            f"{folder} holds no run ({FILE} is missing): name the folder of a run, or start one"
        )
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        facts = json.loads(path.read_bytes())
        if facts.pop("schema") != SCHEMA:
            raise RecordError(f"{path} is of another version of Lockstep: {remedy}")
        if facts.pop("sha256") != _digest({"schema": SCHEMA} | facts):
            raise RecordError(f"{path} is damaged (its digest does not match): {remedy}")
        plan = Plan(**facts | {"dtypes": tuple(facts["dtypes"])})
        problem = _problem(plan)
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
        raise RecordError(f"{path} cannot be used ({problem}): {remedy}")
    return plan


def _problem(plan: Plan) -> str | None:
    """What is wrong with it, if anything is."""
    Config.from_json(plan.config)
    texts = (
        plan.data,
        plan.digest,
        plan.device,
        plan.compile,
        plan.recipe,
        plan.backend,
        plan.weights or "",
    )
    wrong = {
        "types": not all(isinstance(text, str) for text in texts),
        "recipe": plan.recipe not in RECIPES,
        "dtypes": not plan.dtypes
        or not set(plan.dtypes) <= set(DTYPES)
        or len(set(plan.dtypes)) < len(plan.dtypes),
        "twins": type(plan.twins) is not int or not 0 <= plan.twins <= MAX_COUNT,
        "backend": plan.backend not in ("both", *BACKENDS),
        "device": plan.device not in ("auto", "cpu", "cuda"),
        "compile": plan.compile not in ("auto", "on", "off"),
        "checkpoint_every": type(plan.checkpoint_every) is not int or plan.checkpoint_every < 0,
    }
    return next((name for name, applies in wrong.items() if applies), None)


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
