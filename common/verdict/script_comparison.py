"""The typed result of a comparison of two scripts; `to_json` gives an entry of report.json's
`precisions`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from lockstep.common.verdict.check import Check, finite
from lockstep.common.verdict.comparison import Entry, Rule, format_distinct
from lockstep.common.verdict.rank_checks import is_of_ranks

# "diverged": both runs reach a loss that is not finite at the same step, and agree up to it.
ScriptVerdict = Literal["agree", "disagree", "diverged"]
EVERY_STEP = ", every step"  # after the name of an array: the check of its digests
STEPS = "number of steps"  # the tensor of the check of it


@dataclass(frozen=True)
class ScriptPlace:
    """Where two scripts differ first: the first check that they fail, in causal order."""

    check: Check
    sides: tuple[str, str]  # the names of the scripts
    own: tuple[str, str]  # the tensor's name in each script
    layer: str = ""  # the layer that holds it, in A's names
    pattern: str | None = None  # how one tensor is made of the other, where that can be seen
    worst_entries: tuple[Entry, ...] = ()
    causes: tuple[str, ...] = ()  # the likeliest first
    others: int = 0  # other tensors of this step and stage that fail ...
    of: int = 0  # ... of so many others
    trait: str = ""  # what those that fail have in common
    lines: tuple[str | None, str | None] = (None, None)  # of the source, where known

    @property
    def name(self) -> str:
        """Both names of the tensor, or one if they are equal."""
        ours, theirs = self.own
        return ours if ours == theirs else f"{ours} ({theirs})"

    @property
    def message(self) -> str:
        """One line: stage, step, both names, both values, and the gap with its bound."""
        check = self.check
        if check.tensor == STEPS and check.values is not None:
            (a, b), (x, y) = self.sides, check.values
            return f"{a} took {x:,.0f} steps and {b} {y:,.0f}"
        text = f"{check.stage}: step {check.step}: "
        if check.tensor.endswith(EVERY_STEP):
            return f"{text}{self.name}: the two trained on different batches"
        if self.name != check.stage:
            text += f"{self.name}: "
        if check.values is not None:
            shown = zip(check.sides or self.sides, format_distinct(*check.values), strict=True)
            text += " ".join(f"{name}={value}" for name, value in shown) + ", "
        if is_of_ranks(check) and not math.isfinite(check.gap):
            return f"{text}not equal to rank 0's to the bit"
        gap = "gap" if check.measure == "largest" else f"{check.measure} gap"
        bound = f"{check.bound:.1e}" if check.bound else "0"
        return f"{text}{gap} {check.gap:.1e} > {bound}"

    @property
    def extent(self) -> str:
        """How many other tensors of this step and stage fail, and what they have in common."""
        if not self.of:
            return ""
        of = "the other tensor" if self.of == 1 else f"the {self.of:,} other tensors"
        of += " of this stage"
        if not self.others:
            return f"none of {of} fails" if self.of > 1 else f"{of} does not fail"
        if self.of == 1:
            return f"{of} fails, too"
        if self.others == self.of:
            return f"all of {of} fail, too"
        count = f"{self.others:,} of {of} {'fails' if self.others == 1 else 'fail'}, too"
        return f"{count} ({self.trait})" if self.trait else count

    def to_json(self) -> dict[str, object]:
        check = self.check
        values = check.values if check.values is not None and check.sides is None else (None, None)
        return {
            "step": check.step,
            "stage": check.stage,
            "tensor": check.tensor,
            "names": list(self.own),
            "layer": self.layer,
            "gap": finite(check.gap),
            "bound": finite(check.bound),
            "values": [finite(value) for value in values],
            "message": self.message,
            "pattern": self.pattern,
            "extent": self.extent,
            "offenders": [
                {"index": list(e.index), "values": [finite(value) for value in e.values]}
                for e in self.worst_entries
            ],
            "causes": list(self.causes),
            "lines": list(self.lines),
        }


@dataclass(frozen=True)
class Unstable:
    """Where the same script, run again with nothing changed, gave other numbers first."""

    side: str
    step: int
    stage: str
    tensor: str  # its own name
    gap: float  # relative to the largest entry

    @property
    def by_rounding(self) -> bool:
        """Whether sums that are added in another order each time explain it."""
        return self.gap < 1e-9 and self.stage not in ("data", "weights")

    @property
    def message(self) -> str:
        text = (
            f"{self.side} is not reproducible: the same run again differs at step {self.step} "
            f"({self.stage}: {self.tensor})"
        )
        if self.by_rounding:
            return f"{text}, by rounding alone: its sums are added in another order each time"
        return f"{text}: draw its numbers with run.random, or seed it"


@dataclass(frozen=True, repr=False)
class ScriptComparison:
    """Two scripts compared in one precision. It is true if they agree, and shown as the place where
    they diverge if not."""

    dtype: str
    sides: tuple[str, str]
    steps: int  # that both took
    verdict: ScriptVerdict
    checks: tuple[Check, ...]  # at one moment of the run
    windows: tuple[Check, ...]  # over a range of steps
    rule: Rule
    names: Mapping[str, tuple[str, str]]  # A's and B's own, of every tensor that is compared
    losses: tuple[str, ...]
    place: ScriptPlace | None = None
    max_loss_gap: float | None = None
    not_seen: tuple[str, ...] = ()  # what one side lacks, a sentence each
    left_out: tuple[str, ...] = ()  # what both have and cannot be compared
    notes: tuple[str, ...] = ()
    twins: tuple[int, int] = (0, 0)  # of each side
    short_twins: tuple[int, int] = (0, 0)
    again: bool = False  # whether each was run once more
    unstable: tuple[Unstable, ...] = ()
    diverged_at: int | None = None  # the step at which both runs are not finite
    final_losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.verdict == "agree"

    def __repr__(self) -> str:
        if self.place is not None:
            causes = "".join(f"; likely {cause}" for cause in self.place.causes[:1])
            return f"the {self.dtype} runs diverge: {self.place.message}{causes}"
        if self.verdict == "diverged":
            return f"both {self.dtype} runs blow up at step {self.diverged_at}; before, they agree"
        return f"the runs agree: {self.dtype}, {self.steps} steps"

    @property
    def score(self) -> float:
        """The largest share of a bound that was used; 1 is all of it."""
        return max((check.bound_usage for check in (*self.checks, *self.windows)), default=0.0)

    def with_notes(self, *notes: str) -> ScriptComparison:
        return replace(self, notes=(*self.notes, *notes))

    def to_json(self) -> dict[str, object]:
        """One entry of report.json's `precisions`."""
        return {
            "dtype": self.dtype,
            "steps": self.steps,
            "verdict": self.verdict,
            "max_abs_loss_gap": finite(self.max_loss_gap),
            "score": finite(self.score),
            "bound": dict(self.rule),
            "first_divergence": self.place and self.place.to_json(),
            "ladder": [check.to_json() for check in self.checks],
            "stretches": [check.to_json() for check in self.windows],
            "losses": list(self.losses),
            "final_losses": {
                name: [finite(value) for value in pair] for name, pair in self.final_losses.items()
            },
            "twins": list(self.twins),
            "beginners": list(self.short_twins),
            "not_seen": list(self.not_seen),
            "left_out": list(self.left_out),
            "notes": list(self.notes),
            "not_reproducible": [each.message for each in self.unstable],
            "diverged_at": self.diverged_at,
        }
