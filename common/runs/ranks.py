"""One run trained by several processes: each is a rank, and this process, their leader, is none.

The leader trains, records and judges as ever: its backend gives each call to all ranks at once, and
returns rank 0's answer. We start the ranks ourselves, as torchrun does, since a parent can then say
which of them died: the others wait for it in a collective, without end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from lockstep.common.config import FRAMEWORKS
from lockstep.common.protocol import (
    Arrays,
    Backend,
    Dropout,
    Evaluation,
    Metrics,
    RankDifference,
    Snapshot,
)
from lockstep.common.runs.rank_group import RankGroup, StartRanks, start_here
from lockstep.common.runs.rank_process import BuildRank, Reference
from lockstep.common.system.interrupt import SignalHandler

MAX_DIFFERENCES = 8  # tensors of one state that are recorded


class Kept:
    """What the ranks hold for the leader: a state, a data set, or batches.

    Args:
        shape: of batches: that of their labels.
        path: of an entry within `owner`.
    """

    number: int

    def __init__(
        self,
        shape: tuple[int, ...] = (),
        path: tuple[int, ...] = (),
        owner: Kept | None = None,
    ) -> None:
        self.shape, self.path, self.owner = shape, path, owner
        if owner is not None:
            self.number = owner.number

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Kept:
        owner = self if self.owner is None else self.owner
        return Kept(self.shape[1:], (*self.path, index), owner)

    def reference(self) -> Reference:
        return Reference(self.number, self.path)


Batch = np.ndarray | Kept


class RankedBackend:
    """A backend whose steps are taken by all ranks of a group, as `lockstep.common.protocol.Backend`.

    Args:
        local: a backend of one process, which knows the network; it does not train.
    """

    def __init__(self, local: Backend, group: RankGroup, build: BuildRank, dtype: str) -> None:
        self.local, self.group = local, group
        self.name, self.device = local.name, local.device
        self._number = group.new_number(self)
        group.call("build", build, local.name, dtype, group.count, self._number)

    # --- The network

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.local.shapes()

    def native_names(self) -> dict[str, str]:
        return self.local.native_names()

    def layer_kinds(self) -> dict[str, str]:
        return self.local.layer_kinds()

    def module_classes(self) -> tuple[type, ...]:
        return self.local.module_classes()

    def dropout_layers(self) -> dict[str, Dropout]:
        return self.local.dropout_layers()

    # --- Training

    def init(self, snapshot: Snapshot) -> Kept:
        return self._keep("init", snapshot._replace(differences=()))

    def export(self, state: Kept) -> Snapshot:
        """Rank 0's state, and where another rank's is not the same."""
        answers = self._call("export", state)
        snapshot, expected = answers[0]
        found = [
            self._difference(snapshot.step, rank, tensor)
            for rank, (_, theirs) in enumerate(answers[1:], 1)
            for tensor in [name for name in expected if theirs.get(name) != expected[name]][
                :MAX_DIFFERENCES
            ]
        ]
        return snapshot._replace(differences=tuple(each for each in found if each["gap"] != 0))

    def train_step(self, state: Kept, images: Batch, labels: Batch) -> tuple[Kept, Metrics]:
        return state, self._call("train_step", state, images, labels, keep=state.number)[0]

    def train_steps(self, state: Kept, images: Batch, labels: Batch) -> tuple[Kept, Metrics]:
        return state, self._call("train_steps", state, images, labels, keep=state.number)[0]

    def upload(self, images: np.ndarray, labels: np.ndarray) -> Kept:
        return self._keep("upload", images, labels)

    def batches(self, uploaded: Kept, indices: np.ndarray) -> tuple[Kept, Kept]:
        kept = self._keep("batches", uploaded, indices)
        images, labels = (Kept(indices.shape, (part,), kept) for part in (0, 1))
        return images, labels

    def download(self, images: Batch, labels: Batch) -> tuple[np.ndarray, np.ndarray]:
        return self._call("download", images, labels)[0]

    def masks(self, state: Kept, shape: Sequence[int]) -> Arrays:
        return self._call("masks", state, tuple(shape))[0]

    # --- Looking without touching

    def evaluate(self, state: Kept, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        return self._call("evaluate", state, images, labels)[0]

    def probe(self, state: Kept, images: Batch, labels: Batch) -> Arrays:
        return self._call("probe", state, images, labels)[0]

    def describe(self) -> dict[str, object]:
        return self._call("describe")[0] | {"processes": self.group.count}

    # --- Calls

    def _keep(self, method: str, *arguments: object) -> Kept:
        kept = Kept()
        kept.number = self.group.new_number(kept)
        self._call(method, *arguments, keep=kept.number)
        return kept

    def _call(self, method: str, *arguments: object, keep: int = 0) -> list[Any]:
        references = [each.reference() if isinstance(each, Kept) else each for each in arguments]
        forget = self.group.unwanted()
        return self.group.call("call", self._number, method, references, keep, forget)

    def _difference(self, step: int, rank: int, tensor: str) -> RankDifference:
        ours, theirs = (self.group.ask(number, "tensor", tensor) for number in (0, rank))
        gap = None
        if theirs is not None and theirs.shape == ours.shape:
            if np.array_equal(ours, theirs, equal_nan=True):  # zeros of either sign
                gap = 0.0
            else:
                found = float(np.max(np.abs(ours.astype(np.float64) - theirs.astype(np.float64))))
                gap = found if np.isfinite(found) else None
        return {"step": step, "rank": rank, "tensor": tensor, "gap": gap}


class Ranks:
    """Builds backends of one process or of several, as a context manager that ends these.

    Args:
        build: builds a backend of one process. The attribute `build_rank` may be set to another
            function, which builds the next ones in the same processes.
        count: processes of each backend.
        hint: how to go on when a rank has failed.
        start: starts the ranks of a framework.
        signals: where a signal to a rank is passed on to.
    """

    def __init__(
        self,
        build: BuildRank,
        count: int,
        hint: str,
        start: StartRanks | None = None,
        signals: SignalHandler | None = None,
    ) -> None:
        self.build_rank, self.count, self.hint = build, count, hint
        self.start = start_here if start is None else start
        self.signals = SignalHandler() if signals is None else signals
        self.counts: dict[str, int] = {}  # by backend, where it is not `count`
        self.groups: dict[str, RankGroup] = {}

    def __reduce__(self) -> tuple[object, ...]:
        """Another process that builds backends has no ranks yet, and handles signals itself."""
        return Ranks, (self.build_rank, self.count, self.hint), {"counts": self.counts}

    def build(self, name: str, dtype: str, concurrent_processes: int = 1) -> Backend:
        """As `lockstep.backends.build`."""
        count = self.counts.get(name, self.count)
        local = self.build_rank(name, dtype, max(concurrent_processes, count))
        if count == 1:
            return local
        if name not in self.groups:
            ranks = self.start(name, count)
            self.groups[name] = RankGroup(
                FRAMEWORKS[name], ranks, self.hint, self.signals.receive_for_a_rank
            )
        return RankedBackend(local, self.groups[name], self.build_rank, dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for group in self.groups.values():
            if not any(error):
                group.leave()
            group.stop()
