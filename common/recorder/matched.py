"""What `matching.match` returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lockstep.common.recorder.layout import Index


@dataclass(frozen=True, eq=False)
class Match:
    """One tensor of both sides, or a part of one."""

    a: str  # A's own name
    b: str  # B's own name
    name: str  # a, or "a [b]" if b is only a part of a packed a
    how: str  # "value", "gradient", "sibling", "name" or "names file"
    a_index: Index | None  # None: A's array as it is
    b_index: Index | None
    layout: str  # for a table, such as "transposed" or "part of in_proj_weight"; "" if alike

    def of_a(self, array: np.ndarray) -> np.ndarray:
        """This tensor out of an array of A's layout: A's, or that of the part.

        Raises:
            ValueError: if it is a part, and `array` is a fingerprint.
        """
        return array if self.a_index is None else self.a_index.take(array)

    def of_b(self, array: np.ndarray) -> np.ndarray:
        """This tensor out of an array of B's layout, in the shape and layout of `of_a`.

        Raises:
            ValueError: if it is a part, and `array` is a fingerprint.
        """
        return array if self.b_index is None else self.b_index.take(array)


@dataclass(frozen=True)
class Difference:
    """How two matched tensors differ at the start."""

    name: str  # of the match
    text: str


@dataclass(frozen=True)
class Matching:
    """All tensors of two recordings."""

    matches: tuple[Match, ...]  # in A's order of definition
    # Also what is only covered in part: "the rest of" it has no partner. Buffers of integers are
    # left out.
    unmatched_a: tuple[str, ...]
    unmatched_b: tuple[str, ...]
    proposals: dict[str, str]  # an unmatched name of A: the nearest unmatched one of B
    same_start: bool  # both start from the same weights, most of them at least
    differing: tuple[Difference, ...]  # matches whose values differ at the start beyond chance
