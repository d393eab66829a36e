"""Which tensors fail together, and what these have in common."""

from __future__ import annotations

import pytest

from lockstep.common.verdict.check import Check
from lockstep.common.verdict.failures import Failures, failures

LAYERS = [f"{what}{layer}" for layer in ("conv1", "bn", "fc") for what in ("input of ", "")]
TENSORS = ("conv1.kernel", "conv1.bias", "bn.scale", "bn.bias", "fc.kernel", "fc.bias")
BUFFERS = tuple(f"momentum of {tensor}" for tensor in TENSORS)


def found(stage: str, failing: tuple[str, ...], tensors: tuple[str, ...]) -> Failures | None:
    checks = [
        Check(step, stage, tensor, float(step == 1 and tensor in failing), 0.5)
        for step in (0, 1)
        for tensor in tensors
    ]
    return failures(checks, 1, stage, LAYERS)


@pytest.mark.parametrize(
    ("stage", "failing", "common"),
    [
        ("backward", TENSORS, "every tensor"),
        ("backward", ("conv1.bias", "bn.bias", "fc.bias"), "all biases, no kernel or scale"),
        ("backward", ("conv1.kernel", "fc.kernel"), "all kernels, no bias or scale"),
        ("backward", ("conv1.bias",), "only conv1.bias"),
        ("backward", ("conv1.bias", "fc.bias"), "conv1.bias, fc.bias"),
        ("backward", ("fc.kernel", "fc.bias"), "all of the last layer, fc"),
        ("backward", ("conv1.kernel", "conv1.bias"), "all of conv1"),
        ("backward", TENSORS[:4], "all of the layers up to bn"),
        ("weights", TENSORS[2:], "all of the layers from bn on"),
        ("forward", ("bn", "input of fc", "fc"), "everything from bn on"),
        ("forward", ("conv1", "fc"), "conv1, fc"),
    ],
)
def test_what_failing_tensors_have_in_common_is_said(
    stage: str, failing: tuple[str, ...], common: str
) -> None:
    tensors = tuple(LAYERS) if stage == "forward" else TENSORS
    assert found(stage, failing, tensors) == Failures(len(failing), len(tensors), common)


@pytest.mark.parametrize(
    ("failing", "common"),
    [
        ((*BUFFERS, *TENSORS), "every tensor"),
        (TENSORS, "every parameter; no momentum buffer"),
        (BUFFERS, "every parameter; momentum buffers alone"),
        ((*BUFFERS[:3], *TENSORS), "every parameter"),
        (
            tuple(name for name in (*BUFFERS, *TENSORS) if name.endswith(".bias")),
            "all biases, no kernel or scale",
        ),
        (
            ("fc.kernel", "fc.bias"),
            "all of the last layer, fc; no momentum buffer",
        ),
    ],
)
def test_of_an_update_it_is_said_whether_momentum_fails_too(
    failing: tuple[str, ...], common: str
) -> None:
    assert found("update", failing, (*BUFFERS, *TENSORS)) == Failures(len(failing), 12, common)


def test_two_faults_of_one_first_tensor_are_told_apart() -> None:
    """Weight decay after momentum, and none on biases: the first tensor, with all its digits, is
    the same."""
    after_momentum = found("update", (*BUFFERS, *TENSORS), (*BUFFERS, *TENSORS))
    biases = tuple(name for name in (*BUFFERS, *TENSORS) if name.endswith(".bias"))
    not_on_biases = found("update", biases, (*BUFFERS, *TENSORS))
    assert after_momentum is not None and not_on_biases is not None
    assert after_momentum.common != not_on_biases.common


def test_nothing_is_said_where_there_is_no_choice_of_tensors() -> None:
    assert found("loss", ("loss",), ("loss",)) is None
    assert found("evaluate", ("test loss",), ("test loss", "predictions")) is None
    assert found("backward", (), TENSORS) is None
    assert found("backward", TENSORS, TENSORS) is not None  # the control


def test_a_range_of_steps_is_no_tensor_of_a_step() -> None:
    checks = [Check(0, "backward", name, 1.0, 0.5) for name in TENSORS]
    checks.append(Check(0, "backward", "gradient_norm", 0.0, 0.5, start=0, stop=4))
    assert failures(checks, 0, "backward", LAYERS) == Failures(6, 6, "every tensor")
