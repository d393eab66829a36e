"""False alarms and sensitivity: tiny measurements come out as they must, and the statistics are
right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import optax
import pytest
from scipy.stats import binom, binomtest

from lockstep.backends import load
from lockstep.common.config import MODELS, Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.evidence import baselines, false_alarms, judge, sensitivity, train_ensemble
from lockstep.common.evidence.false_alarms import (
    CALIBRATION_SEEDS,
    DEVELOPMENT_SEEDS,
    MEASUREMENT_SEEDS,
    SETTINGS,
    Setting,
    clopper_pearson,
)
from lockstep.common.evidence.plots import draw_sensitivity
from lockstep.common.protocol import Backend
from lockstep.common.recipes import RECIPES
from lockstep.common.testing import same_run
from lockstep.common.verdict import judge as verdicts
from lockstep.common.verdict.check import Check
from lockstep.common.verdict.comparison import Comparison
from tests.marks import slow_except
from tests.verdict.helpers import diverging

WIDTH = 80
TINY = Setting(
    "digits", Config(batch_size=16, momentum=0.9, lr=0.01, steps=3)
)  # of three steps each is a chunk of its own: one program


def width(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> int:
    """Of a table with a frame and one space on each side of a cell."""
    widest = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
    return sum(widest) + 3 * len(columns) + 1


@pytest.mark.parametrize("made", slow_except([1.0, 0.5, 0.0], 0.0))
def test_mixed_precision_sees_updates_that_bfloat16_could_not_hold(
    made: float, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(batch_size=16, lr=1e-4, momentum=0.9, steps=3).resolve(len(digits.train_images))
    apply = optax.apply_updates

    def scaled(parameters: Any, updates: Any) -> Any:
        return apply(parameters, jax.tree.map(lambda update: update * made, updates))

    monkeypatch.setattr(optax, "apply_updates", scaled)
    torch_side, flax_side = (
        load(name)(config, 10, "mixed_bfloat16", "cpu") for name in ("torch", "flax")
    )
    found = same_run(torch_side, flax_side, digits, config, "mixed_bfloat16")
    if made == 1:
        assert found, found
    else:
        first = found.first_divergence
        assert first is not None and (first.step, first.stage) == (0, "update")


# --- The settings and the seeds


def test_the_settings_are_as_wide_as_they_claim() -> None:
    configs = [setting.config for setting in SETTINGS]
    assert len(SETTINGS) == len(set(SETTINGS)) == 32
    assert {setting.data for setting in SETTINGS} == {"digits", "cifar10"}
    assert {1, 3, 7, 128, 512} <= {c.batch_size for c in configs}
    assert (min(c.momentum for c in configs), max(c.momentum for c in configs)) == (0.0, 0.999)
    assert max(c.lr for c in configs) == 1e6
    kinds = {"constant", "cosine", "step", "exponential", "plateau"}
    assert {c.schedule.kind for c in configs} == kinds
    options = ("weight_decay", "nesterov", "dampening", "maximize", "clip_norm", "label_smoothing")
    assert all(any(getattr(c, name) for c in configs) for name in (*options, "augment"))
    assert all(
        setting.config.resolve(1437).total_steps == setting.config.steps for setting in SETTINGS
    )


def test_each_other_network_has_settings_of_both_data_sets_with_what_its_recipe_has() -> None:
    assert false_alarms.settings("net") == list(SETTINGS) and false_alarms.settings("none") == []
    for model in set(MODELS) - {"net"}:
        settings, recipe = false_alarms.settings(model), RECIPES[model].config
        assert [setting.data for setting in settings] == ["digits", "cifar10"]
        last = settings[1].config
        for name in ("momentum", "weight_decay", "augment", "label_smoothing", "clip_norm"):
            assert getattr(last, name) == getattr(recipe, name)
        assert last.schedule.kind == recipe.schedule.kind


def test_no_seed_is_used_both_to_set_levels_and_to_measure() -> None:
    assert (CALIBRATION_SEEDS[0], MEASUREMENT_SEEDS[0]) == (5000, 21000)
    assert not {*CALIBRATION_SEEDS, *DEVELOPMENT_SEEDS} & set(MEASUREMENT_SEEDS)


# --- The false-alarm rate


@pytest.fixture(scope="module")
def measured(
    digits: Dataset, build: Callable
) -> tuple[list[false_alarms.Row], list[tuple[str, str]]]:
    """Two clean pairs, and what was built for them."""
    built = []

    def counted(name: str, config: Config, dtype: str) -> Backend:
        built.append((name, dtype))
        return build(name, config, dtype)

    return list(
        false_alarms.measure(
            TINY, (9000, 9001), {"digits": digits}, counted, ("float64", "float32"), 1
        )
    ), built


def test_clean_pairs_are_measured_in_every_precision_and_each_backend_is_built_once(
    measured: Any,
) -> None:
    rows, built = measured
    assert sorted(built) == sorted(
        (name, dtype) for name in ("torch", "flax") for dtype in ("float64", "float32")
    )
    assert [row["seed"] for row in rows] == [9000, 9001]
    for row in rows:
        assert row["cell"] is None, "it is none of the twenty"
        assert list(row["lenses"]) == ["float64", "float32"]
        for found in row["lenses"].values():
            assert (found["verdict"], found["first_divergence"]) == ("agree", None)
            assert set(found["alarms"]) <= {rule.name for rule in baselines.RULES}
        assert [found["twins"] for found in row["lenses"].values()] == [0, 1]
        assert row["lenses"]["float64"]["alarms"] == [], (
            "two float64 runs of three steps differ for nobody"
        )
        assert row["lenses"]["float32"]["silent"] == [], "TorchDynamo's rule had its reference"


def test_seeds_of_one_setting_are_different_pairs(measured: Any) -> None:
    one, other = (row["lenses"]["float32"]["score"] for row in measured[0])
    assert one is None or one != other


def test_a_flax_side_with_a_wrong_rate_is_an_alarm_of_lockstep_and_of_others(
    digits: Dataset, build: Callable
) -> None:
    def broken(name: str, config: Config, dtype: str) -> Backend:
        return build(
            name, sensitivity.with_lr_error(config, 0.5) if name == "flax" else config, dtype
        )

    [row] = false_alarms.measure(TINY, [9000], {"digits": digits}, broken, ("float64",))
    found = row["lenses"]["float64"]
    assert found["verdict"] == "disagree"
    assert (found["first_divergence"] or "").startswith("update: step 0: ")
    assert found["twins"] == 0, "a difference in the first steps is not chaos"
    assert {
        "assert_close, losses",
        "allclose, weights",
        "reprod_log, losses",
        "TorchDynamo RMSE",
    } <= set(found["alarms"])
    # Equal weights; and three steps do not double a loss.
    assert not {"transformers", "AlgoPerf, last step"} & {*found["alarms"], *found["silent"]}


@pytest.mark.parametrize(
    ("dtype", "first", "then"),
    slow_except([("float64", 0, [2, 6]), ("float32", 1, [6])], "float64"),
)
def test_twins_are_asked_until_there_are_enough_and_each_has_its_number(
    digits: Dataset,
    build: Callable,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    first: int,
    then: list[int],
) -> None:
    config = dataclasses.replace(TINY.config, seed=1).resolve(len(digits.train_images))
    backends = {name: build(name, config, dtype) for name in ("torch", "flax")}
    ensembles = {
        name: train_ensemble(backend, config, digits, dtype, first)
        for name, backend in backends.items()
    }
    asked = []

    def late(comparison: Comparison) -> int:
        """As `twins_wanted` answers while a pair keeps diverging late."""
        first = diverging(2, "loss", "loss")
        asked.append(twins_wanted(dataclasses.replace(comparison, first_divergence=first)))
        return asked[-1]

    twins_wanted = verdicts.twins_wanted
    assert judge(ensembles, backends, config, digits).verdict == "agree"
    assert [len(of.records) for of in ensembles.values()] == [1 + first, 1 + first]
    monkeypatch.setattr(verdicts, "twins_wanted", late)
    assert judge(ensembles, backends, config, digits).verdict == "agree" and asked == [*then, 0]
    assert [[record.twin for record in of.records] for of in ensembles.values()] == 2 * [
        [None, *range(1, 7)]
    ]


@pytest.mark.slow
def test_what_diverges_late_in_the_twins_too_is_no_chaos(digits: Dataset, build: Callable) -> None:
    right, wrong = (
        dataclasses.replace(TINY.config, schedule=Schedule("step", period=period)).resolve(
            len(digits.train_images)
        )
        for period in (2, 3)
    )
    backends = {
        "torch": build("torch", right, "float64"),
        "flax": build("flax", wrong, "float64"),
    }
    ensembles = {
        name: train_ensemble(backend, right, digits, "float64", 2)
        for name, backend in backends.items()
    }
    found = judge(ensembles, backends, right, digits)
    assert found.first_divergence is not None
    assert (found.verdict, found.first_divergence.step) == ("disagree", 2)
    assert [len(of.twins) for of in ensembles.values()] == [
        verdicts.MAX_TWINS,
        verdicts.MAX_TWINS,
    ]


def fake(said_by: dict[str, tuple[str, bool | None]]) -> false_alarms.Row:
    """A row in which msprobe's rule says this, and no other says anything."""
    silent = [rule.name for rule in baselines.RULES if rule.name != "msprobe"]
    row = {
        "lenses": {
            dtype: {
                "verdict": verdict,
                "alarms": ["msprobe"] if said else [],
                "silent": silent + (["msprobe"] if said is None else []),
            }
            for dtype, (verdict, said) in said_by.items()
        }
    }
    return cast(false_alarms.Row, row)


