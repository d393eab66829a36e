"""What the matcher found, as a `Matching`."""

from __future__ import annotations

import numpy as np

from lockstep.common.recorder import differences, values
from lockstep.common.recorder.matched import Difference, Match, Matching
from lockstep.common.recorder.matcher import Link, Matcher
from lockstep.common.recorder.packed import Space
from lockstep.common.recorder.tensors import Tensor

ENOUGH = 0.5  # of the tensors that are not constant: so many are equal where both start alike
NEAR = 0.7  # of a candidate that is proposed, for names, siblings, size and shape together


def summary(found: Matcher) -> Matching:
    """All matches, what is left, and how values differ."""
    links = sorted(found.links, key=_place)
    matches = tuple(_match(link) for link in links)
    parts_a = [link.a for link in links if link.a_index is not None]
    parts_b = [link.b for link in links if link.is_part and link.a_index is None]
    unmatched_a = _left(found.left_a(), parts_a, found.space_a)
    unmatched_b = _left(found.left_b(), parts_b, found.space_b)
    same_start = _same_start(found)
    return Matching(
        matches,
        unmatched_a,
        unmatched_b,
        _proposals(found, unmatched_a, unmatched_b),
        same_start,
        _differing(links, matches, same_start),
    )


def _place(link: Link) -> tuple[int, int, int]:
    """By A's order of definition, and by where a part lies in A's tensor."""
    return link.a.number, 0 if link.a_index is None else link.a_index.base, link.b.number


def _match(link: Link) -> Match:
    name = f"{link.a.name} [{link.b.name}]" if link.a_index is not None else link.a.name
    return Match(link.a.name, link.b.name, name, link.how, link.a_index, link.b_index, link.layout)


def _left(left: list[Tensor], packed: list[Tensor], space: Space) -> tuple[str, ...]:
    """What has no partner, or only in part, in the order of definition; without buffers of
    integers."""
    partly = {t.number: t for t in packed if space.left(t)}
    listed = sorted([*left, *partly.values()], key=lambda t: t.number)
    return tuple(t.name for t in listed if t.is_float or t.is_parameter)


def _same_start(found: Matcher) -> bool:
    equal = {link.a.number for link in found.links if link.how == "value"}
    equal |= {link.a.number for link in found.links if link.stored is not None}
    varied = [t for t in found.a if t.is_parameter and not t.is_constant]
    shared = sum(t.number in equal for t in varied)
    if not varied:
        return all(t.is_constant for t in found.b if t.is_parameter)
    return shared >= ENOUGH * len(varied)


def _differing(
    links: list[Link], matches: tuple[Match, ...], same_start: bool
) -> tuple[Difference, ...]:
    digests: tuple[dict[int, str], dict[int, str]] = ({}, {})
    for link, match in zip(links, matches, strict=True):
        if link.a.is_kept and not link.a.is_constant:
            for of, name, array in (
                (digests[0], match.name, match.of_a(link.a.array)),
                (digests[1], _of_b(link), match.of_b(link.b.array)),
            ):
                of.setdefault(values.signature(values.keys(array)), name)
    found = []
    for link, match in zip(links, matches, strict=True):
        if link.how == "value" or not (link.a.is_kept and link.b.is_kept):
            continue
        text = _difference(link, match, digests, same_start)
        if text:
            found.append(Difference(match.name, text))
    return tuple(found)


def _of_b(link: Link) -> str:
    return (
        f"{link.a.name}'s part of {link.b.name}" if link.is_part and link.b_index else link.b.name
    )


def _difference(
    link: Link, match: Match, digests: tuple[dict[int, str], dict[int, str]], same_start: bool
) -> str:
    if link.a.is_constant and link.b.is_constant and link.a.signature == link.b.signature:
        return ""
    one, other = (
        array.astype(np.int8) if array.dtype == np.bool_ else array  # a mask
        for array in (match.of_a(link.a.array), match.of_b(link.b.array))
    )
    keyed = values.keys(one), values.keys(other)
    if np.array_equal(*keyed):
        return ""
    if link.stored is not None:
        usual = link.layout or "as they are"
        return f"stored {link.stored or 'as it is'}, all others of its kind {usual}"
    digest = [values.signature(x) for x in keyed]
    if digest[0] != digest[1]:
        if digest[1] in digests[0] and not values.is_constant(keyed[1]):
            return f"{_of_b(link)} equals {digests[0][digest[1]]}"
        if digest[0] in digests[1] and not values.is_constant(keyed[0]):
            return f"{match.name} equals {digests[1][digest[0]]}"
    text = differences.in_words(one, other, digest[0] == digest[1])
    if text or not same_start:
        return text
    return f"other values: the largest gap is {np.abs(one - other).max():.3g}"


def _proposals(
    found: Matcher, unmatched_a: tuple[str, ...], unmatched_b: tuple[str, ...]
) -> dict[str, str]:
    """For each name of A, the nearest of B: of its size, and then by name."""
    mine = [t for t in found.a if t.name in set(unmatched_a)]
    theirs = [t for t in found.b if t.name in set(unmatched_b)]
    proposals = {}
    for t in mine:
        scores = [_nearness(found, t, other) for other in theirs]
        if scores and max(scores) > NEAR:
            proposals[t.name] = theirs[int(np.argmax(scores))].name
    return proposals


def _nearness(found: Matcher, a: Tensor, b: Tensor) -> float:
    kin = float(found.kinship.affinity([a.number], [b.number])[0, 0])
    name = float(found.kinship.names[a.number, b.number])
    shape = 0.5 * (sorted(a.shape) == sorted(b.shape))
    return (a.size == b.size) + shape + name + kin - 2 * (a.path.role != b.path.role)
