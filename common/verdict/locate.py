"""Where two runs part: the first step, stage and tensor, the entries that differ most, and what
usually causes it.

What parts in the first steps, or in evaluation alone, the records show. What parts later is looked
for again: the reference is trained up to shortly before that step, and from there on, before each
step, both backends are brought to its state (weights, momentum, model state, schedule) and take
that step on the same batch, tensor by tensor. A difference that is older than the step is not
carried along, so what shows is what that step does wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.data import Dataset, augment
from lockstep.common.dtypes import compute_dtype, numpy_dtype
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.model.perturb import moved
from lockstep.common.protocol import Arrays, Backend, Snapshot
from lockstep.common.runs import training
from lockstep.common.runs.record import OPENING_STEPS, Record
from lockstep.common.system import environment
from lockstep.common.verdict import compare as parity
from lockstep.common.verdict.statistics import gaps

# keeps these random numbers apart from those of lockstep.common.model.initial_weights
REPLAY_STREAM = 4
LOOK_BACK = 30  # steps before the one at which the runs were seen to part
OFFENDERS = 5
ALIKE = 1e-6  # relative residual under which one tensor is called a multiple of the other


@dataclass(frozen=True)
class Trap:
    """A mistake that shows in one place."""

    stage: str
    tensor: str  # regular expression
    pattern: str  # of `pattern_of`, as a regular expression; "" fits any, none included
    cause: str


TRAPS = (
    Trap(
        "data",
        "images",
        "another order",
        "the channels are in another order (BGR), or the port shuffles for itself",
    ),
    Trap(
        "data",
        "images",
        "times",
        "images are scaled otherwise: normalisation constants, or 255 left in",
    ),
    Trap(
        "data",
        "images",
        "",
        "other images: another shuffle, another normalisation, an augmentation on one side",
    ),
    Trap(
        "data",
        "labels",
        "",
        "labels count from one, or the batch holds other images: another shuffle",
    ),
    Trap(
        "weights",
        "",
        "another order",
        "a kernel is transposed: OIHW against HWIO, (out, in) against (in, out)",
    ),
    Trap(
        "weights",
        "",
        "",
        "a layer kept its own initial weights, or was converted with the wrong layout",
    ),
    Trap(
        "forward",
        "input of",
        "another order",
        "flatten: PyTorch unrolls (C, H, W), Flax (H, W, C); see `flattened`",
    ),
    Trap(
        "forward",
        "input of",
        "",
        "what lies between two layers: the activation (nnx.gelu is no exact one), pooling, dropout",
    ),
    Trap(
        "forward",
        "^(?!input of).*(bn|norm)",
        "",
        "epsilon, the variance's formula, axes, train mode on one side",
    ),
    Trap(
        "forward",
        "conv",
        "",
        "padding (Flax pads SAME by default), strides, kernel axes, precision (TF32)",
    ),
    Trap(
        "forward",
        "",
        "",
        "padding (Flax's is SAME by default), strides, a missing bias, precision (float32, TF32)",
    ),
    Trap(
        "loss",
        "",
        "",
        "softmax applied twice, label smoothing, a sum for a mean, a mean over padded examples",
    ),
    Trap("backward", "", "times", "a loss summed over the batch, or scaled; gradients clipped"),
    Trap(
        "backward",
        "",
        "",
        "a layer frozen or detached, stale gradients, gradients cast to a lower precision",
    ),
    Trap("update", "^lr$", "", "the schedule: counted from another step, or computed in float32"),
    Trap(
        "update",
        "momentum of",
        "times",
        "dampening on the first step, lr in the momentum buffer, other clipping",
    ),
    Trap(
        "update",
        "momentum of",
        "",
        "momentum, dampening, weight decay (before momentum in PyTorch), precision",
    ),
    Trap(
        "update",
        r"\.var$",
        "",
        "PyTorch keeps the unbiased variance, nnx.BatchNorm the biased: layers.BatchNorm",
    ),
    Trap(
        "update",
        r"\.(mean|var)$",
        "",
        "momentum (PyTorch's 0.1 is Flax's 0.9), or statistics that are not updated",
    ),
    Trap(
        "update",
        "",
        "",
        "the learning rate, nesterov, weight decay after momentum or beside it, maximize",
    ),
    Trap(
        "evaluate",
        "test loss",
        "",
        "batch means averaged over unequal batches, other normalisation, older weights",
    ),
    Trap("evaluate", "", "another numbering", "the classes are numbered otherwise"),
    Trap(
        "evaluate",
        "",
        "",
        "a last batch left out, older weights, other normalisation, train mode left on",
    ),
)


def locate(
    lens: dict[str, Any],
    runs: dict[str, Record],
    config: Config,
    dataset: Dataset,
    build: Callable[[str], Backend],
    twins: int = 2,
    weights: Arrays | None = None,
) -> dict[str, Any] | None:
    """Where the two runs of a lens part, as plain JSON; None if they agree.

    Args:
        lens: from `parity.compare`.
        runs: by backend, the two records; the first is the reference.
        config: resolved for `dataset`.
        build: makes a backend in the lens's dtype; called only for what the records do not show.
        twins: per backend, for a step that is replayed.
        weights: that both started from, canonical, of any floating-point dtype; None: drawn from
            the seed.
    """
    first = lens["first_divergence"]
    if first is None:
        return None
    step, stage, tensor = first["step"], first["stage"], first["tensor"]
    if step < OPENING_STEPS or stage == "evaluate" or tensor == "lr":
        return describe(first, list(runs), arrays(runs, step, stage, tensor), "as recorded")
    names = list(runs)
    found = _replay(names, config, dataset, lens["dtype"], step, build, twins, weights)
    if found is None:
        how = f"none of the {LOOK_BACK} steps before it and it, taken from the same state on the same batch, is outside "
        how += "its bound: the difference is older, built up over many steps, or lies in what the runs were fed"
        return describe(first, names, arrays(runs, step, stage, tensor), how)
    rung, pair = found
    how = f"replayed: both took step {rung.step} from the state that {names[0]} had before it"
    return describe(parity.divergence(rung, names), names, pair, how)


# --- Replaying


def _replay(
    names: list[str],
    config: Config,
    dataset: Dataset,
    dtype: str,
    step: int,
    build: Callable[[str], Backend],
    twins: int,
    weights: Arrays | None,
) -> tuple[parity.Rung, Any] | None:
    """The first rung outside its bound of the first step, up to `step`, that goes wrong from the
    reference's state."""
    backends = [build(name) for name in names]
    reference = backends[0]
    if weights is None:
        weights = initial_weights(reference.shapes(), config.seed, dtype)
    weights = {name: array.astype(numpy_dtype(dtype)) for name, array in weights.items()}
    state = reference.init(Snapshot.start(weights))
    members = [None, *range(1, twins + 1)]
    for current, indices in enumerate(data.batch_indices(config, len(dataset.train_images))):
        if current > step:
            return None
        [images] = augment.batches(
            config, dataset.train_images, indices[np.newaxis], current, compute_dtype(dtype)
        )
        labels = dataset.train_labels[indices]
        if current >= step - LOOK_BACK:
            snapshot = reference.export(state)
            ours, theirs = (
                [
                    one_step(backend, config, dataset, dtype, snapshot, images, labels, twin)
                    for twin in members
                ]
                for backend in backends
            )
            rungs = [
                rung
                for rung in parity.opening_rungs((ours, theirs), amplified=True)
                if not rung.agrees
            ]
            if rungs:
                pair = arrays(
                    dict(zip(names, (ours[0], theirs[0]), strict=True)),
                    0,
                    rungs[0].stage,
                    rungs[0].tensor,
                )
                return replace(rungs[0], step=current), pair
        state, _ = reference.train_step(state, images, labels)
    return None


