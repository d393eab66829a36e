"""The log lines of a run, and who is told of its progress."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from lockstep.common.config import Config


class Observer(Protocol):
    """Gets the log lines and the progress of a run."""

    def line(self, text: str, /) -> None: ...

    def advance(self, steps: int, loss: float, /) -> None: ...


class TrainingLog:
    """The tutorial's line, `[epoch, step] loss: x.xxx`: the mean loss since the last line, or since
    the start of the epoch.

    Args:
        images: training images.
        every: steps between two lines, counted within an epoch; 0: no lines.
    """

    def __init__(self, config: Config, images: int, every: int, observer: Observer) -> None:
        self.batches, self.every, self.observer = config.batches_per_epoch(images), every, observer
        self.done, self.total, self.count = 0, 0.0, 0

    def add(self, losses: np.ndarray) -> None:
        """Report the steps with these losses."""
        for line in self._lines(losses):
            self.observer.line(line)
        self.observer.advance(len(losses), float(losses[-1]))

    def resume(self, losses: np.ndarray) -> None:
        """Count the steps before a checkpoint; their lines were printed then."""
        for _ in self._lines(losses):
            pass
        if len(losses):
            self.observer.advance(len(losses), float(losses[-1]))

    def _lines(self, losses: np.ndarray) -> Iterator[str]:
        for loss in losses:
            epoch, step = divmod(self.done, self.batches)
            if step == 0:
                self.total, self.count = 0.0, 0
            self.done += 1
            self.total += float(loss)
            self.count += 1
            if self.every and (step + 1) % self.every == 0:
                yield f"[{epoch + 1}, {step + 1:5d}] loss: {self.total / self.count:.3f}"
                self.total, self.count = 0.0, 0
