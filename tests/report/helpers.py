"""Made reports, records and data, and the output that a terminal gives of them."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np

from lockstep.common.config import BACKENDS
from lockstep.common.data import Dataset
from lockstep.common.report import Terminal
from lockstep.common.runs.record import Record
from lockstep.common.verdict import locate
from lockstep.common.verdict.comparison import Divergence

HOSTILE = (
    "<script>alert(1)</script>",
    "\x1b[31mred\x1b[0m",
    "$x_1$ costs $",
    "[red]bold[/red]",
    "猫\n\udce9",
)
PLAIN = ("plane", "car", "bird", "cat", "deer")
STEPS = 40


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def record(backend: str, dtype: str, noise: float = 0.0, twin: int | None = None) -> Record:
    loss = np.linspace(2.3, 1.1, STEPS)
    loss = loss + noise * np.sin(np.arange(STEPS)) * np.arange(STEPS)
    ones, guesses = np.ones(STEPS), np.arange(10) % 3
    made = Record(backend, dtype, twin, {}, {}, {}, "", loss, ones, ones, guesses, 1.2, 3.0, 1234.5)
    return dataclasses.replace(made, batch_digests=np.arange(STEPS))


def comparison(
    dtype: str, verdict: str, classes: tuple[str, ...], backends: tuple[str, ...]
) -> Any:
    both, bad = len(backends) == 2, verdict == "disagree"
    message = "loss: step 17: torch=2.3019 flax=2.3044, gap 2.5e-03 > 4.0e-07"
    row = {
        "step": 0,
        "stage": "forward",
        "tensor": "logits",
        "gap": 1e-16,
        "bound": 1e-13,
        "agrees": True,
    }
    window = {
        "quantity": "loss",
        "start": 0,
        "stop": STEPS,
        "gap": 1.1e-15,
        "drift": None,
        "bound": 1e-12,
    }
    first = {
        "step": 17,
        "stage": "loss",
        "tensor": "loss",
        "gap": 2.5e-3,
        "bound": 4e-7,
        "torch": 2.3,
        "flax": 2.3,
    }
    return {
        "dtype": dtype,
        "steps": STEPS,
        "verdict": verdict,
        "score": (2.5 if bad else 0.25) if both else None,
        "max_abs_loss_gap": 1.1e-15 if both else None,
        "bound": {
            "rule": (
                "a hundred times the largest gap that was measured over 37,500 steps of the same "
                "network"
            )
        },
        "first_divergence": first | {"message": message} if bad else None,
        "ladder": [row, row | {"tensor": "conv1", "gap": None, "agrees": not bad}] if both else [],
        "stretches": [window | {"agrees": not bad}] if both else [],
        "final_loss": dict.fromkeys(backends, 1.1),
        "test_loss": dict.fromkeys(backends, None),
        "accuracy": dict.fromkeys(backends, 0.6),
        "per_class_accuracy": {
            name: {c: k / 5 if k else None for k, c in enumerate(classes)} for name in backends
        },
        "predictions_equal": 9 if both else None,
        "predictions_total": 10,
        "twins": {name: [{"max_abs_loss_gap": 0.1, "predictions_equal": 8}] for name in backends}
        if both
        else {},
        "steps_per_second": dict.fromkeys(backends, 1234.5),
        "seconds": dict.fromkeys(backends, 3.0),
    }


def found(tensor: str = "conv1", entry: float = -9.0, **changes: Any) -> Any:
    """What `locate` says of where two runs diverge.

    Args:
        entry: the one of PyTorch's tensor that differs most.
    """
    first = Divergence(17, "forward", tensor, 2.0, 1e-7, BACKENDS, (1.0, 3.0))
    pair = np.array([[1.0, 2.0], [entry, 4.0]]), np.array([[3.0, 2.0], [3.0, 1 / 3]])
    how = "replayed: both took step 17 from the state that torch had before it"
    return locate.describe(first, pair, how).to_json() | changes


def make(
    *verdicts: str, classes: tuple[str, ...] = PLAIN, backends: tuple[str, ...] = ("torch", "flax")
) -> Any:
    lenses = [
        comparison(dtype, v, classes, backends)
        for dtype, v in zip(("float64", "float32"), verdicts, strict=False)
    ]
    verdict = "disagree" if "disagree" in verdicts else verdicts[0]
    return {"schema": 1, "verdict": verdict, "data": {"classes": list(classes)}, "lenses": lenses}


def dataset(classes: tuple[str, ...] = PLAIN) -> Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    labels = np.arange(10) % len(classes)
    return Dataset("small", pixels, labels, pixels, labels, classes)


def printed(report: Any, quiet: bool = False, verbose: bool = True) -> str:
    out = io.StringIO()
    Terminal(quiet, out, io.StringIO(), verbose=verbose).verdict(report)
    return out.getvalue()
