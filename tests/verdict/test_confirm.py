"""Float64 is not excused by twins before single steps were replayed from one state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.evidence import judge, train_ensemble
from lockstep.common.protocol import Evaluation, Snapshot
from lockstep.common.report.summary import notes
from lockstep.common.runs.record import FIRST_STEPS, Record
from lockstep.common.verdict import confirm as confirming
from lockstep.common.verdict import locate
from lockstep.common.verdict.check import Check
from lockstep.common.verdict.comparison import Comparison, RunSummary, divergence
from lockstep.common.verdict.confirm import (
    confirm,
    growth,
    jumps_at,
    left_bound_at,
    steps_to_replay,
)
from tests.verdict.test_locate import from_step

STEPS = 40
NOTHING: Any = None


def record(name: str, loss: np.ndarray, norm: np.ndarray | None = None) -> Record:
    ones = np.ones(STEPS)
    made = Record(
        name, "float64", None, {}, {}, {}, "", loss, ones if norm is None else norm, ones,
        np.zeros(0, np.int64), 1.0, 1.0, 1.0,
    )  # fmt: skip
    return replace(made, batch_digests=np.arange(STEPS))


def runs(gaps: np.ndarray) -> dict[str, Record]:
    loss = np.full(STEPS, 2.0)
    return {"torch": record("torch", loss), "flax": record("flax", loss + gaps)}


def comparison(verdict: Any = "agree", dtype: str = "float64", twins: int = 4) -> Comparison:
    summary = RunSummary(1.0, 1.0, 0.5, {}, 1.0, 1.0, None, [])
    return Comparison(
        dtype, STEPS, verdict, dict.fromkeys(("torch", "flax"), summary), 10, {"twins": twins}
    )


GROWING = np.where(np.arange(STEPS) < 10, 0.0, 4e-16 * 4.0 ** (np.arange(STEPS) - 10))


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The steps that are replayed; what the test puts first in the list is what is found."""
    seen: list[Any] = [None]

    def replay(names: Any, config: Any, data: Any, dtype: Any, steps: Any, *rest: Any, **more: Any):
        seen.append(steps)
        return seen[0]

    monkeypatch.setattr(locate, "replay", replay)
    monkeypatch.setattr(confirming, "evaluate_one_state", lambda *_: None)
    return seen


def confirmed(of: Comparison, gaps: np.ndarray = GROWING) -> Comparison:
    config = Config(steps=STEPS).resolve(1000)
    return confirm(of, runs(gaps), config, NOTHING, NOTHING)


