"""How alike the names of two tensors are, of whatever two libraries.

A name is a path: its words are put into common terms ("LayerNorm_0", "ln1" and "norm" are norms;
"query", "q_proj" and "wq" are q), and its numbers become ranks among siblings of one kind. The last
component is the role: weight, bias, mean, variance, or a name of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Components that say what a collection of tensors is, not where a module is.
COLLECTIONS = {"params", "batchstats", "state", "modelstate", "buffers"}
ROLES = {
    "weight": ("weight", "kernel", "w", "scale", "gamma", "embedding", "embeddings"),
    "bias": ("bias", "b", "offset", "beta"),
    "mean": ("mean", "runningmean", "average"),
    "variance": ("var", "runningvar", "variance"),
}
TERMS = {
    "norm": "ln norm layernorm batchnorm bn rmsnorm groupnorm gn instancenorm",
    "q": "q query qproj wq toq queries queryproj qlinear",
    "k": "k key kproj wk tok keys keyproj klinear",
    "v": "v value vproj wv tov values valueproj vlinear",
    "out": "o out outproj wo toout output outputproj cproj outlinear",
    "qkv": "qkv inproj cattn queryKeyvalue qkvproj wqkv toqkv querykeyvalue",
    "attention": "attn attention selfattn selfattention mha mhsa multiheadattention"
    " multiheaddotproductattention sa",
    "mlp": "mlp ffn ff feedforward",
    "dense": "fc linear dense lin",
    "up": "cfc upproj up",
    "conv": "conv convolution",
    "embedding": "emb embed embedding embeddings wte tokemb tokenembedding tokenembed tokembed",
    "position": "pos wpe posemb posembed posembedding positionembedding positionembed"
    " positionalembedding",
    "block": "block blocks layer layers h resblock transformerblock transformerlayer encoderlayer"
    " decoderlayer",
    "head": "head lmhead classifier unembed logits",
    "shortcut": "downsample shortcut",
}
_TERM: dict[str, str] = {
    word.lower(): term for term, found in TERMS.items() for word in found.split()
}
_ROLE = {word: role for role, found in ROLES.items() for word in found}
_WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")


@dataclass(frozen=True)
class Path:
    """A tensor's name, taken apart."""

    name: str
    parents: tuple[str, ...]  # the paths of the modules that it is in, "" first
    last: str  # the last component
    kind: str  # the same without a number at its end
    role: str
    terms: frozenset[str]  # of the modules, most of them of one word
    letters: frozenset[str]  # the words themselves
    ranks: tuple[int, ...] = ()  # of its modules among siblings of one kind, where there are some


def components(name: str) -> list[str]:
    """Of a tensor's name: the modules, from the outside, and its role, without collections."""
    parts = [part for part in re.split(r"[./]+", name) if part and part != "~"]
    if len(parts) > 1 and parts[-1] in ("value", "raw_value") and parts[-2].lower() in _ROLE:
        parts.pop()  # nnx variables
    kept = [
        part
        for i, part in enumerate(parts)
        if not (i < min(2, len(parts) - 1) and _letters(part) in COLLECTIONS)
    ]
    packed = re.fullmatch(r"(\w+?)_(weight|bias)((?:_l\d+)?(?:_reverse)?)", kept[-1])
    if packed:  # `in_proj_weight`, `weight_ih_l0`: the module is in the name
        kept[-1:] = [packed[1] + packed[3], packed[2]]
    else:
        packed = re.fullmatch(r"(weight|bias)_(\w+)", kept[-1])
        if packed:
            kept[-1:] = [packed[2], packed[1]]
    return kept


def paths(names: Sequence[str]) -> list[Path]:
    """The names of one side, taken apart together: ranks are among siblings."""
    parts = [components(name) for name in names]
    ranks = _ranks(parts)
    found = []
    for name, own in zip(names, parts, strict=True):
        modules = own[:-1]
        stems = [_letters(part) for part in modules]
        last = _letters(own[-1])
        role = _ROLE.get(last, "")
        if len(stems) > 1 and _term(stems[-2]) == "attention" and _term(stems[-1]) == "dense":
            stems[-1] = "out"  # Haiku calls it linear
        terms: set[str] = {_term(stem) for stem in stems if stem}
        for part, stem in zip(modules, stems, strict=True):
            if stem not in _TERM:
                words = [word.lower() for word in _WORDS.findall(part)]
                terms |= {_term(word) for word in words}
        if not role:
            terms.add(_term(last))
        found.append(
            Path(
                name,
                tuple(".".join(own[:i]) for i in range(len(own))),
                own[-1],
                own[-1].rstrip("0123456789_") or own[-1],
                role or own[-1].lower(),
                frozenset(terms),
                frozenset(stem for stem in stems if stem),
                tuple(
                    ranks[key] for i in range(len(modules)) if (key := tuple(own[: i + 1])) in ranks
                ),
            )
        )
    return found


def _term(word: str) -> str:
    return _TERM.get(word, word)


def _letters(part: str) -> str:
    return re.sub(r"[^a-z]", "", re.sub(r"\dd$", "", part.lower()))


def _ranks(parts: Sequence[Sequence[str]]) -> dict[tuple[str, ...], int]:
    """Of each module that has siblings of the same stem: how many of these come before it, by
    their numbers."""
    modules = dict.fromkeys(tuple(own[: i + 1]) for own in parts for i in range(len(own) - 1))
    kinds: dict[tuple[tuple[str, ...], str], list[tuple[str, ...]]] = {}
    for module in modules:
        stem = _letters(module[-1])
        kinds.setdefault((module[:-1], _term(stem)), []).append(module)
    ranks = {}
    for siblings in kinds.values():
        if len(siblings) > 1:
            siblings.sort(key=_number)
            ranks |= {module: rank for rank, module in enumerate(siblings)}
    return ranks


def _number(module: tuple[str, ...]) -> int:
    digits = re.findall(r"\d+", module[-1])
    return int(digits[-1]) if digits else -1


def likeness(a: Sequence[Path], b: Sequence[Path]) -> np.ndarray:
    """float64 (len(a), len(b)): 0 for nothing in common, 1 for the same terms and ranks, 1.5 for
    the same name."""
    terms = _shared([p.terms for p in a], [p.terms for p in b])
    letters = _shared([p.letters for p in a], [p.letters for p in b])
    ranks_a, ranks_b = dict.fromkeys(p.ranks for p in a), dict.fromkeys(p.ranks for p in b)
    common = {(one, other): _common(one, other) for one in ranks_a for other in ranks_b}
    ranks = np.array([[common[p.ranks, q.ranks] for q in b] for p in a])
    same = np.array([[p.name == q.name for q in b] for p in a])
    return np.where(same, 1.5, 0.45 * terms + 0.1 * letters + 0.45 * ranks)


def _shared(a: Sequence[frozenset[str]], b: Sequence[frozenset[str]]) -> np.ndarray:
    """The common part of each two sets, of their union (1 for two empty ones)."""
    index = {word: i for i, word in enumerate(set().union(*a, *b))}

    def members(sets: Sequence[frozenset[str]]) -> np.ndarray:
        found = np.zeros((len(sets), len(index)))
        for row, words in enumerate(sets):
            found[row, [index[word] for word in words]] = 1
        return found

    one, other = members(a), members(b)
    common = one @ other.T
    union = one.sum(1)[:, None] + other.sum(1)[None] - common
    return np.where(union == 0, 1.0, common / np.maximum(union, 1))


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    if a == b:
        return 1.0
    equal = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        equal += 1
    return equal / max(len(a), len(b), 1) * 0.8
