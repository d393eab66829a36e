"""The false-alarm rate: how often are two correct runs said to differ, by Lockstep and by the rules
that others use?

Each pair is one configuration and one seed, trained by both backends as they are; every alarm is a
false one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lockstep.common.config import BACKENDS, DTYPES, MODELS, RECIPES, Config, Schedule
from lockstep.common.data import Dataset
from lockstep.common.evidence import Build, baselines, family, judge, shortened

# Levels are set on pairs of the first seeds and measured on pairs of the last, so that none is used
# for both. Those between were the first to be measured: three false alarms among them taught
# `parity.judge` to ask for more twins.
PAIRS = 300  # per lens
MAX_SEEDS = 4000
CALIBRATION_SEEDS = range(5000, 5000 + MAX_SEEDS)
LOOKED_AT_SEEDS = range(9000, 9000 + MAX_SEEDS)
MEASUREMENT_SEEDS = range(13000, 13000 + MAX_SEEDS)
TEST_IMAGES = 500
CONFIDENCE = 0.95
LOCKSTEP = "Lockstep"


class Cell(NamedTuple):
    """One configuration to take pairs from; its seed does not count."""

    data: str  # the data set's name
    config: Config


# From gentle to nearly unstable: at digits' lr 0.05 with momentum 0.9 float64 amplifies its own
# rounding past 1e-12.
CELLS = (
    Cell("digits", Config(batch_size=4, momentum=0.9, lr=0.001, steps=150)),
    Cell("digits", Config(batch_size=4, lr=0.01, steps=150)),
    Cell("digits", Config(batch_size=4, momentum=0.95, lr=0.002, steps=150)),
    Cell("digits", Config(batch_size=8, momentum=0.9, lr=0.01, nesterov=True, steps=120)),
    Cell(
        "digits",
        Config(batch_size=8, momentum=0.5, lr=0.05, schedule=Schedule("cosine"), steps=120),
    ),
    Cell("digits", Config(batch_size=16, momentum=0.9, lr=0.02, weight_decay=5e-4, steps=100)),
    Cell("digits", Config(batch_size=16, lr=0.1, steps=100)),
    Cell("digits", Config(batch_size=32, momentum=0.9, lr=0.01, steps=80)),
    Cell("digits", Config(batch_size=32, momentum=0.9, lr=0.05, steps=80)),
    Cell("digits", Config(batch_size=64, momentum=0.95, dampening=0.5, lr=0.01, steps=50)),
    Cell(
        "digits", Config(batch_size=128, momentum=0.9, lr=0.05, schedule=Schedule("step"), steps=40)
    ),
    Cell("cifar10", Config(batch_size=4, momentum=0.9, lr=0.001, steps=150)),
    Cell("cifar10", Config(batch_size=4, lr=0.01, steps=150)),
    Cell("cifar10", Config(batch_size=4, momentum=0.95, lr=0.001, steps=150)),
    Cell(
        "cifar10",
        Config(batch_size=8, momentum=0.9, lr=0.004, schedule=Schedule("exponential"), steps=120),
    ),
    Cell("cifar10", Config(batch_size=16, momentum=0.5, lr=0.03, steps=100)),
    Cell(
        "cifar10",
        Config(batch_size=16, momentum=0.9, lr=0.01, weight_decay=5e-4, nesterov=True, steps=100),
    ),
    Cell("cifar10", Config(batch_size=32, momentum=0.9, lr=0.01, steps=80)),
    Cell("cifar10", Config(batch_size=64, momentum=0.95, lr=0.005, steps=50)),
    Cell("cifar10", Config(batch_size=128, lr=0.1, steps=40)),
)


def _shorter(recipe: Config) -> Config:
    """A recipe with a quarter of the batch at a quarter of the rate, for as many steps as show all
    of its schedule."""
    schedule = (
        recipe.schedule
        if recipe.schedule.warmup is None
        else dataclasses.replace(recipe.schedule, warmup=5)
    )
    return dataclasses.replace(recipe, batch_size=8, lr=recipe.lr / 4, steps=20, schedule=schedule)


# The other networks: plainly, with a large step; and as their recipes train them.
NETWORK_CELLS = tuple(
    cell
    for model in MODELS
    if model in RECIPES
    for cell in (
        Cell("digits", Config(model=model, batch_size=16, lr=0.05, momentum=0.9, steps=20)),
        Cell("cifar10", _shorter(RECIPES[model].config)),
    )
)


def cells(model: str) -> list[Cell]:
    """Those of one network."""
    return [cell for cell in (*CELLS, *NETWORK_CELLS) if cell.config.model == model]


def shares(
    cells: Sequence[Cell], pairs: int, first: int = MEASUREMENT_SEEDS[0]
) -> Iterator[tuple[Cell, range]]:
    """Each of the cells with its share of so many pairs: seeds from `first` on, the same for
    all."""
    for index, cell in enumerate(cells[:pairs]):
        yield cell, range(first, first + pairs // len(cells) + (index < pairs % len(cells)))


def measure(
    cell: Cell,
    seeds: Iterable[int],
    datasets: Mapping[str, Dataset],
    build: Build,
    lenses: Sequence[str] = DTYPES,
    twins: int = 2,
) -> Iterator[dict[str, Any]]:
    """One row per seed: what Lockstep and every peer rule say of a clean pair, through each lens.

    Each backend is built, and so compiled, once per lens; of a seed's configuration only the
    weights and the order of the batches depend on it.

    Args:
        datasets: by name; `cell.data` is looked up.
        twins: per backend, in the production lenses.

    Returns:
        cell (its place in `cells`; None if it is not one of them), seed, and by dtype in lenses:
        verdict, score, first_divergence (its message), twins (per side; more than given where the
        verdict asked for them), and the peers that took the pair for broken (alarms) or had nothing
        to look at (silent).
    """
    dataset = shortened(datasets[cell.data], TEST_IMAGES)
    config = cell.config.resolve(len(dataset.train_images))
    backends = {dtype: {name: build(name, config, dtype) for name in BACKENDS} for dtype in lenses}
    exact = (
        backends["float64"]["torch"] if "float64" in backends else build("torch", config, "float64")
    )
    for seed in seeds:
        run = dataclasses.replace(config, seed=seed)
        known = cells(config.model)
        row: dict[str, Any] = {
            "cell": known.index(cell) if cell in known else None,
            "seed": seed,
            "lenses": {},
        }
        for dtype, sides in backends.items():
            families = {
                name: family(side, run, dataset, dtype, twins) for name, side in sides.items()
            }
            lens = judge(families, sides, run, dataset)
            torch, flax = (families[name][0] for name in BACKENDS)
            said = baselines.answers(torch, flax, baselines.reference(torch, exact))
            row["lenses"][dtype] = {
                "verdict": lens["verdict"],
                "score": lens.get("score"),
                "first_divergence": lens["first_divergence"]
                and lens["first_divergence"]["message"],
                "twins": len(families["flax"]) - 1,
                "alarms": [rule for rule, alarm in said.items() if alarm],
                "silent": [rule for rule, alarm in said.items() if alarm is None],
            }
        yield row


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per lens and rule, Lockstep's first: lens, rule, pairs, alarms, rate, and its 95 % interval.

    Pairs of which a rule says nothing are not its pairs; without pairs the rate is None.
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
    return ("lens", "rule", "pairs>", "alarms>", "rate>", "95 % interval>"), lines
