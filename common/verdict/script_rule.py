"""How the bounds of a comparison of two scripts were set, in words."""

from __future__ import annotations

from lockstep.common.verdict.comparison import Rule
from lockstep.common.verdict.statistics import (
    COUNT_FLOOR,
    FLIP_SHARE,
    FLOOR_ULP,
    PROOF_BOUND,
    SEPARATION,
    SEPARATION_IMAGES,
)


def rule_of(dtype: str, twins: int) -> Rule:
    """As `compare.rule_of`, in the words of scripts."""
    factor = SEPARATION[dtype]
    if dtype == "float64":
        rule = (
            f"a gap may be {PROOF_BOUND:g} of the largest entry, and {PROOF_BOUND:g} for losses below "
            "1. The batch of every step, the initial weights, and whole numbers given to run.finish "
            "must be equal"
        )
        if twins:
            rule += (
                f". After the first steps a gap may in addition be {factor:g} times the spread of "
                f"{twins} twins, those of the script whose twins are closer together"
            )
        return {"rule": rule, "relative": PROOF_BOUND, "twins": twins}
    rule = (
        f"the closest runs of the two scripts may be {factor:g} times as far apart as the most "
        f"distant runs of one, plus {factor * FLOOR_ULP[dtype]:g} ulp of {dtype}. That one is the "
        "script whose runs are closer together, and its runs count up to the end of the next range "
        f"of steps. There are {twins} twins, whose weights and batches are moved by an ulp. Whole "
        f"numbers given to run.finish may differ by {SEPARATION_IMAGES:g} times as much, plus "
        f"{SEPARATION_IMAGES * COUNT_FLOOR:g}. First gradients and the total change of the weights "
        f"get {100 * factor * FLIP_SHARE:g} % extra, because rounding can flip a ReLU; half of the "
        "entries of a first gradient do not. The batch of every step and the initial weights must "
        "be equal"
    )
    return {
        "rule": rule,
        "separation": factor,
        "separation_images": SEPARATION_IMAGES,
        "floor_ulp": FLOOR_ULP[dtype],
        "flip_share": FLIP_SHARE,
        "images": COUNT_FLOOR,
        "twins": twins,
    }
