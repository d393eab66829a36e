"""The first line of a run: what will be trained, and about how long that takes on two cores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lockstep.common.config import FRAMEWORKS, MODELS, Config
from lockstep.common.model import pair as pairs
from lockstep.common.system import environment

if TYPE_CHECKING:
    from lockstep.common.request import Request

# Steps per second at batch 32, (torch, flax), from the committed reports in results/.
SPEEDS: dict[str, dict[str, tuple[float, float]]] = {
    "net": {"float64": (108, 183), "float32": (217, 367)},
    "mlp": {
        "float64": (164, 205),
        "float32": (198, 381),
        "bfloat16": (260, 258),
        "mixed_bfloat16": (158, 189),
    },
    "resnet20": {
        "float64": (2.5, 1.4),
        "float32": (11.6, 3.6),
        "bfloat16": (19.7, 3.4),
        "mixed_bfloat16": (13.6, 6.6),
    },
    "convnext": {
        "float64": (3.6, 1.0),
        "float32": (22.5, 1.5),
        "bfloat16": (42.9, 2.0),
        "mixed_bfloat16": (7.1, 12.1),
    },
    "vit": {
        "float64": (5.0, 3.0),
        "float32": (7.2, 7.1),
        "bfloat16": (10.6, 8.5),
        "mixed_bfloat16": (12.2, 10.6),
    },
}
START = 10.0  # seconds to import both frameworks, compile, and write the report
PER_STEP = 0.15  # share of a step of 32 images that does not depend on how many there are


def seconds(config: Config, dtypes: Sequence[str], twins: int, backends: int) -> float | None:
    """About how long the run takes on two cores; None where nothing was measured.

    Both frameworks train at the same time, so the slower one counts.
    """
    speeds = SPEEDS.get(config.model, {})
    if config.steps is None or any(dtype not in speeds for dtype in dtypes):
        return None
    size = PER_STEP + (1 - PER_STEP) * config.batch_size / 32
    sides = [0.0, 0.0]
    for dtype in dtypes:
        runs = 1 if dtype == "float64" else 1 + twins
        for side, speed in enumerate(speeds[dtype]):
            sides[side] += runs * config.steps * size / speed
    return START + max(sides) * (2 if environment.cores() < 2 and backends > 1 else 1)


def duration(seconds: float) -> str:
    """Roughly, such as "20 seconds" or "3 minutes"."""
    if seconds < 95:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    if seconds < 95 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.0f} hours"


def announcement(request: Request) -> str:
    """The first line of a run: the network, the data, and about how long it takes."""
    config = request.config
    names = " and ".join(FRAMEWORKS[name] for name in request.backends)
    if config.steps is not None:
        length = f"{config.steps:,} step{'' if config.steps == 1 else 's'}"
    else:
        length = f"{config.epochs:,} epoch{'' if config.epochs == 1 else 's'}"
    twins = (
        f", each with {request.twins} twin{'' if request.twins == 1 else 's'}"
        if request.dtypes != ("float64",)
        else ""
    )
    data = {"auto": "CIFAR-10 or the digits", "cifar10": "CIFAR-10", "digits": "the digits"}
    verb = "Resuming" if request.resumed is not None else "Training"
    if request.keep_records:
        verb = "Comparing"
    start = ""
    if config.model not in MODELS and request.weights is None:
        start = ", from weights that Lockstep draws"
        if config.starts_from in FRAMEWORKS:
            start = f", from the initial weights of your {FRAMEWORKS[config.starts_from]} module"
    on = data.get(request.data, request.data)
    if config.model not in MODELS and request.data == "auto":
        pair = pairs.load(config.model)
        on = "its data" if pair.data is not None else on if pair.example is None else "its example"
    together = f", by {request.processes} processes together" if request.processes > 1 else ""
    return (
        f"{verb} {config.model} in {names} on {on}{start}: "
        f"{length} of batch {config.batch_size}{together}, in {' and '.join(request.dtypes)}{twins}"
        f"{time_needed(request, config)}"
    )


def time_needed(request: Request, config: Config) -> str:
    """ ", about so long", where that can be said."""
    needed = seconds(config, request.dtypes, request.twins, len(request.backends))
    known = request.device != "cuda" and request.resumed is None and not request.keep_records
    if needed is None or not known:
        return ""
    return f", about {duration(needed)} on two cores"
