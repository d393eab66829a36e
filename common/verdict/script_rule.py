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
            f"{PROOF_BOUND:g} of the largest magnitude, and of 1 for losses; every step's batch and "
            "the initial weights are equal, and so are whole numbers given to run.finish"
        )
        if twins:
            rule += (
                f"; after the first steps {factor:g} times the spread of {twins} twins is added, "
                "that of the script whose twins spread less"
            )
        return {"rule": rule, "relative": PROOF_BOUND, "twins": twins}
    rule = (
        "every step's batch and the initial weights are equal; the closest runs of the two scripts "
        f"may be {factor:g} times as far apart as the most distant runs of the one that spreads "
        f"less are by the end of the next range of steps ({twins} twins, with weights and batches "
        f"moved by an ulp), and {factor * FLOOR_ULP[dtype]:g} ulp of {dtype}; of whole numbers "
        f"given to run.finish, {SEPARATION_IMAGES:g} times as many may differ, and "
        f"{SEPARATION_IMAGES * COUNT_FLOOR:g}; {100 * factor * FLIP_SHARE:g} % of a first "
        "gradient, but not of half of its entries, and of the way that the weights have gone may "
        "be ReLUs that rounding flipped"
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
