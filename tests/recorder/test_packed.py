"""Tensors that are parts of larger ones."""

from __future__ import annotations

import numpy as np
import pytest

from lockstep.common.protocol import Arrays
from lockstep.common.recorder.matching import Matching, match
from tests.recorder.recordings import recording

D, H, K = 6, 2, 3
RANDOM = np.random.default_rng(1)
Q, KEY, V = (RANDOM.normal(size=(D, D)) for _ in range(3))  # (out, in)
THREE = {"attn.q_proj": Q, "attn.k_proj": KEY, "attn.v_proj": V}


def dense(weights: Arrays, framework: str) -> Arrays:
    """With a bias of zeros next to each."""
    if framework == "torch":
        kernels = {f"{name}.weight": w for name, w in weights.items()}
        return kernels | {f"{n}.bias": np.zeros(w.shape[:1]) for n, w in weights.items()}
    kernels = {f"{name}.kernel": np.ascontiguousarray(w) for name, w in weights.items()}
    return kernels | {f"{n}.bias": np.zeros(w.shape[1:]) for n, w in weights.items()}


def heads(weight: np.ndarray) -> np.ndarray:
    """(out, in) as (in, heads, size)."""
    return weight.T.reshape(D, H, K)


PACKED = {
    "(3d, d)": dense({"attn.qkv": np.concatenate([Q, KEY, V])}, "torch"),
    "(d, 3d)": dense({"attn.qkv": np.concatenate([Q, KEY, V]).T}, "jax"),
    "(d, 3, h, k)": dense({"attn.qkv": np.stack([heads(Q), heads(KEY), heads(V)], 1)}, "jax"),
    "(d, h, 3, k)": dense({"attn.qkv": np.stack([heads(Q), heads(KEY), heads(V)], 2)}, "jax"),
    "(3, d, d)": {
        "attn.qkv.kernel": np.stack([Q, KEY, V]),
        "attn.qkv.bias": np.zeros((3, D)),
    },
}
APART = {
    "(out, in)": dense(THREE, "torch"),
    "(in, out)": dense({name: w.T for name, w in THREE.items()}, "jax"),
    "(in, h, k)": dense({name: heads(w) for name, w in THREE.items()}, "jax"),
}


def is_covered(found: Matching, weights: Arrays, large: str, of_a: bool) -> bool:
    """Whether the parts take each entry of a tensor once."""
    places = np.arange(weights[large].size).reshape(weights[large].shape)
    parts = [m for m in found.matches if large in (m.a, m.b)]
    taken = [(m.of_a if of_a else m.of_b)(places).ravel() for m in parts]
    return bool(np.array_equal(np.sort(np.concatenate(taken)), np.arange(weights[large].size)))


@pytest.mark.parametrize("packed", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("apart", APART.values(), ids=APART)
@pytest.mark.parametrize("packed_first", [True, False])
def test_parts_are_found_in_either_direction(packed: Arrays, apart: Arrays, packed_first: bool):
    sides = [recording(packed), recording(apart, "jax")]
    one, other = sides if packed_first else reversed(sides)
    found = match(one, other)
    assert found.same_start
    assert len(found.matches) == 6
    assert not found.unmatched_a + found.unmatched_b + found.differing
    a, b = (packed, apart) if packed_first else (apart, packed)
    for m in found.matches:
        np.testing.assert_array_equal(m.of_a(a[m.a]), m.of_b(b[m.b]))
        assert m.layout.startswith("part of attn.qkv")
    assert is_covered(
        found,
        packed,
        "attn.qkv.kernel" if "attn.qkv.kernel" in packed else "attn.qkv.weight",
        packed_first,
    )
    assert is_covered(found, packed, "attn.qkv.bias", packed_first)


@pytest.mark.parametrize("packed", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("apart", APART.values(), ids=APART)
def test_a_bias_of_zeros_is_divided_as_the_weight_next_to_it(packed: Arrays, apart: Arrays):
    found = match(recording(packed), recording(apart, "jax"))
    # What the packed bias and the three would be, if they had values: by the weights' own columns.
    for m in found.matches:
        if not m.b.endswith("bias"):
            continue
        which = [name for name in THREE if m.b.startswith(name)]
        assert which, m.b
        own = THREE[which[0]][:, 0]  # of the first input: a value for each output
        whole = [n for n in packed if n != "attn.qkv.bias"]
        column = first_input(packed[whole[0]], packed["attn.qkv.bias"].shape)
        np.testing.assert_array_equal(m.of_a(column).ravel(), own)


def first_input(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The entries of a packed weight for its first input, as a bias."""
    if packed.shape == (3, D, D):
        return packed[:, :, 0]
    return packed[:, 0] if packed.shape[0] == 3 * D else packed[0].reshape(shape)
