"""Two steps of SGD: every stage of the first one, and each option of the optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import numpy as np

from lockstep.common.config import BACKENDS, Config
from lockstep.common.learn.experiment import (
    MOMENTUM,
    SGD,
    Experiment,
    StepTrace,
    largest_gap,
    max_gap,
    trace_steps,
)
from lockstep.common.protocol import Arrays

# the parameter that is followed: its gradient is short enough to be checked by hand
BIAS = "fc3.bias"
ENTRIES = 3  # shown of a tensor


class EntryJson(TypedDict):
    """One entry of a tensor; `expected` is computed by hand."""

    place: str
    torch: float
    flax: float
    expected: float | None


class StageJson(TypedDict):
    """One tensor of a step."""

    shape: list[int]
    entries: list[EntryJson]
    gap: float  # between the frameworks, over all entries
    hand_gap: float | None  # between PyTorch and the arithmetic by hand


class StepJson(TypedDict):
    """One step, stage by stage."""

    batch: int
    lr: float
    momentum: float
    bias: str
    classes: int
    stages: dict[str, StageJson]
    before: list[float]  # entries of the bias
    guess: float  # the loss of a network that knows nothing
    parameters: int
    gradient_gap: float
    parameter_gap: float


class UpdateJson(TypedDict):
    """The update of one parameter in one step."""

    gradient: float
    sum: str
    expected: float
    torch: float
    flax: float
    times_plain: float
    gap: float
    hand_gap: float


class CaseJson(TypedDict):
    """Two steps with one option of the optimizer."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    steps: list[UpdateJson]
    gap: float
    hand_gap: float


class OptionsJson(TypedDict):
    """The options, one by one."""

    entry: str
    start: float
    cases: dict[str, CaseJson]


# --- One step


