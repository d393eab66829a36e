"""`compare`, with more twins wherever the verdict should wait for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from lockstep.common.model.perturb import REPLICATE
from lockstep.common.runs.ensemble import Ensembles
from lockstep.common.runs.record import FIRST_STEPS, Record
from lockstep.common.verdict.compare import compare
from lockstep.common.verdict.comparison import Comparison

TrainTwins = Callable[[str, range], Iterable[Record]]  # by backend, the twins of these numbers

INITIAL_TWINS = 2  # per backend, where float64 turns out to need any
# Per backend: then a late divergence is no rounding. Three were enough for each of 3 in 900 clean
# pairs.
MAX_TWINS = 6


def judge(
    ensembles: Ensembles,
    train_twins: TrainTwins,
    labels: np.ndarray,
    train_first_steps: TrainTwins = lambda name, twins: (),
) -> Comparison:
    """`compare`, with more twins wherever the verdict should wait for them.

    Args:
        ensembles: by backend; the twins that are trained here are added to them.
        train_twins: trains the twins of these numbers of one backend (0: the same run again, which
            is trained with the first twins that float64 needs); none, if it cannot.
        labels: int64 (test images,): the true classes.
        train_first_steps: the same, but only the first steps.
    """
    short: dict[str, list[Record]] = {}
    while True:
        comparison = compare(
            {
                name: ensemble.with_short_twins(short.get(name, ()))
                for name, ensemble in ensembles.items()
            },
            labels,
        )
        if not short and differs_in_first_steps(comparison):
            last = INITIAL_TWINS if comparison.dtype == "float64" else MAX_TWINS
            short = {
                name: list(train_first_steps(name, range(len(of.records), last + 1)))
                for name, of in ensembles.items()
            }
            if any(short.values()):
                continue
        wanted, added = twins_wanted(comparison), False
        for name, ensemble in list(ensembles.items()):
            first = REPLICATE if wanted and not ensemble.twins else len(ensemble.records)
            twins = list(train_twins(name, range(first, wanted + 1)))
            ensembles[name], added = ensemble.add_twins(twins), added or bool(twins)
        if not added:
            return comparison


def without_twins(comparison: Comparison) -> Comparison:
    """A comparison that may have no more twins: undecided if its verdict should wait for some."""
    waits = twins_wanted(comparison) or differs_in_first_steps(comparison)
    undecided = comparison.verdict == "disagree" and waits
    return replace(comparison, verdict="undecided") if undecided else comparison


def twins_wanted(comparison: Comparison) -> int:
    """How many twins per backend this verdict should wait for; 0 if it stands.

    A difference in the first step (float64: first two) is not chaos, and twins cannot explain a
    non-finite loss: ask for none (but see `differs_in_first_steps`). Later, near instability,
    training amplifies even float64's rounding: digits at lr 0.05 and momentum 0.9 passed 1e-12 at
    step 85. And in float32 two twins may both stay on their run's path where rounding flipped a
    ReLU between the frameworks: 2 of 300 clean pairs, each of which a third twin cleared, and in
    the second step of ResNet-20 on digits 2 of 6, which a fourth did. In evaluation alone no
    float64 run is chaotic: a port that leaves dropout on there would be excused by its own twins.
    """
    first = comparison.first_divergence
    if first is None or not math.isfinite(first.gap) or comparison.location is not None:
        return 0  # where the ranks of one run differ, its place is known
    exact = comparison.dtype == "float64" or first.stage == "data" or first.tensor == "lr"
    short = any((comparison.short_twins or {}).values())
    if first.step < (FIRST_STEPS if exact or short else 1):
        return 0
    fewest = min(len(twins) for twins in (comparison.twins or {}).values())
    if comparison.dtype == "float64" and fewest == 0:
        return 0 if first.stage == "evaluate" else INITIAL_TWINS
    return MAX_TWINS if fewest < MAX_TWINS else 0


def differs_in_first_steps(comparison: Comparison) -> bool:
    """Whether the verdict should wait for the first steps of more twins.

    In every precision but float64, rounding may flip a ReLU in the first step already. It shows in
    gradients, and in what they update; in the step after, anywhere. With 32 images and lr 0.05, two
    flipped in PyTorch's first step of ResNet-20, moved a gradient by 3.6 % of its largest, and with
    one twin per backend none did. In float64 a gradient may cancel: that of a scale before a batch
    norm is moved by 6.5e-12 of its largest where the weights are moved by an ulp.
    """
    first = comparison.first_divergence
    if first is None or first.stage in ("data", "weights") or first.tensor == "lr":
        return False
    if comparison.location is not None:  # the ranks of one run differ
        return False
    possible = first.step > 0 or first.stage in ("backward", "update")
    return possible and first.step < FIRST_STEPS and math.isfinite(first.gap)
