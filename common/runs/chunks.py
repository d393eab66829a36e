"""The batches of a run, several to a chunk: what one call of `train_steps` takes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.runs.record import FIRST_STEPS

CHUNK_STEPS = 250  # at most so many steps in one chunk ...
CHUNK_BYTES = 8 * 2**20  # ... whose images take at most so much memory


def chunks(config: Config, images: int, bytes_per_image: int) -> Iterator[np.ndarray]:
    """The batches of the run, several to a chunk: int64 (steps, batch size) image numbers.

    The backends compile a program for each length of a chunk, so there are only two: one step, for
    the first steps and for the remainder, and the longest that the limits allow. No chunk crosses a
    smaller batch, which ends an epoch.
    """
    limit = max(1, min(CHUNK_STEPS, CHUNK_BYTES // (config.batch_size * bytes_per_image)))
    same_size = config.total_steps - FIRST_STEPS  # batches of one size in a row
    if images % config.batch_size and not config.drop_last:
        same_size = min(same_size, images // config.batch_size)
    n_chunks = -(-same_size // limit)
    length = max(1, same_size // max(1, n_chunks))
    pending: list[np.ndarray] = []
    for step, indices in enumerate(data.batch_indices(config, images)):
        if pending and len(pending[0]) != len(indices):
            yield from one_by_one(pending)
            pending = []
        pending.append(indices)
        if step < FIRST_STEPS or len(pending) == length:
            yield np.stack(pending)
            pending = []
    yield from one_by_one(pending)


def one_by_one(batches: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Each batch as a chunk."""
    for indices in batches:
        yield indices[np.newaxis]
