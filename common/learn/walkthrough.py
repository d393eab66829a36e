"""`walk.html`: stochastic gradient descent in both frameworks, walked through with the numbers of
real runs.

`walk_through` trains what the page speaks of, a few short runs, and computes every number of it;
`write_walk_page` writes them down. For someone who knows one of the two frameworks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from lockstep.common import data
from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.dtypes import numpy_dtype
from lockstep.common.evidence import Build, judge, take_test_images, train_ensemble
from lockstep.common.learn import alignment, outline
from lockstep.common.learn.annotations import Anchor
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.protocol import Arrays, Backend, Evaluation, Snapshot
from lockstep.common.report.template import write_page
from lockstep.common.runs.record import Record

# two steps: momentum and dampening first act in the second
SGD = Config(batch_size=16, lr=0.01, steps=2)
RUN = Config(batch_size=16, lr=0.03, momentum=0.9, steps=120)  # long enough for float32 to part
TWINS = 2  # per backend, in float32
TEST_IMAGES = 200  # evaluated: more would take longer than the training
SIZES = (4, 16, 64)  # batch sizes ...
SEEN = 1280  # ... and the images that each of these runs sees
# whose gradients are held against their mean; of the largest size, all that are seen
NOISE_BATCHES = 20
# the parameter that is followed: its gradient is short enough to be checked by hand
BIAS = "fc3.bias"
ENTRIES = 3  # shown of a tensor
RECTIFIED = ("conv1", "conv2", "fc1", "fc2")  # layers whose outputs go through a rectifier
MILESTONES = (1, 3, 10, 30, 100)  # steps at which the gap is told, beside the last


def walk_through(
    build: Build,
    dataset: Dataset,
    sources: Path,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train and compute all that the page says: numbers, excerpts of the sources, and one picture.

    Args:
        build: makes a backend of a name for a resolved configuration and a precision.
        sources: the folder that holds `backends`.
        announce: is told what is computed next.

    Raises:
        ConfigError: if the data has fewer images than a batch of `SIZES`.
        SourceError: if the sources lack a line that the page shows.
    """
    lab = Lab(build, dataset)
    backends = outline.read_backends(sources)
    excerpts = {key: excerpt(backends, anchors) for key, anchors in EXCERPTS.items()}
    announce("One step, stage by stage")
    step = one_step(lab)
    announce("The optimizer's options, one by one")
    options = optimizer_options(lab)
    announce("float32 and float64")
    precision = precisions(lab)
    announce("Batch sizes")
    sizes = batch_sizes(lab)
    return {
        "data": dataset.name,
        "excerpts": excerpts,
        "step": step,
        "options": options,
        "precision": precision,
        "sizes": sizes,
    }


def write_walk_page(path: Path, walked: Mapping[str, Any]) -> Path:
    """Write what `walk_through` computed; equal results give equal bytes.

    Raises:
        RecordError: if the page cannot be written.
    """
    spacings = [lens["spacing"] for lens in walked["precision"]["lenses"].values()]
    return write_page(
        path,
        "walk.html.jinja",
        **walked,
        picture=draw_gaps(walked["precision"]),
        digits=math.log10(max(spacings) / min(spacings)),  # that float64 has more than float32
        highlight=alignment.stylesheet(),
        written=written,
        gap=gap_text,
        pair=pair_text,
    )


# --- What runs


