"""Images and labels: where they come from, in which order they are trained on, and how they are
augmented."""

from lockstep.common.data.batches import (
    batch_digests,
    batch_indices,
    check_all_shares,
    check_shares,
    first_seen,
    order_digest,
    permutation,
    rows,
)
from lockstep.common.data.dataset import Dataset, bytes_per_input, label_count, normalise
from lockstep.common.data.sources import check, load

__all__ = [
    "Dataset",
    "batch_digests",
    "batch_indices",
    "bytes_per_input",
    "check",
    "check_all_shares",
    "check_shares",
    "first_seen",
    "label_count",
    "load",
    "normalise",
    "order_digest",
    "permutation",
    "rows",
]
