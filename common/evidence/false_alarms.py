"""The false-alarm rate: how often do Lockstep and the rules of others report that two correct runs
differ?

Both backends, unchanged, train each pair: one configuration with one seed. Every alarm is therefore
false.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lockstep.common.config import BACKENDS, DTYPES, MODELS, Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.evidence import Build, baselines, judge, take_test_images, train_ensemble
from lockstep.common.recipes import RECIPES
from lockstep.common.verdict.check import finite

# Three disjoint ranges of seeds: one to set the bounds, one to measure the rate, and one that was
# measured first. Three false alarms in that one led `judge` to ask for more twins, so it cannot be
# used to measure the rate again.
PAIRS = 300  # per precision
MAX_SEEDS = 4000
CALIBRATION_SEEDS = range(5000, 5000 + MAX_SEEDS)
DEVELOPMENT_SEEDS = range(9000, 9000 + MAX_SEEDS)
MEASUREMENT_SEEDS = range(13000, 13000 + MAX_SEEDS)
TEST_IMAGES = 500
CONFIDENCE = 0.95
LOCKSTEP = "Lockstep"


class Setting(NamedTuple):
    """One configuration of which pairs are trained, each with a seed of its own."""

    data: str  # the data set's name
    config: Config


# From gentle to nearly unstable: at digits' lr 0.05 with momentum 0.9 float64 amplifies its own
# rounding past 1e-12.
SETTINGS = (
    Setting("digits", Config(batch_size=4, momentum=0.9, lr=0.001, steps=150)),
    Setting("digits", Config(batch_size=4, lr=0.01, steps=150)),
    Setting("digits", Config(batch_size=4, momentum=0.95, lr=0.002, steps=150)),
    Setting("digits", Config(batch_size=8, momentum=0.9, lr=0.01, nesterov=True, steps=120)),
    Setting(
        "digits",
        Config(batch_size=8, momentum=0.5, lr=0.05, schedule=Schedule("cosine"), steps=120),
    ),
    Setting("digits", Config(batch_size=16, momentum=0.9, lr=0.02, weight_decay=5e-4, steps=100)),
    Setting("digits", Config(batch_size=16, lr=0.1, steps=100)),
    Setting("digits", Config(batch_size=32, momentum=0.9, lr=0.01, steps=80)),
    Setting("digits", Config(batch_size=32, momentum=0.9, lr=0.05, steps=80)),
    Setting("digits", Config(batch_size=64, momentum=0.95, dampening=0.5, lr=0.01, steps=50)),
    Setting(
        "digits", Config(batch_size=128, momentum=0.9, lr=0.05, schedule=Schedule("step"), steps=40)
    ),
    Setting("cifar10", Config(batch_size=4, momentum=0.9, lr=0.001, steps=150)),
    Setting("cifar10", Config(batch_size=4, lr=0.01, steps=150)),
    Setting("cifar10", Config(batch_size=4, momentum=0.95, lr=0.001, steps=150)),
    Setting(
        "cifar10",
        Config(batch_size=8, momentum=0.9, lr=0.004, schedule=Schedule("exponential"), steps=120),
    ),
    Setting("cifar10", Config(batch_size=16, momentum=0.5, lr=0.03, steps=100)),
    Setting(
        "cifar10",
        Config(batch_size=16, momentum=0.9, lr=0.01, weight_decay=5e-4, nesterov=True, steps=100),
    ),
    Setting("cifar10", Config(batch_size=32, momentum=0.9, lr=0.01, steps=80)),
    Setting("cifar10", Config(batch_size=64, momentum=0.95, lr=0.005, steps=50)),
    Setting("cifar10", Config(batch_size=128, lr=0.1, steps=40)),
)


def shortened(recipe: Config) -> Config:
    """A recipe with small batches and a quarter of its learning rate; 20 steps show all of its
    schedule."""
    schedule = (
        recipe.schedule
        if recipe.schedule.warmup is None
        else dataclasses.replace(recipe.schedule, warmup=5)
    )
    return dataclasses.replace(recipe, batch_size=8, lr=recipe.lr / 4, steps=20, schedule=schedule)


# The other networks: plainly, with a large step; and as their recipes train them.
NETWORK_SETTINGS = tuple(
    setting
    for model in MODELS
    if model in RECIPES
    for setting in (
        Setting("digits", Config(model=model, batch_size=16, lr=0.05, momentum=0.9, steps=20)),
        Setting("cifar10", shortened(RECIPES[model].config)),
    )
)


def settings(model: str) -> list[Setting]:
    """The settings of one network."""
    return [setting for setting in (*SETTINGS, *NETWORK_SETTINGS) if setting.config.model == model]


def work_items(
    settings: Sequence[Setting], pairs: int, first: int = MEASUREMENT_SEEDS[0]
) -> Iterator[tuple[Setting, range]]:
    """Split `pairs` evenly over the settings: each setting with its seeds, which start at
    `first`."""
    for index, setting in enumerate(settings[:pairs]):
        yield (
            setting,
            range(first, first + pairs // len(settings) + (index < pairs % len(settings))),
        )


def measure(
    setting: Setting,
    seeds: Iterable[int],
    datasets: Mapping[str, Dataset],
    build: Build,
    lenses: Sequence[str] = DTYPES,
    twins: int = 2,
) -> Iterator[dict[str, Any]]:
    """One row per seed: the verdicts of Lockstep and of every other rule on a correct pair, in each
    precision.

    Each backend is built, and so compiled, once per precision: the seed changes only the weights
    and the order of the batches.

    Args:
        datasets: by name; `setting.data` is looked up.
        twins: per backend, in every precision but float64.

    Returns:
        cell (its place in `settings`; None if it is not one of them), seed, and by dtype in lenses:
        verdict, score, first_divergence (its message), twins (per side; more than given where the
        verdict asked for them), and the other rules that report a difference (alarms) or do not
        apply (silent).
    """
    dataset = take_test_images(datasets[setting.data], TEST_IMAGES)
    config = setting.config.resolve(len(dataset.train_images))
    backends = {dtype: {name: build(name, config, dtype) for name in BACKENDS} for dtype in lenses}
    exact = (
        backends["float64"]["torch"] if "float64" in backends else build("torch", config, "float64")
    )
    for seed in seeds:
        run = dataclasses.replace(config, seed=seed)
        known = settings(config.model)
        row: dict[str, Any] = {
            "cell": known.index(setting) if setting in known else None,
            "seed": seed,
            "lenses": {},
        }
        for dtype, sides in backends.items():
            ensembles = {
                name: train_ensemble(side, run, dataset, dtype, twins)
                for name, side in sides.items()
            }
            found = judge(ensembles, sides, run, dataset)
            torch, flax = (ensembles[name].run for name in BACKENDS)
            said = baselines.verdicts(torch, flax, baselines.reference(torch, exact))
            row["lenses"][dtype] = {
                "verdict": found.verdict,
                "score": finite(found.score),
                "first_divergence": found.first_divergence and found.first_divergence.message,
                "twins": len(ensembles["flax"].twins),
                "alarms": [rule for rule, alarm in said.items() if alarm],
                "silent": [rule for rule, alarm in said.items() if alarm is None],
            }
        yield row


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per precision and rule, Lockstep first: lens, rule, pairs, alarms, rate, 95 % interval.

    Pairs to which a rule does not apply are not counted for it; without pairs the rate is None.
    """
    said: dict[tuple[str, str], list[bool]] = {}
    for row in rows:
        for dtype, lens in row["lenses"].items():
            said.setdefault((dtype, LOCKSTEP), []).append(lens["verdict"] == "disagree")
            for rule in baselines.RULES:
                kept = said.setdefault((dtype, rule.name), [])
                if rule.name not in lens["silent"]:
                    kept.append(rule.name in lens["alarms"])
    order = sorted(said, key=lambda key: DTYPES.index(key[0]))  # stable: rules stay in their order
    return [
        {
            "lens": dtype,
            "rule": name,
            "pairs": len(said[dtype, name]),
            "alarms": sum(said[dtype, name]),
            "rate": sum(said[dtype, name]) / len(said[dtype, name]) if said[dtype, name] else None,
            "interval": list(clopper_pearson(sum(said[dtype, name]), len(said[dtype, name]))),
        }
        for dtype, name in order
    ]


def clopper_pearson(alarms: int, pairs: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact two-sided interval for the rate behind `alarms` of `pairs`.

        low  = quantile of Beta(k, n - k + 1) at a/2,      0 where k = 0
        high = quantile of Beta(k + 1, n - k) at 1 - a/2,  1 where k = n

    with k alarms, n pairs, a = 1 - confidence. It covers the rate at least that often if pairs are
    independent and have one rate. Here every configuration is run with the same seeds, so that
    pairs of one seed share their random numbers, and configurations may differ in their rates: take
    it as a guide. Of no pairs: 0 to 1.

    Source: C. J. Clopper and E. S. Pearson, "The use of confidence or fiducial limits illustrated
    in the case of the binomial", Biometrika 26 (1934), 404-413.
    """
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = float(betaincinv(alarms, pairs - alarms + 1, tail)) if alarms > 0 else 0.0
    high = float(betaincinv(alarms + 1, pairs - alarms, 1 - tail)) if alarms < pairs else 1.0
    return low, high


def table(rows: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The summary of `measure`'s rows: column names (`>` for numbers) and lines, in 80 columns."""
    lines = []
    for line in summary(rows):
        low, high = (f"{100 * end:.1f}" for end in line["interval"])
        rate = "-" if line["rate"] is None else f"{100 * line['rate']:.1f} %"
        lines.append(
            (
                line["lens"],
                line["rule"],
                str(line["pairs"]),
                str(line["alarms"]),
                rate,
                f"{low} to {high} %",
            )
        )
    return ("dtype", "rule", "pairs>", "alarms>", "rate>", "95 % interval>"), lines
