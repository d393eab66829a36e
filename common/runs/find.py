"""The finished runs of a folder: found, and checked that they are of the same run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.errors import RecordError
from lockstep.common.runs import record, training
from lockstep.common.runs.ensemble import Ensemble, Ensembles
from lockstep.common.runs.record import Record
from lockstep.common.system import environment


def find_runs(
    folder: Path,
    dtypes: Sequence[str],
    names: Sequence[str],
    config: Config,
    dataset: Dataset,
    log: Callable[[str], None],
) -> dict[str, Ensembles]:
    """By dtype, the finished runs of these backends.

    They are read before anything is trained, so that a damaged one is reported at once.

    Args:
        log: called with a line for each record that is of another run.

    Raises:
        RecordError: as `find_ensemble`.
    """
    found: dict[str, Ensembles] = {dtype: {} for dtype in dtypes}
    for dtype, name in itertools.product(dtypes, names):
        ensemble = find_ensemble(folder, name, dtype, config, dataset, log)
        if ensemble is not None:
            found[dtype][name] = ensemble
    return found


def find_ensemble(
    folder: Path,
    name: str,
    dtype: str,
    config: Config,
    dataset: Dataset,
    log: Callable[[str], None],
) -> Ensemble | None:
    """The run of one backend in one precision, with its twins; None if it is not there.

    Raises:
        RecordError: if a record is damaged, stale, or not what its name says.
    """
    stem = record.file_stem(name, dtype)
    path = folder / f"{stem}.safetensors"
    if not path.exists():
        return None
    run = matching_record(path, name, config, dataset)
    if run is None:
        log(f"Not compared: {path} is of a run with another configuration or other data")
        return None
    twins = []
    for path in sorted(folder.glob(f"{stem}-twin*.safetensors")):
        if record.read(path).source == environment.source_digest(name):
            twin = matching_record(path, name, config, dataset)
            twins += [] if twin is None else [twin]  # an earlier run may have left others
    return Ensemble(run, tuple(twins))


def matching_record(path: Path, name: str, config: Config, dataset: Dataset) -> Record | None:
    """The record in `path` if it is of this run; None if it is of another one.

    Raises:
        RecordError: if it is damaged, stale, or not what its name says.
    """
    found = record.read(path)
    if found.stem != path.stem or found.backend != name:
        raise RecordError(
            f"the record {path} is not what its name says: delete it and run {name} again"
        )
    # The same data may have another name, such as the path of their folder.
    data = training.describe(config, dataset) | {"name": found.data.get("name")}
    if found.config != config.to_json() or found.data != data:
        return None
    if found.source != environment.source_digest(name):
        raise RecordError(
            f"the record {path} is stale, the code has changed since: run --backend {name} again"
        )
    return found