def test_the_summary_counts_alarms_and_leaves_out_what_a_rule_says_nothing_of() -> None:
    rows = [
        fake({"float32": ("agree", True), "float64": ("agree", None)}),
        fake({"float32": ("disagree", True), "float64": ("agree", None)}),
        fake({"float32": ("agree", False), "float64": ("agree", None)}),
    ]
    found = {(line["lens"], line["rule"]): line for line in false_alarms.summary(rows)}
    rules = ["Lockstep", *(rule.name for rule in baselines.RULES)]
    assert list(found) == [(dtype, rule) for dtype in ("float64", "float32") for rule in rules]
    found = {key: line for key, line in found.items() if line["pairs"] or key[1] == "msprobe"}
    counts = {key: (line["alarms"], line["pairs"], line["rate"]) for key, line in found.items()}
    assert counts == {
        ("float64", "Lockstep"): (0, 3, 0.0),
        ("float64", "msprobe"): (0, 0, None),
        ("float32", "Lockstep"): (1, 3, 1 / 3),
        ("float32", "msprobe"): (2, 3, 2 / 3),
    }
    assert found["float32", "msprobe"]["interval"] == list(clopper_pearson(2, 3))


def test_pairs_that_diverge_together_count_for_no_rule() -> None:
    rows = [fake({"float32": (verdict, True)}) for verdict in ("diverged", "agree", "diverged")]
    found = {line["rule"]: line for line in false_alarms.summary(rows)}
    own, other = found["Lockstep"], found["msprobe"]
    assert (own["pairs"], own["alarms"], own["diverged"]) == (1, 0, 2)
    assert (other["pairs"], other["alarms"]) == (1, 1)


