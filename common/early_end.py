"""Ends a comparison early: a large float64 difference in the first steps decides the verdict, and the
rest is not trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lockstep.common.config import BACKENDS
from lockstep.common.data import Dataset
from lockstep.common.request import Request
from lockstep.common.runs.ensemble import Ensemble, Ensembles
from lockstep.common.runs.parallel import MIN_IMAGES
from lockstep.common.runs.record import FIRST_STEPS
from lockstep.common.runs.trainer import Trainer
from lockstep.common.runs.training import FEW_TEST_IMAGES
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
) -> tuple[Dataset, Ensembles, Comparison]:
    """Judge the first steps alone, as the trainer's `watch` has them; no record is written. Returns
    the data with the few test images that were evaluated, the runs by backend, and the comparison."""
    assert trainer.watch is not None
    config = dataclasses.replace(trainer.config, steps=FIRST_STEPS).to_json()
    whole = dataclasses.replace(trainer, watch=None)
    train_twins = whole.train_first_steps("float64", names)
    ensembles: Ensembles = {}
    for name in names:
        trainer.remove_checkpoints(f"{name}-float64")
        run = dataclasses.replace(trainer.watch.records[name], config=config)
        ensembles[name] = Ensemble(run)
    dataset = trainer.dataset.first_test_images(FEW_TEST_IMAGES)
    comparison = judge(
        ensembles,
        lambda name, twins: [],
        dataset.test_labels,
        lambda name, twins: [
            dataclasses.replace(twin, config=config) for twin in train_twins(name, twins)
        ],
    )
    return dataset, ensembles, comparison
