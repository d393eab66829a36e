"""A run is what its options say: contradictions are refused by name, and equal runs have equal
fingerprints."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest

from lockstep.common.config import DTYPES, OMIT_IF_DEFAULT, SCHEDULES, Config, Schedule
from lockstep.common.errors import ConfigError
from lockstep.common.optimizers import DEFAULTS, OPTIMIZERS, flag, option_names
from lockstep.common.recipes import RECIPES

IMAGES = 1437  # of the digits: no batch size but 1, 3, 479 and 1437 divides it
PLATEAU = {
    "window": 2,
    "patience": 5,
    "gamma": 0.1,
    "threshold": 1e-4,
    "cooldown": 0,
    "min_lr": 0.0,
}


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Config(**options)
    return str(caught.value)


# --- Config


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model": "resnet"}, "model 'resnet'"),
        ({"epochs": 0}, "--epochs"),
        ({"epochs": -1}, "--epochs"),
        ({"steps": 0}, "--steps"),
        ({"steps": -5}, "--steps"),
        ({"batch_size": 0}, "--batch-size"),
        ({"lr": -0.1}, "--lr"),
        ({"lr": math.nan}, "--lr"),
        ({"lr": math.inf}, "--lr"),
        ({"momentum": -0.1}, "--momentum"),
        ({"momentum": math.nan}, "--momentum"),
        ({"dampening": math.nan}, "--dampening"),
        ({"dampening": -math.inf}, "--dampening"),
        ({"weight_decay": -1e-9}, "--weight-decay"),
        ({"weight_decay": math.inf}, "--weight-decay"),
        ({"clip_norm": 0.0}, "--clip-norm"),
        ({"clip_norm": -1.0}, "--clip-norm"),
        ({"clip_norm": math.nan}, "--clip-norm"),
        ({"clip_norm": math.inf}, "--clip-norm"),
        ({"label_smoothing": -0.1}, "--label-smoothing"),
        ({"label_smoothing": 1.0}, "--label-smoothing"),
        ({"label_smoothing": math.nan}, "--label-smoothing"),
        ({"augment": "mixup"}, "--augment 'mixup': choose crop-flip"),
        ({"seed": -1}, "--seed"),
        ({"seed": 2**32}, "--seed"),
        ({"optimizer": "adamm"}, "unknown optimizer 'adamm': did you mean adam?"),
        ({"optimizer": "adam", "betas": (0.9, 1.0)}, "--betas must be 0 or more, below 1"),
        ({"optimizer": "adam", "betas": (0.9,)}, "--betas are two numbers"),
        ({"optimizer": "adam", "betas": (math.nan, 0.9)}, "--betas"),
        ({"optimizer": "adam", "eps": -1e-8}, "--eps"),
        ({"optimizer": "adam", "eps": math.nan}, "--eps"),
        ({"optimizer": "rmsprop", "alpha": 1.0}, "--alpha must be 0 or more, below 1"),
        ({"optimizer": "adagrad", "lr_decay": math.inf}, "--lr-decay"),
        ({"optimizer": "adagrad", "initial_accumulator_value": -0.1}, "--initial-accumulator-v"),
        ({"nesterov": True}, "--nesterov needs --momentum"),
        ({"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "--nesterov needs --momentum"),
        (
            {"lr": 0.01, "schedule": Schedule("cosine", min_lr=0.02)},
            "min_lr 0.02 is above --lr 0.01",
        ),
        (
            {"lr": 0.01, "schedule": Schedule("plateau", min_lr=0.02)},
            "min_lr 0.02 is above --lr 0.01",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_option_that_describes_no_run_is_refused_by_its_name_in_one_line(
    options: dict, named: str
) -> None:
    message = refusal(**options)
    assert named in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.0},
        {"momentum": 1.5},
        {"dampening": -0.5},
        {"dampening": 0.5, "momentum": 0.9},
        {"nesterov": True, "momentum": 0.9},
        {"maximize": True},
        {"seed": 2**32 - 1},
        {"lr": 0.01, "schedule": Schedule("cosine", min_lr=0.01)},
    ],
    ids=str,
)
def test_what_torch_optim_sgd_takes_is_taken(options: dict) -> None:
    Config(**options)


@pytest.mark.parametrize(
    ("images", "batch_size", "drop_last", "batches"),
    [
        (10, 4, False, 3),
        (10, 4, True, 2),
        (12, 4, False, 3),
        (12, 4, True, 3),
        (4, 4, True, 1),
        (5, 1, True, 5),
        (50_000, 4, False, 12_500),
    ],
)
def test_an_epoch_has_a_smaller_last_batch_unless_it_is_dropped(
    images: int, batch_size: int, drop_last: bool, batches: int
) -> None:
    assert Config(batch_size=batch_size, drop_last=drop_last).batches_per_epoch(images) == batches


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({}, 3, 1),
        ({"epochs": 2}, 6, 2),
        ({"epochs": 2, "drop_last": True}, 4, 2),
        ({"steps": 1}, 1, 1),
        ({"steps": 3}, 3, 1),
        ({"steps": 4}, 4, 2),
        ({"steps": 7, "epochs": 5}, 7, 3),
    ],
    ids=str,
)
def test_a_resolved_run_says_its_steps_and_the_epochs_they_reach_into(
    options: dict, steps: int, epochs: int
) -> None:
    config = Config(batch_size=4, **options).resolve(10)
    assert (config.total_steps, config.epochs) == (steps, epochs)
    assert config.resolve(10) == config


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_batch_larger_than_the_data_is_refused_and_one_as_large_is_not(drop_last: bool) -> None:
    config = Config(batch_size=11, drop_last=drop_last)
    with pytest.raises(
        ConfigError, match=r"^--batch-size 11 is larger than the data: choose 10 or less$"
    ):
        config.resolve(10)
    assert config.resolve(11).total_steps == 1


# --- Fingerprints

BASE = Config(steps=30, batch_size=4, lr=0.1, momentum=0.9, schedule=Schedule("plateau", **PLATEAU))
OTHER: dict[str, Any] = {
    "steps": 31,
    "batch_size": 5,
    "drop_last": True,
    "lr": 0.2,
    "momentum": 0.8,
    "dampening": 0.5,
    "weight_decay": 0.01,
    "nesterov": True,
    "maximize": True,
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
    "augment": "crop-flip",
    "optimizer": "rmsprop",
    "betas": (0.8, 0.9),
    "eps": 1e-7,
    "alpha": 0.9,
    "centered": True,
    "amsgrad": True,
    "lr_decay": 0.1,
    "initial_accumulator_value": 0.1,
    "decay_biases_and_norms": False,
    "schedule": Schedule("constant"),
    "seed": 1,
    "weights": "0f" * 32,
    "pair": "1e" * 32,
    "init": "numpy",
    "exact_sums": True,
    "batch_norm": "local",
}


# An optimizer that takes the option, for those that SGD does not take.
TAKERS = {
    "betas": "adam",
    "eps": "adam",
    "amsgrad": "adamw",
    "alpha": "rmsprop",
    "centered": "rmsprop",
    "lr_decay": "adagrad",
    "initial_accumulator_value": "adagrad",
}


def taking(field: str, base: Config) -> Config:
    """`base`, with an optimizer that takes the option."""
    if field not in TAKERS:
        return base
    return dataclasses.replace(base, optimizer=TAKERS[field], momentum=0.0)


@pytest.mark.parametrize("field", OTHER)
def test_a_field_that_changes_the_numbers_changes_the_fingerprint(field: str) -> None:
    base = taking(field, BASE)
    changed = dataclasses.replace(base, **{field: OTHER[field]})
    assert changed.resolve(IMAGES).fingerprint("d") != base.resolve(IMAGES).fingerprint("d")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_takes_its_own_options_and_no_others(optimizer: str) -> None:
    for option in option_names():
        given = {"optimizer": optimizer, option: OTHER[option]}
        if option in OPTIMIZERS[optimizer]:
            if option == "nesterov":
                given["momentum"] = 0.9
            Config(**given)
        else:
            assert f"{optimizer} takes no {flag(option)}: its options are --" in refusal(**given)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_an_optimizers_options_leave_open_is_the_default_of_torch(optimizer: str) -> None:
    resolved = Config(optimizer=optimizer).resolve(IMAGES)
    left_open = {"betas", "eps", "alpha"} & {*OPTIMIZERS[optimizer]}
    assert {name: getattr(resolved, name) for name in left_open} == DEFAULTS[optimizer]
    assert resolved.resolve(IMAGES) == resolved


def test_every_field_is_covered_but_the_one_network_and_the_epochs_that_follow_from_the_steps() -> (
    None
):
    assert {field.name for field in dataclasses.fields(Config)} == {*OTHER, "model", "epochs"}


@pytest.mark.parametrize("option", PLATEAU)
def test_each_option_of_a_schedule_changes_the_fingerprint(option: str) -> None:
    other = {
        "window": 3,
        "patience": 4,
        "gamma": 0.2,
        "threshold": 1e-3,
        "cooldown": 1,
        "min_lr": 0.01,
    }
    schedule = dataclasses.replace(BASE.schedule, **{option: other[option]})
    changed = dataclasses.replace(BASE, schedule=schedule)
    assert changed.resolve(IMAGES).fingerprint("d") != BASE.resolve(IMAGES).fingerprint("d")


def test_other_data_changes_the_fingerprint() -> None:
    assert BASE.fingerprint("d1") != BASE.fingerprint("d2")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Config(epochs=2), Config(steps=720)),
        (Config(epochs=1, steps=500), Config(epochs=7, steps=500)),
        (
            Config(schedule=Schedule("cosine")),
            Config(schedule=Schedule("cosine", period=360, min_lr=0.0)),
        ),
        (
            Config(steps=30, schedule=Schedule("step")),
            Config(steps=30, schedule=Schedule("step", 10, gamma=0.1)),
        ),
    ],
    ids=["epochs as steps", "epochs that steps overrule", "defaults of cosine", "defaults of step"],
)
def test_two_ways_to_say_the_same_run_have_one_fingerprint(one: Config, other: Config) -> None:
    assert one != other
    assert one.resolve(IMAGES).fingerprint("d") == other.resolve(IMAGES).fingerprint("d")


def test_a_fingerprint_is_twelve_hexadecimal_digits() -> None:
    assert re.fullmatch("[0-9a-f]{12}", BASE.fingerprint("d"))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_configuration_as_json_is_plain_and_leaves_out_what_does_not_apply(kind: str) -> None:
    values = Config(schedule=Schedule(kind)).resolve(IMAGES).to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert set(values["schedule"]) == {"kind", *SCHEDULES[kind]}
    assert set(values) == {field.name for field in dataclasses.fields(Config)} - {*OMIT_IF_DEFAULT}


def test_runs_from_before_an_option_was_there_keep_their_fingerprint() -> None:
    config = Config(steps=500, batch_size=32, lr=0.01, momentum=0.9).resolve(50_000)
    assert (
        config.fingerprint("d") == "0d07d4193db1"
    )  # as of the version with `weights` for its last field
    assert not config.to_json().keys() & {*OMIT_IF_DEFAULT}
    for name in OMIT_IF_DEFAULT:
        base = taking(name, config)
        changed = dataclasses.replace(base, **{name: OTHER[name]})
        assert changed.to_json()[name] == json.loads(json.dumps(OTHER[name]))
        assert changed.fingerprint("d") != base.fingerprint("d")


@pytest.mark.parametrize("name", [*OMIT_IF_DEFAULT, None])
def test_a_configuration_goes_through_json_and_back(name: str | None) -> None:
    base = taking(name or "", BASE)
    config = dataclasses.replace(base, **({name: OTHER[name]} if name else {})).resolve(IMAGES)
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    if name is None:  # what is not left out must be there
        fields = config.to_json()
        del fields["lr"]
        with pytest.raises(ConfigError, match=r"Config\.lr"):
            Config.from_json(fields)


# --- Schedules

RESOLVED = {
    "constant": {},
    "step": {"period": 33, "gamma": 0.1},
    "multistep": {"milestones": (50, 75), "gamma": 0.1},
    "exponential": {"gamma": 0.1**0.01},
    "cosine": {"period": 100, "min_lr": 0.0},
    "warmup-cosine": {"warmup": 5, "start": 0.01, "period": 95, "min_lr": 0.0},
    "plateau": PLATEAU,
}


def test_every_kind_of_schedule_is_covered() -> None:
    assert RESOLVED.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("kind", SCHEDULES)
def test_what_a_schedule_leaves_open_is_derived_from_the_run(kind: str) -> None:
    resolved = Schedule.parse(kind).resolve(100)
    assert resolved == Schedule(kind, **RESOLVED[kind])
    assert resolved.resolve(999) == resolved


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 49])
def test_every_schedule_fits_every_short_run(kind: str, steps: int) -> None:
    resolved = Config(steps=steps, schedule=Schedule(kind)).resolve(IMAGES).schedule
    assert all(getattr(resolved, option) is not None for option in SCHEDULES[kind])


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("constant", Schedule()),
        ("step:period=10,gamma=0.5", Schedule("step", period=10, gamma=0.5)),
        (
            "multistep:milestones=100+200,gamma=1e-1",
            Schedule("multistep", milestones=(100, 200), gamma=0.1),
        ),
        ("multistep:milestones=7", Schedule("multistep", milestones=(7,))),
        ("exponential:gamma=0.999", Schedule("exponential", gamma=0.999)),
        ("cosine:period=1000,min_lr=1e-5", Schedule("cosine", period=1000, min_lr=1e-5)),
        (
            "warmup-cosine:warmup=10,start=0.1,period=90,min_lr=0",
            Schedule("warmup-cosine", warmup=10, start=0.1, period=90, min_lr=0.0),
        ),
        (
            "plateau:window=2,patience=5,gamma=0.1,threshold=1e-4,cooldown=0,min_lr=0",
            Schedule("plateau", **PLATEAU),
        ),
        ("step:", Schedule("step")),
    ],
)
def test_a_schedule_is_read_from_its_kind_and_options(text: str, schedule: Schedule) -> None:
    assert Schedule.parse(text) == schedule


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "unknown schedule ''"),
        ("linear", "unknown schedule 'linear'"),
        ("linear:gamma=0.1", "unknown schedule 'linear'"),
        ("Step", "unknown schedule 'Step'"),
        (
            "step:gama=0.1",
            "schedule 'step' has no option 'gama'; did you mean gamma? its options: period, gamma",
        ),
        ("step:kind=cosine", "schedule 'step' has no option 'kind'"),
        ("step:gamma", "'gamma' is not NAME=VALUE"),
        ("step:gamma=", "'' is not a number"),
        ("step:gamma=half", "'half' is not a number"),
        ("step:period=1.5", "'1.5' is not a number"),
        ("multistep:milestones=1++2", "'1++2' is not a number"),
        ("constant:gamma=0.1", "schedule 'constant' has no option 'gamma'; its options: none"),
        (
            "cosine:gamma=0.1",
            "schedule 'cosine' has no option 'gamma'; its options: period, min_lr",
        ),
        ("step:period=0", "period must be 1 or more"),
        ("plateau:window=0", "window must be 1 or more"),
        ("plateau:patience=-1", "patience must be 0 or more"),
        ("plateau:cooldown=-1", "cooldown must be 0 or more"),
        ("plateau:min_lr=-0.1", "min_lr must be 0 or more"),
        ("cosine:min_lr=nan", "min_lr must be 0 or more"),
        ("cosine:min_lr=inf", "min_lr must be 0 or more"),
        ("plateau:threshold=1", "threshold must lie between 0 and 1"),
        ("plateau:threshold=0", "threshold must lie between 0 and 1"),
        ("cosine:warmup=5", "schedule 'cosine' has no option 'warmup'"),
        ("warmup-cosine:warmup=0", "warmup must be 1 or more"),
        ("warmup-cosine:warmup=1.5", "'1.5' is not a number"),
        ("warmup-cosine:start=0", "start must be above 0 and at most 1"),
        ("warmup-cosine:start=1.01", "start must be above 0 and at most 1"),
        ("warmup-cosine:start=nan", "start must be above 0 and at most 1"),
        ("step:gamma=0", "gamma must be above 0 and at most 1"),
        ("step:gamma=1.01", "gamma must be above 0 and at most 1"),
        ("step:gamma=nan", "gamma must be above 0 and at most 1"),
        ("plateau:gamma=1", "plateau needs gamma below 1"),
        ("multistep:milestones=0+5", "milestones must rise from 1"),
        ("multistep:milestones=5+5", "milestones must rise from 1"),
        ("multistep:milestones=9+5", "milestones must rise from 1"),
    ],
)
def test_a_schedule_that_means_nothing_is_refused_by_name_in_one_line(
    text: str, named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Schedule.parse(text)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_cosine_shorter_than_the_run_is_refused_and_one_as_long_is_not() -> None:
    def resolve(period: int) -> Config:
        return Config(steps=100, schedule=Schedule("cosine", period=period)).resolve(IMAGES)

    with pytest.raises(
        ConfigError,
        match=r"^schedule: cosine's period 99 is shorter than the run: give 100 or more$",
    ):
        resolve(99)
    assert resolve(100).schedule.period == 100
    assert resolve(101).schedule.period == 101


def test_a_cosine_after_a_warm_up_is_refused_where_both_are_shorter_than_the_run() -> None:
    def resolve(**options: Any) -> Any:
        return (
            Config(steps=100, schedule=Schedule("warmup-cosine", **options))
            .resolve(IMAGES)
            .schedule
        )

    said = (
        r"^schedule: cosine's period 89 is shorter than the run after its warm-up: give 90 or more$"
    )
    with pytest.raises(ConfigError, match=said):
        resolve(warmup=10, period=89)
    assert resolve(warmup=10, period=90).period == resolve(warmup=10).period == 90
    assert resolve(warmup=200).period == 1  # the run ends within the warm-up


# --- Recipes


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("images", [IMAGES, 50_000], ids=["digits", "cifar10"])
def test_a_recipe_is_a_run_that_can_be_carried_out_and_judged(name: str, images: int) -> None:
    recipe = RECIPES[name]
    assert recipe.config.resolve(images).total_steps >= 1
    assert recipe.dtypes and set(recipe.dtypes) <= set(DTYPES)
    assert recipe.twins >= 1 or recipe.dtypes == ("float64",)
    assert recipe.summary and "\n" not in recipe.summary


def test_the_tutorial_is_the_tutorial() -> None:
    config = RECIPES["tutorial"].config.resolve(50_000)
    assert (config.batch_size, config.lr, config.momentum, config.total_steps) == (
        4,
        0.001,
        0.9,
        37_500,
    )
