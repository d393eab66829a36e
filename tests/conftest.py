"""What several test files use."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lockstep import backends
from lockstep.common import data
from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset

# Programs that tests start see this checkout, installed or not.
_PACKAGE = Path(__file__).resolve().parents[1] / ".package"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(_PACKAGE), os.environ.get("PYTHONPATH")])
)
os.environ["LOCKSTEP_OFFLINE"] = "1"  # no test asks the network for CIFAR-10
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each worker
else:
    # Each program is compiled once in a session, however many backends and workers are built: half
    # of the tests' time was compilation. JAX locks the folder only if its size is limited.
    _cache = tempfile.TemporaryDirectory(prefix="lockstep-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**33)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_configure(config: pytest.Config) -> None:
    """In the default run, XLA compiles quickly in place of well: most of the time was compiling.
    The slow tests run what a user runs."""
    if config.option.markexpr == "not slow":
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


class SilentObserver:
    """Keeps the log lines and counts the steps."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps = 0

    def line(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, steps: int, loss: float) -> None:
        self.steps += steps


@pytest.fixture
def observer() -> SilentObserver:
    return SilentObserver()


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return data.load("digits")


@pytest.fixture(params=BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return request.param


@pytest.fixture(scope="session")
def build() -> Callable:
    """Build a backend for the digits on the CPU."""

    def build(name: str, config: Config, dtype: str = "float64", compile: str = "auto"):
        return backends.load(name)(config, 10, dtype, "cpu", compile)

    return build


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)
