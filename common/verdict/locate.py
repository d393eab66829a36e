"""Where two runs diverge: the first step, stage and tensor, the entries that differ most, and what
usually causes it.

A divergence in the first steps, or in evaluation alone, is read from the records. For a later one
the run is replayed: the reference is trained up to shortly before that step, and from there on,
before each step, both backends are brought to its state (weights, optimizer, model state, schedule)
and take that step on the same batch, tensor by tensor. A difference that is older than the step is
not carried along, so what shows is what that step does wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.data import Dataset, augment
from lockstep.common.dtypes import compute_dtype, numpy_dtype
from lockstep.common.model.initial_weights import initial_weights
from lockstep.common.model.layers import ModuleNames, kind_of, native_names, own_names
from lockstep.common.model.perturb import perturb_one_ulp, ulp_of_weights
from lockstep.common.model.sources import excerpts
from lockstep.common.protocol import STAGES, Arrays, Backend, Snapshot, split_slot
from lockstep.common.runs import training
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import FIRST_STEPS, Record
from lockstep.common.system import environment
from lockstep.common.verdict.causes import find_causes, fixes, float32_cause
from lockstep.common.verdict.check import BATCH, OUTPUTS, Check
from lockstep.common.verdict.comparison import (
    Divergence,
    Entry,
    Location,
    divergence,
)
from lockstep.common.verdict.distances import abs_differences, magnitude, max_tensor_difference
from lockstep.common.verdict.failures import Failures, failures
from lockstep.common.verdict.first_steps import check_first_steps
from lockstep.common.verdict.rank_checks import METHOD, check_ranks, ranks_location
from lockstep.common.verdict.relations import (
    describe_relation,
    largest_differences,
    slot_relation,
    update_relation,
)

# keeps these random numbers apart from those of lockstep.common.model.initial_weights
REPLAY_STREAM = 4
REPLAY_STEPS = 30  # before the step at which the runs were seen to diverge
# Times the gap one step earlier, and the bound. In 40 clean float64 pairs rounding grew by at most
# 26 times in one step.
JUMP = 1000.0

Tensors = tuple[np.ndarray | None, np.ndarray | None]  # of both runs; None where one has none


def locate(
    first: Divergence | None,
    runs: Mapping[str, Record],
    config: Config,
    dataset: Dataset,
    build: Callable[[str], Backend] | None,
    twins: int = 2,
    weights: Arrays | None = None,
    checks: Sequence[Check] = (),
    names_of: Callable[[str], ModuleNames] | None = None,
) -> Location | None:
    """Where two runs diverge; None if they agree.

    Args:
        first: the first check that they fail, as `compare` found it.
        runs: by backend, the two records of one precision; the first is the reference.
        config: resolved for `dataset`.
        build: makes a backend in that precision; called only for what the records do not show. None:
            no step is taken again.
        twins: per backend, for a step that is replayed.
        weights: that both started from, canonical, of any floating-point dtype; None: drawn from
            the seed.
        checks: all that `compare` found, to say which tensors fail together.
        names_of: what a backend calls its tensors, and what its layers are; None: that is not
            known.
    """
    if first is None:
        return None
    names, reference = list(runs), next(iter(runs.values()))
    dtype = reference.dtype
    if first.tensor == BATCH:
        one, other = runs.values()
        pattern = describe_batches(one, other, first.step)
        causes = find_causes(first.stage, first.tensor, pattern)
        method = "every step's batch was recorded"
        return Location(first, method, pattern, (), causes, fixes=fixes(causes))
    modules = None if names_of is None else {name: names_of(name) for name in names}
    recorded = tensors_at(runs, first.step, first.stage, first.tensor)
    if first.step < FIRST_STEPS or first.stage == "evaluate" or first.tensor == "lr":
        together = failures(checks, first.step, first.stage, reference.layers)
        seen = describe_update(first, recorded, reference)
        return describe(first, recorded, "as recorded", together, modules, seen)
    if build is None:
        return describe(first, recorded, "as recorded; no step was taken again")
    steps = range(max(0, first.step - REPLAY_STEPS), first.step + 1)
    found = replay(names, config, dataset, dtype, steps, build, twins, weights)
    if found is None and first.stage == "loss" and first.step > 0 and _jumps(first, runs):
        before = first.step - 1
        left = replace(
            first, step=before, stage="update", tensor="all parameters", values=None, sides=None
        )
        method = (
            f"by elimination: the two trained on the same batches, and the {REPLAY_STEPS} steps "
            "before agree when both take them from the same state. So step "
            f"{before} left another state behind, and does not do so each time"
        )
        return describe(left, (None, None), method)
    if found is None:
        method = (
            f"replayed: none of the {REPLAY_STEPS} steps before it, nor that step, fails when both "
            "take it from the same state on the same batch. The difference is older, built up over "
            "many steps, or lies in the inputs"
        )
        return describe(first, recorded, method)
    check, tensors, together = found
    method = f"replayed: both took step {check.step} from the state that {names[0]} had before it"
    place = divergence(check, names)
    if of_ranks := ranks_location(place, [check] if check.sides else [], f"{method}; {METHOD}"):
        return of_ranks
    return describe(place, tensors, method, together, modules)


def _jumps(first: Divergence, runs: Mapping[str, Record]) -> bool:
    """Whether the loss differs suddenly: rounding grows, it does not jump."""
    if first.sides is not None:
        return True
    a, b = (record.loss for record in runs.values())
    gaps = abs_differences(a, b)
    return bool(gaps[first.step] > JUMP * max(gaps[first.step - 1], first.bound))


# --- Replaying


def replay(
    names: Sequence[str],
    config: Config,
    dataset: Dataset,
    dtype: str,
    steps: Collection[int],
    build: Callable[[str], Backend],
    twins: int = 2,
    weights: Arrays | None = None,
) -> tuple[Check, Tensors, Failures | None] | None:
    """The first check outside its bound of the first of these steps that goes wrong from the
    reference's state, and which tensors fail there; None if every one is right.

    Args: as of `locate`; the first of `names` is the reference.
    """
    if not steps:
        return None
    backends = [build(name) for name in names]
    reference = backends[0]
    if weights is None:
        weights = initial_weights(reference.shapes(), config.seed, dtype)
    weights = {name: array.astype(numpy_dtype(dtype)) for name, array in weights.items()}
    state = reference.init(Snapshot.start(weights))
    for current, indices in enumerate(data.batch_indices(config, len(dataset.train_images))):
        if current > max(steps):
            break
        [images] = augment.batches(
            config, dataset.train_images, indices[np.newaxis], current, compute_dtype(dtype)
        )
        labels = dataset.train_labels[indices]
        if current in steps:
            take = functools.partial(
                _take, config, dataset, dtype, (reference.export(state), images, labels)
            )
            if found := _step_failure(backends, dtype, take, twins):
                return replace(found[0], step=current), *found[1:]
        state, _ = reference.train_step(state, images, labels)
    return None


def _take(
    config: Config,
    dataset: Dataset,
    dtype: str,
    at: tuple[Snapshot, np.ndarray, np.ndarray],
    backend: Backend,
    twin: int | None,
) -> Record:
    """`one_step`, with what differs between the calls of one step last."""
    return one_step(backend, config, dataset, dtype, *at, twin)


def _step_failure(
    backends: Sequence[Backend],
    dtype: str,
    take: Callable[[Backend, int | None], Record],
    twins: int,
) -> tuple[Check, Tensors, Failures | None] | None:
    """The first check that one step from one state fails; in float64 twins are asked only then."""
    a, b = (Ensemble(take(backend, None)) for backend in backends)
    of_ranks = check_ranks([a.run, b.run])
    if dtype == "float64" and all(check.agrees for check in of_ranks + check_first_steps(a, b)):
        return None
    numbers = range(1, twins + 1)
    a, b = (
        side.add_twins(take(backend, twin) for twin in numbers)
        for side, backend in zip((a, b), backends, strict=True)
    )
    checks = check_first_steps(a, b, replayed=True)
    failing = [check for check in of_ranks + checks if not check.agrees]
    if not failing:
        return None
    worst = min(failing, key=lambda check: STAGES.index(check.stage))  # of those, the first
    runs = {backend.name: side.run for backend, side in zip(backends, (a, b), strict=True)}
    tensors = tensors_at(runs, 0, worst.stage, worst.tensor)
    return worst, tensors, failures(checks, 0, worst.stage, a.run.layers)


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
    """A record of one step from `snapshot`; a twin's parameters, optimizer and images are moved
    by at most one ulp."""
    if twin is not None:
        generator = np.random.default_rng([config.seed, REPLAY_STREAM, snapshot.step, twin])
        ulp = ulp_of_weights(dtype, images)
        parameters = {
            name: perturb_one_ulp(array, generator, ulp)
            for name, array in snapshot.parameters.items()
        }
        slots = {
            slot: {name: perturb_one_ulp(array, generator) for name, array in arrays.items()}
            for slot, arrays in snapshot.slots.items()
        }
        snapshot = snapshot._replace(parameters=parameters, slots=slots)
        images = perturb_one_ulp(images, generator)
    state = backend.init(snapshot)
    weights = backend.export(state).tensors
    opening = {f"0/{name}": array for name, array in backend.probe(state, images, labels).items()}
    state, metrics = backend.train_steps(state, images[np.newaxis], labels[np.newaxis])
    after = backend.export(state)
    opening |= {f"0/{name}": array for name, array in training.update_tensors(after).items()}
    return Record(
        backend=backend.name,
        dtype=dtype,
        twin=twin,
        config=config.to_json(),
        data={"classes": list(dataset.classes)},
        environment={},
        source=environment.source_digest(backend.name),
        loss=metrics.loss,
        gradient_norm=metrics.gradient_norm,
        lr=metrics.lr,
        batch_digests=data.batch_digests(images[np.newaxis], labels[np.newaxis]),
        predictions=np.zeros(0, np.int64),
        test_loss=0.0,
        seconds=0.0,
        steps_per_second=0.0,
        weights=weights,
        first_steps=opening,
        layers=training.layers_of(opening),
        rank_differences=list(after.differences),
    )


# --- Describing


def tensors_at(runs: Mapping[str, Record], step: int, stage: str, tensor: str) -> Tensors:
    """The tensor that a check names, from both records; None where a record has none."""
    found: list[np.ndarray | None] = []
    for record in runs.values():
        if stage == "weights":
            found.append(record.weights.get(tensor))
        elif stage == "evaluate":
            found.append(record.predictions if tensor != "test loss" else None)
        elif (
            tensor in ("lr", "loss", "gradient_norm")
            and f"{step}/{stage}/{tensor}" not in record.first_steps
        ):
            found.append(getattr(record, tensor)[step : step + 1])
        else:
            found.append(record.first_steps.get(f"{step}/{stage}/{tensor}"))
    first, second = found
    return first, second


def describe_batches(a: Record, b: Record, step: int) -> str | None:
    """Names the other side's step whose batch one side trained on, or the masks of dropout where a
    first step's images and labels are equal; None if neither can be seen."""
    for one, other in ((b, a), (a, b)):
        [steps] = np.nonzero(other.batch_digests == one.batch_digests[step])
        if len(steps):
            closest = int(steps[np.argmin(abs(steps - step))])
            return f"{one.backend}'s batch is that of step {closest} in {other.backend}"
    inputs = [
        [record.first_steps.get(f"{step}/data/{name}") for name in ("images", "labels")]
        for record in (a, b)
    ]
    if all(max_tensor_difference(x, y)[0] == 0 for x, y in zip(*inputs, strict=True)):
        return "images and labels are equal: the masks of dropout differ"
    return None


