"""Tensors that a wrong converter filled are matched with what they should equal."""

from __future__ import annotations

import numpy as np
import pytest

from lockstep.common.protocol import Arrays
from lockstep.common.recorder.matching import Match, match
from lockstep.common.recorder.recording import Recording
from tests.recorder.recordings import ATTENTION, coarse, gpt, linen, pairs_of_gpt, recording
from tests.recorder.test_matching import pairs

BLOCK = f"params.Block_0.{ATTENTION}"
QUERY, KEY = f"{BLOCK}.query.kernel", f"{BLOCK}.key.kernel"
UP = "params.Block_0.Dense_0.kernel"
WRONG = {
    "q and k swapped": (
        lambda w: {QUERY: w[KEY], KEY: w[QUERY]},
        {QUERY: "equals blocks.0.attn.in_proj_weight [params.Block_0", KEY: "equals"},
    ),
    "k loaded into q": (lambda w: {QUERY: w[KEY]}, {QUERY: "equals"}),
    "q with its own values": (
        lambda w: {QUERY: np.random.default_rng(7).normal(size=w[QUERY].shape)},
        {QUERY: "other values"},
    ),
    "a kernel with its own values": (
        lambda w: {UP: np.random.default_rng(7).normal(size=w[UP].shape) / 50},
        {UP: "standard deviation"},
    ),
    "a kernel reshaped": (
        lambda w: {UP: w[UP].T.reshape(w[UP].shape)},
        {UP: "stored reshaped, all others of its kind transposed"},
    ),
    "a bias of ones": (
        lambda w: {"params.Block_0.Dense_0.bias": np.ones(48)},
        {"params.Block_0.Dense_0.bias": "all 0 against all 1"},
    ),
    "a kernel rounded to 16 bits": (
        lambda w: {UP: coarse(w[UP])},
        {UP: ""},
    ),
}


@pytest.mark.parametrize(("wrong", "said"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("linen_first", [False, True])
def test_a_wrong_tensor_is_matched_with_what_it_should_equal(wrong, said, linen_first: bool):
    weights, others = gpt(), linen(gpt())
    others |= wrong(others)
    sides = [recording(weights), recording(others, "jax")]
    a, b = reversed(sides) if linen_first else sides
    found = match(a, b)
    assert found.same_start and not found.unmatched_a + found.unmatched_b
    wanted = set(pairs_of_gpt().items())
    assert pairs(found) == (wanted if linen_first else {(b, a) for a, b in wanted})
    names = {m.name: m.a if linen_first else m.b for m in found.matches}
    texts = {names[d.name]: d.text for d in found.differing}
    assert set(texts) == set(said), texts
    if not linen_first:
        assert all(part in texts[name] for name, part in said.items()), texts
    # The wrong tensor, and no other, differs in the layout that was found.
    unequal = {names[m.name] for m in found.matches if is_unequal(m, a, b)}
    assert unequal == set(said)


def is_unequal(found: Match, a: Recording, b: Recording) -> bool:
    return not np.array_equal(found.of_a(a.weights[found.a]), found.of_b(b.weights[found.b]))


def projections(transposed: bool) -> Arrays:
    draw = np.random.default_rng(4).normal
    weights = {
        f"layers.{i}.{name}_proj": draw(size=(6, 6)) for i in range(2) for name in ("q", "k", "v")
    }
    if transposed:
        return {f"{name}.kernel": w.T for name, w in weights.items()}
    return {f"{name}.weight": w for name, w in weights.items()}


def test_a_square_kernel_that_alone_is_not_transposed_is_named():
    a, b = projections(False), projections(True)
    b["layers.1.k_proj.kernel"] = b["layers.1.k_proj.kernel"].T
    found = match(recording(a), recording(b, "jax"))
    assert [(d.name, d.text) for d in found.differing] == [
        ("layers.1.k_proj.weight", "stored as it is, all others of its kind transposed")
    ]
    layouts = {m.layout for m in found.matches}
    assert layouts == {"transposed"}
    # The control: where all are stored so, it is a layout.
    found = match(
        recording(a), recording({n.replace("weight", "kernel"): w for n, w in a.items()}, "jax")
    )
    assert not found.differing and {m.layout for m in found.matches} == {""}