class Lab:
    """The data, and backends that are built once."""

    def __init__(self, build: Build, dataset: Dataset) -> None:
        self.dataset = take_test_images(dataset, TEST_IMAGES)
        self._build = build
        self._built: dict[tuple[str, Config, str], Backend] = {}

    def resolve(self, config: Config) -> Config:
        return config.resolve(len(self.dataset.train_images))

    def backend(self, name: str, config: Config, dtype: str = "float64") -> Backend:
        key = name, config, dtype
        if key not in self._built:
            self._built[key] = self._build(name, self.resolve(config), dtype)
        return self._built[key]

    def weights(self, config: Config) -> Arrays:
        return initial_weights(self.backend(BACKENDS[0], SGD).shapes(), config.seed, "float64")

    def batches(self, config: Config, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """The first `steps` batches in float64: images (steps, batch, 32, 32, 3) and labels (steps,
        batch)."""
        resolved = self.resolve(dataclasses.replace(config, steps=steps))
        indices = np.stack(list(data.batch_indices(resolved, len(self.dataset.train_images))))
        images = data.normalise(self.dataset.train_images[indices], numpy_dtype("float64"))
        return images, self.dataset.train_labels[indices]

    def probe(
        self, name: str, parameters: Arrays, images: np.ndarray, labels: np.ndarray
    ) -> Arrays:
        """What a step from `parameters` computes on one batch, in float64: `Backend.probe`."""
        reader = self.backend(name, SGD)
        return reader.probe(reader.init(Snapshot.start(parameters)), images, labels)

    def evaluate(self, name: str, parameters: Arrays) -> Evaluation:
        """What a network of these parameters says of the test images, in float64."""
        reader = self.backend(name, SGD)
        images = data.normalise(self.dataset.test_images, numpy_dtype("float64"))
        return reader.evaluate(
            reader.init(Snapshot.start(parameters)), images, self.dataset.test_labels
        )


@dataclass(frozen=True)
class Moment:
    """One step of one backend."""

    before: Arrays  # parameters
    probe: Arrays  # as `Backend.probe`
    after: Snapshot


def course(lab: Lab, name: str, config: Config) -> list[Moment]:
    """The first two steps in float64."""
    backend = lab.backend(name, config)
    state = backend.init(Snapshot.start(lab.weights(config)))
    moments = []
    for images, labels in zip(*lab.batches(config, 2), strict=True):
        before = backend.export(state).parameters
        probe = lab.probe(name, before, images, labels)
        state, _ = backend.train_step(state, images, labels)
        moments.append(Moment(before, probe, backend.export(state)))
    return moments


def largest_gap(one: np.ndarray, other: np.ndarray) -> float:
    return float(
        np.max(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)), initial=0.0)
    )


def widest(one: Arrays, other: Arrays) -> float:
    """The largest gap over all tensors."""
    return max(largest_gap(one[name], other[name]) for name in one)


# --- One step

MOMENTUM = dataclasses.replace(SGD, momentum=0.9)


