"""The typed result of a comparison; `to_json` gives an entry of report.json's `lenses`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

from lockstep.common.model.sources import Excerpt
from lockstep.common.runs.record import Segment
from lockstep.common.verdict.check import BATCH, MEAN, Check, finite
from lockstep.common.verdict.distances import scalar_gap
from lockstep.common.verdict.failures import Failures
from lockstep.common.verdict.statistics import ClassDifference

# "diverged": both runs reach a loss or a gradient norm that is not finite, at the same step, or,
# below float64, a loss that rounding decides; they agree up to it.
# "undecided": the runs differ, and the twins that tell rounding from a fault were not trained, since
# the command was stopped.
Verdict = Literal["agree", "disagree", "diverged", "undecided", "single"]


class Rule(TypedDict, total=False):
    """How the bounds were set: a sentence, and the constants in it."""

    rule: str
    relative: float
    separation: float
    separation_images: float
    floor_ulp: float
    flip_share: float
    images: int
    twins: int


@dataclass(frozen=True)
class Divergence:
    """The first check that two runs fail."""

    step: int
    stage: str
    tensor: str
    gap: float
    bound: float
    names: tuple[str, ...]  # of the two backends
    values: tuple[float, float] | None = None  # of both runs
    measure: str = "largest"  # of the differences of a tensor's entries
    sides: tuple[str, str] | None = None  # whose values they are, if not the two backends'

    @property
    def message(self) -> str:
        """One line: stage, step, tensor, both values, and the gap with its bound."""
        text = f"{self.stage}: step {self.step}: "
        if self.tensor != self.stage:
            text += f"{self.tensor}: "
        if self.values:
            shown = zip(self.sides or self.names, format_distinct(*self.values), strict=True)
            text += " ".join(f"{name}={value}" for name, value in shown) + ", "
        if self.tensor == BATCH:
            return f"{self.stage}: step {self.step}: the two runs trained on different batches"
        gap = "gap" if self.measure == "largest" else f"{self.measure} gap"
        return text + f"{gap} {self.gap:.1e} > {self.bound:.1e}"

    def to_json(self) -> dict[str, object]:
        values: tuple[float | None, float | None] = self.values or (None, None)
        if self.sides is not None:
            values = (None, None)
        return {
            "step": self.step,
            "stage": self.stage,
            "tensor": self.tensor,
            "gap": finite(self.gap),
            "bound": finite(self.bound),
            **{name: finite(value) for name, value in zip(self.names, values, strict=True)},
            "message": self.message,
        }


def divergence(check: Check, names: Sequence[str]) -> Divergence:
    """Where two runs diverge: `check`, which failed.

    Args:
        names: of the two backends.
    """
    # The check of a range of steps has the gap of the whole range; this names that of its step.
    at_step = check.start is not None and not check.tensor.startswith(MEAN)
    gap = scalar_gap(*check.values) if at_step and check.values is not None else check.gap
    return Divergence(
        check.step,
        check.stage,
        check.tensor,
        gap,
        check.bound,
        tuple(names),
        check.values,
        check.measure,
        check.sides,
    )


@dataclass(frozen=True)
class Entry:
    """One entry of a tensor in both runs."""

    index: tuple[int, ...]
    values: tuple[float, float]


@dataclass(frozen=True)
class Location:
    """Where two runs diverge, what the tensor there looks like, and what usually causes it."""

    divergence: Divergence
    method: str  # how it was found
    pattern: str | None  # how one tensor is made of the other, where that can be seen
    worst_entries: tuple[Entry, ...]
    causes: tuple[str, ...]  # the likeliest first
    failures: Failures | None = None  # at that step and stage, this tensor's included
    # By backend, what its module calls the tensor, where the two differ.
    own_names: Mapping[str, str] = field(default_factory=dict)
    fixes: tuple[str, ...] = ()  # code that sets right what usually causes it
    # By backend, the lines of its network's source that are about that layer.
    sources: Mapping[str, Excerpt] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        names = self.divergence.names
        found: dict[str, object] = {
            **self.divergence.to_json(),
            "how": self.method,
            "pattern": self.pattern,
            "offenders": [
                {"index": list(entry.index)}
                | {name: finite(value) for name, value in zip(names, entry.values, strict=True)}
                for entry in self.worst_entries
            ],
            "causes": list(self.causes),
            "fixes": list(self.fixes),
        }
        if self.failures is not None:
            found |= dataclasses.asdict(self.failures)
        if self.own_names:
            found["own_names"] = dict(self.own_names)
        if self.sources:
            found["sources"] = {
                name: {"file": each.file, "lines": [list(line) for line in each.lines]}
                for name, each in self.sources.items()
            }
        return found


@dataclass(frozen=True)
class Growth:
    """How the gap between the losses of two float64 runs grew beyond what is compared without
    twins, and the steps that were replayed: from one state, each of them agreed."""

    start: int  # the first step with a gap ...
    first: float  # ... which is this, nats
    stop: int  # the step with the largest ...
    largest: float  # ... which is this
    factor: float  # how many times the largest so far grew in one step, at most
    replayed: tuple[int, ...]
    beyond: int | None = None  # the step from which on the gap exceeds the twins' bound


@dataclass(frozen=True)
class RunSummary:
    """The figures that a report gives of one run."""

    final_loss: float
    test_loss: float
    accuracy: float | None  # None, and no classes below: nothing was classified
    class_accuracy: dict[str, float | None]  # None for a class without test images
    steps_per_second: float
    seconds: float
    nonfinite_step: int | None  # where the run ended early
    segments: list[Segment]  # of a run that was resumed


@dataclass(frozen=True)
class TwinSummary:
    """How far one twin is from its run."""

    max_loss_gap: float
    predictions_equal: int | None


@dataclass(frozen=True)
class TensorError:
    """How far a gradient of the first step is from float64's, as a share of its largest entry."""

    tensor: str
    share: float
    other: float  # of the other side