def one_step(
    backend: Backend,
    config: Config,
    dataset: Dataset,
    dtype: str,
    snapshot: Snapshot,
    images: np.ndarray,
    labels: np.ndarray,
    twin: int | None = None,
) -> Record:
    """A record of one step from `snapshot`; a twin's parameters, momentum and images are moved by
    at most one ulp."""
    if twin is not None:
        generator = np.random.default_rng([config.seed, REPLAY_STREAM, snapshot.step, twin])
        parameters = {name: moved(array, generator) for name, array in snapshot.parameters.items()}
        momentum = {name: moved(array, generator) for name, array in snapshot.momentum.items()}
        snapshot = snapshot._replace(parameters=parameters, momentum=momentum)
        images = moved(images, generator)
    state = backend.init(snapshot)
    weights = backend.export(state).tensors
    opening = {f"0/{name}": array for name, array in backend.probe(state, images, labels).items()}
    state, metrics = backend.train_steps(state, images[np.newaxis], labels[np.newaxis])
    opening |= {
        f"0/{name}": array for name, array in training.updated(backend.export(state)).items()
    }
    return Record(
        backend=backend.name,
        dtype=dtype,
        twin=twin,
        config=config.to_json(),
        data={"classes": list(dataset.classes)},
        environment={},
        source=environment.source(backend.name),
        loss=metrics.loss,
        gradient_norm=metrics.gradient_norm,
        lr=metrics.lr,
        predictions=np.zeros(0, np.int64),
        test_loss=0.0,
        seconds=0.0,
        steps_per_second=0.0,
        weights=weights,
        opening=opening,
        layers=training.layers_of(opening),
    )


