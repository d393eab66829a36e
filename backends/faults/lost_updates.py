"""Faults of single updates: lost, or made without a part of the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lockstep.backends.faults.registry import LATE, SetAttr, fault
from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.protocol import Metrics, Snapshot

if TYPE_CHECKING:
    from lockstep.backends.flax_backend.state import State


def after_each_step(patch: SetAttr, change: Callable[[Snapshot, Snapshot], Snapshot]) -> None:
    """Put another state in the place of the one after a step, given those before and after it."""
    from lockstep.backends.faults.frameworks import FlaxBackend

    train_steps = FlaxBackend.train_steps

    def replaced(
        self: FlaxBackend, state: State, images: np.ndarray, labels: np.ndarray
    ) -> tuple[State, Metrics]:
        series = []
        for number in range(len(labels)):
            one = slice(number, number + 1)
            before = self.export(state)
            state, metrics = train_steps(self, state, images[one], labels[one])
            after = self.export(state)
            if (changed := change(before, after)) is not after:
                state = self.init(changed)
            series.append(metrics)
        return state, Metrics(*map(np.concatenate, zip(*series, strict=True)))

    patch(FlaxBackend, "train_steps", replaced)


@fault("update", None, "an asynchronous update that is dropped", momentum=0.9)
def updates_lost_at_random(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """After step 10, one update in five is lost, at random."""
    generator = np.random.default_rng()

    def lose(before: Snapshot, after: Snapshot) -> Snapshot:
        if before.step <= 10 or generator.random() > 0.2:
            return after
        return after._replace(parameters=before.parameters, slots=before.slots)

    after_each_step(patch, lose)


@fault("update", None, "a step that a gradient scaler skips (torch.amp.GradScaler)", momentum=0.9)
def update_lost_once(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """One update late in the run is lost."""

    def lose(before: Snapshot, after: Snapshot) -> Snapshot:
        if before.step != LATE:
            return after
        return after._replace(parameters=before.parameters, slots=before.slots)

    after_each_step(patch, lose)


@fault("update", "fc2.kernel", "a parameter group that is frozen late in training")
def update_lost_in_one_layer(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """From step 30 on, one kernel is no longer updated."""

    def lose(before: Snapshot, after: Snapshot) -> Snapshot:
        if before.step < LATE:
            return after
        kept = {"fc2.kernel": before.parameters["fc2.kernel"]}
        return after._replace(parameters=after.parameters | kept)

    after_each_step(patch, lose)


@fault("update", "momentum of *", "a checkpoint without the optimizer's state", momentum=0.9)
def momentum_lost_once(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """After step 30 the momentum starts at zero again."""

    def lose(before: Snapshot, after: Snapshot) -> Snapshot:
        if before.step != LATE:
            return after
        return after._replace(
            slots={
                slot: {name: np.zeros_like(array) for name, array in arrays.items()}
                for slot, arrays in after.slots.items()
            }
        )

    after_each_step(patch, lose)
