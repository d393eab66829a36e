"""Rules that other projects use to compare two runs or two implementations, each as in its source.

All compare in float64, except where PyTorch compares in the tensors' own dtype. Most rules are not
symmetric: PyTorch's run is the expected one, Flax's the actual one. Each source has the version
that was read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lockstep.common.evidence.torch_closeness import isclose, same
from lockstep.common.protocol import Arrays, Backend, Snapshot
from lockstep.common.runs.record import Record

Close = Callable[
    [np.ndarray, np.ndarray], bool | np.ndarray
]  # of the actual and the expected array
Differs = Callable[[Record, Record, Record | None], bool | None]

# torch.testing.assert_close: (rtol, atol) by dtype
TORCH_TOLERANCES = {"float64": (1e-7, 1e-7), "float32": (1.3e-6, 1e-5), "bfloat16": (1.6e-2, 1e-5)}
TORCH_TOLERANCES["mixed_bfloat16"] = TORCH_TOLERANCES["bfloat16"]
NUMPY_TOLERANCES = (1e-5, 1e-8)
TRANSFORMERS_BOUND = 1e-5
REPROD_BOUND, REPROD_STEPS = 1e-6, 10
# its atol, and the rtol that numpy.testing.assert_allclose has by default
KERAS_TOLERANCES = 1e-7, 1e-3
# rtol, rtol, steps; atol is numpy.allclose's
ALGOPERF_LAST, ALGOPERF_EACH, ALGOPERF_STEPS = 1.0, 5e-3, 10
MSPROBE_BOUND = 0.01


@dataclass(frozen=True)
class Rule:
    """One rule.

    `differs(torch, flax, reference)` takes the two runs in one precision and, or None, a float64
    record with the first steps of PyTorch's run (see `reference`). It is True for "they differ",
    False for no alarm, and None where the rule does not apply.
    """

    name: str
    what: str
    source: str
    differs: Differs


def reference(run: Record, backend: Backend) -> Record:
    """`run` with step 0 computed again in float64, from the weights and the batch of `run`.

    This is how TorchDynamo makes its float64 reference: it casts the rounded weights and inputs to
    float64. A separate float64 run starts from weights that were not rounded, which makes the
    reference's error larger and the rule laxer.

    Args:
        run: in any dtype, with the weights and the first steps.
        backend: built for float64 and for `run`'s configuration.
    """

    def wide(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array, np.float64)

    snapshot = Snapshot.start({name: wide(array) for name, array in run.weights.items()})
    images, labels = (run.first_steps[f"0/data/{name}"] for name in ("images", "labels"))
    images = wide(images) if images.dtype.kind == "f" else images  # words stay integers
    labels = np.ascontiguousarray(labels, None if labels.dtype.kind == "f" else np.int64)
    state = backend.init(snapshot)
    probed = backend.probe(state, images, labels)
    state, _ = backend.train_step(state, images, labels)
    probed |= {f"update/{name}": array for name, array in backend.export(state).parameters.items()}
    first_steps: Arrays = {}
    for name, array in probed.items():
        like = run.first_steps.get(f"0/{name}")
        if like is not None:  # activations are recorded for a batch's first images only
            first_steps[f"0/{name}"] = array[: len(like)] if array.ndim else array
    return dataclasses.replace(run, dtype="float64", first_steps=first_steps)


# --- What each rule looks at


def _differ(
    torch: Mapping[str, np.ndarray], flax: Mapping[str, np.ndarray], close: Close
) -> bool | None:
    """Whether names or shapes differ, or any pair is not `close(actual, expected)`; None if there
    is no tensor."""
    if not torch and not flax:
        return None
    if torch.keys() != flax.keys() or any(torch[name].shape != flax[name].shape for name in torch):
        return True
    with np.errstate(all="ignore"):
        return not all(bool(np.all(close(flax[name], torch[name]))) for name in torch)


def _allclose(rtol: float, atol: float, equal_nan: bool = False) -> Close:
    def close(actual: np.ndarray, expected: np.ndarray) -> bool:
        wide = actual.astype(np.float64), expected.astype(np.float64)
        return np.allclose(*wide, rtol=rtol, atol=atol, equal_nan=equal_nan)

    return close


def _torch_close(dtype: str) -> Close:
    rtol, atol = TORCH_TOLERANCES[dtype]

    def close(actual: np.ndarray, expected: np.ndarray) -> bool:
        return actual.dtype == expected.dtype and bool(
            np.all(isclose(actual, expected, rtol, atol))
        )

    return close


def _losses(record: Record, steps: int | None = None) -> Arrays:
    return {"loss": record.loss[:steps]}


def _step(record: Record, *beginnings: str) -> Arrays:
    """The tensors "<stage>/<tensor>" of the first step whose names begin so, without inputs of
    layers and momentum."""
    wanted = tuple(f"0/{beginning}" for beginning in beginnings)
    chosen = {key: array for key, array in record.first_steps.items() if key.startswith(wanted)}
    return {key: array for key, array in chosen.items() if " of " not in key}


def _epoch_losses(record: Record) -> np.ndarray:
    """The mean loss of each epoch, weighted by the images of each batch, float64 (epochs,). An
    epoch that was not finished counts too."""
    whole, rest = divmod(record.data["sizes"]["train"], record.config["batch_size"])
    sizes = [record.config["batch_size"]] * whole + [rest] * (
        rest > 0 and not record.config["drop_last"]
    )
    weights, epochs = (
        np.resize(sizes, record.steps).astype(np.float64),
        np.arange(record.steps) // len(sizes),
    )
    with np.errstate(all="ignore"):
        return np.bincount(epochs, weights * record.loss) / np.bincount(epochs, weights)


# --- The rules


def assert_close_losses(torch: Record, flax: Record, reference: Record | None) -> bool | None:
    """In bfloat16 the losses are float32, but the tolerance is the laxer one of bfloat16."""
    dtype = np.float64 if torch.dtype == "float64" else np.float32
    one, other = ({"loss": record.loss.astype(dtype)} for record in (torch, flax))
    return _differ(one, other, _torch_close(torch.dtype))


def assert_close_weights(torch: Record, flax: Record, reference: Record | None) -> bool | None:
    return _differ(torch.final, flax.final, _torch_close(torch.dtype))


def numpy_losses(torch: Record, flax: Record, reference: Record | None) -> bool | None:
    return _differ(_losses(torch), _losses(flax), _allclose(*NUMPY_TOLERANCES))


def numpy_weights(torch: Record, flax: Record, reference: Record | None) -> bool | None:
    return _differ(torch.final, flax.final, _allclose(*NUMPY_TOLERANCES))


def transformers(torch: Record, flax: Record, reference: Record | None) -> bool | None:
    """Compares the logits and the outputs of all layers, from equal weights. The source skips
    NaN."""

    def close(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
        gap = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
        nan = np.isnan(actual.astype(np.float64)) | np.isnan(expected.astype(np.float64))
        return nan | (gap <= TRANSFORMERS_BOUND)  # equal infinities leave NaN, which is not close

    one, other = _step(torch, "forward/"), _step(flax, "forward/")
    return None if "0/forward/logits" not in one | other else _differ(one, other, close)


def reprod_losses(torch: Record, flax: Record, reference: Record | None) -> bool | None:
    return _differ(_losses(torch), _losses(flax), _reprod_close)


def reprod_steps(torch: Record, flax: Record, reference: Record | None) -> bool | None:
    """Each of the first steps' losses, and the gradients of those that were recorded."""

    def tensors(record: Record) -> Arrays:
        losses = {f"{step}/loss": loss for step, loss in enumerate(record.loss[:REPROD_STEPS])}
        return losses | {
            key: array for key, array in record.first_steps.items() if "/backward/" in key
        }

    return _differ(tensors(torch), tensors(flax), _reprod_close)