def one_step(experiment: Experiment) -> StepJson:
    """The first step, stage by stage: some entries of both frameworks, the same by hand where that
    is short, and the gaps."""
    first = {name: trace_steps(experiment, name, MOMENTUM)[0] for name in BACKENDS}
    probe = first["torch"].probe
    logits, labels = probe["forward/logits"], probe["data/labels"]
    probabilities = softmax(logits)
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    gradient = (probabilities - np.eye(logits.shape[1])[labels]).mean(axis=0)
    before = first["torch"].before[BIAS]
    expected = {
        "loss": np.array(loss),
        "gradient": gradient,
        "momentum": gradient,  # the first buffer is the gradient itself
        "parameter": before - MOMENTUM.lr * gradient,
    }
    row, column = (size // 2 for size in probe["forward/conv1"].shape[1:3])
    pixels = [(0, 16, 8 + 4 * k, 0) for k in range(ENTRIES)]
    tensors: list[tuple[str, Callable[[StepTrace], np.ndarray], list[tuple[int, ...]]]] = [
        ("images", lambda m: m.probe["data/images"], pixels),
        ("labels", lambda m: m.probe["data/labels"], [(k,) for k in range(ENTRIES)]),
        (
            "conv1",
            lambda m: m.probe["forward/conv1"],
            [(0, row, column, k) for k in range(ENTRIES)],
        ),
        ("logits", lambda m: m.probe["forward/logits"], [(0, k) for k in range(ENTRIES)]),
        ("loss", lambda m: m.probe["loss/loss"], [()]),
        ("gradient", lambda m: m.probe[f"backward/{BIAS}"], [(k,) for k in range(ENTRIES)]),
        ("momentum", lambda m: m.after.slots["momentum"][BIAS], [(k,) for k in range(ENTRIES)]),
        ("parameter", lambda m: m.after.parameters[BIAS], [(k,) for k in range(ENTRIES)]),
    ]
    stages = {
        key: _stage({name: of(trace) for name, trace in first.items()}, places, expected.get(key))
        for key, of, places in tensors
    }
    gradients = [
        {k: a for k, a in first[name].probe.items() if k.startswith("backward/")}
        for name in BACKENDS
    ]
    return {
        "batch": MOMENTUM.batch_size,
        "lr": MOMENTUM.lr,
        "momentum": MOMENTUM.momentum,
        "bias": BIAS,
        "classes": logits.shape[1],
        "stages": stages,
        "before": [float(before[k]) for k in range(ENTRIES)],
        "guess": math.log(logits.shape[1]),
        "parameters": sum(array.size for array in first["torch"].before.values()),
        "gradient_gap": max_gap(*gradients),
        "parameter_gap": max_gap(*(first[name].after.parameters for name in BACKENDS)),
    }


def _stage(
    tensors: Mapping[str, np.ndarray],
    places: Sequence[tuple[int, ...]],
    expected: np.ndarray | None,
) -> StageJson:
    one, other = (tensors[name] for name in BACKENDS)
    return {
        "shape": list(one.shape),
        "entries": [
            {
                "place": ", ".join(map(str, place)),
                "torch": one[place].item(),
                "flax": other[place].item(),
                "expected": None if expected is None else expected[place].item(),
            }
            for place in places
        ],
        "gap": largest_gap(one, other),
        "hand_gap": None if expected is None else largest_gap(one, expected),
    }


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (n, classes) from logits."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


# --- The optimizer's options

CASES = {
    "plain": SGD,
    "lr": dataclasses.replace(SGD, lr=2 * SGD.lr),
    "momentum": MOMENTUM,
    "dampening": dataclasses.replace(MOMENTUM, dampening=0.5),
    "weight_decay": dataclasses.replace(SGD, weight_decay=0.1),
    "nesterov": dataclasses.replace(MOMENTUM, nesterov=True),
}


def optimizer_options(experiment: Experiment) -> OptionsJson:
    """Two steps with each option: the updates of one parameter in both frameworks and by hand."""
    traces = {
        key: {name: trace_steps(experiment, name, config) for name in BACKENDS}
        for key, config in CASES.items()
    }
    first, second = (trace.probe[f"backward/{BIAS}"] for trace in traces["plain"]["torch"])
    entry = int(np.argmax(first * second))  # both gradients are large and of one sign
    plain = [_update(trace, entry) for trace in traces["plain"]["torch"]]
    return {
        "entry": f"{BIAS}[{entry}]",
        "start": float(traces["plain"]["torch"][0].before[BIAS][entry]),
        "cases": {key: _case(CASES[key], traces[key], entry, plain) for key in CASES},
    }


def expected(
    config: Config, start: Arrays, gradients: Sequence[Arrays]
) -> list[tuple[Arrays, Arrays]]:
    """Parameters and momentum buffers after each step, in NumPy.

    The formula is that of the documentation of `torch.optim.SGD`.
    """
    parameters, buffers, found = dict(start), {}, []
    for given in gradients:
        for name, gradient in given.items():
            decayed = gradient + config.weight_decay * parameters[name]
            update = decayed
            if config.momentum != 0:
                earlier = buffers.get(name)
                kept = (1 - config.dampening) * decayed
                buffers[name] = decayed if earlier is None else config.momentum * earlier + kept
                update = (
                    decayed + config.momentum * buffers[name] if config.nesterov else buffers[name]
                )
            parameters[name] = parameters[name] - config.lr * update
        found.append((dict(parameters), dict(buffers)))
    return found


def _case(
    config: Config, traces: Mapping[str, list[StepTrace]], entry: int, plain: Sequence[float]
) -> CaseJson:
    torch, flax = (traces[name] for name in BACKENDS)
    gradients = [
        {
            key.removeprefix("backward/"): array
            for key, array in trace.probe.items()
            if key.startswith("backward/")
        }
        for trace in torch
    ]
    formula = expected(config, torch[0].before, gradients)
    steps: list[UpdateJson] = []
    for place, (one, other, (parameters, _)) in enumerate(zip(torch, flax, formula, strict=True)):
        buffer = formula[place - 1][1].get(BIAS) if place else None
        before = formula[place - 1][0] if place else torch[0].before
        steps.append(
            {
                "gradient": float(one.probe[f"backward/{BIAS}"][entry]),
                "sum": arithmetic(
                    config,
                    float(one.probe[f"backward/{BIAS}"][entry]),
                    float(before[BIAS][entry]),
                    None if buffer is None else float(buffer[entry]),
                ),
                "expected": float((parameters[BIAS] - before[BIAS])[entry]),
                "torch": _update(one, entry),
                "flax": _update(other, entry),
                "times_plain": _update(one, entry) / plain[place],
                "gap": max_gap(one.after.parameters, other.after.parameters),
                "hand_gap": max_gap(one.after.parameters, parameters),
            }
        )
    return {
        "lr": config.lr,
        "momentum": config.momentum,
        "dampening": config.dampening,
        "weight_decay": config.weight_decay,
        "nesterov": config.nesterov,
        "steps": steps,
        "gap": max(step["gap"] for step in steps),
        "hand_gap": max(step["hand_gap"] for step in steps),
    }


def _update(trace: StepTrace, entry: int) -> float:
    return float((trace.after.parameters[BIAS] - trace.before[BIAS])[entry])


def arithmetic(config: Config, gradient: float, parameter: float, buffer: float | None) -> str:
    """The update of one number, as a formula of numbers.

    Args:
        buffer: of the step before; None in the first.
    """

    def short(value: float) -> str:
        return f"{value:.4g}".replace("-", "−")

    def signed(value: float) -> str:
        return short(value) if value >= 0 else f"({short(value)})"

    g = signed(gradient)
    if config.weight_decay:
        g = f"({short(gradient)} + {short(config.weight_decay)} × {signed(parameter)})"
    if config.momentum == 0:
        return f"−{short(config.lr)} × {g}"
    b = g
    if buffer is not None:
        kept = f"{short(1 - config.dampening)} × {g}" if config.dampening else g
        b = f"({short(config.momentum)} × {signed(buffer)} + {kept})"
    update = f"({g} + {short(config.momentum)} × {b})" if config.nesterov else b
    return f"−{short(config.lr)} × {update}"
