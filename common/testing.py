"""For a user's own tests: `assert same_run(one, other, dataset, config)`."""

from __future__ import annotations

from dataclasses import replace

from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.errors import RecordError
from lockstep.common.evidence import judge, train_ensemble
from lockstep.common.model.layers import module_names
from lockstep.common.protocol import Backend
from lockstep.common.verdict import locate
from lockstep.common.verdict.comparison import Comparison


def same_run(
    one: Backend,
    other: Backend,
    dataset: Dataset,
    config: Config,
    dtype: str = "float64",
    twins: int = 2,
) -> Comparison:
    """Train both backends and check whether the two runs are the same run.

    Args:
        one, other: with different names, both built for `config` and `dtype`; `one` is the
            reference.
        config: resolved for `dataset`.
        twins: per backend, in every precision except float64. If the verdict needs more twins, or
            twins in float64, they are trained, too.

    Returns:
        A `Comparison`. It is true if the runs agree; if not, its `repr` names the place where they
        diverge.

    Raises:
        RecordError: if the two backends have the same name, or if there is nothing to compare
            with, as without twins in float32.
    """
    if one.name == other.name:
        raise RecordError(f"both backends are called {one.name!r}: give one of them another `name`")
    backends = {backend.name: backend for backend in (one, other)}
    ensembles = {
        name: train_ensemble(backend, config, dataset, dtype, twins)
        for name, backend in backends.items()
    }
    comparison = judge(ensembles, backends, config, dataset)
    if comparison.verdict == "agree" or comparison.location is not None:
        return comparison
    runs = {name: ensemble.run for name, ensemble in ensembles.items()}
    location = locate.locate(
        comparison.first_divergence,
        runs,
        config,
        dataset,
        backends.__getitem__,
        twins,
        checks=comparison.checks,
        names_of=lambda name: module_names(backends[name]),
    )
    return replace(comparison, location=location)
