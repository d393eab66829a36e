"""Which tensor of one recording is which of the other."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from lockstep.common.protocol import Arrays
from lockstep.common.recorder.matching import Match, Matching, match
from lockstep.common.recorder.recording import fingerprint
from tests.recorder.recordings import coarse, gpt, linen, pairs_of_gpt, recording


def pairs(found: Matching) -> set[tuple[str, str]]:
    return {(m.a, m.b) for m in found.matches}


def one(found: Matching) -> Match:
    assert len(found.matches) == 1, found
    return found.matches[0]


def numbered(weights: Arrays, seed: int) -> Arrays:
    """Other values for each tensor of the first side, as gradients are."""
    draw = np.random.default_rng(seed).normal
    return {name: draw(size=values.shape) for name, values in weights.items()}


def assert_alike(found: Matching, a: Arrays, b: Arrays) -> None:
    """Each match takes the same numbers out of both sides."""
    for m in found.matches:
        np.testing.assert_array_equal(m.of_a(a[m.a]), m.of_b(b[m.b]), m.name)


# --- A whole network


@pytest.mark.parametrize("linen_first", [False, True])
def test_a_gpt_of_pytorch_meets_that_of_linen(linen_first: bool):
    weights = gpt()
    sides = [recording(weights), recording(linen(weights), "jax")]
    a, b = reversed(sides) if linen_first else sides
    found = match(a, b)
    assert found.same_start
    assert not found.unmatched_a + found.unmatched_b + found.differing
    wanted = set(pairs_of_gpt().items())
    assert pairs(found) == (wanted if linen_first else {(b, a) for a, b in wanted})


@pytest.mark.parametrize("start", [0, 1])
def test_what_is_recorded_later_is_in_the_layout_that_was_found(start: int):
    # start 1: from other weights, so that names alone decide
    weights = gpt()
    others = linen(gpt(seed=start))
    found = match(recording(weights), recording(others, "jax"))
    assert found.same_start == (start == 0)
    later = numbered(weights, 5)
    assert_alike(found, later, linen(later))
    shifted = {name: np.roll(values, 1, -1) for name, values in linen(later).items()}
    with pytest.raises(AssertionError):  # the control
        assert_alike(found, later, shifted)


# --- Layouts

RANDOM = np.random.default_rng(3)
DENSE = RANDOM.normal(size=(6, 10))
SQUARE = RANDOM.normal(size=(6, 6))
CONV = RANDOM.normal(size=(4, 3, 5, 5))
FLAT = RANDOM.normal(size=(7, 3 * 4 * 5))
LAYOUTS = {
    "as it is": (DENSE, DENSE, ""),
    "transposed": (DENSE, DENSE.T, "transposed"),
    "square, transposed": (SQUARE, SQUARE.T, "transposed"),
    "OIHW as HWIO": (CONV, CONV.transpose(2, 3, 1, 0), "axes (3, 2, 0, 1)"),
    "heads split": (DENSE, DENSE.T.reshape(10, 2, 3), "heads split, axes (1, 2, 0)"),
    "heads merged": (DENSE.T.reshape(10, 2, 3), DENSE, "heads merged, axes (1, 0)"),
    "another shape": (DENSE, DENSE.reshape(2, 3, 10), "reshaped"),
    "after a flatten": (
        FLAT,
        FLAT.reshape(7, 3, 4, 5).transpose(2, 3, 1, 0).reshape(60, 7),
        "transposed, columns unrolled (3, 20) in the order (1, 0)",
    ),
    "rows in another order": (
        DENSE,
        DENSE[[3, 0, 5, 1, 2, 4]],
        "rows in another order",
    ),
    "reversed": (DENSE, DENSE[:, ::-1], "columns reversed"),
    "both in another order": (
        DENSE,
        DENSE[[3, 0, 5, 1, 2, 4]][:, [3, 9, 0, 5, 1, 8, 2, 4, 7, 6]].T,
        "transposed, rows in another order, columns in another order",
    ),
    "through float32": (DENSE, DENSE.T.astype(np.float32).astype(np.float64), "transposed"),
}


@pytest.mark.parametrize(("a", "b", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_equal_values_say_the_layout(a: np.ndarray, b: np.ndarray, layout: str):
    found = one(match(recording({"x": a}), recording({"y": b}, "jax")))
    assert (found.how, found.layout) == ("value", layout)
    np.testing.assert_array_equal(
        found.of_b(np.ascontiguousarray(b)).astype(np.float32), a.astype(np.float32)
    )


def test_a_flatten_in_another_order_is_right_next_to_kernels_that_are_transposed():
    draw = np.random.default_rng(5)
    kernels = {f"fc{i}.weight": draw.normal(size=(8, 8 + i)) for i in range(4)}
    ours = {"flat.weight": FLAT, **kernels}
    theirs = {name.replace("weight", "kernel"): np.array(k.T) for name, k in kernels.items()}
    theirs["flat.kernel"] = FLAT.reshape(7, 3, 4, 5).transpose(2, 3, 1, 0).reshape(60, 7)
    found = match(recording(ours), recording(theirs, "jax"))
    assert not found.differing
    [flat] = [m for m in found.matches if m.a == "flat.weight"]
    assert flat.how == "value"
    np.testing.assert_array_equal(flat.of_b(theirs["flat.kernel"]), FLAT)


def test_a_mask_among_the_buffers_is_no_obstacle():
    mask = np.tril(np.ones((4, 4), bool))
    ours = recording({"x.weight": DENSE, "mask": mask})
    theirs = recording({"y.kernel": np.array(DENSE.T), "future": ~mask}, "jax")
    for side, name in ((ours, "mask"), (theirs, "future")):
        side.first_steps[f"0/update/{name}"] = side.weights[name]
        side.parameter_history[f"3/{name}"] = side.weights[name]
    assert ("x.weight", "y.kernel") in pairs(match(ours, theirs))


def test_the_same_numbers_in_no_layout_are_said_to_be_so():
    shuffled = np.random.default_rng(0).permutation(DENSE.ravel()).reshape(DENSE.shape)
    found = match(recording({"x.weight": DENSE}), recording({"x.weight": shuffled}))
    assert one(found).how == "name"
    assert found.differing[0].text == "the same numbers in another order"


@pytest.mark.parametrize("rows", [64, 300])
def test_values_that_repeat_do_not_hide_a_layout(rows: int):
    # bfloat16 has few values: of 60,000 weights, 2,500 are different, and most of these repeat.
    draw = np.random.default_rng(rows)
    a = coarse(draw.normal(size=(rows, 200)))
    assert len(np.unique(a)) < a.size / 3
    b = np.ascontiguousarray(a[draw.permutation(rows)][:, draw.permutation(200)].T)
    found = one(match(recording({"x": a}), recording({"y": b}, "jax")))
    assert found.how == "value"
    np.testing.assert_array_equal(found.of_b(b), a)


@pytest.mark.parametrize("seed", range(40))
def test_any_separable_layout_is_found(seed: int):
    draw = np.random.default_rng(seed)
    shape = tuple(draw.integers(2, 7, draw.integers(1, 5)))
    a = draw.normal(size=shape)
    b, later_a = a, draw.normal(size=shape)
    later_b = later_a
    for axis in range(a.ndim):  # some axes in another order
        if draw.random() < 0.4:
            order = draw.permutation(shape[axis])
            b, later_b = b.take(order, axis), later_b.take(order, axis)
    axes = draw.permutation(a.ndim)
    b, later_b = b.transpose(axes), later_b.transpose(axes)
    if draw.random() < 0.5:  # two axes as one
        at = draw.integers(0, a.ndim)
        merged = (*b.shape[:at], -1, *b.shape[at + 2 :])
        b, later_b = b.reshape(merged), later_b.reshape(merged)
    is_part = draw.random() < 0.5
    if is_part:  # within a larger tensor
        b, later_b = (np.concatenate([draw.normal(size=x.shape), x]) for x in (b, later_b))
    found = one(match(recording({"x": a}), recording({"y": b}, "jax")))
    assert found.how == "value" and found.layout.startswith("part of") == is_part
    np.testing.assert_array_equal(found.of_a(later_a), found.of_b(later_b))
    later_b = np.roll(later_b, 1)
    assert not np.array_equal(found.of_a(later_a), found.of_b(later_b))  # the control


# --- Equal values in several tensors, and constants


def test_layers_of_equal_values_are_told_apart_by_their_names():
    weights = gpt()
    weights |= {n.replace("blocks.0", "blocks.1"): v for n, v in weights.items() if "blocks.0" in n}
    found = match(recording(weights), recording(linen(weights), "jax"))
    assert pairs(found) == {(b, a) for a, b in pairs_of_gpt().items()}


CONSTANTS = {
    "w.weight": DENSE,
    "m1.g": np.ones(6),
    "m2.g": np.ones(6),
    "z.weight": np.zeros((6, 6)),
}
OTHERS = {"w.kernel": DENSE.T, "u.s": np.ones(6), "v.s": np.ones(6), "y.kernel": np.zeros((6, 6))}


@pytest.mark.parametrize("transposed", [True, False])
def test_equal_gradients_tell_constants_apart(transposed: bool):
    gradients = numbered(CONSTANTS, 1)
    others = {"u.s": gradients["m2.g"], "v.s": gradients["m1.g"] * (1 + 1e-9)}
    others |= {"w.kernel": gradients["w.weight"].T}
    others["y.kernel"] = gradients["z.weight"].T if transposed else gradients["z.weight"]
    a = recording(CONSTANTS, gradients=gradients)
    found = match(a, recording(OTHERS, "jax", gradients=others))
    how = {(m.a, m.b): (m.how, m.layout) for m in found.matches}
    assert how["m1.g", "v.s"] == how["m2.g", "u.s"] == ("gradient", "")
    assert how["z.weight", "y.kernel"] == ("gradient", "transposed" if transposed else "")
    # The control: gradients that differ say nothing, and the order of definition decides.
    others = {name: values * 1.01 for name, values in others.items()}
    found = match(a, recording(OTHERS, "jax", gradients=others))
    how = {(m.a, m.b): (m.how, m.layout) for m in found.matches}
    assert how["m1.g", "u.s"] == how["m2.g", "v.s"] == ("sibling", "")
    assert how["z.weight", "y.kernel"] == ("sibling", "transposed")  # as w is


def test_the_first_steps_tell_constants_apart_where_no_gradient_was_recorded():
    moved = {name: values + 0.1 for name, values in numbered(CONSTANTS, 2).items()}
    others = {"w.kernel": moved["w.weight"].T, "y.kernel": moved["z.weight"].T}
    others |= {"u.s": moved["m2.g"], "v.s": moved["m1.g"]}
    histories = [{f"3/{name}": v for name, v in side.items()} for side in (moved, others)]
    found = match(
        recording(CONSTANTS, history=histories[0]), recording(OTHERS, "jax", history=histories[1])
    )
    assert {("m1.g", "v.s"), ("m2.g", "u.s")} <= pairs(found)


def test_the_bias_of_rows_in_another_order_follows_its_weight():
    order = [3, 0, 5, 1, 2, 4]
    a = {"fc.weight": DENSE, "fc.bias": np.zeros(6)}
    b = {"fc.kernel": np.ascontiguousarray(DENSE[order].T), "fc.bias": np.zeros(6)}
    bias = match(recording(a), recording(b, "jax")).matches[1]
    np.testing.assert_array_equal(bias.of_b(np.array(order)), np.arange(6))


# --- Other weights at the start


def test_other_weights_are_said_and_how_their_distributions_differ():
    draw = np.random.default_rng(6)
    a = {"fc1.weight": draw.uniform(-1, 1, (80, 50)), "fc2.weight": draw.normal(size=(7, 80))}
    b = {
        "Dense_0.kernel": draw.normal(0, 3**-0.5, (50, 80)),
        "Dense_1.kernel": draw.normal(size=(80, 7)),
    }
    found = match(recording(a), recording(b, "jax"))
    assert not found.same_start
    assert [(m.a, m.b, m.how, m.layout) for m in found.matches] == [
        ("fc1.weight", "Dense_0.kernel", "name", "transposed"),
        ("fc2.weight", "Dense_1.kernel", "name", "transposed"),
    ]
    assert [(d.name, d.text) for d in found.differing] == [("fc1.weight", "uniform against normal")]
    b["Dense_1.kernel"] = b["Dense_1.kernel"] * 1.3 + 0.5
    found = match(recording(a), recording(b, "jax"))
    assert "mean" in found.differing[1].text and "standard deviation" in found.differing[1].text


# --- Buffers, fingerprints, and what has no partner


def test_buffers_meet_across_collections_and_counters_are_left_out():
    a = {"conv1.weight": CONV, "bn1.weight": np.ones(4), "bn1.bias": np.zeros(4)}
    buffers = {"bn1.running_mean": np.zeros(4), "bn1.running_var": np.ones(4)}
    b = {
        "batch_stats.BatchNorm_0.mean": np.zeros(4),
        "batch_stats.BatchNorm_0.var": np.ones(4),
        "params.BatchNorm_0.bias": np.zeros(4),
        "params.BatchNorm_0.scale": np.ones(4),
        "params.Conv_0.kernel": CONV.transpose(2, 3, 1, 0),
    }
    counter = {"bn1.num_batches_tracked": np.array(0)}
    one_side = recording(a | buffers | counter, parameters=list(a))
    other = recording(b, "jax", parameters=[name for name in b if name.startswith("params")])
    found = match(one_side, other)
    assert ("bn1.running_mean", "batch_stats.BatchNorm_0.mean") in pairs(found)
    assert ("bn1.running_var", "batch_stats.BatchNorm_0.var") in pairs(found)
    assert not found.unmatched_a + found.unmatched_b
    mask = {"mask": np.linspace(0, 1, 3)}  # the control: a buffer of floats is listed
    found = match(recording(a | buffers | counter | mask, parameters=list(a)), other)
    assert found.unmatched_a == ("mask",)


def test_fingerprints_are_matched_and_left_as_they_are():
    print_ = fingerprint(np.random.default_rng(2).normal(size=(9, 9)))
    a = replace(
        recording({"big.weight": print_, "s.weight": DENSE}), fingerprints=["weights/big.weight"]
    )
    b = replace(
        recording({"big.kernel": print_, "s.kernel": DENSE.T}, "jax"),
        fingerprints=["weights/big.kernel"],
    )
    found = match(a, b)
    assert pairs(found) == {("big.weight", "big.kernel"), ("s.weight", "s.kernel")}
    assert found.matches[0].of_b(print_) is print_
    assert found.matches[1].of_b(print_) is print_  # of a whole tensor: no permutation changes it


def test_a_head_that_is_not_tied_has_no_partner():
    weights, others = gpt(), linen(gpt())
    others["params.Dense_0.kernel"] = weights["wte.weight"].T
    found = match(recording(weights), recording(others, "jax"))
    assert found.unmatched_b == ("params.Dense_0.kernel",) and not found.unmatched_a


def test_what_is_left_is_proposed_by_size_and_name():
    a = {"fc.weight": DENSE, "extra.weight": np.zeros((3, 2)), "odd.bias": np.arange(5.0)}
    b = {"fc.kernel": DENSE.T, "extra.kernel": np.ones((4, 4))}
    found = match(recording(a), recording(b, "jax"))
    assert found.unmatched_a == ("extra.weight", "odd.bias")
    assert found.unmatched_b == ("extra.kernel",)
    assert found.proposals == {"extra.weight": "extra.kernel"}


def test_a_tensor_that_is_only_covered_in_part_is_listed():
    found = match(
        recording({"wte": np.concatenate([DENSE, -DENSE])}), recording({"e": DENSE}, "jax")
    )
    assert one(found).layout == "part of wte"
    assert found.unmatched_a == ("wte",)


# --- Cost


def test_a_thousand_tensors_take_seconds_and_not_minutes():
    blocks = 90
    weights = gpt(blocks=blocks)
    others = linen(weights, blocks)
    start = time.process_time()  # other tests run at the same time
    found = match(recording(weights), recording(others, "jax"))
    assert time.process_time() - start < 60  # measured: 5 s
    assert pairs(found) == {(b, a) for a, b in pairs_of_gpt(blocks).items()}
