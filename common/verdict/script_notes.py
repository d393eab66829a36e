"""What is said of two scripts besides the checks: what was not seen, what is not reproducible, what
is float32 in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lockstep.common.errors import shorten
from lockstep.common.protocol import STAGES, Arrays, split_slot
from lockstep.common.recorder.align import A, Alignment, B
from lockstep.common.recorder.matched import Matching
from lockstep.common.recorder.recording import Recording
from lockstep.common.runs.record import FIRST_STEPS
from lockstep.common.verdict.distances import magnitude, max_tensor_difference
from lockstep.common.verdict.script_comparison import Unstable

# --- What one side lacks

HINTS = {
    "activations": 'name some with run.tap("name", x)',
    "gradients": "give them to run.step(..., grads=grads)",
    "learning rate": "give it to run.step(..., lr=lr)",
}


def not_seen(alignment: Alignment) -> tuple[str, ...]:
    """What one of the scripts did not record, or neither did, a sentence each."""
    paired = [{own[side] for own in alignment.groups["data"].values()} for side in (A, B)]
    listed = [
        [what for what in _recorded(run) if what not in names]
        for run, names in zip(alignment.runs, paired, strict=True)
    ]
    seen = [set(each) for each in listed]
    found = []
    for what in dict.fromkeys([*listed[A], *listed[B]]):
        lacking = [name for name, has in zip(alignment.sides, seen, strict=True) if what not in has]
        found += [(side, what) for side in lacking]
    sentences = []
    for side in alignment.sides:
        if missing := [what for lacking, what in found if lacking == side]:
            hints = (f"{what} ({HINTS[what]})" if what in HINTS else what for what in missing)
            sentences.append(f"not seen on {side}: {shorten(hints)}")
    for what in ("gradients", "activations"):
        if not any(what in has for has in seen):
            sentences.append(f"not seen on either side: {what}")
    known = alignment.groups["forward"] or "activations" in alignment.of_ranks
    if all("activations" in has for has in seen) and not known:
        sentences.append(f"no activation corresponds to another: {HINTS['activations']}")
    return tuple(sentences)


def _recorded(run: Recording) -> Iterator[str]:
    """The kinds of things that a recording holds."""
    stages = {key.split("/", 2)[1] for key in run.first_steps}
    yield from (name for name in run.batch_digests)
    if "forward" in stages:
        yield "activations"
    yield from (f"loss {name!r}" for name in run.losses if name != "loss")
    if "loss" in run.losses:
        yield "loss"
    if "backward" in stages:
        yield "gradients"
    if "lr" in run.series:
        yield "learning rate"
    updates = (key.split("/", 2)[2] for key in run.first_steps if "/update/" in key)
    yield from dict.fromkeys(slot for slot, _ in map(split_slot, updates) if slot)
    if any(f"0/update/{name}" in run.first_steps for name in run.parameters):
        yield "parameters after a step"
    if run.final:
        yield "final parameters"
    yield from (f"result {name!r}" for name in run.results)


def unmatched(alignment: Alignment, matching: Matching) -> tuple[str, ...]:
    """The tensors that have no counterpart, a sentence per side."""
    found = zip(alignment.sides, (matching.unmatched_a, matching.unmatched_b), strict=True)
    return tuple(
        f"{len(names):,} of {side}'s tensors have no counterpart: {shorten(names)}"
        for side, names in found
        if names
    )


def of_one_rank(alignment: Alignment) -> Iterator[str]:
    """What rank 0 of several processes has of its own, and what follows for the losses."""
    if not alignment.of_ranks:
        return
    sides = [alignment.sides[side] for side in sorted(set().union(*alignment.of_ranks.values()))]
    losses = {name for run in alignment.runs for name in run.losses}
    hint = "; give run.step means over all ranks to have losses compared"
    yield (
        f"not compared, since each rank of {' and of '.join(sides)} has its own: "
        f"{shorten(alignment.of_ranks)}{hint * bool(losses & alignment.of_ranks.keys())}"
    )


# --- The rest


def notes_of(alignment: Alignment, dtypes: tuple[str, str]) -> Iterator[str]:
    """Sentences on the two runs of one precision."""
    for side, run in zip(alignment.sides, alignment.runs, strict=True):
        if run.processes > 1:
            equal = ", whose parameters are equal to the bit" * (run.rank_differences == [])
            yield f"{side} was run by {run.processes} processes{equal}"
        if run.pinned:
            yield f"{side} computes in float32 in its float64 run: {shorten(run.pinned)}"
        yield from (f"{side}: {note}" for note in run.notes)
        if run.fingerprints:
            yield (
                f"{side}: {len(run.fingerprints):,} tensors over the limit of the recording are "
                "compared by their means, norms and extremes"
            )
    if dtypes[A] != dtypes[B]:
        yield (
            f"{alignment.sides[A]} runs in {dtypes[A]} and {alignment.sides[B]} in {dtypes[B]}: "
            "the bounds are those of the coarser one"
        )


def first_change(side: str, run: Recording, again: Recording) -> Unstable | None:
    """Where the same run again was another one first; None if both are equal to the bit."""
    places = [*_of_groups(run, again), *_of_series(run, again)]
    order = {stage: place for place, stage in enumerate(STAGES)}
    places.sort(key=lambda p: (p.step, order[p.stage]))
    return next(iter([Unstable(side, *place.rest) for place in places]), None)


class _Place:
    """A tensor that is not the same the second time."""

    def __init__(self, step: int, stage: str, tensor: str, gap: float) -> None:
        self.step, self.stage = step, stage
        self.rest = (step, stage, tensor, gap)


def _of_groups(run: Recording, again: Recording) -> Iterator[_Place]:
    steps = min(run.steps, again.steps)
    for name, array in run.weights.items():
        yield from _changed(0, "weights", name, array, again.weights)
    for key, array in run.first_steps.items():
        step, stage, tensor = key.split("/", 2)
        if int(step) < min(steps, FIRST_STEPS):
            yield from _changed(int(step), stage, key, array, again.first_steps, tensor)
    if run.steps == again.steps:
        for key, array in run.parameter_history.items():
            step, _, name = key.partition("/")
            yield from _changed(int(step) - 1, "update", key, array, again.parameter_history, name)
        for name, array in run.results.items():
            yield from _changed(run.steps, "evaluate", name, array, again.results)


def _of_series(run: Recording, again: Recording) -> Iterator[_Place]:
    for group, stage in (("batch_digests", "data"), ("series", "loss")):
        ours, theirs = getattr(run, group), getattr(again, group)
        for name, values in ours.items():
            if name not in theirs:
                continue
            shared = min(len(values), len(theirs[name]))
            x, y = (np.ascontiguousarray(v[:shared]).view(np.int64) for v in (values, theirs[name]))
            unequal = (x != y).reshape(shared, -1).any(axis=1)
            if unequal.any():
                step = int(np.argmax(unequal))
                gap = 1.0 if group == "batch_digests" else _relative(values, theirs[name], step)
                yield _Place(step, "update" if name == "lr" else stage, name, gap)


def _relative(values: np.ndarray, others: np.ndarray, step: int) -> float:
    return abs(float(values[step] - others[step])) / (magnitude(values[: step + 1]) or 1.0)


def _changed(
    step: int, stage: str, key: str, array: np.ndarray, others: Arrays, tensor: str = ""
) -> Iterator[_Place]:
    other = others.get(key)
    if other is not None and array.tobytes() != other.tobytes():
        gap, _ = max_tensor_difference(array, other)
        yield _Place(step, stage, tensor or key, gap / (magnitude(array) or 1.0))
