"""What a run shows: `report.json`, the lines and tables on the terminal, the pictures, and
`report.html`.

`report.json` holds JSON types only; a number that is not finite is null there.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from lockstep.common.report.html import write_report_page
from lockstep.common.report.images import write_pictures
from lockstep.common.report.tensorboard import check_tensorboard, write_tensorboard
from lockstep.common.report.terminal import Terminal, safe, sentence
from lockstep.common.system.storage import write_atomic

__all__ = [
    "Terminal",
    "check_tensorboard",
    "jsonable",
    "safe",
    "sentence",
    "to_json",
    "write_json",
    "write_pictures",
    "write_report_page",
    "write_tensorboard",
]


def jsonable(value: Any) -> Any:
    """`value` in JSON types: NumPy's scalars and arrays as Python's, paths as strings, non-finite
    numbers as None."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, (float, np.generic)) and not isinstance(value, (str, bytes)):
        number = float(value)  # bfloat16, too, is a generic
        return number if math.isfinite(number) else None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def to_json(report: dict[str, Any]) -> str:
    """`report` as the text of its file."""
    return json.dumps(jsonable(report), allow_nan=False, indent=1) + "\n"


def write_json(report: dict[str, Any], folder: Path) -> Path:
    """Keep `report` as `report.json` in `folder`, whole or not at all.

    Raises:
        RecordError: if the folder cannot be written.
    """
    path = Path(folder, "report.json")
    write_atomic(path, to_json(report).encode())
    return path
