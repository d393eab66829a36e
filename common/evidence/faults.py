"""The detection matrix: for each known fault, whether the verdict finds it and where it places it.

The caller passes the function that puts a fault into the Flax backend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Generic, NotRequired, Protocol, TypedDict, TypeVar

from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset, of_pair
from lockstep.common.evidence import Build, baselines, train_first_steps, train_runs
from lockstep.common.model.layers import module_names
from lockstep.common.protocol import Backend
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record
from lockstep.common.verdict import locate
from lockstep.common.verdict.check import finite
from lockstep.common.verdict.comparison import Comparison, Location
from lockstep.common.verdict.confirm import confirm
from lockstep.common.verdict.judge import judge

# The run that a fault's options change.
BASE = Config(steps=60, batch_size=32, lr=0.01, momentum=0.9)
PRECISIONS = ("float64", "float32")
# Few, since evaluation dominates a short run, but enough to show the faults of evaluation.
TEST_IMAGES = 1000
FAULTY_BACKEND = "flax"  # whose runs have the fault
CORRECT_BACKEND = next(name for name in BACKENDS if name != FAULTY_BACKEND)


class Fault(Protocol):
    """The attributes of a fault that the matrix reads; see `lockstep.backends.faults.Fault`."""

    @property
    def name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def stage(self) -> str: ...
    @property
    def tensor(self) -> str | None: ...
    @property
    def source(self) -> str: ...
    @property
    def options(self) -> Mapping[str, object]: ...
    @property
    def train_images(self) -> int | None: ...
    @property
    def changes_function(self) -> bool: ...
    @property
    def precision(self) -> str | None: ...
    @property
    def held_out(self) -> bool: ...


F = TypeVar("F", bound=Fault)
Inject = Callable[[F, Config, Dataset], AbstractContextManager[None]]


class Finding(TypedDict):
    """The result for one fault in one precision. Numbers that are not finite are None."""

    caught: bool
    step: int | None
    stage: str | None
    tensor: str | None
    gap: float | None
    bound: float | None
    gap_over_bound: float | None
    stage_right: bool
    tensor_right: bool | None  # None where no tensor is to blame
    trajectory_agrees: bool
    message: str | None
    pattern: str | None
    causes: Sequence[str] | None
    common: str | None  # what the tensors that fail there have in common
    twins: int
    peers: Mapping[str, bool | None]  # what other rules say; see `baselines`


class Row(TypedDict):
    """The results for one fault."""

    name: str
    sentence: str
    source: str
    stage: str
    tensor: str | None
    changes_function: bool
    held_out: NotRequired[bool]  # no rule of the verdict was set with it
    lens: str | None  # the only precision that has this fault
    config: Mapping[str, object]  # as in report.json
    train_images: int
    lenses: dict[str, Finding]  # by precision


@dataclass
class Cache:
    """Shared by several faults: shortened data, and the runs of the correct backend."""

    datasets: dict[int, Dataset] = field(default_factory=dict)  # by number of training images
    # by configuration, digest of the data, and dtype
    correct: dict[tuple[Config, str, str], tuple[Backend, dict[int | None, Record]]] = field(
        default_factory=dict
    )
    # float64 backends, for rules that need a reference
    exact: dict[tuple[Config, str], Backend] = field(default_factory=dict)


def config_of(fault: Fault, images: int) -> Config:
    """The run in which `fault` shows, on so many training images."""
    return dataclasses.replace(BASE, **fault.options).resolve(images)


def measure(
    fault: F,
    dataset: Dataset,
    build: Build,
    inject: Inject[F],
    cache: Cache,
    precisions: Sequence[str] = PRECISIONS,
    twins: int = 2,
) -> Row:
    """One row: a fault, and the result in each precision of a run that has it.

    Args:
        inject: within `inject(fault, config, dataset)` the Flax backend has the fault.
        twins: per backend, in float32; the verdict may ask for more, and for some in float64.
    """
    if fault.train_images is not None:
        if fault.train_images not in cache.datasets:
            cache.datasets[fault.train_images] = _first_images(dataset, fault.train_images)
        dataset = cache.datasets[fault.train_images]
    dataset = of_pair.own(str(fault.options.get("model", BASE.model))) or dataset
    config = config_of(fault, len(dataset.train_images))
    return {
        "name": fault.name,
        "sentence": fault.description,
        "source": fault.source,
        "stage": fault.stage,
        "tensor": fault.tensor,
        "changes_function": fault.changes_function,
        "held_out": fault.held_out,
        "lens": fault.precision,
        "config": config.to_json(),
        "train_images": len(dataset.train_images),
        "lenses": {
            dtype: measure_precision(
                _Pair(fault, config, dataset, dtype, build, inject, cache),
                twins if dtype != "float64" else 0,
            )
            for dtype in precisions
        },
    }


class _Pair(Generic[F]):
    """The two backends of one configuration and precision, Flax with the fault."""

    def __init__(
        self,
        fault: F,
        config: Config,
        dataset: Dataset,
        dtype: str,
        build: Build,
        inject: Inject[F],
        cache: Cache,
    ) -> None:
        self.fault, self.config, self.dataset, self.dtype = fault, config, dataset, dtype
        self._inject = inject
        key = (config, dataset.digest, dtype)
        if key not in cache.correct:
            cache.correct[key] = build(CORRECT_BACKEND, config, dtype), {}
        self._correct, self._records = cache.correct[key]
        if (exact := key[:2]) not in cache.exact:
            cache.exact[exact] = (
                self._correct if dtype == "float64" else build(CORRECT_BACKEND, config, "float64")
            )
        self.exact = cache.exact[exact]
        with self.injected():
            self._faulty = build(FAULTY_BACKEND, config, dtype)

    def injected(self) -> AbstractContextManager[None]:
        return self._inject(self.fault, self.config, self.dataset)

    def backend(self, name: str) -> Backend:
        return self._correct if name == CORRECT_BACKEND else self._faulty

    def train(self, name: str, numbers: Iterable[int | None]) -> list[Record]:
        """These runs of an ensemble; see `train_runs`."""
        if name == FAULTY_BACKEND:
            with self.injected():
                return self._train(name, numbers)
        numbers = list(numbers)
        missing = [number for number in numbers if number not in self._records]
        self._records.update(zip(missing, self._train(name, missing), strict=True))
        return [self._records[number] for number in numbers]

    def _train(self, name: str, numbers: Iterable[int | None]) -> list[Record]:
        return train_runs(self.backend(name), self.config, self.dataset, self.dtype, numbers)

    def train_first_steps(self, name: str, numbers: range) -> list[Record]:
        arguments = self.backend(name), self.config, self.dataset, self.dtype, numbers
        if name == CORRECT_BACKEND:
            return train_first_steps(*arguments)
        with self.injected():
            return train_first_steps(*arguments)


def measure_precision(pair: _Pair[F], twins: int) -> Finding:
    """The result in one precision, found as for a user's runs: judge, train more twins if needed,
    locate."""
    numbers = [None, *range(1, 1 + twins)]
    ensembles = {
        name: Ensemble.of(pair.train(name, numbers)) for name in (CORRECT_BACKEND, FAULTY_BACKEND)
    }
    comparison = judge(ensembles, pair.train, pair.dataset.test_labels, pair.train_first_steps)
    runs = {name: ensemble.run for name, ensemble in ensembles.items()}
    with pair.injected():  # a late divergence is located by training again
        comparison = confirm(comparison, runs, pair.config, pair.dataset, pair.backend)
        located = comparison.location or locate.locate(
            comparison.first_divergence,
            runs,
            pair.config,
            pair.dataset,
            pair.backend,
            twins or 2,
            checks=comparison.checks,
            names_of=lambda name: module_names(pair.backend(name)),
        )
    correct = runs[CORRECT_BACKEND]
    verdicts = baselines.verdicts(
        correct, runs[FAULTY_BACKEND], baselines.reference(correct, pair.exact)
    )
    return finding(pair.fault, comparison, located, len(ensembles[FAULTY_BACKEND].twins), verdicts)


def finding(
    fault: Fault | None,
    comparison: Comparison,
    located: Location | None,
    twins: int,
    peers: Mapping[str, bool | None],
) -> Finding:
    """What was found, next to what is wrong; `fault` is None for a correct run."""
    first = None if located is None else located.divergence
    gap = None if first is None else finite(first.gap)
    bound = None if first is None else finite(first.bound)
    stage_right = first is not None and fault is not None and first.stage == fault.stage
    tensor = None if fault is None else fault.tensor
    tensor_right = first is not None and stage_right and fnmatchcase(first.tensor, tensor or "")
    return {
        "caught": comparison.verdict == "disagree",
        "step": first and first.step,
        "stage": first and first.stage,
        "tensor": first and first.tensor,
        "gap": gap,
        "bound": bound,
        "gap_over_bound": gap / bound if gap and bound else None,
        "stage_right": stage_right,
        "tensor_right": tensor_right if tensor else None,
        "trajectory_agrees": all(check.agrees for check in comparison.windows),
        "message": first and first.message,
        "pattern": located and located.pattern,
        "causes": located and list(located.causes),
        "common": located and located.failures and located.failures.common,
        "twins": twins,
        "peers": peers,
    }


def _first_images(dataset: Dataset, count: int) -> Dataset:
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[:count],
        train_labels=dataset.train_labels[:count],
    )
