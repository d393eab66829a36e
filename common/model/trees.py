"""The outputs of a network: one array, or a tuple, list or dictionary of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lockstep.common.protocol import Arrays


def leaves(tree: Any, name: str = "output") -> Iterator[tuple[str, Any]]:
    """Each array of a network's outputs, of either framework, with a name: `output`, or
    `output.0.mean`. The keys of dictionaries are sorted, as JAX sorts them."""
    if isinstance(tree, Mapping):
        for key in sorted(tree, key=str):
            yield from leaves(tree[key], f"{name}.{key}")
    elif isinstance(tree, Sequence):
        for place, part in enumerate(tree):
            yield from leaves(part, f"{name}.{place}")
    elif tree is not None:
        yield name, tree


def flat(outputs: Arrays) -> np.ndarray:
    """All outputs of each input as one row, floating-point (n, numbers); those without such an axis
    are left out."""
    size = max(len(array) for array in outputs.values() if array.ndim)
    rows = [array.reshape(size, -1) for array in outputs.values() if array.shape[:1] == (size,)]
    joined = np.concatenate(rows, axis=1)
    return joined.astype(np.float64) if joined.dtype.kind in "biu" else joined
