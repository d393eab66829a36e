"""Which of two sides' tensors belong together by names, and by the matches of their neighbours.

Each match is a vote that the modules round its two tensors are one: `blocks.0` is `Block_0` where
all tensors of the one that are matched lie in the other. `settle` repeats: score all pairs that are
possible, take those that are best for both, and let them vote.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lockstep.common.recorder.likeness import Path, likeness

KIN, NAME, ORDER = 4.0, 3.0, 0.3  # weights of affinity, likeness of names, and order
MARGIN = 0.05  # a pair this much better than any other of its two tensors is taken at once
SURE_KIN, SURE_NAME = 0.9, 0.5  # affinity or likeness that is enough by itself


class Kinship:
    """Two sides' modules, and how the matches so far connect them."""

    def __init__(self, a: Sequence[Path], b: Sequence[Path]) -> None:
        self.a, self.b = a, b
        self._a, self._size_a = _ancestors(a)
        self._b, self._size_b = _ancestors(b)
        self.names = likeness(a, b) if a and b else np.zeros((len(a), len(b)))
        self._votes = np.zeros((self._size_a, self._size_b))
        self._votes_a, self._votes_b = np.zeros(self._size_a), np.zeros(self._size_b)

    def vote(self, a: int, b: int) -> None:
        """These two tensors are matched."""
        mine, theirs = np.unique(self._a[a]), np.unique(self._b[b])
        self._votes[np.ix_(mine, theirs)] += 1
        self._votes_a[mine] += 1
        self._votes_b[theirs] += 1

    def affinity(self, a: Sequence[int], b: Sequence[int]) -> np.ndarray:
        """float64 (len(a), len(b)): 1 where the modules round two tensors are each other's, as far
        as these have matches; 0 where nothing says so."""
        union = self._votes_a[:, None] + self._votes_b[None] - self._votes
        overlap = self._votes / np.maximum(union, 1)  # of modules: Jaccard's index
        mine, theirs = self._a[list(a)], self._b[list(b)]
        return (
            _mean_of_best(overlap, self._votes_a, mine, theirs)
            + _mean_of_best(overlap.T, self._votes_b, theirs, mine).T
        ) / 2

    def are_kin(self, a: int, b: int) -> bool:
        """Whether a module round the one, other than the whole, is that round the other."""
        union = self._votes_a[:, None] + self._votes_b[None] - self._votes
        block = np.ix_(self._a[a][self._a[a] > 0], self._b[b][self._b[b] > 0])
        overlap = self._votes[block] / np.maximum(union[block], 1)
        return bool((overlap > 0.5).any())


def _ancestors(paths: Sequence[Path]) -> tuple[np.ndarray, int]:
    """int (tensors, depth): the modules round each tensor by number, 0 for the whole, which fills
    up; and how many modules there are."""
    numbers = {"": 0}
    for path in paths:
        for parent in path.parents:
            numbers.setdefault(parent, len(numbers))
    found = np.zeros((len(paths), max((len(p.parents) for p in paths), default=1)), int)
    for row, path in zip(found, paths, strict=True):
        row[: len(path.parents)] = [numbers[parent] for parent in path.parents]
    return found, len(numbers)


def _mean_of_best(
    overlap: np.ndarray, votes: np.ndarray, mine: np.ndarray, theirs: np.ndarray
) -> np.ndarray:
    """For each pair of tensors: over the modules round the one that have matches, the mean overlap
    with the most alike of the modules round the other."""
    best = np.stack([overlap[:, column] for column in theirs.T]).max(axis=0)  # (modules, theirs)
    counted = (votes[mine] > 0) & ((mine > 0) | (np.arange(mine.shape[1]) == 0))
    total = np.einsum("ad,adb->ab", counted.astype(float), best[mine])
    return total / np.maximum(counted.sum(axis=1), 1)[:, None]


def settle(
    kinship: Kinship,
    a: Sequence[int],
    b: Sequence[int],
    possible: np.ndarray,
    bonus: np.ndarray,
    certain: bool = False,
) -> list[tuple[int, int]]:
    """Pairs of tensors of `a` and `b`; each match votes at once.

    Args:
        kinship: of all tensors.
        a: numbers of the tensors of one side that are left.
        b: of the other.
        possible: bool (len(a), len(b)).
        bonus: float64 (len(a), len(b)): what else speaks for a pair.
        certain: each is known to have a partner among the possible ones; else a pair needs a kin, a
            name, or as many candidates on either side.
    """
    possible = possible.copy()
    names = kinship.names[np.ix_(list(a), list(b))]
    bonus = bonus + NAME * names + ORDER * _order(possible)
    found: list[tuple[int, int]] = []
    while possible.any():
        kin = kinship.affinity(a, b)
        scores = np.where(possible, KIN * kin + bonus, -np.inf)
        enough = (kin >= SURE_KIN) | (names >= SURE_NAME) | _equally_many(possible)
        if not certain:
            scores = np.where(enough, scores, -np.inf)
        taken = _mutual(scores, MARGIN) or _mutual(scores, 0.0)
        if not taken:
            break
        for i, j in taken:
            possible[i], possible[:, j] = False, False
            kinship.vote(a[i], b[j])
            found.append((a[i], b[j]))
    return found


def _mutual(scores: np.ndarray, margin: float) -> list[tuple[int, int]]:
    """Pairs that are best for both, by more than `margin`; with 0, of equals the first."""
    found: list[tuple[int, int]] = []
    rows, columns = scores.argmax(axis=1), scores.argmax(axis=0)
    for i, j in enumerate(rows):
        best = scores[i, j]
        if best == -np.inf:
            continue
        if margin:
            near = (scores[i] > best - margin).sum() + (scores[:, j] > best - margin).sum()
            if near == 2:
                found.append((i, int(j)))
        elif columns[j] == i:
            found.append((i, int(j)))
    return found


def _order(possible: np.ndarray) -> np.ndarray:
    """1 for tensors at the same place among those that have the same candidates, less for others."""
    groups = {row.tobytes(): row for row in possible}
    closeness = np.zeros(possible.shape)
    for key, row in groups.items():
        mine = np.array([i for i, other in enumerate(possible) if other.tobytes() == key])
        theirs = np.flatnonzero(row)
        if theirs.size:
            one = np.arange(mine.size) / max(mine.size, theirs.size)
            other = np.arange(theirs.size) / max(mine.size, theirs.size)
            closeness[np.ix_(mine, theirs)] = 1 - np.abs(one[:, None] - other[None])
    return closeness


def _equally_many(possible: np.ndarray) -> np.ndarray:
    """bool: pairs of a group in which each has all as candidates, as many on either side."""
    rows, columns = possible.sum(axis=1), possible.sum(axis=0)
    return possible & (rows[:, None] == columns[None])
