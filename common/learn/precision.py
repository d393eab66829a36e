"""A short run in float32 and in float64, with twins: how far rounding takes two runs apart."""

from __future__ import annotations

import itertools
from typing import TypedDict

import numpy as np
from markupsafe import Markup

from lockstep.common.config import BACKENDS, Config
from lockstep.common.evidence import judge, train_ensemble
from lockstep.common.learn.experiment import SGD, Experiment
from lockstep.common.learn.text import gap_text
from lockstep.common.report.figures import (
    COLOURS,
    GREY,
    INK,
    drawing,
    new_figure,
    style_axes,
    to_inline,
)
from lockstep.common.runs.record import Record

RUN = Config(batch_size=16, lr=0.03, momentum=0.9, steps=120)  # float32 runs diverge within it
TWINS = 2  # per backend, in float32
RELU_LAYERS = ("conv1", "conv2", "fc1", "fc2")  # layers that a ReLU follows
MILESTONES = (1, 3, 10, 30, 100)  # steps at which the page gives the gap, and at the last


class SumJson(TypedDict):
    """One sum in two orders."""

    forward: float
    backward: float
    gap: float


class SumsJson(TypedDict):
    """One sum of `terms` products."""

    terms: int
    float64: SumJson
    float32: SumJson


class SignChanges(TypedDict):
    """How many numbers have different signs in two runs."""

    count: int
    of: int


class RunJson(TypedDict):
    """The run of both backends in one precision; dictionaries are by backend."""

    gap: np.ndarray  # float64 (steps,): the largest so far between the losses
    spread: np.ndarray  # float64 (steps,): the same between twins; empty without any
    first_gap: float
    first_ulp: float
    spacing: float  # between 1 and the next number
    verdict: str
    final: dict[str, float]
    test_loss: dict[str, float]
    equal: int  # predictions
    images: int
    sign_changes: SignChanges
    twins_equal: list[int]  # predictions, per pair of twins


class Milestone(TypedDict):
    """The largest gaps up to a step."""

    step: int
    float64: float
    float32: float
    twins: float


class PrecisionJson(TypedDict):
    """Both precisions."""

    steps: int
    batch: int
    lr: float
    momentum: float
    twins: int
    sums: SumsJson
    runs: dict[str, RunJson]  # by precision
    milestones: list[Milestone]


def precisions(experiment: Experiment) -> PrecisionJson:
    """A short run of both backends in both precisions, with twins: how far they diverge, and where
    that begins."""
    config = experiment.resolve(RUN)
    runs = {dtype: _run(experiment, config, dtype) for dtype in ("float64", "float32")}
    return {
        "steps": config.total_steps,
        "batch": config.batch_size,
        "lr": config.lr,
        "momentum": config.momentum,
        "twins": TWINS,
        "sums": _sums(experiment),
        "runs": runs,
        "milestones": [
            {
                "step": step,
                "float64": float(runs["float64"]["gap"][step - 1]),
                "float32": float(runs["float32"]["gap"][step - 1]),
                "twins": float(runs["float32"]["spread"][step - 1]),
            }
            for step in milestones(config.total_steps)
        ],
    }


def milestones(steps: int) -> list[int]:
    return [step for step in MILESTONES if step < steps] + [steps]


def _run(experiment: Experiment, config: Config, dtype: str) -> RunJson:
    backends = {name: experiment.backend(name, RUN, dtype) for name in BACKENDS}
    ensembles = {
        name: train_ensemble(backends[name], config, experiment.dataset, dtype, TWINS)
        for name in BACKENDS
    }
    one, other = (ensembles[name].run for name in BACKENDS)
    spreads = [
        np.abs(a.loss - b.loss)
        for ensemble in ensembles.values()
        for a, b in itertools.combinations(ensemble.records, 2)
    ]
    verdict = judge(ensembles, backends, config, experiment.dataset)
    first = np.abs(one.loss[0] - other.loss[0])
    return {
        "gap": np.maximum.accumulate(np.abs(one.loss - other.loss)),
        "spread": np.maximum.accumulate(np.max(spreads, axis=0)) if spreads else np.zeros(0),
        "first_gap": float(first),
        "first_ulp": float(first / np.spacing(np.asarray(one.loss[0], dtype))),
        "spacing": float(np.finfo(dtype).eps),
        "verdict": verdict.verdict,
        "final": {record.backend: float(record.loss[-1]) for record in (one, other)},
        "test_loss": {record.backend: float(record.test_loss) for record in (one, other)},
        "equal": int(np.sum(one.predictions == other.predictions)),
        "images": len(one.predictions),
        "sign_changes": _sign_changes(experiment, one, other),
        "twins_equal": [
            int(np.sum(a.predictions == b.predictions))
            for ensemble in ensembles.values()
            for a, b in itertools.combinations(ensemble.records, 2)
        ],
    }


