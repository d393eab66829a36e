"""Images and labels: where they come from, in which order they are trained on, and how they are
augmented."""

from lockstep.common.data.batches import (
    batch_digests,
    batch_indices,
    check_divides,
    first_seen,
    order_digest,
    permutation,
    rows,
)
from lockstep.common.data.dataset import Dataset, normalise, of_example
from lockstep.common.data.sources import check, load

__all__ = [
    "Dataset",
    "batch_digests",
    "batch_indices",
    "check",
    "check_divides",
    "first_seen",
    "load",
    "normalise",
    "of_example",
    "order_digest",
    "permutation",
    "rows",
]
