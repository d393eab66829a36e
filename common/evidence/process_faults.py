"""Whether the verdict finds mistakes of training in several processes, and where it places them.

PyTorch trains in several processes that have the fault, Flax in one, where nothing is exchanged that
could go wrong; with local batch norms, which depend on the number of processes, in as many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.evidence import judge, train_ensemble
from lockstep.common.evidence.faults import Fault, Finding, Row, finding
from lockstep.common.model.layers import module_names
from lockstep.common.runs.rank_process import BuildRank
from lockstep.common.runs.ranks import Ranks
from lockstep.common.verdict import locate

BASE = Config(steps=12, batch_size=32, lr=0.01, momentum=0.9)
TEST_IMAGES = 100
HINT = "run the command again"


def config_of(fault: Fault | None, images: int, seed: int = 0) -> Config:
    """The run in which `fault` shows; without one, a correct run."""
    options = {} if fault is None else fault.options
    return dataclasses.replace(BASE, seed=seed, **options).resolve(images)


def row(fault: Fault, config: Config, images: int, lenses: Mapping[str, Finding]) -> Row:
    """The results for a fault, by precision."""
    return {
        "name": fault.name,
        "sentence": fault.description,
        "source": fault.source,
        "stage": fault.stage,
        "tensor": fault.tensor,
        "changes_function": fault.changes_function,
        "held_out": fault.held_out,
        "lens": fault.precision,
        "config": config.to_json(),
        "train_images": images,
        "lenses": dict(lenses),
    }


def measure(
    fault: Fault | None,
    config: Config,
    dataset: Dataset,
    dtype: str,
    ranks: Ranks,
    build: BuildRank,
) -> Finding:
    """The result for a fault in one precision, found as for a user's runs.

    Args:
        fault: None for a correct run.
        ranks: the processes of PyTorch, which live on: to start them takes longer than most runs.
        build: builds ranks that have the fault.
    """
    twins = 0 if dtype == "float64" else 2
    ranks.build_rank = build
    ranks.counts["flax"] = ranks.count if config.batch_norm == "local" else 1
    backends = {name: ranks.build(name, dtype) for name in BACKENDS}
    ensembles = {
        name: train_ensemble(backend, config, dataset, dtype, twins)
        for name, backend in backends.items()
    }
    comparison = judge(ensembles, backends, config, dataset)
    located = comparison.location or locate.locate(
        comparison.first_divergence,
        {name: ensemble.run for name, ensemble in ensembles.items()},
        config,
        dataset,
        backends.__getitem__,
        twins or 2,
        checks=comparison.checks,
        names_of=lambda name: module_names(backends[name]),
    )
    return finding(fault, comparison, located, len(ensembles["torch"].twins), {})