@dataclass(frozen=True)
class Arithmetic:
    """Two programs that are one in float64, and compute differently in a lower precision."""

    off: Mapping[str, tuple[TensorError, ...]]  # by backend, the largest error first


@dataclass(frozen=True, repr=False)
class Comparison:
    """Two runs compared in one precision, or one run described. It is true if the runs agree, and
    shown as the place where they diverge if not."""

    dtype: str
    steps: int
    verdict: Verdict
    runs: dict[str, RunSummary]  # by backend
    predictions_total: int
    rule: Rule
    checks: tuple[Check, ...] = ()  # at one moment of the run
    windows: tuple[Check, ...] = ()  # over a range of steps
    first_divergence: Divergence | None = None
    score: float | None = None  # the largest share of a bound that was used; 1 is all of it
    max_loss_gap: float | None = None
    predictions_equal: int | None = None
    twins: Mapping[str, tuple[TwinSummary, ...]] | None = None  # by backend
    short_twins: Mapping[str, int] | None = None  # by backend, how many
    class_differences: Mapping[str, ClassDifference] | None = None
    location: Location | None = None
    # By backend, the first step at which the same run again did not give the same bits.
    not_reproducible: Mapping[str, int] = field(default_factory=dict)
    diverged_at: int | None = None  # the step at which both runs diverge
    # By backend, a user's layers that Lockstep exchanged for its own.
    exchanged: Mapping[str, list[str]] = field(default_factory=dict)
    # By backend, slots of a pair's own optimizer that the other backend's does not have.
    unmatched_slots: Mapping[str, list[str]] = field(default_factory=dict)
    arithmetic: Arithmetic | None = None  # what float64 says of a lower precision that disagrees
    growth: Growth | None = None  # where float64 agrees because of twins alone

    def __bool__(self) -> bool:
        return self.verdict == "agree"

    def __repr__(self) -> str:
        if self:
            return f"the runs agree: {self.dtype}, {self.steps} steps"
        if self.location is not None:
            found = self.location
            causes = "".join(f"; likely {cause}" for cause in found.causes[:1])
            return (
                f"the {self.dtype} runs diverge: {found.divergence.message} "
                f"({found.method}){causes}"
            )
        if self.verdict == "undecided":
            return f"not decided without twins: {self.dtype}, {self.steps} steps"
        if self.first_divergence is not None:
            return f"the {self.dtype} runs diverge: {self.first_divergence.message}"
        if self.verdict == "diverged":
            return (
                f"both {self.dtype} runs blow up at step {self.diverged_at}, where the loss is not "
                "finite, or so large that rounding decides it; up to there they agree"
            )
        return f"one run: {self.dtype}, {self.steps} steps"

    @property
    def no_power_from(self) -> int | None:
        """The step from which on no check of the training could fail; None if one could to the
        end."""
        starts = [check.start for check in self.windows if not check.has_power]
        powerful = [
            check.stop for check in self.windows if check.has_power and check.tensor != "lr"
        ]
        last = max((stop for stop in powerful if stop is not None), default=0)
        return min((start for start in starts if start is not None and start >= last), default=None)

    @property
    def nonfinite_step(self) -> int | None:
        """The step whose loss is not finite, if it is the same one in all runs."""
        return common_nonfinite_step(run.nonfinite_step for run in self.runs.values())

    def to_json(self) -> dict[str, object]:
        """One entry of report.json's `lenses`."""
        runs = self.runs
        twins = self.twins or {}
        found: dict[str, object] = {
            "dtype": self.dtype,
            "steps": self.steps,
            "broken": {name: run.nonfinite_step for name, run in runs.items()},
            "legs": {name: run.segments for name, run in runs.items()},
            "verdict": self.verdict,
            "max_abs_loss_gap": finite(self.max_loss_gap),
            "bound": dict(self.rule),
            "first_divergence": self.first_divergence and self.first_divergence.to_json(),
            "ladder": [check.to_json() for check in self.checks],
            "stretches": [check.to_json() for check in self.windows],
            "final_loss": {name: finite(run.final_loss) for name, run in runs.items()},
            "test_loss": {name: finite(run.test_loss) for name, run in runs.items()},
            "accuracy": {name: run.accuracy for name, run in runs.items()},
            "per_class_accuracy": {name: run.class_accuracy for name, run in runs.items()},
            "predictions_equal": self.predictions_equal,
            "predictions_total": self.predictions_total,
            "twins": {
                name: [
                    {
                        "max_abs_loss_gap": finite(twin.max_loss_gap),
                        "predictions_equal": twin.predictions_equal,
                    }
                    for twin in twins.get(name, ())
                ]
                for name in runs
            },
            "steps_per_second": {name: finite(run.steps_per_second) for name, run in runs.items()},
            "seconds": {name: finite(run.seconds) for name, run in runs.items()},
        }
        if self.verdict != "single":
            found["score"] = finite(self.score)
            found["diverged_at"] = self.diverged_at
            found["no_power_from"] = self.no_power_from
            found["not_reproducible"] = dict(self.not_reproducible)
            found["beginners"] = dict(self.short_twins or {})
            found["class_differences"] = dict(self.class_differences or {})
        if self.location is not None:
            found["located"] = self.location.to_json()
        if self.exchanged:
            found["exchanged"] = dict(self.exchanged)
        if self.unmatched_slots:
            found["unmatched_slots"] = dict(self.unmatched_slots)
        if self.arithmetic is not None:
            found["arithmetic"] = dataclasses.asdict(self.arithmetic)
        if self.growth is not None:
            found["growth"] = dataclasses.asdict(self.growth)
        return found


def common_nonfinite_step(steps: Iterable[int | None]) -> int | None:
    """The step at which all runs ended early, if it is the same one.

    Args:
        steps: per run, the step whose loss is not finite; None if there is none.
    """
    found = set(steps)
    return found.pop() if len(found) == 1 else None


def format_distinct(a: float, b: float) -> tuple[str, str]:
    """Both values, in as few digits as show a difference."""
    for digits in range(6, 18):
        texts = f"{a:.{digits}g}", f"{b:.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts
