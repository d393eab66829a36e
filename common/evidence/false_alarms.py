"""The false-alarm rate: how often do Lockstep and the rules of other projects report that two
correct runs differ?

A pair is one configuration and seed, trained by both correct backends. So every alarm is false.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypedDict

from lockstep.common.config import BACKENDS, DTYPES, MODELS, Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.evidence import Build, baselines, judge, train_ensemble
from lockstep.common.recipes import RECIPES
from lockstep.common.verdict.check import finite

# Three disjoint ranges of seeds: for setting the bounds, for development, and for measuring the
# rate. Three false alarms in the development seeds led `judge` to ask for more twins, and seven in
# seeds from 13000 on to `statistics.EXPLODED`, so these seeds cannot measure the rate any more.
PAIRS = 300  # per precision
MAX_SEEDS = 4000
CALIBRATION_SEEDS = range(5000, 5000 + MAX_SEEDS)
DEVELOPMENT_SEEDS = range(9000, 9000 + MAX_SEEDS)
MEASUREMENT_SEEDS = range(21000, 21000 + MAX_SEEDS)
TEST_IMAGES = 500
CONFIDENCE = 0.95
LOCKSTEP = "Lockstep"


class Finding(TypedDict):
    """The verdicts of Lockstep and of the other rules on one pair in one precision."""

    verdict: str
    score: float | None  # None where it is not finite
    first_divergence: str | None  # its message
    twins: int  # per backend; more than asked for where the verdict wanted more
    alarms: list[str]  # the other rules that report a difference
    silent: list[str]  # the other rules that do not apply


class Row(TypedDict):
    """The results for one pair."""

    cell: int | None  # the place of its setting in `settings`; None for another setting
    seed: int
    lenses: dict[str, Finding]  # by precision


class Line(TypedDict):
    """The false alarms of one rule in one precision."""

    lens: str
    rule: str
    pairs: int  # to which the rule applies
    alarms: int
    # Pairs whose runs are not finite from one step on, the same in both: neither agreement nor
    # alarm. They are not among `pairs`.
    diverged: int
    rate: float | None  # None without pairs
    interval: list[float]  # of the rate, with CONFIDENCE


class Setting(NamedTuple):
    """One configuration. Its pairs differ in the seed."""

    data: str  # the data set's name
    config: Config


# From gentle to nearly unstable: with digits, lr 0.05 and momentum 0.9, a run amplifies float64's
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
    # At the ends: batches of 1 and 512, learning rates at which both runs diverge, every option.
    Setting("digits", Config(batch_size=1, momentum=0.9, lr=0.002, steps=150)),
    Setting("cifar10", Config(batch_size=3, lr=0.005, label_smoothing=0.1, steps=150)),
    Setting("digits", Config(batch_size=7, momentum=0.999, lr=1e-4, steps=120)),
    Setting("cifar10", Config(batch_size=512, momentum=0.9, lr=0.05, steps=20)),
    Setting("digits", Config(batch_size=512, lr=0.2, weight_decay=5e-4, steps=20)),
    Setting("digits", Config(batch_size=16, lr=1e6, steps=30)),
    Setting("cifar10", Config(batch_size=16, momentum=0.9, lr=1e3, steps=30)),
    Setting("digits", Config(batch_size=32, lr=10.0, steps=40)),
    Setting("digits", Config(batch_size=16, lr=0.01, momentum=0.5, maximize=True, steps=60)),
    Setting("cifar10", Config(batch_size=16, momentum=0.9, lr=0.05, clip_norm=0.5, steps=80)),
    Setting(
        "digits",
        Config(
            batch_size=16,
            momentum=0.9,
            lr=0.02,
            schedule=Schedule("plateau", window=10, patience=1),
            steps=100,
        ),
    ),
    Setting(
        "cifar10",
        Config(
            batch_size=32,
            momentum=0.9,
            lr=0.02,
            nesterov=True,
            label_smoothing=0.1,
            clip_norm=1.0,
            augment="crop-flip",
            steps=60,
        ),
    ),
)


def shortened(recipe: Config) -> Config:
    """A recipe with small batches, a quarter of its learning rate, and 20 steps, which include all
    of its schedule."""
    schedule = (
        recipe.schedule
        if recipe.schedule.warmup is None
        else dataclasses.replace(recipe.schedule, warmup=5)
    )
    return dataclasses.replace(recipe, batch_size=8, lr=recipe.lr / 4, steps=20, schedule=schedule)


# The other networks: with plain SGD and a large learning rate, and with their recipes.
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
    precisions: Sequence[str] = DTYPES,
    twins: int = 2,
) -> Iterator[Row]:
    """One row per seed: the verdicts of Lockstep and of every other rule on a correct pair, in each
    precision.

    Each backend is built, and so compiled, once per precision: the seed changes only the weights
    and the order of the batches.

    Args:
        datasets: by name; `setting.data` is looked up.
        twins: per backend, in every precision except float64.
    """
    dataset = datasets[setting.data].first_test_images(TEST_IMAGES)
    config = setting.config.resolve(len(dataset.train_images))
    backends = {
        dtype: {name: build(name, config, dtype) for name in BACKENDS} for dtype in precisions
    }
    exact = (
        backends["float64"]["torch"] if "float64" in backends else build("torch", config, "float64")
    )
    for seed in seeds:
        run = dataclasses.replace(config, seed=seed)
        known = settings(config.model)
        findings: dict[str, Finding] = {}
        for dtype, pair in backends.items():
            ensembles = {
                name: train_ensemble(backend, run, dataset, dtype, twins)
                for name, backend in pair.items()
            }
            found = judge(ensembles, pair, run, dataset)
            torch, flax = (ensembles[name].run for name in BACKENDS)
            said = baselines.verdicts(torch, flax, baselines.reference(torch, exact))
            findings[dtype] = {
                "verdict": found.verdict,
                "score": finite(found.score),
                "first_divergence": found.first_divergence and found.first_divergence.message,
                "twins": len(ensembles["flax"].twins),
                "alarms": [rule for rule, alarm in said.items() if alarm],
                "silent": [rule for rule, alarm in said.items() if alarm is None],
            }
        yield {
            "cell": known.index(setting) if setting in known else None,
            "seed": seed,
            "lenses": findings,
        }


def summary(rows: Iterable[Row]) -> list[Line]:
    """One line per precision and rule, Lockstep first. A pair to which a rule does not apply does
    not count for it, and one whose runs diverge together for none."""
    said: dict[tuple[str, str], list[bool]] = {}
    diverged: Counter[str] = Counter()
    for row in rows:
        for dtype, finding in row["lenses"].items():
            own = said.setdefault((dtype, LOCKSTEP), [])
            if finding["verdict"] == "diverged":
                diverged[dtype] += 1
            else:
                own.append(finding["verdict"] == "disagree")
            for rule in baselines.RULES:
                alarms = said.setdefault((dtype, rule.name), [])
                if finding["verdict"] != "diverged" and rule.name not in finding["silent"]:
                    alarms.append(rule.name in finding["alarms"])
    order = sorted(said, key=lambda key: DTYPES.index(key[0]))  # stable: rules stay in their order
    return [
        {
            "lens": dtype,
            "rule": name,
            "pairs": len(said[dtype, name]),
            "alarms": sum(said[dtype, name]),
            "diverged": diverged[dtype],
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


def table(rows: Iterable[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
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
