"""Comparisons and divergences as entries of report.json, made of records and dictionaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lockstep.common.config import BACKENDS
from lockstep.common.runs.ensemble import Ensemble
from lockstep.common.runs.record import Record
from lockstep.common.verdict.compare import compare
from lockstep.common.verdict.comparison import Divergence


def compared(
    runs: Mapping[str, Record], twins: Mapping[str, Sequence[Record]], labels: np.ndarray
) -> dict[str, Any]:
    """What `compare` says of these runs, as an entry of report.json."""
    ensembles = {name: Ensemble(run, tuple(twins.get(name, ()))) for name, run in runs.items()}
    return compare(ensembles, labels).to_json()


def diverging(step: int, stage: str, tensor: str) -> Divergence:
    return Divergence(step, stage, tensor, 1.0, 0.1, BACKENDS)
