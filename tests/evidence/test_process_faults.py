"""Faults of training in several processes: one is found and placed, and a correct run agrees."""

from __future__ import annotations

import functools

import pytest

from lockstep import backends
from lockstep.backends.faults import FAULTS
from lockstep.backends.faults.processes import (
    PROCESS_FAULTS,
    build_with_fault,
    process_fault_named,
)
from lockstep.common.data import Dataset
from lockstep.common.errors import ConfigError
from lockstep.common.evidence import process_faults
from lockstep.common.protocol import STAGES
from lockstep.common.runs.ranks import Ranks


def test_catalogue():
    names = [fault.name for fault in PROCESS_FAULTS]
    assert len(set(names)) == 14
    assert not set(names) & {fault.name for fault in FAULTS}
    assert {fault.stage for fault in PROCESS_FAULTS} <= set(STAGES)
    assert all(fault.description and fault.source for fault in PROCESS_FAULTS)
    with pytest.raises(ConfigError, match="gradients-summed"):
        process_fault_named("gradients-sumed")


@pytest.mark.slow
def test_one_is_found_and_a_correct_run_agrees(digits: Dataset):
    dataset = digits.first_test_images(20)
    fault = process_fault_named("no-sync-in-one-step")
    config = process_faults.config_of(fault, len(dataset.train_images))
    build = functools.partial(backends.build, config, dataset.task, "cpu", "off")
    faulty, clean = (
        functools.partial(build_with_fault, name, config, dataset, build)
        for name in (fault.name, None)
    )
    with Ranks(clean, 2, process_faults.HINT) as ranks:
        found = process_faults.measure(fault, config, dataset, "float64", ranks, faulty)
        assert (found["caught"], found["step"], found["stage"]) == (True, 3, "backward")
        again = process_faults.measure(None, config, dataset, "float64", ranks, clean)
        assert not again["caught"], "the same processes, which have the fault no longer"
