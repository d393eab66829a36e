"""Whose arithmetic is off where a lower precision disagrees and float64 does not: one step of both
in float64, from the same weights and batch, is what both should have computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np

from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.dtypes import compute_dtype
from lockstep.common.protocol import Backend, Snapshot
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record
from lockstep.common.verdict import locate
from lockstep.common.verdict.check import Check
from lockstep.common.verdict.comparison import Arithmetic, TensorError
from lockstep.common.verdict.distances import magnitude, max_tensor_difference
from lockstep.common.verdict.first_steps import check_first_steps
from lockstep.common.verdict.judge import INITIAL_TWINS
from lockstep.common.verdict.statistics import NEAR_ZERO_ULP

CANCELS = ("backward", "update")  # where rounding may exceed the bound, and twins are asked
# A side is off in a tensor whose error is so many times the other's, and so many units in the last
# place. Dense layers over 1,024 tokens in bfloat16: PyTorch's LayerNorm 0.76 and 0.19 of the largest
# entry, JAX 0.004; JAX's biases 0.07, PyTorch 0.005; all others within a factor of 2.
TIMES, ULP = 4.0, 4.0
MAX_TENSORS = 4  # in a sentence


def compare_one_step(
    sides: Sequence[Backend],
    config: Config,
    dataset: Dataset,
    start: Snapshot,
    images: np.ndarray,
    labels: np.ndarray,
) -> tuple[list[Record], list[Check]]:
    """One step of both in float64 from one state, and what it is compared by; where a gradient may
    cancel, next to twins."""

    def one_step(side: Backend, twin: int | None) -> Record:
        return locate.one_step(side, config, dataset, "float64", start, images, labels, twin)

    records = [one_step(side, None) for side in sides]
    a, b = map(Ensemble, records)
    checks = check_first_steps(a, b)
    if any(check.step == 0 and check.stage in CANCELS and not check.agrees for check in checks):
        twins = [[one_step(side, twin) for twin in range(1, INITIAL_TWINS + 1)] for side in sides]
        checks = check_first_steps(a.with_short_twins(twins[0]), b.with_short_twins(twins[1]))
    return records, checks


def explain(
    runs: Mapping[str, Record],
    config: Config,
    dataset: Dataset,
    build: Callable[[str], Backend],
) -> Arithmetic | None:
    """What float64 says of two runs in a lower precision, from the first step of both; None if one
    step in float64 disagrees as well.

    Args:
        runs: by backend, in the lower precision.
        build: the backend of a name, in float64.
    """
    first = next(iter(runs.values()))
    start = Snapshot.start({name: a.astype(np.float64) for name, a in first.weights.items()})
    images, labels = (first.first_steps[f"0/data/{name}"] for name in ("images", "labels"))
    if images.dtype.kind not in "iu":
        images = images.astype(np.float64)
    records, checks = compare_one_step(
        [build(name) for name in runs], config, dataset, start, images, labels
    )
    if not all(check.agrees for check in checks):
        return None
    errors = {
        name: gradient_errors(run, exact)
        for (name, run), exact in zip(runs.items(), records, strict=True)
    }
    one, other = runs
    least = ULP * float(ml_dtypes.finfo(compute_dtype(first.dtype)).eps)
    return Arithmetic(
        {
            side: larger_errors(errors[side], errors[against], least)
            for side, against in ((one, other), (other, one))
        }
    )


def gradient_errors(run: Record, exact: Record) -> dict[str, float]:
    """Of each gradient of the first step, the largest error, as a share of its largest entry; but
    for what rounding leaves of a sum that is zero, which has no size."""
    prefix, found = "0/backward/", {}
    gradients = {key: a for key, a in exact.first_steps.items() if key.startswith(prefix)}
    near_zero = NEAR_ZERO_ULP * float(np.finfo(np.float64).eps)
    least = near_zero * max(map(magnitude, gradients.values()), default=0.0)
    for key, right in gradients.items():
        if key in run.first_steps and magnitude(right) > least:
            error, _ = max_tensor_difference(run.first_steps[key].astype(np.float64), right)
            found[key.removeprefix(prefix)] = error / magnitude(right)
    return found


def larger_errors(
    ours: Mapping[str, float], theirs: Mapping[str, float], least: float
) -> tuple[TensorError, ...]:
    """The tensors in which this side is off, the largest error first."""
    off = [
        TensorError(name, share, theirs[name])
        for name, share in ours.items()
        if name in theirs and share > max(least, TIMES * theirs[name])
    ]
    return tuple(sorted(off, key=lambda error: -error.share))


def in_words(found: Arithmetic, dtype: str, names: Mapping[str, str]) -> str:
    """A sentence: which side is off, in which tensor, and by how much.

    Args:
        names: of the frameworks, by backend.
    """
    text = (
        f"the arithmetic of {dtype}, and not the program: in float64, one step of both from the same "
        "weights and batch agrees"
    )
    sides = []
    for side in BACKENDS:
        other = names[next(name for name in BACKENDS if name != side)]
        if errors := found.off.get(side, ()):
            tensors = ", ".join(
                f"{error.tensor} by {_percent(error.share, 2)} of its largest ({other} "
                f"{_percent(error.other, 1)})"
                for error in errors[:MAX_TENSORS]
            )
            sides.append(f"against it, gradients of {names[side]} are off: {tensors}")
    if not sides:
        return f"{text}; neither side's first gradients are much further from it than the other's"
    return "; ".join([text, *sides])


def _percent(share: float, digits: int) -> str:
    """As `76 %`, `110 %` or `0.4 %`."""
    return f"{float(f'{100 * share:.{digits}g}'):g} %"