def one_step(lab: Lab) -> dict[str, Any]:
    """The first step, stage by stage: some entries in both frameworks, by hand where that is short,
    and the gaps."""
    first = {name: course(lab, name, MOMENTUM)[0] for name in BACKENDS}
    probe = first["torch"].probe
    logits, labels = probe["forward/logits"], probe["data/labels"]
    probabilities = softmax(logits)
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    gradient = (probabilities - np.eye(logits.shape[1])[labels]).mean(axis=0)
    before = first["torch"].before[BIAS]
    by_hand = {
        "loss": np.array(loss),
        "gradient": gradient,
        "momentum": gradient,  # the first buffer is the gradient itself
        "parameter": before - MOMENTUM.lr * gradient,
    }
    row, column = (size // 2 for size in probe["forward/conv1"].shape[1:3])
    pixels = [(0, 16, 8 + 4 * k, 0) for k in range(ENTRIES)]
    tensors: list[tuple[str, Callable[[Moment], np.ndarray], list[tuple[int, ...]]]] = [
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
        ("momentum", lambda m: m.after.momentum[BIAS], [(k,) for k in range(ENTRIES)]),
        ("parameter", lambda m: m.after.parameters[BIAS], [(k,) for k in range(ENTRIES)]),
    ]
    stages = {
        key: _stage({name: of(moment) for name, moment in first.items()}, places, by_hand.get(key))
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
        "gradient_gap": widest(*gradients),
        "parameter_gap": widest(*(first[name].after.parameters for name in BACKENDS)),
    }


def _stage(
    tensors: Mapping[str, np.ndarray], places: Sequence[tuple[int, ...]], by_hand: np.ndarray | None
) -> dict[str, Any]:
    one, other = (tensors[name] for name in BACKENDS)
    return {
        "shape": list(one.shape),
        "entries": [
            {
                "place": ", ".join(map(str, place)),
                **{name: tensors[name][place].item() for name in BACKENDS},
                "by_hand": None if by_hand is None else by_hand[place].item(),
            }
            for place in places
        ],
        "gap": largest_gap(one, other),
        "hand_gap": None if by_hand is None else largest_gap(one, by_hand),
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


def optimizer_options(lab: Lab) -> dict[str, Any]:
    """Two steps with each option: the updates of one parameter in both frameworks and by hand."""
    courses = {
        key: {name: course(lab, name, config) for name in BACKENDS} for key, config in CASES.items()
    }
    first, second = (moment.probe[f"backward/{BIAS}"] for moment in courses["plain"]["torch"])
    entry = int(np.argmax(first * second))  # both gradients are large and of one sign
    plain = [_update(moment, entry) for moment in courses["plain"]["torch"]]
    return {
        "entry": f"{BIAS}[{entry}]",
        "start": float(courses["plain"]["torch"][0].before[BIAS][entry]),
        "cases": {key: _case(CASES[key], courses[key], entry, plain) for key in CASES},
    }


def by_hand(
    config: Config, start: Arrays, gradients: Sequence[Arrays]
) -> list[tuple[Arrays, Arrays]]:
    """Parameters and momentum buffers after each step, in NumPy: the formula of torch.optim.SGD's
    documentation."""
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
    config: Config, courses: Mapping[str, list[Moment]], entry: int, plain: Sequence[float]
) -> dict[str, Any]:
    torch, flax = (courses[name] for name in BACKENDS)
    gradients = [
        {
            key.removeprefix("backward/"): array
            for key, array in moment.probe.items()
            if key.startswith("backward/")
        }
        for moment in torch
    ]
    expected = by_hand(config, torch[0].before, gradients)
    steps = []
    for place, (one, other, (parameters, _)) in enumerate(zip(torch, flax, expected, strict=True)):
        buffer = expected[place - 1][1].get(BIAS) if place else None
        before = expected[place - 1][0] if place else torch[0].before
        steps.append(
            {
                "gradient": float(one.probe[f"backward/{BIAS}"][entry]),
                "sum": arithmetic(
                    config,
                    float(one.probe[f"backward/{BIAS}"][entry]),
                    float(before[BIAS][entry]),
                    None if buffer is None else float(buffer[entry]),
                ),
                "by_hand": float((parameters[BIAS] - before[BIAS])[entry]),
                "torch": _update(one, entry),
                "flax": _update(other, entry),
                "times_plain": _update(one, entry) / plain[place],
                "gap": widest(one.after.parameters, other.after.parameters),
                "hand_gap": widest(one.after.parameters, parameters),
            }
        )
    return {
        **{
            name: getattr(config, name)
            for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")
        },
        "steps": steps,
        "gap": max(step["gap"] for step in steps),
        "hand_gap": max(step["hand_gap"] for step in steps),
    }


def _update(moment: Moment, entry: int) -> float:
    return float((moment.after.parameters[BIAS] - moment.before[BIAS])[entry])


def arithmetic(config: Config, gradient: float, parameter: float, buffer: float | None) -> str:
    """The update of one number, written out; `buffer` is that of the step before, None in the
    first."""

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


# --- float32 and float64


def precisions(lab: Lab) -> dict[str, Any]:
    """A short run of both backends in both precisions, with twins: how far they part, and where it
    begins."""
    config = lab.resolve(RUN)
    lenses = {dtype: _lens(lab, config, dtype) for dtype in ("float64", "float32")}
    return {
        "steps": config.total_steps,
        "batch": config.batch_size,
        "lr": config.lr,
        "momentum": config.momentum,
        "twins": TWINS,
        "sums": _sums(lab),
        "lenses": lenses,
        "milestones": [
            {
                "step": step,
                **{dtype: float(lens["gap"][step - 1]) for dtype, lens in lenses.items()},
                "twins": float(lenses["float32"]["drift"][step - 1]),
            }
            for step in milestones(config.total_steps)
        ],
    }


def milestones(steps: int) -> list[int]:
    return [step for step in MILESTONES if step < steps] + [steps]


def _lens(lab: Lab, config: Config, dtype: str) -> dict[str, Any]:
    backends = {name: lab.backend(name, RUN, dtype) for name in BACKENDS}
    ensembles = {
        name: train_ensemble(backends[name], config, lab.dataset, dtype, TWINS) for name in BACKENDS
    }
    one, other = (ensembles[name].run for name in BACKENDS)
    drifts = [
        np.abs(a.loss - b.loss)
        for ensemble in ensembles.values()
        for a, b in itertools.combinations(ensemble.records, 2)
    ]
    verdict = judge(ensembles, backends, config, lab.dataset)
    first = np.abs(one.loss[0] - other.loss[0])
    return {
        "gap": np.maximum.accumulate(np.abs(one.loss - other.loss)),
        "drift": np.maximum.accumulate(np.max(drifts, axis=0)) if drifts else np.zeros(0),
        "first_gap": float(first),
        "first_ulp": float(first / np.spacing(np.asarray(one.loss[0], dtype))),
        "spacing": float(np.finfo(dtype).eps),
        "verdict": verdict.verdict,
        "final": {record.backend: float(record.loss[-1]) for record in (one, other)},
        "test_loss": {record.backend: float(record.test_loss) for record in (one, other)},
        "equal": int(np.sum(one.predictions == other.predictions)),
        "images": len(one.predictions),
        "tipped": _tipped(lab, one, other),
        "twins_equal": [
            int(np.sum(a.predictions == b.predictions))
            for ensemble in ensembles.values()
            for a, b in itertools.combinations(ensemble.records, 2)
        ],
    }


def _tipped(lab: Lab, one: Record, other: Record) -> dict[str, int]:
    """On the first batch after the run: rectifiers that are open in one run and closed in the
    other, and how many."""
    images, labels = (batches[0] for batches in lab.batches(SGD, 1))
    seen = [
        lab.probe(
            "torch",
            {name: a.astype(np.float64) for name, a in record.final.items()},
            images,
            labels,
        )
        for record in (one, other)
    ]
    signs = [
        np.concatenate([(probe[f"forward/{layer}"] > 0).ravel() for layer in RECTIFIED])
        for probe in seen
    ]
    return {"count": int(np.sum(signs[0] != signs[1])), "of": len(signs[0])}


def _sums(lab: Lab) -> dict[str, Any]:
    """One output of the first dense layer, added up from the front and from the back, in both
    precisions."""
    images, labels = (batches[0] for batches in lab.batches(SGD, 1))
    weights = lab.weights(SGD)
    inputs = lab.probe("torch", weights, images, labels)["forward/input of fc1"][0]
    found = {}
    for dtype in ("float64", "float32"):
        products = inputs.astype(dtype) * weights["fc1.kernel"][:, 0].astype(dtype)
        forward, backward = (
            np.cumsum(p, dtype=dtype)[-1].item() for p in (products, products[::-1])
        )
        found[dtype] = {"forward": forward, "backward": backward, "gap": abs(forward - backward)}
    return {"terms": len(inputs), **found}


def draw_gaps(precision: Mapping[str, Any]) -> Markup:
    """The gaps between the training losses over the steps, as a picture in the page's colours."""
    from lockstep.common.report.figures import (
        COLOURS,
        GREY,
        INK,
        drawing,
        new_figure,
        plain,
        to_inline,
    )

    lenses = precision["lenses"]
    lines = [  # values, name, colour, dashes
        (lenses["float32"]["drift"], "float32, furthest twins", GREY, (0, (4, 2))),
        (lenses["float32"]["gap"], "float32, PyTorch and Flax", COLOURS["flax"], "-"),
        (lenses["float64"]["gap"], "float64, PyTorch and Flax", COLOURS["torch"], "-"),
    ]
    with drawing():
        figure = new_figure(7.5, 3.9)
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
        plain(axes)
        return Markup(to_inline(figure, "gaps", _in_words(precision)))


def _in_words(precision: Mapping[str, Any]) -> str:
    """What the picture shows."""
    last = precision["milestones"][-1]
    return (
        f"The largest gap between two training losses, over {precision['steps']} steps, on logarithmic axes. "
        f"PyTorch and Flax in float64 end at {gap_text(last['float64'])}, in float32 at {gap_text(last['float32'])}; "
        f"the furthest twins of one framework in float32 at {gap_text(last['twins'])}."
    )


# --- Batch sizes


def batch_sizes(lab: Lab) -> dict[str, Any]:
    """Runs that see the same number of images in batches of different sizes, in float64."""
    rows = [_size(lab, size) for size in SIZES]
    # that of all the images
    reference = float(np.linalg.norm(gradients(lab, SIZES[-1]).mean(axis=0)))
    for row in rows:
        row["noise"] = spread(gradients(lab, row["size"])) / reference
        row["scaled_noise"] = row["noise"] * math.sqrt(row["size"])
    facts = {
        "seen": SEEN,
        "lr": MOMENTUM.lr,
        "momentum": MOMENTUM.momentum,
        "batches": NOISE_BATCHES,
    }
    return {**facts, "test_images": len(lab.dataset.test_images), "rows": rows}


def _size(lab: Lab, size: int) -> dict[str, Any]:
    steps = SEEN // size
    config = dataclasses.replace(MOMENTUM, batch_size=size, steps=steps)
    images, labels = lab.batches(config, steps)
    losses, evaluations = {}, {}
    for name in BACKENDS:
        backend = lab.backend(name, config)
        state, metrics = backend.train_steps(
            backend.init(Snapshot.start(lab.weights(config))), images, labels
        )
        losses[name] = np.asarray(metrics.loss)
        evaluations[name] = lab.evaluate(name, backend.export(state).parameters)
    tail = max(1, steps // 8)  # the last eighth of the images
    return {
        "size": size,
        "steps": steps,
        "loss": float(losses["torch"][-tail:].mean()),
        "test_loss": float(evaluations["torch"].loss),
        "accuracy": float(np.mean(evaluations["torch"].predictions == lab.dataset.test_labels)),
        "gap": largest_gap(*losses.values()),
        "equal": int(np.sum(evaluations["torch"].predictions == evaluations["flax"].predictions)),
    }


def gradients(lab: Lab, size: int) -> np.ndarray:
    """The gradients of the first batches of this size at the first weights: (batches, parameters).

    They are PyTorch's, which are Flax's to the last digits.
    """
    weights = lab.weights(SGD)
    images, labels = lab.batches(
        dataclasses.replace(SGD, batch_size=size), min(NOISE_BATCHES, SEEN // size)
    )
    probes = (lab.probe("torch", weights, *batch) for batch in zip(images, labels, strict=True))
    return np.stack(
        [
            np.concatenate([probe[f"backward/{name}"].ravel() for name in weights])
            for probe in probes
        ]
    )


def spread(vectors: np.ndarray) -> float:
    """How far vectors (n, size) lie from their mean: the root of the mean square, with n - 1 as for
    a variance."""
    return float(np.sqrt(np.sum((vectors - vectors.mean(axis=0)) ** 2) / (len(vectors) - 1)))


# --- In words


def written(value: float | int, dtype: str = "float64") -> str:
    """A number in full: as many digits as tell it from its neighbours in its precision."""
    return str(np.float32(value) if dtype == "float32" else value).replace("-", "−")


def gap_text(value: float) -> str:
    """A gap in two digits, as `0.68` or `2.4e−7`."""
    if value == 0 or value >= 1e-3:
        return f"{value:.2g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e−{abs(int(exponent))}"


def pair_text(
    one: float | int, other: float | int, dtype: str = "float64"
) -> tuple[Markup, Markup]:
    """Two numbers in full; from where they differ on, their digits are marked."""
    first, second = written(one, dtype), written(other, dtype)
    pairs = zip(first, second, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda letters: letters[0] == letters[1], pairs))
    return _marked(first, same), _marked(second, same)


def _marked(text: str, same: int) -> Markup:
    mark = Markup('{}<span class="x">{}</span>')
    return mark.format(text[:same], text[same:]) if text[same:] else Markup(text)


# --- Excerpts

_STEP = "backend.py:Backend._step"
_MAKE = "optimizer.py:make_optimizer"
EXCERPTS: dict[str, dict[str, list[Anchor]]] = {
    "images": {
        "torch": [Anchor("inputs.py:Inputs.images", "movedim(-1, -3)")],
        "flax": [Anchor("inputs.py:Inputs.images", "jnp.asarray(images")],
    },
    "labels": {
        "torch": [Anchor("inputs.py:Inputs.labels", "torch.int64")],
        "flax": [Anchor("inputs.py:Inputs.labels", "jnp.int32")],
    },
    "conv1": {
        "torch": [Anchor("models/net.py:Net.forward", "self.conv1(x)")],
        "flax": [Anchor("models/net.py:Net.__call__", "self.conv1(x)")],
    },
    "logits": {
        "torch": [Anchor("models/net.py:Net.forward", "return self.fc3(x)")],
        "flax": [Anchor("models/net.py:Net.__call__", "return self.fc3(x)")],
    },
    "loss": {
        "torch": [Anchor("losses.py:cross_entropy", "F.cross_entropy")],
        "flax": [Anchor("losses.py:cross_entropy", ".mean()")],
    },
    "gradient": {
        "torch": [Anchor(_STEP, "optimizer.zero_grad()"), Anchor(_STEP, "loss.backward()")],
        "flax": [Anchor(_STEP, "jax.value_and_grad(loss_of, has_aux=True)")],
    },
    "momentum": {
        "torch": [Anchor(_STEP, "optimizer.step()")],
        "flax": [Anchor(_STEP, "self.optimizer.update(")],
    },
    "parameter": {
        "torch": [Anchor(_STEP, "optimizer.step()")],
        "flax": [Anchor(_STEP, "optax.apply_updates(")],
    },
    "lr": {
        "torch": [Anchor(_MAKE, "lr=config.lr,")],
        "flax": [Anchor(_MAKE, "optax.sgd(")],
    },
    "momentum option": {
        "torch": [Anchor(_MAKE, "momentum=config.momentum,")],
        "flax": [Anchor(_MAKE, "optax.sgd(")],
    },
    "dampening": {
        "torch": [Anchor(_MAKE, "dampening=config.dampening,")],
        "flax": [Anchor(_MAKE, '("dampening", dampen(')],
    },
    "weight_decay": {
        "torch": [Anchor(_MAKE, "weight_decay=config.weight_decay,")],
        "flax": [Anchor(_MAKE, '"weight_decay",')],
    },
    "nesterov": {
        "torch": [Anchor(_MAKE, "nesterov=config.nesterov,")],
        "flax": [Anchor(_MAKE, "optax.sgd(")],
    },
}


def excerpt(
    backends: Mapping[str, Mapping[str, outline.Definition]],
    anchors: Mapping[str, Sequence[Anchor]],
) -> dict[str, list[Markup]]:
    """Lines of the sources, one list a side, highlighted.

    Raises:
        SourceError: if one is gone.
    """
    return {side: [_line(backends[side], anchor) for anchor in anchors[side]] for side in BACKENDS}


def _line(definitions: Mapping[str, outline.Definition], anchor: Anchor) -> Markup:
    if anchor.definition not in definitions:
        raise outline.SourceError(
            f"{anchor.definition}, which the walk-through shows, is gone: change walk.py"
        )
    definition = definitions[anchor.definition]
    line = outline.find(definition, anchor.definition, anchor.snippet)
    tokens = alignment.highlight(definition)[line.number]
    return alignment.markup(tokens[1:] if tokens[0][1].isspace() else tokens)
