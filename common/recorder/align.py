"""Two recordings in one layout: the records that the verdict compares, in A's names."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lockstep.common.protocol import Arrays, split_slot
from lockstep.common.recorder.layouts import Layout, find_layout
from lockstep.common.recorder.matched import Match, Matching
from lockstep.common.recorder.modules import components, corresponding, layer_of
from lockstep.common.recorder.recording import Recording, fingerprint, means
from lockstep.common.runs.record import FIRST_STEPS, Record

ROOT = "output"  # the recorders' name of what the whole network returns
A, B = 0, 1
Side = int  # A or B
Names = dict[str, tuple[str, str]]  # by canonical name, A's and B's own


@dataclass(frozen=True)
class ScriptRecord(Record):
    """A recording under A's names and in A's layout. `backend` is the side's name; `loss` is the
    first of the losses. Numbers are float64, or int64 where they are whole ones."""

    taken: int = 0  # steps
    losses: Arrays = field(default_factory=dict)  # float64 (steps,) by name
    batches: Arrays = field(default_factory=dict)  # int64 (steps,): digests, by array of a batch
    results: Arrays = field(default_factory=dict)
    # The tensors in A's order of definition, and the layer that holds each parameter.
    order: dict[str, int] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.taken

    @property
    def first_nonfinite(self) -> int | None:
        """The first step at which a loss is not finite."""
        bad = [np.flatnonzero(~np.isfinite(values)) for values in self.losses.values()]
        return min((int(steps[0]) for steps in bad if len(steps)), default=None)

    def until(self, step: int) -> ScriptRecord:
        earlier = super().until(step)
        assert isinstance(earlier, ScriptRecord)
        return dataclasses.replace(
            earlier,
            taken=min(self.taken, step),
            losses={name: values[:step] for name, values in self.losses.items()},
            batches={name: values[:step] for name, values in self.batches.items()},
        )


@dataclass
class Alignment:
    """How two recordings, and their twins, become records of one layout.

    The layouts of activations, batches and results are found by value in the two runs; twins use
    the same.
    """

    sides: tuple[str, str]
    runs: tuple[Recording, Recording]
    matches: Sequence[Match]
    parameters: Names
    layouts: dict[tuple[str, str], Layout] = field(default_factory=dict)  # by group and name
    # Canonical names of activations whose correspondence follows from the parameters of a module
    # alone; those of `Run.tap` were named by the user.
    inferred: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # a sentence each
    # What is not compared, and the sides of which each rank has its own: `_is_of_one_rank`.
    of_ranks: dict[str, set[Side]] = field(default_factory=dict)
    # Activations ("forward"), arrays of a batch ("data"), "losses" and "results".
    groups: dict[str, Names] = field(default_factory=dict)

    @classmethod
    def of(
        cls, a: Recording, b: Recording, matching: Matching, sides: tuple[str, str]
    ) -> Alignment:
        """The alignment of two runs.

        Args:
            sides: what the two are called.
        """
        found = cls(sides, (a, b), matching.matches, {m.name: (m.a, m.b) for m in matching.matches})
        found._pair_forward()
        found._pair_batches()
        found._pair("losses", _losses(a), _losses(b))
        found._pair("results", a.results, b.results)
        for match in matching.matches:
            found._is_of_one_rank("backward", (match.a, match.b), "gradients")
        return found

    @property
    def names(self) -> Names:
        """Of every tensor that is compared."""
        groups = ("results", "losses", "data", "forward")
        return {n: own for g in groups for n, own in self.groups[g].items()} | self.parameters

    def record(self, recording: Recording, side: Side) -> ScriptRecord:
        """A run or a twin of one side."""
        taken = recording.steps
        losses = {
            name: recording.series[own[side]]
            for name, own in self.groups["losses"].items()
            if own[side] in recording.series
        }
        order = {match.name: place for place, match in enumerate(self.matches)}
        layers = [name for name in self.runs[A].layers if name in self.groups["forward"]]
        holders = {m.name: layer_of(m.a, layers) or "" for m in self.matches}
        return ScriptRecord(
            backend=self.sides[side],
            dtype=recording.dtype,
            twin=recording.twin,
            config={},
            data={},
            environment=recording.environment,
            source=recording.source,
            loss=next(iter(losses.values()), np.zeros(taken)),
            gradient_norm=np.zeros(0),
            lr=self._rate(recording),
            predictions=np.zeros(0, np.int64),
            test_loss=0.0,
            seconds=recording.seconds,
            steps_per_second=taken / recording.seconds if recording.seconds else 0.0,
            weights=self._tensors("weights", recording, side),
            first_steps=self._first_steps(recording, side),
            layers=layers,
            rank_differences=recording.rank_differences or [],
            parameter_history=self._history(recording, side),
            final=self._tensors("final", recording, side),
            taken=taken,
            losses=losses,
            batches=self._digests(recording, side),
            results=dict(self._laid_out("results", recording.results, side)),
            order=order,
            holders=holders,
        )

    # --- What corresponds to what

    def _pair_forward(self) -> None:
        """Activations: those of one name, then those of modules with the same parameters."""
        a, b = self.runs
        ours, theirs = (_of_stage(run, "forward") for run in self.runs)
        modules = [[n for n in run.layers if n != ROOT] for run in self.runs]
        pairs = corresponding(modules[A], modules[B], self.parameters)
        same = {name: name for name in ours if name in theirs and name not in pairs}
        held = {name for name in same if layer_of_any(name, a) or layer_of_any(name, b)}
        pairs = {name: (pairs | same)[name] for name in ours if name in pairs | same}
        found = self._add("forward", pairs, ours, theirs)
        self.inferred = [n for n in found if n not in same or n in held or n == ROOT]

    def _pair_batches(self) -> None:
        """Arrays of a batch: those of one name if they can be the same, else by their digests."""
        digests = [run.batch_digests for run in self.runs]
        free = dict.fromkeys(digests[B])
        pairs: dict[str, str] = {}
        for name, values in digests[A].items():
            alike = [n for n in free if _same_entries(values, digests[B][n])]
            chosen = name if name in alike else next(iter(alike), name)
            if chosen in free:
                pairs[name] = chosen
                del free[chosen]
        ours, theirs = (_of_stage(run, "data") for run in self.runs)
        self._add("data", pairs, ours, theirs)

    def _pair(self, group: str, ours: Arrays, theirs: Arrays) -> None:
        """Arrays of one name; if each side has one more, these two."""
        pairs = {name: name for name in ours if name in theirs}
        rest = [[name for name in side if name not in pairs] for side in (ours, theirs)]
        if group == "losses" and [len(names) for names in rest] == [1, 1]:
            pairs[rest[A][0]] = rest[B][0]
        if group == "losses":
            named = {name: (name, other) for name, other in pairs.items()}
            self.groups[group] = {
                name: own
                for name, own in named.items()
                if not self._is_of_one_rank(group, own, name)
            }
            return
        self._add(group, pairs, ours, theirs)

    def _add(self, group: str, pairs: Mapping[str, str], ours: Arrays, theirs: Arrays) -> list[str]:
        """Keep the pairs that have a layout in common; the others are listed."""
        kept: Names = {}
        for name, other in pairs.items():
            if name not in ours or other not in theirs:
                continue
            called = "activations" if group == "forward" else name
            if self._is_of_one_rank(group, (name, other), called):
                continue
            a, b = ours[name], theirs[other]
            layout = None
            if not self._is_fingerprint(group, name, A) and not self._is_fingerprint(
                group, other, B
            ):
                layout = find_layout(a, b)
                if layout is None and not (group == "data" and _other_batch_size(a, b)):
                    shown = name if name == other else f"{name} and {other}"
                    self.left_out.append(
                        f"{group}: {shown}: the shapes {a.shape} and {b.shape} have no order of "
                        "axes in common"
                    )
                    continue
            if layout is not None:
                self.layouts[group, name] = layout
            kept[name] = (name, other)
        self.groups[group] = kept
        return list(kept)

    def _is_of_one_rank(self, group: str, own: tuple[str, str], called: str) -> bool:
        """Whether one of the runs has this of rank 0 alone, such as its rows, and the other has not
        the same: that of as many processes. If so, it is noted."""
        local = {side for side in (A, B) if f"{group}/{own[side]}" in self.runs[side].local}
        if not local or (len(local) == 2 and self.runs[A].processes == self.runs[B].processes):
            return False
        self.of_ranks.setdefault(called, set()).update(local)
        return True

    # --- Arrays of one side, in the common layout

    def _tensors(self, group: str, recording: Recording, side: Side) -> Arrays:
        return dict(self._matched(group, "", getattr(recording, group), recording, side))

    def _history(self, recording: Recording, side: Side) -> Arrays:
        history = recording.parameter_history
        prefixes = dict.fromkeys(f"{key.partition('/')[0]}/" for key in history)
        return {
            f"{prefix}{name}": array
            for prefix in prefixes
            for name, array in self._matched("parameter_history", prefix, history, recording, side)
        }

    def _first_steps(self, recording: Recording, side: Side) -> Arrays:
        arrays, found = recording.first_steps, {}
        for step in range(FIRST_STEPS):
            for stage in ("data", "forward", "loss"):
                own = {
                    key.split("/", 2)[2]: array
                    for key, array in arrays.items()
                    if key.startswith(f"{step}/{stage}/")
                }
                group = "losses" if stage == "loss" else stage
                for name, array in self._laid_out(group, own, side, f"{step}/{stage}/"):
                    found[f"{step}/{stage}/{name}"] = array
            for prefix in self._prefixes(arrays, step, "gradients" not in self.of_ranks):
                for name, array in self._matched("first_steps", prefix, arrays, recording, side):
                    found[f"{prefix}{name}"] = array
        return found

    @staticmethod
    def _prefixes(arrays: Arrays, step: int, gradients: bool) -> Iterator[str]:
        """What stands before a parameter's name: its gradient, each slot, and the parameter."""
        if gradients:
            yield f"{step}/backward/"
        start = f"{step}/update/"
        tensors = (key.removeprefix(start) for key in arrays if key.startswith(start))
        slots = dict.fromkeys(slot for slot, _ in map(split_slot, tensors) if slot)
        yield from (f"{start}{slot} of " for slot in slots)
        yield start

    def _matched(
        self, group: str, prefix: str, arrays: Arrays, recording: Recording, side: Side
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Of the matched tensors, those that a side has; both as fingerprints where one is."""
        for match in self.matches:
            own = (match.a, match.b)
            array = arrays.get(prefix + own[side])
            if array is None:
                continue
            key = [f"{group}/{prefix}{name}" for name in own]
            kept = [key[s] in self.runs[s].fingerprints for s in (A, B)]
            is_kept = f"{group}/{prefix}{own[side]}" in recording.fingerprints
            if not any(kept) and not is_kept:
                if (taken := self._taken(match, array, side)) is not None:
                    yield match.name, in_common_type(taken)
            elif is_kept or match.name == match.a:  # not of a piece
                yield match.name, means(array if is_kept else fingerprint(array))

    def _taken(self, match: Match, array: np.ndarray, side: Side) -> np.ndarray | None:
        """What a match names of an array of its parameter's shape; None for another shape, such as
        that of a slot that is not kept entry by entry."""
        run, own = self.runs[side], (match.a, match.b)[side]
        whole = f"weights/{own}" not in run.fingerprints and own in run.weights
        if whole and run.weights[own].shape != array.shape:
            return None
        return match.of_a(array) if side == A else match.of_b(array)

    def _laid_out(
        self, group: str, arrays: Arrays, side: Side, prefix: str = ""
    ) -> Iterator[tuple[str, np.ndarray]]:
        for name, own in self.groups[group].items():
            array = arrays.get(own[side])
            if array is None:
                continue
            marked = [self._is_fingerprint(group, n, s) for s, n in ((A, own[A]), (B, own[B]))]
            if any(marked):
                yield name, means(array if marked[side] else fingerprint(array))
                continue
            layout = self.layouts.get((group, name))
            if side == B and layout is not None and array.size == np.prod(layout.shape):
                array = layout.of(array)
            yield name, in_common_type(array)

    def _is_fingerprint(self, group: str, name: str, side: Side) -> bool:
        stage = {"losses": "loss"}.get(group, group)
        marks = self.runs[side].fingerprints
        return any(f"first_steps/{step}/{stage}/{name}" in marks for step in range(FIRST_STEPS))

    def _digests(self, recording: Recording, side: Side) -> Arrays:
        """Of each array of a batch: the digest of its rows where both have the same rows, else the
        one that no order of the entries changes."""
        found = {}
        for name, own in self.groups["data"].items():
            layout = self.layouts.get(("data", name))
            shapes = [_of_stage(r, "data")[n].shape for r, n in zip(self.runs, own, strict=True)]
            rows = layout is None or (layout.keeps_rows and shapes[A][:1] == shapes[B][:1])
            if own[side] in recording.batch_digests:
                found[name] = recording.batch_digests[own[side]][:, 0 if rows else 1]
        return found

    def _rate(self, recording: Recording) -> np.ndarray:
        """float64 (steps,); empty unless both know the learning rate of every step."""
        known = all(
            "lr" in run.series and bool(np.isfinite(run.series["lr"]).all()) for run in self.runs
        )
        return recording.series.get("lr", np.zeros(0)) if known else np.zeros(0)


def align(
    a: Recording, b: Recording, matching: Matching, sides: tuple[str, str] | None = None
) -> tuple[ScriptRecord, ScriptRecord]:
    """Two recordings as records of one layout: B's tensors under A's names and in A's layout.

    What one side lacks is in neither record.
    """
    alignment = Alignment.of(a, b, matching, sides or (a.name, b.name))
    return in_common(alignment.record(a, A), alignment.record(b, B))


def in_common(first: ScriptRecord, second: ScriptRecord) -> tuple[ScriptRecord, ScriptRecord]:
    """Both without the tensors that the other lacks, and each tensor of one dtype in both."""
    one, other = _like(first, second), _like(second, first)
    return _like(one, other), other


def like(record: ScriptRecord, run: ScriptRecord) -> ScriptRecord:
    """A twin with the tensors and the dtypes of its run."""
    return _like(record, run)


SHARED = ("weights", "first_steps", "parameter_history", "final", "results", "batches", "losses")


def _like(record: ScriptRecord, other: ScriptRecord) -> ScriptRecord:
    groups: dict[str, Arrays] = {}
    for group in SHARED:
        arrays, theirs = getattr(record, group), getattr(other, group)
        groups[group] = {
            name: array if array.dtype == theirs[name].dtype else array.astype(np.float64)
            for name, array in arrays.items()
            if name in theirs
        }
    return dataclasses.replace(record, **groups)  # pyright: ignore[reportArgumentType]


def in_common_type(array: np.ndarray) -> np.ndarray:
    """Whole numbers as int64, all others as float64: 1 is 1 whatever holds it."""
    return array.astype(np.int64 if array.dtype.kind in "biu" else np.float64)


def layer_of_any(module: str, recording: Recording) -> bool:
    """Whether a module of this name holds parameters."""
    path = components(module)
    return any(components(name)[: len(path)] == path for name in recording.weights)


def _losses(recording: Recording) -> Arrays:
    return {name: recording.series[name] for name in recording.losses}


def _of_stage(recording: Recording, stage: str) -> Arrays:
    """The first array of each name of a stage."""
    found: Arrays = {}
    for step in range(FIRST_STEPS):
        for key, array in recording.first_steps.items():
            if key.startswith(f"{step}/{stage}/"):
                found.setdefault(key.split("/", 2)[2], array)
    return found


def _same_entries(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return bool(len(ours) and len(theirs) and ours[0, 1] == theirs[0, 1])


def _other_batch_size(a: np.ndarray, b: np.ndarray) -> bool:
    return a.ndim == b.ndim > 0 and a.shape[1:] == b.shape[1:]