@pytest.mark.parametrize("pairs", [1, 7, 200])
@pytest.mark.parametrize("confidence", [0.95, 0.99])
def test_the_interval_is_scipys_exact_one(pairs: int, confidence: float) -> None:
    for count in range(0, pairs + 1, max(1, pairs // 10)):
        true = binomtest(count, pairs).proportion_ci(confidence, method="exact")
        assert clopper_pearson(count, pairs, confidence) == pytest.approx(
            (true.low, true.high), rel=1e-9
        )


def test_the_interval_covers_the_rate_as_often_as_it_says_and_no_pairs_say_nothing() -> None:
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    intervals = [clopper_pearson(count, 40) for count in range(41)]
    for rate in (0.01, 0.1, 0.5):
        covered = [low <= rate <= high for low, high in intervals]
        assert binom.pmf(range(41), 40, rate) @ covered >= 0.95


def test_the_table_of_alarms_has_a_line_per_precision_and_rule_within_80_columns(
    measured: Any,
) -> None:
    columns, lines = false_alarms.table([row for row in measured[0] for _ in range(300)])
    assert len(lines) == 2 * (1 + len(baselines.RULES))
    assert ("float64", "Lockstep", "600", "0", "0.0 %", "0.0 to 0.6 %") in lines
    assert all(len(line) == len(columns) for line in lines)
    assert width(columns, lines) <= WIDTH


# --- Sensitivity


@pytest.fixture(scope="module")
def errors(digits: Dataset, build: Callable) -> list[sensitivity.Row]:
    """An error that float64's losses see, and one below every bound."""
    small = dataclasses.replace(
        digits, test_images=digits.test_images[:50], test_labels=digits.test_labels[:50]
    )
    return [
        *sensitivity.measure(small, build, 3, ("float64", "float32"), 1, [1e-6]),
        *sensitivity.measure(small, build, 3, ("float64",), 1, [1e-14]),
    ]


def test_a_wrong_rate_is_seen_at_the_first_step_and_one_below_the_bound_is_not(
    errors: list[sensitivity.Row],
) -> None:
    middle, small = (row["lenses"] for row in errors)
    assert [row["error"] for row in errors] == [1e-6, 1e-14]
    for found in middle.values():  # float32, too: its learning rates are compared as closely
        assert (found["caught"], found["step"], found["stage"]) == (True, 0, "update")
        assert (found["message"] or "").startswith("update: step 0: ")
    assert not small["float64"]["caught"]
    nothing = {
        name: small["float64"][name] for name in ("step", "stage", "tensor", "message", "loss_step")
    }
    assert nothing == dict.fromkeys(nothing)


def test_the_loss_shows_an_error_of_the_rate_from_the_second_step_on(
    errors: list[sensitivity.Row],
) -> None:
    assert [row["lenses"]["float64"]["loss_step"] for row in errors] == [1, None]
    assert errors[0]["lenses"]["float32"]["loss_step"] is None, (
        "a millionth is far below float32's spread"
    )


def test_the_loss_step_is_the_first_beyond_the_bound_of_its_step_range() -> None:
    torch, flax = (
        dataclasses.make_dataclass("Run", ["loss"])(np.array(loss))
        for loss in ([0.0] * 6, [0, 1, 2, 3, 4, np.nan])
    )
    rows = [
        ("lr", 0, 6, 0.0, False),
        ("loss", 0, 2, 1.0, True),
        ("loss", 2, 4, 2.5, False),
        ("loss", 4, 6, 0.0, False),
    ]
    windows = [
        Check(start, "loss", name, 0.0 if agrees else 99.0, limit, None, None, start, stop)
        for name, start, stop, limit, agrees in rows
    ]
    assert sensitivity.loss_step(windows, torch, flax) == 3
    windows[2] = dataclasses.replace(windows[2], gap=0.0)
    assert sensitivity.loss_step(windows, torch, flax) == 4
    windows[3] = dataclasses.replace(windows[3], bound=9.0)
    assert sensitivity.loss_step(windows, torch, flax) == 5, (
        "a value that is not finite is beyond any bound"
    )
    assert sensitivity.loss_step([], torch, flax) is None


def test_the_wrong_rate_is_wrong_by_the_error_and_nothing_else_is() -> None:
    config = Config(steps=5, lr=0.01, schedule=Schedule("cosine")).resolve(100)
    assert sensitivity.with_lr_error(config, 1e-3).lr == 0.01 * 1.001
    assert dataclasses.replace(sensitivity.with_lr_error(config, 1e-3), lr=0.01) == config
    assert (
        len(sensitivity.ERRORS) == 14
        and sensitivity.ERRORS[0] == 0.1
        and sensitivity.ERRORS[-1] == 1e-14
    )


def test_the_table_of_errors_says_what_was_not_seen_within_80_columns(
    errors: list[sensitivity.Row],
) -> None:
    columns, lines = sensitivity.table(errors)
    assert ("1e-14", "float64", "-", "not seen", "-") in lines
    assert len(lines) == 3 and all(len(line) == len(columns) for line in lines)
    assert lines[0][:3] == ("1e-06", "float64", "0") and lines[0][3].startswith("update, ")
    assert width(columns, lines) <= WIDTH


def test_the_picture_is_a_png_and_the_same_bytes_each_time(
    errors: list[sensitivity.Row], tmp_path: Path
) -> None:
    for name in ("a.png", "b.png"):
        draw_sensitivity(errors, tmp_path / name)
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
    assert content == (tmp_path / "b.png").read_bytes()