def describe(
    first: Divergence,
    tensors: Tensors,
    method: str,
    together: Failures | None = None,
    modules: Mapping[str, ModuleNames] | None = None,
    seen: str | None = None,
) -> Location:
    """A divergence with what can be seen in its two tensors, and likely causes.

    Args:
        tensors: of `tensors_at`.
        method: how the place was found.
        together: the tensors that fail there.
        modules: by backend.
        seen: how one tensor is made of the other, if that is known.
    """
    a, b = tensors
    pattern: str | None = None
    worst_entries: tuple[Entry, ...] = ()
    if a is not None and b is not None and a.shape == b.shape:
        classes = first.stage == "evaluate" and first.tensor != OUTPUTS
        pattern = seen or describe_relation(a, b, first.names, classes)
        if not first.tensor.startswith("accuracy of "):  # of all classes, none differs by much
            worst_entries = largest_differences(a, b)
        if a.dtype != b.dtype:
            pattern = f"{first.names[0]}'s dtype is {a.dtype}, {first.names[1]}'s {b.dtype}"
    elif a is not None and b is not None:
        pattern = f"{first.names[0]}'s shape is {a.shape}, {first.names[1]}'s {b.shape}"
    patterns = "; ".join(filter(None, [pattern, together and together.common]))
    kind = None if modules is None else kind_of(first.tensor, modules.values())
    causes = find_causes(first.stage, first.tensor, patterns, kind)
    if first.tensor != "lr" and (cause := float32_cause(_relative_gap(tensors))):
        causes = (cause, *causes[:1])
    own, sources = {}, {}
    if modules is not None:
        own = own_names(first.tensor, modules)
        classes = {name: module.classes for name, module in modules.items()}
        sources = excerpts(classes, native_names(first.tensor, modules))
    return Location(
        first, method, pattern, worst_entries, causes, together, own, fixes(causes), sources
    )