def _sign_changes(experiment: Experiment, one: Record, other: Record) -> SignChanges:
    """The inputs of ReLUs whose sign differs between the two runs, on the first batch after the
    run."""
    images, labels = (batches[0] for batches in experiment.batches(SGD, 1))
    seen = [
        experiment.probe(
            "torch",
            {name: a.astype(np.float64) for name, a in record.final.items()},
            images,
            labels,
        )
        for record in (one, other)
    ]
    signs = [
        np.concatenate([(probe[f"forward/{layer}"] > 0).ravel() for layer in RELU_LAYERS])
        for probe in seen
    ]
    return {"count": int(np.sum(signs[0] != signs[1])), "of": len(signs[0])}


def _sums(experiment: Experiment) -> SumsJson:
    """One output of the first dense layer, summed from the front and from the back, in both
    precisions."""
    images, labels = (batches[0] for batches in experiment.batches(SGD, 1))
    weights = experiment.weights(SGD)
    inputs = experiment.probe("torch", weights, images, labels)["forward/input of fc1"][0]
    found: dict[str, SumJson] = {}
    for dtype in ("float64", "float32"):
        products = inputs.astype(dtype) * weights["fc1.kernel"][:, 0].astype(dtype)
        forward, backward = (
            np.cumsum(p, dtype=dtype)[-1].item() for p in (products, products[::-1])
        )
        found[dtype] = {"forward": forward, "backward": backward, "gap": abs(forward - backward)}
    return {"terms": len(inputs), "float64": found["float64"], "float32": found["float32"]}


def draw_gaps(precision: PrecisionJson) -> Markup:
    """The gaps between the training losses over the steps, as an SVG in the page's colours."""
    runs = precision["runs"]
    lines = [  # values, name, colour, dashes
        (runs["float32"]["spread"], "float32, most distant twins", GREY, (0, (4, 2))),
        (runs["float32"]["gap"], "float32, PyTorch and Flax", COLOURS["flax"], "-"),
        (runs["float64"]["gap"], "float64, PyTorch and Flax", COLOURS["torch"], "-"),
    ]
    with drawing():
        figure = new_figure(5.6, 3.7)  # small, so that a phone shows its letters large enough
        axes = figure.subplots()
        for values, name, colour, dashes in lines:
            steps = np.arange(1, len(values) + 1)
            seen = np.where(values > 0, values, np.nan)  # a logarithmic axis has no place for 0
            axes.plot(steps, seen, color=colour, linestyle=dashes, linewidth=1.8, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(1e-17, 1e2)
        axes.set_yticks([10.0**power for power in range(-16, 1, 4)])
        ticks = [step for step in MILESTONES if step < precision["steps"]]
        axes.set_xticks(ticks, [f"{step:,}" for step in ticks])
        axes.minorticks_off()
        axes.set_xlabel("steps")
        axes.set_ylabel("largest gap so far, nats", color=INK)
        figure.legend(loc="outside upper left", frameon=False, ncols=1)
        style_axes(axes)
        return Markup(to_inline(figure, "gaps", _in_words(precision)))


def _in_words(precision: PrecisionJson) -> str:
    """The picture in words."""
    last = precision["milestones"][-1]
    return (
        f"The largest gap between two training losses, over {precision['steps']} steps, on "
        f"logarithmic axes. PyTorch and Flax in float64 end at {gap_text(last['float64'])}, in "
        f"float32 at {gap_text(last['float32'])}; the most distant twins of one framework in "
        f"float32 at {gap_text(last['twins'])}."
    )
