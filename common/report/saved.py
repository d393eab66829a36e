"""A run that is finished: its report and its records, read again from its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from lockstep.common.config import BACKENDS, DTYPES
from lockstep.common.errors import RecordError
from lockstep.common.runs import record
from lockstep.common.system import program

if TYPE_CHECKING:
    from lockstep.common.report.chart_data import Records, Twins
    from lockstep.common.report.json import ReportJson

REPORT = "report.json"
MAX_BYTES = 2**28


class SavedRun(NamedTuple):
    """What a folder holds of a run."""

    report: ReportJson
    records: Records  # by precision and backend
    twins: Twins  # by precision and backend


def read(folder: Path) -> SavedRun:
    """The report of the run in `folder`, and the records that it was made of.

    Raises:
        RecordError: if one of them is missing or damaged.
    """
    report = read_report(folder)
    records: Records = {}
    twins: Twins = {}
    for comparison in report["lenses"]:
        dtype = comparison["dtype"]
        names = [name for name in BACKENDS if name in comparison["accuracy"]]
        stems = {name: record.file_stem(name, dtype) for name in names}
        records[dtype] = {
            name: record.read(folder / f"{stem}.safetensors") for name, stem in stems.items()
        }
        twins[dtype] = {
            name: [
                record.read(folder / f"{stem}-twin{number}.safetensors")
                for number in range(1, 1 + len(comparison["twins"].get(name, ())))
            ]
            for name, stem in stems.items()
        }
    return SavedRun(report, records, twins)


def read_report(folder: Path) -> ReportJson:
    """The report.json of a run of Lockstep's own networks or of a pair.

    Raises:
        RecordError: if it is missing, damaged, or of something else.
    """
    path = folder / REPORT
    hint = f"give the folder of a finished run, which {program.name()} leaves there"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecordError(f"{path} is larger than any report: {hint}")
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{folder} holds no {REPORT}: {hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} cannot be read ({type(error).__name__}): {hint}") from None
    known = isinstance(found, dict) and isinstance(found.get("lenses"), list)
    if not known or not all(_is_comparison(each) for each in found["lenses"]):
        raise RecordError(f"{path} is not the report of a run: {hint}")
    return cast("ReportJson", found)


def _is_comparison(found: object) -> bool:
    return (
        isinstance(found, dict)
        and found.get("dtype") in DTYPES
        and isinstance(found.get("accuracy"), dict)
        and isinstance(found.get("twins"), dict)
    )
