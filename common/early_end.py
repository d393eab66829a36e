"""Ends a comparison early: a large float64 difference in the first steps decides the verdict, and the
rest is not trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lockstep.common.config import BACKENDS
from lockstep.common.request import Request
from lockstep.common.runs import training
from lockstep.common.runs.ensemble import Ensemble, Ensembles
from lockstep.common.runs.parallel import MIN_IMAGES
from lockstep.common.runs.record import FIRST_STEPS
from lockstep.common.runs.trainer import TerminalObserver, Trainer, backend_errors
from lockstep.common.runs.watch import FirstStepsWatch
from lockstep.common.verdict.comparison import Comparison
from lockstep.common.verdict.judge import judge

ENDED = (
    "The rest was not trained, since float64 differs in the first steps: --keep-going trains it all"
)


def watched(request: Request, trainer: Trainer, found: Mapping[str, Ensembles]) -> Trainer:
    """`trainer`; it watches the first steps of a long run whose folder holds no float64 record yet."""
    config = trainer.config
    images = config.total_steps * config.batch_size
    fresh = found.get("float64") == {} and len(request.backends) == len(BACKENDS)
    alone = request.cluster is None  # its workers train twins at the same time
    ends = fresh and alone and not request.keep_going and images >= MIN_IMAGES
    return dataclasses.replace(trainer, watch=FirstStepsWatch() if ends else None)


def judge_first_steps(
    trainer: Trainer, names: Sequence[str]
) -> tuple[Trainer, Ensembles, Comparison]:
    """Train, evaluate and judge the first steps alone; no record is written. Returns the trainer of
    this short run, its runs by backend, and the comparison."""
    config = dataclasses.replace(trainer.config, steps=FIRST_STEPS)
    short = dataclasses.replace(trainer, config=config, watch=None)
    observer = TerminalObserver(lambda text: None, lambda steps, loss: None)
    ensembles: Ensembles = {}
    for name in names:
        short.remove_checkpoints(f"{name}-float64")
        with backend_errors(name), short.signals.deferred():
            backend = short.backend(name, "float64")
            run = training.train(
                backend, config, short.dataset, "float64", observer, weights=short.weights
            )
        ensembles[name] = Ensemble(run)
    comparison = judge(
        ensembles,
        lambda name, twins: [],
        short.dataset.test_labels,
        short.train_first_steps("float64", names),
    )
    return short, ensembles, comparison