def _reprod_close(actual: np.ndarray, expected: np.ndarray) -> bool:
    # `not >`, not `<=`: in the source a mean that is NaN passes
    return (
        not np.mean(np.abs(actual.astype(np.float64) - expected.astype(np.float64))) > REPROD_BOUND
    )


def keras(torch: Record, flax: Record, reference: Record | None) -> bool | None:
    """NaN equals NaN, as in numpy.testing.assert_allclose."""

    def tensors(record: Record) -> Arrays:
        return record.final | {
            "history": _epoch_losses(record),
            "evaluate": np.array(record.test_loss),
        }

    if torch.steps != flax.steps:
        return True
    return _differ(tensors(torch), tensors(flax), _allclose(*KERAS_TOLERANCES, equal_nan=True))


def algoperf_last(torch: Record, flax: Record, reference: Record | None) -> bool | None:
    def tensors(record: Record) -> Arrays:
        last = {"loss": record.loss[-1:], "gradient norm": record.gradient_norm[-1:]}
        return last | {"evaluation": np.array(record.test_loss)}

    if torch.steps != flax.steps:
        return True
    # The source gives JAX first, so that the tolerance is relative to PyTorch's value.
    return _differ(tensors(torch), tensors(flax), _allclose(ALGOPERF_LAST, NUMPY_TOLERANCES[1]))


def algoperf_each(torch: Record, flax: Record, reference: Record | None) -> bool | None:
    def tensors(record: Record) -> Arrays:
        return {
            "loss": record.loss[:ALGOPERF_STEPS],
            "gradient norm": record.gradient_norm[:ALGOPERF_STEPS],
        }

    return _differ(tensors(torch), tensors(flax), _allclose(ALGOPERF_EACH, NUMPY_TOLERANCES[1]))