def test_the_step_that_left_the_bound_the_one_before_and_later_ones_are_replayed(
    replayed: list[Any],
) -> None:
    left = int(np.argmax(GROWING > 2e-12))
    found = confirmed(comparison())
    jump = jumps_at(*runs(GROWING).values())
    later = (left - 1, left, (left + STEPS - 1) // 2, STEPS - 1)
    assert replayed[1:] == [(jump - 1, jump, *later)]
    assert found.verdict == "agree" and found.growth is not None
    assert found.growth.replayed == replayed[1]


@pytest.mark.parametrize(
    "of",
    [
        comparison(twins=0),
        comparison("disagree"),
        comparison(dtype="float32"),
        comparison("single"),
    ],
    ids=["no twins were needed", "disagree", "float32", "one run"],
)
def test_what_twins_did_not_excuse_costs_no_more(of: Comparison, replayed: list[Any]) -> None:
    assert confirmed(of) is of and len(replayed) == 1
    confirmed(comparison())
    assert len(replayed) == 2  # the control


def test_the_step_at_which_the_gap_grew_most_and_the_one_before_are_replayed(
    replayed: list[Any],
) -> None:
    jumping = GROWING * np.where(np.arange(STEPS) < 33, 1, 1e4)
    confirmed(comparison(), jumping)
    assert {32, 33} <= set(replayed[1])
    confirmed(comparison())  # the control
    assert not {32, 33} & set(replayed[2])


def test_a_step_that_fails_from_one_state_is_the_fault(replayed: list[Any]) -> None:
    tensors = np.ones(4), np.full(4, 1.5)
    replayed[0] = Check(27, "update", "fc1.bias", 0.5, 1e-12, values=(1.0, 1.5)), tensors, None
    found = confirmed(comparison())
    assert found.verdict == "disagree" and found.growth is None
    assert found.first_divergence is not None and found.location is not None
    assert found.first_divergence.message.startswith("update: step 27: fc1.bias: torch=1 flax=1.5")
    assert found.location.divergence == found.first_divergence
    assert "replayed: twins explain the gap" in found.location.method
    assert found.location.method.endswith("one state of torch, the two take step 27 differently")
    assert found.location.pattern == "flax is 1.5 times torch"


def beyond_twins(**changes: Any) -> Comparison:
    """Runs that disagree at step 20 by more than their twins show; `changes` are of that check."""
    settings: dict[str, Any] = {"bound": 65e-9, "spread": 1e-9, "start": 10, "stop": 30}
    place: dict[str, Any] = {"step": 20, "stage": "loss", "tensor": "loss", "gap": 1.0}
    failed = Check(**(place | settings | changes))
    found = divergence(failed, BACKENDS)
    return replace(comparison("disagree"), windows=(failed,), first_divergence=found)


@pytest.mark.parametrize("spread", [1e-9, None], ids=["both sides", "a run and its twins"])
def test_a_gap_beyond_the_twins_is_rounding_where_every_step_agrees_from_one_state(
    replayed: list[Any], spread: float | None
) -> None:
    found = confirmed(beyond_twins(spread=spread))
    assert replayed[1:] == [(*range(20), 20, 29, 39)]
    assert found.verdict == "agree" and found.first_divergence is None
    assert found.growth is not None and found.growth.beyond == 20
    _, text = notes({"dtype": "float64", "growth": {**found.growth.__dict__}})  # pyright: ignore
    assert "from step 20 on the gap exceeds the twins' bound" in text
    # the control: a step fails
    replayed[0] = Check(17, "update", "fc1.bias", 0.5, 1e-12), (None, None), None
    of = beyond_twins(spread=spread)
    assert confirmed(of) is of


@pytest.mark.parametrize(
    ("changes", "amplified"),
    [
        ({"bound": 9.9e-12, "spread": None}, False),
        ({"bound": 10.1e-12, "spread": None, "values": (0.5, 0.4)}, True),
        ({"bound": 49e-12, "spread": None, "values": (-5.0, 4.0)}, False),
        ({"bound": 51e-12, "spread": None, "values": (-5.0, 4.0)}, True),
        ({"bound": 9.9e-12, "spread": 8.9e-12 / 64}, False),
        ({"bound": 10.1e-12, "spread": 9.1e-12 / 64}, True),
        ({"step": FIRST_STEPS}, True),
    ],
)
def test_twins_decide_where_the_bound_is_ten_times_the_one_without_them(
    changes: dict[str, Any], amplified: bool, replayed: list[Any]
) -> None:
    # another check that fails, which is not asked
    other = Check(30, "backward", "gradient_norm", 1.0, 1e-12, 1e-15, start=30, stop=40)
    of = beyond_twins(**changes)
    of = replace(of, windows=(other, *of.windows))
    assert bool(confirmed(of)) == amplified
    assert len(replayed) == 1 + amplified


def test_a_gap_after_the_last_step_is_asked_of_the_steps_before(replayed: list[Any]) -> None:
    assert confirmed(beyond_twins(step=STEPS, stage="update", tensor="fc1.bias"))
    assert replayed[1:] == [tuple(range(STEPS - 31, STEPS))]


@pytest.mark.parametrize(
    "of",
    [
        beyond_twins(bound=9e-12, spread=1e-13),
        beyond_twins(bound=9e-12, spread=None),
        beyond_twins(step=1),
        beyond_twins(stage="data"),
        beyond_twins(tensor="lr"),
        beyond_twins(gap=np.inf),
        replace(beyond_twins(), not_reproducible={"flax": 12}),
    ],
    ids=[
        "not amplified",
        "a run and its twins, not amplified",
        "a first step",
        "data",
        "learning rate",
        "not finite",
        "not reproducible",
    ],
)
def test_what_may_be_a_fault_at_once_is_not_replayed(of: Comparison, replayed: list[Any]) -> None:
    assert confirmed(of) is of and len(replayed) == 1


class Evaluator:
    """A backend that evaluates each state alike."""

    def __init__(self, loss: float, predictions: np.ndarray) -> None:
        self.found = Evaluation(predictions, loss)

    def init(self, snapshot: Snapshot) -> Snapshot:
        assert snapshot.parameters == {"fc1.bias": 7.0}
        return snapshot

    def evaluate(self, *_: Any) -> Evaluation:
        return self.found


@pytest.mark.parametrize(
    ("loss", "tensor"),
    [
        (4 + 3e-12, None),
        (4 + 5e-12, "test loss"),
        (np.nan, "test loss"),
        (4.0, "predictions"),
        (0.5 + 0.9e-12, None),
        (0.5 + 1.2e-12, "test loss"),
    ],
)
def test_an_evaluation_of_one_state_that_differs_is_the_fault(
    replayed: list[Any], monkeypatch: pytest.MonkeyPatch, loss: float, tensor: str | None
) -> None:
    labels = np.arange(4)
    pixels = np.zeros((4, 32, 32, 3), np.uint8)
    dataset = Dataset("made", pixels, labels, pixels, labels, ("a", "b", "c", "d"))
    other = np.array([0, 1, 2, 2]) if tensor == "predictions" else labels
    reference = 0.5 if loss < 1 else 4.0
    backends: Any = {"torch": Evaluator(reference, labels), "flax": Evaluator(loss, other)}
    ended: Any = {"fc1.bias": 7.0}
    both = {name: replace(run, final=ended) for name, run in runs(GROWING).items()}
    monkeypatch.undo()
    monkeypatch.setattr(locate, "replay", lambda *_, **__: None)
    config = Config(steps=STEPS).resolve(1000)
    found = confirm(comparison(), both, config, dataset, backends.__getitem__)
    if tensor is None:
        assert found and found.growth is not None
        return
    assert not found and found.location is not None and found.first_divergence is not None
    place = found.first_divergence
    assert (place.step, place.stage, place.tensor) == (STEPS, "evaluate", tensor)
    assert found.location.method.endswith(
        "but the two evaluate the last state of torch differently"
    )


def test_the_first_step_beyond_the_bound_is_that_of_the_loss_or_of_the_gradient() -> None:
    loss, norm = np.full(STEPS, 100.0), np.full(STEPS, 0.5)
    one = record("torch", loss, norm)

    def left(quantity: str, step: int, gap: float) -> int:
        changed = getattr(one, quantity).copy()
        changed[step] += gap
        return left_bound_at(one, replace(one, **{quantity: changed}))

    assert left("loss", 7, 1.1e-10) == 7  # 1e-12 of 100
    assert left("loss", 7, 0.9e-10) == STEPS - 1
    assert left("gradient_norm", 5, 1.1e-12) == 5  # of 1, where the norm is smaller
    assert left("gradient_norm", 5, 0.9e-12) == STEPS - 1
    assert jumps_at(replace(one, loss=loss[:1]), replace(one, loss=loss[:1])) == 0
    assert steps_to_replay(0, 1) == (0,) and steps_to_replay(0, 3) == (0, 1, 2)


def test_the_growth_of_the_gap_is_told_with_its_largest_factor_in_one_step() -> None:
    gaps = GROWING.copy()
    gaps[20:] *= 50  # the jump: 200 times in one step
    torch, flax = runs(gaps).values()
    found = growth(torch, flax, (19, 20))
    assert (found.start, found.stop) == (10, STEPS - 1)
    assert found.largest == pytest.approx(gaps[-1], rel=1e-3)
    assert 150 < found.factor < 250
    # The control: rounding below an ulp of the loss is no growth of its own.
    torch, flax = runs(GROWING).values()
    assert growth(torch, flax, ()).factor < 6
    assert growth(torch, torch, ()).factor == 1
    said: Any = {"dtype": "float64", "growth": {**found.__dict__}}
    [text] = notes(said)
    assert "grew from 4.4e-16 at step 10 to" in text
    assert text.endswith("Replayed from one state on both sides, steps 19, 20 agree.")
    assert notes({"dtype": "float64"}) == []  # pyright: ignore[reportArgumentType]


def test_the_later_steps_are_a_sample() -> None:
    assert confirming.LATER_STEPS == 2
    assert steps_to_replay(10, 1001) == (9, 10, 505, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [0.0, 2e-11])
def test_a_late_fault_that_the_runs_amplify_is_found_by_its_step(
    fault: float, digits: Any, build: Callable
) -> None:
    """Digits at lr 0.05 and momentum 0.9 amplify rounding to 6e-12 of the loss at step 101;
    gradients that are off by 2e-11 from step 105 on hide in that."""
    config = Config(steps=120, batch_size=16, lr=0.05, momentum=0.9)
    config = config.resolve(len(digits.train_images))
    sides = {name: build(name, config) for name in BACKENDS}
    sides["flax"].optimizer = from_step(
        105,
        before=lambda late, gradients, params: {
            name: gradient * (1 + fault * late) for name, gradient in gradients.items()
        },
    )(sides["flax"].optimizer)
    ensembles = {
        name: train_ensemble(side, config, digits, "float64", 0) for name, side in sides.items()
    }
    found = judge(ensembles, sides, config, digits)
    assert found.rule.get("twins") == 4
    if not fault:  # the control
        assert found.verdict == "agree" and found.growth is not None
        return
    assert found.verdict == "disagree" and found.location is not None
    place = found.location.divergence
    assert (place.stage, place.tensor[:12]) == ("update", "momentum of ") and place.step >= 105
    assert "twins explain the gap" in found.location.method
