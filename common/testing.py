"""For a user's own tests: `assert same_run(one, other, dataset, config)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.errors import RecordError
from lockstep.common.evidence import judge, train_ensemble
from lockstep.common.protocol import Backend
from lockstep.common.verdict import locate


@dataclass(frozen=True)
class Comparison:
    """Two runs held against each other. It is true if they agree, and shown as the place where they
    part if not."""

    lens: dict[
        str, Any
    ]  # one entry of report.json's `lenses`, with `located` where the runs disagree

    def __bool__(self) -> bool:
        return self.lens["verdict"] == "agree"

    def __repr__(self) -> str:
        if self:
            return f"the runs agree: {self.lens['dtype']}, {self.lens['steps']} steps"
        found = self.lens["located"]
        causes = "".join(f"; likely {cause}" for cause in found["causes"][:1])
        return f"the {self.lens['dtype']} runs part: {found['message']} ({found['how']}){causes}"


def same_run(
    one: Backend,
    other: Backend,
    dataset: Dataset,
    config: Config,
    dtype: str = "float64",
    twins: int = 2,
) -> Comparison:
    """Train both and say whether the two runs are the same run.

    Args:
        one, other: of different names, both built for `config` and `dtype`; `one` is the reference.
        config: resolved for `dataset`.
        twins: per backend, in the lenses but float64; more, and float64's, are trained where the
            verdict asks for them.

    Raises:
        RecordError: if there is nothing to compare, as without twins in a production lens, or two
            backends of one name.
    """
    if one.name == other.name:
        raise RecordError(f"both backends are called {one.name!r}: give one of them another `name`")
    backends = {backend.name: backend for backend in (one, other)}
    families = {
        name: train_ensemble(backend, config, dataset, dtype, twins)
        for name, backend in backends.items()
    }
    lens = judge(families, backends, config, dataset)
    if lens["verdict"] == "disagree":
        runs = {name: members[0] for name, members in families.items()}
        lens["located"] = locate.locate(lens, runs, config, dataset, backends.__getitem__, twins)
    return Comparison(lens)
