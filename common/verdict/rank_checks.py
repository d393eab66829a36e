"""The states of the processes that train a run together, and in PyTorch the gradients of the last
step: they must be equal to the bit.

Rank 0's numbers alone go into the record, so a tensor that differs elsewhere, such as a buffer that
is not broadcast, shows nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lockstep.common.config import FRAMEWORKS
from lockstep.common.protocol import GRADIENT_OF, RankDifference
from lockstep.common.runs.record import Record
from lockstep.common.verdict.check import Check
from lockstep.common.verdict.comparison import Divergence, Location

METHOD = "the states of all ranks were compared with rank 0's"
CAUSES = {
    "weights": "weights not broadcast: each rank starts from weights of its own",
    "backward": "gradients that are not the same in all ranks: they are not reduced in this step, as "
    "within no_sync",
    "update": "an update that is not the same in all ranks: gradients are not reduced in some step "
    "(no_sync), a rank clips or schedules by its own numbers, or buffers are not broadcast",
}
FIXES = {
    "weights": "torch.distributed.broadcast(tensor, src=0)  # each parameter, before the first step",
    "backward": "torch.distributed.all_reduce(gradient)  # in each step, before clipping",
    "update": "torch.distributed.all_reduce(gradient)  # in each step, before clipping",
}


def check_ranks(runs: Iterable[Record]) -> list[Check]:
    """A check for each tensor in which a rank differed from rank 0, at the first such step."""
    return [
        check
        for run in runs
        for check in checks_of(run.rank_differences, FRAMEWORKS.get(run.backend, run.backend))
    ]


def checks_of(differences: Iterable[RankDifference], run: str) -> list[Check]:
    """A check for each difference between the ranks of one run, which is called so."""
    return [
        Check(
            step=max(0, each["step"] - 1),
            stage=_stage(each),
            tensor=f"{each['tensor'].removeprefix(GRADIENT_OF)}, rank {each['rank']} of {run}",
            gap=math.inf if each["gap"] is None else each["gap"],
            bound=0.0,
            sides=("rank 0", f"rank {each['rank']}"),
        )
        for each in differences
    ]


def _stage(difference: RankDifference) -> str:
    if difference["tensor"].startswith(GRADIENT_OF):
        return "backward"
    return "update" if difference["step"] else "weights"


def is_of_ranks(check: Check) -> bool:
    """Whether it compares the ranks of one run."""
    return check.sides is not None and check.sides[0] == "rank 0"


def ranks_location(
    first: Divergence, checks: Sequence[Check], method: str = METHOD
) -> Location | None:
    """Where the ranks of one run diverge; None if `first` is not one of `checks` (those of
    `check_ranks`)."""
    if (first.step, first.tensor) not in [(check.step, check.tensor) for check in checks]:
        return None
    stage = first.stage
    return Location(first, method, None, (), (CAUSES[stage],), fixes=(FIXES[stage],))
