"""The verdict on two scripts: clean pairs agree, each fault is found at its stage, and what one side
lacks is said."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from lockstep.common.errors import RecordError
from lockstep.common.recorder.matched import Difference
from lockstep.common.recorder.recording import Recording
from lockstep.common.verdict.script_comparison import ScriptComparison
from lockstep.common.verdict.scripts import (
    ScriptRuns,
    Wanted,
    compare_scripts,
    judge_scripts,
    runs_wanted,
    side_names,
)
from tests.recorder.made import (
    STAGES_OF_FAULTS,
    STEPS,
    matching,
    recording,
    with_twins,
)

SIDES = ("train_torch.py", "train_jax.py")


def compared(
    a: Recording | None = None, b: Recording | None = None, **faults: str
) -> ScriptComparison:
    ours = ScriptRuns(a or recording("torch"))
    theirs = ScriptRuns(b or recording("jax", **faults))
    return compare_scripts(ours, theirs, matching())


def own_precision(
    dtype: str = "float32", fault: str = "", count: int = 2
) -> tuple[ScriptRuns, ScriptRuns]:
    return (
        ScriptRuns.of(with_twins("torch", dtype, count)),
        ScriptRuns.of(with_twins("jax", dtype, count, fault=fault)),
    )


# --- Agreement, and each fault


def test_two_layouts_and_orders_of_addition_agree_in_float64() -> None:
    found = compared()
    assert found and found.verdict == "agree" and found.place is None
    stages = {check.stage for check in found.checks}
    assert stages == {"data", "weights", "forward", "loss", "backward", "update", "evaluate"}
    assert 0 < found.score < 0.1, "rounding differs, and is far from the bound"
    assert not found.not_seen and not found.left_out and not found.notes


@pytest.mark.parametrize("fault", STAGES_OF_FAULTS)
def test_each_fault_is_found_at_its_stage(fault: str) -> None:
    found = compared(fault=fault)
    assert found.verdict == "disagree" and found.place is not None
    expected = {"dropped update": "update"}.get(fault, STAGES_OF_FAULTS[fault])
    assert found.place.check.stage == expected, found.place.message
    assert found.place.causes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_scripts_agree_in_their_own_precision_within_their_twins(dtype: str) -> None:
    found = compare_scripts(*own_precision(dtype), matching())
    assert found.verdict == "agree", found
    assert found.twins == (2, 2)


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        ("batches in another order", "data"),
        ("tanh", "forward"),
        ("labels shifted", "loss"),
        ("frozen layer", "backward"),
        ("beta2", "update"),
        ("no bias correction", "update"),
    ],
)
def test_large_faults_are_found_in_float32(fault: str, stage: str) -> None:
    found = compare_scripts(*own_precision(fault=fault), matching())
    assert found.place is not None and found.place.check.stage == stage, found


def test_other_precisions_than_float64_need_twins() -> None:
    with pytest.raises(RecordError, match=r"--twins"):
        compared(recording("torch", "float32"), recording("jax", "float32"))


# --- The place


@pytest.mark.parametrize(
    ("fault", "tensor", "pattern", "cause"),
    [
        ("scaled images", "batch[0]", "is 1.1 times", "scaled otherwise"),
        ("frozen layer", "net.fc1.weight (params.Dense_0.kernel)", "zeros", "frozen"),
        ("decay in the gradient", "net.fc2.bias", "0.001 times the parameter itself", "decay"),
        ("beta2", "second moment of net.fc1.weight", "is 50 times", "beta2"),
        ("beta1", "first moment of net.fc1.weight", "as all that fail are", "beta1"),
        ("clipping", "first moment of net.fc1.weight", "by its own factor", "by its own norm"),
        ("epsilon", "net.fc1.weight", "the smaller the gradient", "epsilon"),
        ("decay", "net.fc1.weight", "-1e-05 times the parameter itself", "decoupled"),
        ("no bias correction", "net.fc1.weight", "about 3.16 times", "bias correction"),
        ("learning rate", "lr", "is 1.1 times", "schedule"),
        ("tanh", "net.fc2 (Dense_1)", "", "activation"),
    ],
)
def test_the_place_has_both_names_what_is_seen_and_a_cause(
    fault: str, tensor: str, pattern: str, cause: str
) -> None:
    place = compared(fault=fault).place
    assert place is not None
    assert place.name.startswith(tensor)
    assert pattern in (place.pattern or "")
    assert cause in place.causes[0]
    assert re.search(rf"{SIDES[0]}=\S+ {SIDES[1]}=\S+, gap .* > ", place.message)


def test_a_tensor_in_the_wrong_place_is_told_from_another_start() -> None:
    theirs = recording("jax")
    names = list(theirs.weights)
    theirs.weights[names[1]] = theirs.weights[names[1]][::-1]
    text = "q.bias equals params.k.bias"
    found = compare_scripts(
        ScriptRuns(recording("torch")),
        ScriptRuns(theirs),
        matching(differing=(Difference("net.fc1.bias", text),)),
    )
    assert found.place is not None and found.place.pattern == text
    assert "wrong place" in found.place.causes[0]


@pytest.mark.parametrize(
    ("fault", "extent"),
    [
        ("decay", "all kernels, no vector"),
        ("decay of biases", "all vectors, no kernel"),
        ("frozen layer", "none of the 3 other tensors of this stage fails"),
        ("beta1", "all of the 3 other tensors of this stage fail, too"),
    ],
)
def test_the_place_says_what_the_failing_tensors_have_in_common(fault: str, extent: str) -> None:
    place = compared(fault=fault).place
    assert place is not None and extent in place.extent


def test_what_differs_after_equal_updates_uses_older_parameters() -> None:
    theirs = recording("jax")
    for key in theirs.first_steps:
        if key.startswith("1/forward/") or key == "1/loss/loss":
            theirs.first_steps[key] = theirs.first_steps[key] + 0.1
    place = compared(b=theirs).place
    assert place is not None and place.name == "net.fc1 (Dense_0)"
    assert place.pattern == "the updates before it agree"
    assert "parameters of before the last update" in place.causes[0]


def test_activations_are_said_to_differ_from_one_of_them_on() -> None:
    place = compared(fault="tanh").place
    assert place is not None
    assert place.extent == (
        "1 of the 2 other tensors of this stage fails, too (everything from net.fc2 on)"
    )


def test_a_step_whose_update_is_lost_is_found_at_that_step() -> None:
    place = compared(fault="dropped update").place
    assert place is not None and place.check.step == 9


def test_the_line_of_the_source_is_named_where_it_is_known() -> None:
    place = compared(fault="labels shifted").place
    assert place is not None
    assert place.lines == ("train_torch.py:41", "train_jax.py:41")


# --- What is missing, or not the same


@pytest.mark.parametrize("lacks", [("backward",), ("backward", "forward"), ("lr", "update")])
def test_what_one_side_lacks_is_listed_and_the_rest_is_compared(lacks: tuple[str, ...]) -> None:
    found = compared(b=recording("jax", lacks=lacks))
    assert found.verdict == "agree"
    [sentence] = found.not_seen
    words = {"backward": "gradients", "forward": "activations", "lr": "learning rate"}
    assert sentence.startswith("not seen on train_jax.py: ")
    for stage in lacks:
        assert words.get(stage, "moment") in sentence
    assert ("learning rate (give it to run.step(..., lr=lr))" in sentence) == ("lr" in lacks)


def test_without_gradients_the_update_speaks() -> None:
    found = compared(b=recording("jax", fault="frozen layer", lacks=("backward",)))
    assert found.place is not None
    assert found.place.check.tensor == "first moment of net.fc1.weight"


def test_nothing_in_common_is_an_error_and_no_agreement() -> None:
    ours = dataclasses.replace(
        recording("torch", lacks=("forward", "loss", "evaluate")), series={"a": np.ones(STEPS)}
    )
    theirs = dataclasses.replace(
        recording("jax", lacks=("forward", "loss", "evaluate")),
        series={"b": np.ones(STEPS), "c": np.ones(STEPS)},
    )
    with pytest.raises(RecordError, match="nothing in common"):
        compare_scripts(ScriptRuns(ours), ScriptRuns(theirs), matching(matches=()))


def test_tensors_without_a_counterpart_are_listed() -> None:
    found = compare_scripts(
        ScriptRuns(recording("torch")),
        ScriptRuns(recording("jax")),
        matching(unmatched_a=("extra.weight",)),
    )
    assert found and "1 of train_torch.py's tensors have no counterpart" in found.left_out[0]


def test_other_numbers_of_steps_disagree_and_are_compared_over_the_common_ones() -> None:
    found = compared(b=recording("jax", steps=STEPS + 6))
    assert found.verdict == "disagree" and found.place is not None
    assert found.place.message == "train_torch.py took 24 steps and train_jax.py 30"
    assert found.steps == STEPS and found.max_loss_gap is not None and found.max_loss_gap < 1e-12
    assert not runs_wanted(found)
    wrong = compared(b=recording("jax", steps=STEPS + 6, fault="late schedule"))
    assert wrong.place is not None and wrong.place.check.step == 7, "an earlier place comes first"


def test_runs_that_are_not_finite_at_the_same_step_diverge_together() -> None:
    sides = [recording(name) for name in ("torch", "jax")]
    for side in sides:
        side.series["loss"][9:] = np.nan
    assert compared(*sides).verdict == "diverged"
    assert compared(sides[0], recording("jax")).verdict == "disagree"


def test_a_loss_that_only_some_steps_have_is_compared_there() -> None:
    sides = [recording(name) for name in ("torch", "jax")]
    for side in sides:
        side.series["generator"] = np.where(np.arange(STEPS) % 5 == 4, 1.5, np.nan)
    assert compared(*sides).verdict == "agree"
    sides[1].series["generator"][14] = 1.6
    found = compared(*sides)
    assert found.place is not None
    assert (found.place.check.step, found.place.name) == (14, "generator")


def test_float32_in_a_float64_run_is_named_and_is_the_cause() -> None:
    theirs = recording("jax")
    for key, array in theirs.first_steps.items():
        if key.endswith("forward/Dense_0"):
            theirs.first_steps[key] = array.astype(np.float32)
    theirs.first_steps["0/loss/loss"] = theirs.first_steps["0/loss/loss"] * (1 + 1e-7)
    found = compared(b=dataclasses.replace(theirs, pinned=["forward/Dense_0"]))
    assert found.place is not None and found.place.name == "net.fc1 (Dense_0)"
    assert "float32" in (found.place.pattern or "") and "float32" in found.place.causes[0]
    assert any("train_jax.py computes in float32" in note for note in found.notes)


# --- What is believed


def test_modules_that_return_something_else_are_no_difference_of_the_training() -> None:
    theirs = recording("jax")
    for step in (0, 1):
        theirs.first_steps[f"{step}/forward/Dense_0"] += 1.0
    found = compared(b=theirs)
    assert found.verdict == "agree"
    assert any("net.fc1" in sentence for sentence in found.left_out)
    wrong = recording("jax", fault="decay")
    wrong.first_steps["0/forward/Dense_0"] += 1.0
    found = compared(b=wrong)
    assert found.place is not None and found.place.check.stage == "update", "the losses agree"
    tapped = [recording(name) for name in ("torch", "jax")]
    for side, value in zip(tapped, (1.0, 2.0), strict=True):
        side.first_steps["0/forward/scores"] = np.full(4, value)
        side.layers.append("scores")
    found = compared(*tapped)
    assert found.place is not None and found.place.name == "scores", "a tap counts"


def test_a_learning_rate_that_is_reported_and_not_applied_is_no_difference() -> None:
    theirs = recording("jax")
    theirs.series["lr"] *= 2
    found = compared(b=theirs)
    assert found.verdict == "agree"
    assert any("learning rates differ" in sentence for sentence in found.left_out)


def test_a_parameter_that_rounding_alone_moves_has_room() -> None:
    sides = [recording(name) for name in ("torch", "jax")]
    for n, side in enumerate(sides):
        name = list(side.weights)[1]
        for step in (0, 1):
            side.first_steps[f"{step}/backward/{name}"] = np.full(8, 1e-17 * (n + 1))
            for slot in ("first moment", "second moment"):
                side.first_steps[f"{step}/update/{slot} of {name}"] = np.full(8, 1e-33 * (n + 1))
            side.first_steps[f"{step}/update/{name}"] = side.weights[name] + 1e-11 * (n + 1)
        for key in ("3", "10"):
            side.parameter_history[f"{key}/{name}"] = side.weights[name] + 1e-11 * (n + 1)
        side.final[name] = side.weights[name] + 1e-11 * (n + 1)
    assert compared(*sides).verdict == "agree"
    decayed = list(sides[1].weights)[1]
    sides[1].final[decayed] = sides[1].final[decayed] * (1 - 1e-5)
    assert compared(*sides).verdict == "disagree"


@pytest.mark.parametrize("zero", [False, True], ids=["both near zero", "zero on one side"])
def test_a_part_of_a_parameter_that_rounding_alone_moves_has_room(zero: bool) -> None:
    """As the bias of the keys in `in_proj_bias`: Adam makes steps of what rounding leaves."""
    sides = [recording(name) for name in ("torch", "jax")]
    for n, side in enumerate(sides):
        name = list(side.weights)[1]
        for step in (0, 1):
            side.first_steps[f"{step}/backward/{name}"][:3] = 0.0 if zero and n else 1e-18 * (n + 1)
            for slot in ("first moment", "second moment"):
                side.first_steps[f"{step}/update/{slot} of {name}"][:3] = 1e-33
            side.first_steps[f"{step}/update/{name}"][:3] = side.weights[name][:3] + 1e-11 * n
        for key in ("3", "10"):
            side.parameter_history[f"{key}/{name}"][:3] = side.weights[name][:3] + 1e-11 * n
        side.final[name][:3] = side.weights[name][:3] + 1e-11 * n
    assert compared(*sides).verdict == "agree"
    sides[1].final[list(sides[1].weights)[1]][5] += 1e-11  # an entry that has a gradient
    assert compared(*sides).verdict == "disagree"


@pytest.mark.parametrize(
    ("other", "agrees"),
    [(float(np.float32(84 / 99)), True), (85 / 99, False), (84 / 99 + 1e-6, False)],
    ids=["rounded", "one more image", "no share"],
)
def test_an_accuracy_may_be_in_float32_in_a_float64_run(other: float, agrees: bool) -> None:
    sides = [
        dataclasses.replace(recording(name), results={"accuracy": np.array(value)})
        for name, value in (("torch", 84 / 99), ("jax", other))
    ]
    assert (compared(*sides).verdict == "agree") == agrees


# --- More runs


@pytest.mark.parametrize(
    ("share", "agrees"), [(6.5e-6, True), (1e-3, False)], ids=["optax", "a larger one"]
)
def test_an_optimizers_own_scalars_may_round_in_float32(share: float, agrees: bool) -> None:
    """As optax's bias correction does, in no twin: the first update is 6.5e-6 larger. It shows where
    a bias starts from zero."""
    ours, theirs = own_precision()

    def scaled(found: Recording, factor: float) -> Recording:
        weights, first = dict(found.weights), dict(found.first_steps)
        for name in found.parameters:
            if weights[name].ndim == 1:
                change = first[f"0/update/{name}"] - weights[name]
                first[f"0/update/{name}"] = (change * factor).astype(change.dtype)
                weights[name] = np.zeros_like(weights[name])
        return dataclasses.replace(found, weights=weights, first_steps=first)

    def runs(of: ScriptRuns, factor: float) -> ScriptRuns:
        return ScriptRuns(scaled(of.run, factor), tuple(scaled(t, factor) for t in of.twins))

    found = compare_scripts(runs(ours, 1.0), runs(theirs, 1 + share), matching())
    assert (found.verdict == "agree") == agrees, found


def test_a_script_that_is_not_reproducible_is_told_from_a_wrong_one() -> None:
    ours = ScriptRuns(recording("torch"))
    theirs = recording("jax", fault="batches in another order")
    first = compare_scripts(ours, ScriptRuns(theirs), matching())
    assert runs_wanted(first) == Wanted(0, again=True, short=False)
    again = [recording("torch", twin=0), recording("jax", twin=0)]
    found = compare_scripts(ours.add(again[:1]), ScriptRuns(theirs).add(again[1:]), matching())
    [unstable] = found.unstable
    assert unstable.message.startswith(
        "train_jax.py is not reproducible: the same run again differs at step 5 (data: batch[0])"
    )
    assert "run.random" in unstable.message
    same = [recording("torch", twin=0), dataclasses.replace(theirs, twin=0)]
    found = compare_scripts(ours.add(same[:1]), ScriptRuns(theirs).add(same[1:]), matching())
    assert not found.unstable and not runs_wanted(found)


def test_twins_are_run_before_a_late_difference_stands() -> None:
    asked: list[tuple[list[int], int | None]] = []

    def run_twins(numbers: list[int], steps: int | None) -> tuple[list[Recording], list[Recording]]:
        asked.append((numbers, steps))
        count = steps or STEPS
        return (
            [recording("torch", twin=number, steps=count) for number in numbers],
            [
                recording("jax", twin=number, steps=count, fault="dropped update")
                for number in numbers
            ],
        )

    found, ours, theirs = judge_scripts(
        ScriptRuns(recording("torch")),
        ScriptRuns(recording("jax", fault="dropped update")),
        matching(),
        run_twins,
    )
    assert asked == [([0, 1, 2], None)] and found.verdict == "disagree"
    assert [len(side.twins) for side in (ours, theirs)] == [2, 2]


def test_rounding_that_a_run_amplifies_is_explained_by_its_twins() -> None:
    def amplified(name: str, twin: int | None) -> Recording:
        found = recording(name, twin=twin)
        size = np.where(np.arange(STEPS) > 5, 1e-9, 0.0)
        sign = (1 if name == "torch" else -1) * (1 + (twin or 0))
        found.series["loss"] = found.series["loss"] + sign * size
        return found

    def run_twins(numbers: list[int], steps: int | None) -> tuple[list[Recording], list[Recording]]:
        first, second = ([amplified(name, n) for n in numbers] for name in ("torch", "jax"))
        return first, second

    ours, theirs = (ScriptRuns(amplified(name, None)) for name in ("torch", "jax"))
    assert compare_scripts(ours, theirs, matching()).verdict == "disagree"
    assert judge_scripts(ours, theirs, matching(), run_twins)[0].verdict == "agree"


@pytest.mark.parametrize(("flipped", "agrees"), [([0], True), ([0, 1, 2], False)])
def test_a_batch_that_rounding_decides_may_differ_below_float64(
    flipped: list[int], agrees: bool
) -> None:
    """What a policy sees follows from its actions: one flips in a run and in no twin, or, where the
    two see other batches, in all of them."""
    ours, theirs = with_twins("torch", "float32", 2), with_twins("jax", "float32", 2)
    for i in flipped:
        digests = {name: values.copy() for name, values in ours[i].batch_digests.items()}
        digests["batch[0]"][6:] += 1
        ours[i] = dataclasses.replace(ours[i], batch_digests=digests)
    found = compare_scripts(ScriptRuns.of(ours), ScriptRuns.of(theirs), matching())
    assert (found.verdict == "agree") == agrees, found
    if not agrees:
        assert found.place is not None
        assert (found.place.check.stage, found.place.check.step) == ("data", 6)
        assert runs_wanted(found).twins > 2, "another twin may show it"


def test_judging_ends_where_no_more_runs_can_be_had() -> None:
    found, *_ = judge_scripts(
        ScriptRuns(recording("torch")),
        ScriptRuns(recording("jax", fault="dropped update")),
        matching(),
        lambda numbers, steps: ([], []),
    )
    assert found.verdict == "disagree"


# --- Names of the sides


@pytest.mark.parametrize(
    ("scripts", "names"),
    [
        (("a/train.py", "b/train.py"), ("a/train.py", "b/train.py")),
        (("x/one/train.py", "x/two/train.py"), ("one/train.py", "two/train.py")),
        (("train.py", "train.py"), ("train.py (1)", "train.py (2)")),
    ],
)
def test_scripts_of_one_name_are_told_apart(
    scripts: tuple[str, str], names: tuple[str, str]
) -> None:
    made = recording("torch")
    a, b = (dataclasses.replace(made, name="train.py", script=script) for script in scripts)
    assert side_names(a, b) == names


# --- Results


def test_predictions_are_counted_below_float64_and_equal_in_it() -> None:
    assert compared(fault="other accuracy").place is not None
    ours, theirs = own_precision(count=2)
    changed = theirs.run.results["predictions"].copy()
    changed[:3] = (changed[:3] + 1) % 5
    few = dataclasses.replace(theirs.run, results={**theirs.run.results, "predictions": changed})
    assert compare_scripts(ours, dataclasses.replace(theirs, run=few), matching())
    exact = compared(b=dataclasses.replace(recording("jax"), results={"predictions": changed}))
    assert exact.place is not None and exact.place.name == "predictions"
