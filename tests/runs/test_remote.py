"""Twins that workers of a cluster train are those that this process would train."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lockstep import backends
from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.errors import BackendError, DataError
from lockstep.common.runs import parallel, record, remote
from lockstep.common.runs.record import Record
from lockstep.common.runs.trainer import Trainer

QUIET = parallel.RemoteProgress(lambda report: None)


@pytest.fixture
def twins() -> remote.Twins:
    digits = data.load("digits")
    config = Config(steps=3, batch_size=4).resolve(len(digits.train_images))
    build = functools.partial(backends.build, config, len(digits.classes), "cpu", "off")
    return remote.Twins(build, config, "digits", None, digits.digest, None)


def trainer(
    twins: remote.Twins, folder: Path, start: Callable[..., Future[Record]] | None
) -> Trainer:
    build = functools.partial(
        backends.build, twins.config, len(data.load("digits").classes), "cpu", "off"
    )
    return Trainer(folder, twins.config, data.load("digits"), build, QUIET, start_twin=start)


def done(work: Callable[[], Record]) -> Future[Record]:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work)


def test_a_twin_of_a_worker_is_written_as_one_that_was_trained_here(
    twins: remote.Twins, tmp_path: Path
) -> None:
    here = trainer(twins, tmp_path / "here", None).train("torch", "float32", [1, 2])
    asked = []

    def start(name: str, dtype: str, twin: int) -> Future[Record]:
        asked.append(twin)
        return done(lambda: remote.train_twin(twins, name, dtype, 3 - twin))  # the other one

    trainer(
        twins, tmp_path / "there", lambda *given: done(lambda: remote.train_twin(twins, *given))
    ).train("torch", "float32", [1, 2])
    for run in here:
        again = record.read(tmp_path / "there" / f"{run.stem}.safetensors")
        assert all(np.array_equal(run.final[name], again.final[name]) for name in run.final)
    swapped = trainer(twins, tmp_path / "swapped", start).train(
        "torch", "float32", [1, 2]
    )  # control
    moved = [
        not np.array_equal(here[0].final[name], swapped[0].final[name]) for name in here[0].final
    ]
    assert asked == [1, 2] and any(moved)


def test_a_worker_with_other_data_is_refused_and_its_errors_are_one_line(
    twins: remote.Twins, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="give it the same files"):
        remote.train_twin(dataclasses.replace(twins, digest="another"), "torch", "float32", 1)

    def lost() -> Record:
        raise RuntimeError("the device is lost")

    with pytest.raises(BackendError, match="the device is lost"):
        trainer(twins, tmp_path, lambda *given: done(lost)).train("torch", "float32", [1])
