"""How far apart two programs are, measured by how far apart runs of one program are.

Every run has *twins*: runs of the same program from initial weights, and with images, moved by at
most one ulp. If the two programs compute the same function, the runs of one side (a run and its
twins) and those of the other are drawn alike: rounding alone tells them apart, and nothing marks a
run as PyTorch's or Flax's. So the statistic is that of two clusters,

    gap     the smallest distance between a run of one side and a run of the other,
    spread  the largest distance between two runs of one side; of the two sides' spreads the
            smaller, so that no side excuses itself: one that shuffles for itself, loses updates
            or computes in TF32 spreads widely, and the other does not,

and the programs differ where gap > c (spread + floor): where even the closest runs of the two sides
are further apart than `c` times the most distant runs of the side that spreads less. This is a
permutation test on distances between runs, as Friedman and Rafsky's (Annals of Statistics 7, 1979)
and the energy test of Szekely and Rizzo (2004) are.

The level. Of all ways to split 2n runs in halves, gap > spread holds for one at most. Say that a
half is isolated if its runs are closer to each other than to any other run; then gap > spread means
that one of the halves is isolated. Let H and G be two isolated halves that overlap, x in both, y in
H alone, z in G alone. H is isolated, so d(x, y) < d(x, z); G is, so d(x, z) < d(x, y). That cannot
be, so two isolated halves are the two sides of one split. Twins of one number share their random
numbers across the frameworks, so the runs are n matched pairs, and what may be exchanged is a
pair's two runs: in one place and with c = 1, chance alone separates the sides at most once in
2^(n - 1), 4 with two twins a side and 64 with six. One run that diverges early from all others, since
rounding flipped a ReLU in it, leaves the gap as it is: it costs power, and no alarm.

Two things keep this from being the whole answer: the frameworks do not round exactly alike (hence
the floors), and one run is looked at in many places (steps, tensors, classes). So `c` is set by
measurement, in the way of split conformal prediction (Papadopoulos et al. 2002; Vovk, Gammerman and
Shafer 2005): a pair's score is its largest gap / (spread + floor), and another pair, exchangeable
with n clean ones, exceeds the largest of their scores with a probability of at most 1 / (n + 1).
`SEPARATION` is twice that and more, for floors and `c` were looked at on the same pairs, which were
longer runs than those that the false alarms are counted on; the count (results/alarms) decides.

One thing remains: rounding flips a ReLU between the frameworks, and in no twin. Of 300 float32
pairs two were false alarms, at scores of 123 and 25,000 (the next was 5), and one of 300
bfloat16 pairs. No `c` helps there, but a third twin cleared each. So `judge` trains more
twins before a verdict of disagree stands. Measured again, on 300 other pairs of each precision, there was
no false alarm (results/alarms). ResNet-20 with a large step does the same in the second step
already, 2 of 6 float32 pairs on digits, and a fourth twin cleared those; of 12 others none needed
it.

The spread was that of both sides until 26 November 2026, and a side that shuffled for itself excused
itself with it. Measured again with the smaller one, seeds from 11000 on, two twins a side, 60
float32, 40 float64 and 20 bfloat16 pairs: four float32 pairs were outside their bounds, at scores of
6 to 295, and six twins cleared each; the next score was 0.1. The largest of bfloat16
was 0.5, that of float64 0.02, and that of a float64 run among its own twins 0.03.

Tried and given up: twins whose weights alone are moved are too tame, for two frameworks round
differently at every step. In one clean pair both of Flax's twins stayed on their run's path, bit
for bit, while the frameworks diverged; its score was 15, and is 1.3 with images moved, too. And the
gap between the two runs themselves, compared with their twins, needed 3 % of a gradient for
flipped ReLUs in every range of steps, which hid all smaller faults from step 30 on.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple, NotRequired, TypedDict, TypeVar

import ml_dtypes
import numpy as np

from lockstep.common.dtypes import compute_dtype, numpy_dtype

T = TypeVar("T")

# float64. Relative to the largest magnitude in the tensor; absolute for values below 1 along the
# trajectory. Measured: 7e-15 in the loss over the tutorial's 37,500 steps, 1e-15 of the magnitude
# in the tensors of the first steps. To be caught: logits that pass through float32, 1e-8; a
# learning rate computed in float32, 1e-8 of it.
PROOF_BOUND = 1e-12

# The same for a step that is replayed, late in a float64 run. If the terms of a gradient cancel, its
# rounding is relative to the terms, not to their sum, and twins of one side share it. Over 84 steps of 12 clean pairs of ResNet-20 (seeds from 5000 on) the largest gap
# was 8.7e-13; in one pair more, 1.5e-12. To be caught: logits that pass through float32, 1e-8.
REPLAY_BOUND = 1e-11

# `c`. Over 100 float32 and 40 bfloat16 clean pairs with two twins a side (the configurations of
# lockstep.common.evidence.false_alarms with twice as many steps, seeds from 5000 on) the largest
# scores were 3.4, 2.5 and 1.4, and 2.4, 1.8 and 1.6. To be caught: what is past all that runs of
# one side do.
# float64's counts only where a run amplifies its own rounding past PROOF_BOUND. It is larger, because
# twins do not show rounding that all runs of one side share. The gradient of ResNet-20's first kernel is a sum
# of 16,384 terms that cancel: the frameworks differ by 1.5e-14 there, and twins of Flax by 1.3e-15.
# Over 12 pairs of ResNet-20 (digits, lr 0.05, 20 steps, seeds from 5000 on) the largest gap was 10
# times the spread of six twins, in the variance of a batch norm. In one more pair the sign of a ReLU's
# input changed, where no `c` helps. Replays from one state find the faults that so large a `c` might
# hide (`lockstep.common.verdict.confirm`).
# Mixed precision has bfloat16's levels: over 20 clean pairs the largest score was 0.6; what is stored
# in float32 has the floor of float32 (see `bound`).
SEPARATION = {"float64": 64.0, "float32": 8.0, "bfloat16": 8.0, "mixed_bfloat16": 8.0}
# The same for counts of test images, which cannot grow like a distance: no more than all of them
# differ. The largest scores of the same pairs were 0.8 and 1.0. To be caught after the whole
# tutorial, where twins differ in 2,300 of 10,000 predictions: classes numbered otherwise, 9,000.
# Not caught there: two weak classes in each other's place.
SEPARATION_IMAGES = 2.0
# Times `c`. Gaps are a few ulp where twins show none, for loss and logits come in steps of an ulp:
# 1 ulp of float32 was seen, in the loss. bfloat16's ulp is 0.8 %, and its twins nearly always show
# some.
FLOOR_ULP = {"float64": 0.0, "float32": 4.0, "bfloat16": 0.25, "mixed_bfloat16": 0.25}
# Of a gradient, and of the way that the weights have gone: what one ReLU or pooling window
# that rounding flipped between the frameworks, and in no twin, may change; times `c`. Seen: 0.9 % of
# a gradient in one clean pair, 0.3 % of the way in another. To be caught: a sum for a mean, a layer
# without gradient.
FLIP_SHARE = 0.004
# The quantile of a gradient's differences that is compared without FLIP_SHARE. Over the 60 float32
# pairs the largest share of its bound was 0.17. To be caught: a mantissa of 10 bits in one kernel's
# gradient, 2.7; 2 % on one kernel, 12; division by batch - 1, up to a batch of 512, 350.
BULK = 0.5
# Times the first loss. If rounding alone moves the loss by so much, it also decides whether a run
# overflows: the runs have diverged. Seen: of 300 bfloat16 pairs five, of 32 in mixed
# precision two, in which the twins of each side were 1e21 and more apart.
EXPLODED = 1e6
COUNT_FLOOR = 4  # times SEPARATION_IMAGES; two predictions were seen to differ where no twin's did
# Of a step's largest gradient: what is smaller is what rounding leaves of a sum that is zero, such
# as the gradient of a bias before a batch norm: two such rests agree, since twins of one framework
# share how it adds. Seen: 60 ulp of float64; of float32, up to 840 (PyTorch's batch norm on the CPU,
# digits, batch 128; 1,610 at batch 512, 70 on CIFAR-10).
NEAR_ZERO_ULP, MAX_NEAR_ZERO = 1000.0, 1e-3
# float64. Any gradient may differ by so many ulp of the step's largest gradient. Where an activation
# saturates, rounding decides its slope: a tanh of exactly 1 has the slope 0, and one of 1 less an ulp
# has 2e-16. All twins of one side round it alike. Seen: 16 ulp, in a gradient whose largest entry was
# 3e-12. In lower precisions such an allowance would hide faults.
SATURATED_ULP = 100.0
CONFIDENCE = 0.99  # of all classes' intervals together


class Distances(NamedTuple):
    """Two clusters of runs, in some distance."""

    # Of the closest runs of the two sides; infinite where the runs themselves are not finite.
    between: float
    # Of the most distant runs of one side, the smaller of both sides' where both have twins; None
    # without twins, infinite where no twin is finite.
    within: float | None


def between_and_within(
    ours: Sequence[T],
    theirs: Sequence[T],
    distance: Callable[[T, T], float],
) -> Distances:
    """The two clusters; the first of each is the run itself, the others are its twins.

    Non-finite twins are ignored; a non-finite run makes the gap infinite.
    """
    between = [distance(a, b) for a in ours for b in theirs]
    within = [
        [distance(a, b) for a, b in itertools.combinations(side, 2)] for side in (ours, theirs)
    ]
    return distances_of(between, within)


def distances_of(between: Sequence[float], within: Sequence[Sequence[float]]) -> Distances:
    """The same, from the distances.

    Args:
        between: the first is that between the two runs themselves.
        within: per side; empty for one without twins.
    """
    gap = min(between) if math.isfinite(between[0]) else math.inf
    return Distances(gap, smaller_spread(within))


def smaller_spread(within: Sequence[Sequence[float]]) -> float | None:
    """The smaller of the sides' largest finite distances; None if no side has twins, infinite if
    none is finite."""
    spreads = [
        max((distance for distance in side if math.isfinite(distance)), default=math.inf)
        for side in within
        if side
    ]
    return min(spreads, default=None)


def nearest_twin(run: T, twins: Sequence[T], distance: Callable[[T, T], float]) -> Distances | None:
    """A run among its own twins: its distance from the nearest of them, and the largest distance of
    two of them. None with fewer than two twins that are finite."""
    within = [distance(a, b) for a, b in itertools.combinations(twins, 2)]
    if (spread := smaller_spread([within])) is None or not math.isfinite(spread):
        return None
    return Distances(min(distance(run, twin) for twin in twins), spread)


def bound(
    dtype: str,
    spread: float | None,
    scale: float,
    extra: float = 0.0,
    stored: bool = False,
    exact: float = PROOF_BOUND,
) -> float:
    """How far two correct programs may be apart in something of magnitude `scale`.

    Args:
        spread: `Distances.within`.
        stored: whether it has the weights' precision, which in mixed precision is not what is
            computed in. There, updates that are halved, or not made at all, would hide below an
            ulp of bfloat16.
        extra: what else is known to move it, in every precision but float64 (a ReLU that rounding
            flipped).
        exact: the share of `scale` that float64's rounding may take.
    """
    if spread is None:
        return exact * scale
    if not math.isfinite(spread):
        return 0.0
    if dtype == "float64":
        return exact * scale + SEPARATION[dtype] * spread
    precision = numpy_dtype(dtype).name if stored else dtype
    floor = FLOOR_ULP[precision] * float(ml_dtypes.finfo(compute_dtype(precision)).eps) * scale
    return SEPARATION[dtype] * (spread + floor + extra)


# --- Classes


class PairedDifference(TypedDict):
    """The difference of two accuracies on the same images, and its interval."""

    difference: float
    low: float
    high: float
    discordant: list[int]  # images that only the first recognised, and only the second
    images: int


class ClassDifference(PairedDifference):
    """The same of one class, with what the verdict compares: the share of the class's images that
    one side recognises and the other does not."""

    gap: NotRequired[float | None]  # of the closest runs of the two sides
    spread: NotRequired[float | None]  # of the most distant runs of one side; None without twins
    bound: NotRequired[float | None]


def is_correct(predictions: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool (n,): which test images were recognised; one without a prediction was not."""
    full = np.full(len(labels), -1, np.int64)
    shared = min(len(labels), len(predictions))
    full[:shared] = predictions[:shared]
    return full == labels


def paired_difference(first: np.ndarray, second: np.ndarray, classes: int) -> PairedDifference:
    """The difference of two accuracies on the same images, with its interval.

    Args:
        first, second: bool (n,): which of n images each side recognised.
        classes: how many such intervals are to hold together, with `CONFIDENCE` (Bonferroni).

    With b images that only `first` recognised and c that only `second` did, p = (b + 1) / (n + 2), q =
    (c + 1) / (n + 2): p - q +- z sqrt((p + q - (p - q)^2) / (n + 2)). Assumes independent images.
    It says how exactly n images measure the difference between these two networks; whether the
    programs differ, twins must say. Source: Bonett and Price, "Adjusted Wald confidence interval
    for a difference of binomial proportions based on paired data", Journal of Educational and
    Behavioral Statistics 37, 2012.
    """
    n, b, c = len(first), int(np.sum(first & ~second)), int(np.sum(second & ~first))
    z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * classes))
    p, q = (b + 1) / (n + 2), (c + 1) / (n + 2)
    half = z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    low, high = max(-1.0, p - q - half), min(1.0, p - q + half)
    return {"difference": (b - c) / n, "low": low, "high": high, "discordant": [b, c], "images": n}
