"""The steps of `matching.match`, which explains them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from lockstep.common.errors import ConfigError, shorten
from lockstep.common.recorder import evidence, packed
from lockstep.common.recorder.conventions import Conventions, are_possible
from lockstep.common.recorder.kinship import Kinship, settle
from lockstep.common.recorder.layout import Index, Reshaping, reshaped, words
from lockstep.common.recorder.names import split_key
from lockstep.common.recorder.packed import Part, Space
from lockstep.common.recorder.recording import Recording
from lockstep.common.recorder.tensors import Tensor, tensors
from lockstep.common.recorder.values import Found, by_axes, whole_layout

USUAL = 0.5  # what a layout by convention counts for, next to the weights in `kinship.py`
VALUE, GRADIENT, SIBLING, NAME, FILE = "value", "gradient", "sibling", "name", "names file"


@dataclass(frozen=True, eq=False)
class Link:
    """A match in the making."""

    a: Tensor
    b: Tensor
    how: str
    a_index: Index | None = None
    b_index: Index | None = None
    reshaping: Reshaping | None = None  # of a whole tensor; None: of another kind
    layout: str = ""
    stored: str | None = None  # the layout that B's values have, if it is not the right one

    @property
    def is_part(self) -> bool:
        return self.a.size != self.b.size


class Matcher:
    """What has been matched so far, and what is left."""

    def __init__(self, a: Recording, b: Recording) -> None:
        self.a, self.b = tensors(a), tensors(b)
        self.kinship = Kinship([t.path for t in self.a], [t.path for t in self.b])
        self.conventions = Conventions()
        self.links: list[Link] = []
        self.space_a, self.space_b = Space(), Space()
        self._done_a: set[int] = set()
        self._done_b: set[int] = set()

    # --- What is left, and what is found

    def left_a(self) -> list[Tensor]:
        return [t for t in self.a if t.number not in self._done_a]

    def left_b(self) -> list[Tensor]:
        return [t for t in self.b if t.number not in self._done_b]

    def add(self, link: Link, vote: bool = True) -> None:
        self.links.append(link)
        self._done_a.add(link.a.number)
        self._done_b.add(link.b.number)
        if vote:
            self.kinship.vote(link.a.number, link.b.number)
        if link.reshaping is not None and link.how == VALUE and link.stored is None:
            self.conventions.add(link.a, link.b, link.reshaping)

    def _add_whole(self, a: Tensor, b: Tensor, how: str, vote: bool = True) -> None:
        """Match two tensors of one size, in the layout that is most likely."""
        found = self._layout(a, b)
        self.add(_whole(a, b, how, found), vote)

    def _layout(self, a: Tensor, b: Tensor) -> Found | None:
        usual = self.conventions.of(a, b)
        if a.is_kept and b.is_kept and not a.is_constant and a.signature == b.signature:
            found = by_axes(a.keys(), b.keys(), usual)
            if found is not None and self.conventions.against(a, b, found.how) is None:
                return found
        found = evidence.layout(a, b, usual)
        if found is not None:
            return found
        beside = self._beside(a, b)
        if beside is not None:
            return beside
        plain = self.conventions.layout(a, b)
        return None if plain is None else Found(*plain)

    def _beside(self, a: Tensor, b: Tensor) -> Found | None:
        """The layout of a bias, by that of the weight next to it."""
        if len(a.shape) == len(b.shape) == 1 and a.shape == b.shape and not self._may_differ(a, b):
            return None
        for link in self._next_to(a, b):
            if link.b_index is not None and link.a_index is None:
                index = packed.derived(link.b_index, a.shape, b.shape, link.a.is_out_first)
                if index is not None and index.whole:
                    return Found(index, None)
        return None

    def _may_differ(self, a: Tensor, b: Tensor) -> bool:
        """Whether the weight next to a bias has rows in another order."""
        return any(
            link.reshaping is None and link.b_index is not None for link in self._next_to(a, b)
        )

    def _next_to(self, a: Tensor, b: Tensor) -> list[Link]:
        return [
            link
            for link in self.links
            if link.a.path.parents[-1] == a.path.parents[-1]
            and link.b.path.parents[-1] == b.path.parents[-1]
            and not link.is_part
            and len(link.a.shape) > len(a.shape)
        ]

    @property
    def _has_values(self) -> bool:
        return any(link.how in (VALUE, GRADIENT) for link in self.links)

    # --- The steps

    def by_names_file(self, names: Mapping[str, str]) -> None:
        """What the user says.

        Raises:
            ConfigError: if two tensors have no layout in common.
        """
        by_a, by_b = ({t.name: t for t in side} for side in (self.a, self.b))
        pairs = [(by_a[split_key(one)], by_b[other]) for one, other in names.items()]
        for a, b in pairs:
            if a.size == b.size and not self._is_done(a, b):
                if a.is_kept and b.is_kept and self.conventions.layout(a, b) is None:
                    raise ConfigError(
                        f"the names file matches {a.name} {a.shape} with {b.name} {b.shape}: "
                        "no permutation of axes makes them equal"
                    )
                self._add_whole(a, b, FILE)
        for in_a in (True, False):
            packings: dict[int, list[tuple[Tensor, Tensor]]] = {}
            for a, b in pairs:
                large, small = (a, b) if in_a else (b, a)
                if large.size > small.size:
                    packings.setdefault(large.number, []).append((large, small))
            for packing in packings.values():
                self._add_packing(packing, in_a, FILE)

    def _is_done(self, a: Tensor, b: Tensor) -> bool:
        return a.number in self._done_a or b.number in self._done_b

    def _add_packing(self, packing: Sequence[tuple[Tensor, Tensor]], in_a: bool, how: str) -> None:
        """Match a tensor with its parts: where their values are, or else one after the other."""
        large = packing[0][0]
        small = [part for _, part in packing]
        parts = list(packed.find(_searchable(small), _searchable([large])))
        parts = parts or packed.divided(large, small, self.conventions, in_a)
        if not parts and how == FILE:
            sizes = " + ".join(str(t.size) for t in small)
            raise ConfigError(
                f"the names file matches {large.name} with {shorten(t.name for t in small)}, "
                f"of other sizes ({large.size}, {sizes}): name all parts, in their order"
            )
        for part in parts:
            self._add_part(part, in_a, how)

    def by_value(self) -> None:
        """Tensors with the same numbers; those that are alone first."""
        buckets: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
        for side, left in enumerate((self.left_a(), self.left_b())):
            for t in left:
                if not t.is_constant:
                    key = (t.size, t.is_kept, t.signature)
                    buckets.setdefault(key, ([], []))[side].append(t)
        shared = [(mine, theirs) for mine, theirs in buckets.values() if mine and theirs]
        for mine, theirs in sorted(shared, key=lambda found: len(found[0]) * len(found[1])):
            possible = np.array([[not _is_contradiction(a, b) for b in theirs] for a in mine])
            if possible.size == 1:
                pairs = [(mine[0].number, theirs[0].number)] if possible[0, 0] else []
            else:
                bonus = self._bonus(mine, theirs)
                pairs = settle(
                    self.kinship, _numbers(mine), _numbers(theirs), possible, bonus, certain=True
                )
            for i, j in pairs:
                self._add_equal(self.a[i], self.b[j], vote=possible.size == 1)
        self._check_conventions()

    def _add_equal(self, a: Tensor, b: Tensor, vote: bool) -> None:
        if not a.is_kept:
            self.add(Link(a, b, VALUE), vote)
            return
        found = whole_layout(a.keys(), b.keys(), self.conventions.of(a, b))
        if found is not None:
            self.add(_whole(a, b, VALUE, found), vote)

    def _check_conventions(self) -> None:
        """Bring what is stored otherwise than all others of its kind into the layout of these."""
        for position, link in enumerate(self.links):
            if link.how != VALUE or link.is_part or not link.a.is_kept:
                continue
            usual = self.conventions.against(link.a, link.b, link.reshaping)
            index = None if usual is None else reshaped(link.a.shape, link.b.shape, usual)
            if usual is None or index is None:
                continue
            right = _whole(link.a, link.b, VALUE, Found(index, usual))
            if not np.array_equal(index.take(link.b.keys()), link.a.keys()):
                right = replace(right, how=NAME, stored=link.layout)
            self.links[position] = right

    def by_parts(self) -> None:
        """Tensors that lie in a larger one, in either direction."""
        for in_a in (True, False):
            mine, theirs = self.left_a(), self.left_b()
            large, small = (mine, theirs) if in_a else (theirs, mine)
            found = list(packed.find(_searchable(small), _searchable(large)))
            scores = [self._score(part.large, part.small, in_a) for part in found]
            order = sorted(range(len(found)), key=lambda at: -scores[at])
            right = [found[at] for at in order if not packed.is_misplaced(found[at])]
            wrong = [found[at] for at in order if packed.is_misplaced(found[at])]
            for part in right:
                self._add_part(part, in_a, VALUE)
            for part in wrong:
                place = packed.moved(part, [x for x in found if x.large is part.large])
                if place is not None:
                    self._add_part(place, in_a, NAME)
            self._add_beside_parts(in_a)

    def _score(self, large: Tensor, small: Tensor, in_a: bool) -> float:
        """How well names and siblings of a tensor and of a part fit."""
        a, b = (large, small) if in_a else (small, large)
        kin = float(self.kinship.affinity([a.number], [b.number])[0, 0])
        return 4 * kin + 2 * float(self.kinship.names[a.number, b.number])

    def _add_part(self, part: Part, in_a: bool, how: str) -> None:
        done = self._done_b if in_a else self._done_a
        space = self.space_a if in_a else self.space_b
        if part.small.number in done or not space.take(part.large, part.index):
            return
        if how == NAME and _is_equal(part):
            how = VALUE
        layout = words(part.index, None, part_of=part.large.name)
        if in_a:
            self.add(Link(part.large, part.small, how, a_index=part.index, layout=layout))
        else:
            self.add(Link(part.small, part.large, how, b_index=part.index, layout=layout))

    def _add_beside_parts(self, in_a: bool) -> None:
        """What belongs next to the parts that were found: in what is left of the same large
        tensor, and in the biases next to it."""
        large, small = (self.left_a(), self.left_b()) if in_a else (self.left_b(), self.left_a())
        for tensor in small:
            for part in packed.remaining(tensor, self._parts(in_a), self._space(in_a)):
                self._add_part(part, in_a, SIBLING)
        for part in list(packed.beside(self._parts(in_a), small, large)):
            self._add_part(part, in_a, SIBLING)

    def _parts(self, in_a: bool) -> list[Part]:
        found = [x for x in self.links if x.is_part and (x.a_index is not None) == in_a]
        return [_part(link, in_a) for link in found]

    def _space(self, in_a: bool) -> Space:
        return self.space_a if in_a else self.space_b

    def by_gradients(self) -> None:
        """Constants, by the gradients of step 0."""
        for a, b in evidence.equal(self.left_a(), self.left_b()):
            if not _is_contradiction(a, b):
                self._add_whole(a, b, GRADIENT)

    def by_roles(self) -> None:
        """Packed q, k and v of other values, by their names."""
        for in_a in (True, False):
            large, small = (
                (self.left_a(), self.left_b()) if in_a else (self.left_b(), self.left_a())
            )
            alike = partial(self._score, in_a=in_a)
            for whole, parts in packed.packings(large, small, alike):
                self._add_packing([(whole, part) for part in parts], in_a, NAME)

    def by_siblings(self) -> None:
        """All that is left, by the matches around it and by names."""
        mine, theirs = self.left_a(), self.left_b()
        groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
        for side, left in enumerate((mine, theirs)):
            for t in left:
                groups.setdefault((t.size, t.is_kept, t.is_float), ([], []))[side].append(t)
        found: list[tuple[Tensor, Tensor, str]] = []
        matrices_first = sorted(groups.values(), key=lambda group: -_axes(group[0]))
        for mine, theirs in matrices_first:
            if not mine or not theirs:
                continue
            possible = np.array([[self._is_possible(a, b) for b in theirs] for a in mine])
            bonus = self._bonus(mine, theirs)
            for i, j in settle(self.kinship, _numbers(mine), _numbers(theirs), possible, bonus):
                kin = self._has_values and self.kinship.are_kin(i, j)
                found.append((self.a[i], self.b[j], SIBLING if kin else NAME))
        self.conventions.learn([(a, b) for a, b, _ in found])
        for a, b, how in sorted(found, key=lambda pair: -len(pair[0].shape)):
            self._add_whole(a, b, how, vote=False)

    def _is_possible(self, a: Tensor, b: Tensor) -> bool:
        if a.is_kept and not are_possible(a.shape, b.shape):
            return False
        known = ("weight", "bias", "mean", "variance")
        roles = (a.path.role, b.path.role)
        return roles[0] == roles[1] or not (roles[0] in known and roles[1] in known)

    def _bonus(self, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> np.ndarray:
        """What speaks for each pair besides names and siblings."""
        usual = self.conventions.fit(mine, theirs)
        return USUAL * usual + np.array([[_likeness(a, b) for b in theirs] for a in mine])


def _likeness(a: Tensor, b: Tensor) -> float:
    score = 0.0
    score += a.path.role == b.path.role
    score += 0.1 * (sorted(a.shape) == sorted(b.shape))
    score += 0.5 * (a.is_parameter == b.is_parameter)
    if a.is_constant != b.is_constant:
        score -= 1
    elif a.is_constant and a.signature == b.signature:
        score += 1
    return score


def _is_contradiction(a: Tensor, b: Tensor) -> bool:
    """Whether the one is called q and the other k, or the like."""
    one, other = packed.role_rank(a), packed.role_rank(b)
    return one is not None and other is not None and one != other


def _searchable(side: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in side if t.is_kept and not t.is_constant]


def _is_equal(part: Part) -> bool:
    """Whether a part has values that say so."""
    taken = part.index.take(part.large.keys())
    return not part.small.is_constant and np.array_equal(taken, part.small.keys())


def _axes(side: Sequence[Tensor]) -> int:
    return max((len(t.shape) for t in side), default=0)


def _numbers(side: Sequence[Tensor]) -> list[int]:
    return [t.number for t in side]


def _part(link: Link, in_a: bool) -> Part:
    index = link.a_index if in_a else link.b_index
    assert index is not None
    return Part(link.b, link.a, index) if in_a else Part(link.a, link.b, index)


def _whole(a: Tensor, b: Tensor, how: str, found: Found | None) -> Link:
    if found is None or (a.shape == b.shape and found.index.is_plain):
        return Link(a, b, how, reshaping=Reshaping(tuple(range(len(b.shape)))))
    layout = words(found.index, found.how)
    return Link(a, b, how, b_index=found.index, reshaping=found.how, layout=layout)