# --- Describing


def arrays(runs: dict[str, Record], step: int, stage: str, tensor: str) -> list[np.ndarray | None]:
    """The tensor that a rung names, as either record holds it; None where it does not."""
    found = []
    for record in runs.values():
        if stage == "weights":
            found.append(record.weights.get(tensor))
        elif stage == "evaluate":
            found.append(record.predictions if tensor != "test loss" else None)
        elif (
            tensor in ("lr", "loss", "gradient_norm")
            and f"{step}/{stage}/{tensor}" not in record.opening
        ):
            found.append(getattr(record, tensor)[step : step + 1])
        else:
            found.append(record.opening.get(f"{step}/{stage}/{tensor}"))
    return found


def describe(
    first: dict[str, Any], names: list[str], pair: list[np.ndarray | None], how: str
) -> dict[str, Any]:
    """A first divergence, from `parity.divergence`, with what can be seen in the two tensors, and
    likely causes."""
    one, other = pair
    pattern, offenders = None, []
    if one is not None and other is not None and one.shape == other.shape:
        pattern = pattern_of(one, other, names, classes=first["stage"] == "evaluate")
        differences = gaps(np.ravel(one).astype(np.float64), np.ravel(other).astype(np.float64))
        if first["tensor"].startswith("accuracy of "):
            differences[:] = 0.0  # of all classes' predictions, none is a large one
        worst = [
            int(index)
            for index in np.argsort(-differences, kind="stable")[:OFFENDERS]
            if differences[index] > 0
        ]
        offenders = [
            {"index": [int(part) for part in np.unravel_index(index, one.shape)]}
            | {
                name: _number(array.flat[index])
                for name, array in zip(names, (one, other), strict=True)
            }
            for index in worst
        ]
    elif one is not None and other is not None:
        pattern = f"{names[0]}'s shape is {one.shape}, {names[1]}'s {other.shape}"
    traps = [
        trap
        for trap in TRAPS
        if trap.stage == first["stage"]
        and re.search(trap.tensor, first["tensor"])
        and (not trap.pattern or (pattern and re.search(trap.pattern, pattern)))
    ]
    return {
        **first,
        "how": how,
        "pattern": pattern,
        "offenders": offenders,
        "causes": [t.cause for t in traps[:2]],
    }


def pattern_of(
    one: np.ndarray, other: np.ndarray, names: list[str], classes: bool = False
) -> str | None:
    """How one tensor is made of the other, where that can be seen: numbering, order, or a common
    factor."""
    if classes:
        pairs = set(zip(one.tolist(), other.tolist(), strict=True))
        sizes = {len(pairs), len({a for a, _ in pairs}), len({b for _, b in pairs})}
        renumbered = len(sizes) == 1 < len(pairs) and any(a != b for a, b in pairs)
        return "the same predictions under another numbering of the classes" if renumbered else None
    a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    if len(a) < 2 or not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        return None
    zeros = [not np.any(a), not np.any(b)]
    if any(zeros):
        return None if all(zeros) else f"{names[zeros.index(True)]} has nothing but zeros"
    with np.errstate(all="ignore"):  # where squares overflow or vanish, nothing is to be seen
        size = np.linalg.norm(a)
        if np.linalg.norm(np.sort(a) - np.sort(b)) <= ALIKE * size < np.linalg.norm(a - b):
            return "the same numbers in another order"
        factor = (a @ b) / np.square(size)
        if abs(factor - 1) > ALIKE and np.linalg.norm(b - factor * a) <= ALIKE * abs(factor) * size:
            return f"{names[1]} is {factor:.6g} times {names[0]}"
    return None


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(np.float64(value)) else None
