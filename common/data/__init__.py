"""Images and labels: where they come from, in which order they are trained on, and how they are
augmented."""

from lockstep.common.data.sources import (
    Dataset,
    batch_indices,
    load,
    normalise,
    order_digest,
    permutation,
)

__all__ = ["Dataset", "batch_indices", "load", "normalise", "order_digest", "permutation"]