def describe_update(first: Divergence, after: Tensors, reference: Record) -> str | None:
    """How the second run's update of a parameter, or of what the optimizer keeps of it, is made of the
    first one's, in a step that was recorded; None where that cannot be seen.

    Args:
        after: the step, of both runs.
        reference: the first run. Both are equal up to this update.
    """
    slot, parameter = split_slot(first.tensor)
    a, b = after
    gradient = reference.first_steps.get(f"{first.step}/backward/{parameter}")
    if first.stage != "update" or gradient is None or a is None or b is None or a.shape != b.shape:
        return None

    def before(tensor: str) -> np.ndarray | None:
        found = reference.first_steps.get(f"{first.step - 1}/update/{tensor}")
        return reference.weights.get(tensor) if first.step == 0 else found

    weights, kept = before(parameter), before(first.tensor)
    if weights is None or weights.shape != a.shape:
        return None
    if not slot:
        return update_relation(weights, (a, b), gradient, first.names)
    return slot_relation(np.zeros_like(a) if kept is None else kept, (a, b), weights, first.names)


def _relative_gap(tensors: Tensors) -> float:
    """The largest gap as a share of the largest entry, where a side is float64; 0 in other
    precisions, and where tensors cannot be compared."""
    a, b = tensors
    if a is None or b is None or a.shape != b.shape or a.size == 0:
        return 0.0
    scale = max(magnitude(a), magnitude(b))
    if scale == 0 or np.float64 not in (a.dtype, b.dtype):
        return 0.0
    return max_tensor_difference(a.astype(np.float64), b.astype(np.float64))[0] / scale