def msprobe(torch: Record, flax: Record, reference: Record | None) -> bool | None:
    """Compares the first losses, their average over the run, and how many are not finite."""
    if torch.steps != flax.steps or np.isfinite(torch.loss).sum() > np.isfinite(flax.loss).sum():
        return True
    with np.errstate(all="ignore"):
        errors = np.abs(flax.loss - torch.loss) / np.abs(torch.loss)
    errors = np.where(flax.loss == torch.loss, 0.0, errors)
    known = errors[np.isfinite(torch.loss) & np.isfinite(flax.loss)]
    first = errors[0] if len(errors) and not math.isnan(errors[0]) else 0.0
    return bool(first > MSPROBE_BOUND or (len(known) > 0 and float(np.mean(known)) > MSPROBE_BOUND))


def dynamo(torch: Record, flax: Record, reference: Record | None) -> bool | None:
    one, other = (
        _step(run, "forward/logits", "loss/", "backward/", "update/") for run in (torch, flax)
    )
    if reference is None or reference.dtype != "float64" or not one:
        return None
    exact = reference.first_steps
    if any(name not in exact or exact[name].shape != one[name].shape for name in one):
        return None
    if one.keys() != other.keys():
        return True
    pointwise = {name: one[name].ndim == 4 and one[name].shape[:2] == (1, 1) for name in one}
    return not all(
        same(one[name], other[name], exact[name], pointwise=pointwise[name]) for name in one
    )


RULES = (
    Rule(
        "assert_close, losses",
        "every loss within rtol 1.3e-6 and atol 1e-5 (float32), 1e-7 and 1e-7 (float64), "
        "1.6e-2 and 1e-5 (bfloat16)",
        "torch.testing.assert_close's defaults: torch/testing/_comparison.py, PyTorch 2.15",
        assert_close_losses,
    ),
    Rule(
        "assert_close, weights",
        "every final parameter within the same tolerances",
        "torch.testing.assert_close's defaults: torch/testing/_comparison.py, PyTorch 2.15",
        assert_close_weights,
    ),
    Rule(
        "allclose, losses",
        "every loss within rtol 1e-5 and atol 1e-8",
        "numpy.allclose's defaults: NumPy 2.4",
        numpy_losses,
    ),
    Rule(
        "allclose, weights",
        "every final parameter within rtol 1e-5 and atol 1e-8",
        "numpy.allclose's defaults: NumPy 2.4",
        numpy_weights,
    ),
    Rule(
        "transformers",
        "logits and layer outputs of one forward pass within 1e-5; meant for float32",
        "check_pt_flax_outputs in tests/test_modeling_common.py of huggingface/transformers "
        "(4.x); issue 16497",
        transformers,
    ),
    Rule(
        "reprod_log, losses",
        "mean |difference| of the run's losses at most 1e-6; meant for float32",
        "ReprodDiffHelper.report's defaults (mean, diff_threshold 1e-6): WenmuZhou/reprod_log, "
        "of PaddlePaddle",
        reprod_losses,
    ),
    Rule(
        "reprod_log, ten steps",
        "each loss of the first 10 steps, and each gradient's mean |difference|, at most 1e-6; "
        "meant for float32",
        "compare_loss_and_backward's defaults in reprod_log/compare.py: WenmuZhou/reprod_log, "
        "of PaddlePaddle",
        reprod_steps,
    ),
    Rule(
        "Keras numerical_test",
        "mean loss of each epoch, final parameters and test loss within 1e-3 (rtol 1e-7); "
        "meant for float32",
        "integration_tests/numerical_test.py of keras-team/keras (3.x): assert_allclose with "
        "atol 1e-3",
        keras,
    ),
    Rule(
        "AlgoPerf, last step",
        "the last step's loss and gradient norm, and the evaluation's loss, within rtol 1",
        "tests/test_traindiffs.py of mlcommons/algorithmic-efficiency",
        algoperf_last,
    ),
    Rule(
        "AlgoPerf, ten steps",
        "loss and gradient norm of each of the first 10 steps within rtol 5e-3",
        "tests/test_traindiffs.py of mlcommons/algorithmic-efficiency, another version (commit "
        "04840e0)",
        algoperf_each,
    ),
    Rule(
        "msprobe",
        "relative loss error at most 1 % at the first step and on average over the run, and no "
        "more NaN",
        "Ascend/msprobe, docs/en/best_practices/train_debug_guide.md, section 1.3",
        msprobe,
    ),
    Rule(
        "TorchDynamo RMSE",
        "logits, loss, gradients and updated parameters of one step: close by 1e-4, or RMSE "
        "against float64 at most 2 or 3 times the reference's, plus 1e-5",
        "same() in torch/_dynamo/utils.py, PyTorch 2.15, on what collect_results() in "
        "torch/_dynamo/testing.py lists",
        dynamo,
    ),
)


def verdicts(
    torch: Record, flax: Record, reference: Record | None = None
) -> dict[str, bool | None]:
    """The verdict of each rule, by its name."""
    return {rule.name: rule.differs(torch, flax, reference) for rule in RULES}
