"""What several test files use."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep import backends, cli
from lockstep.common import data, report
from lockstep.common.config import BACKENDS, Config
from lockstep.common.data import Dataset
from lockstep.common.protocol import Backend

# Programs that tests start see this checkout, installed or not.
_PACKAGE = Path(__file__).resolve().parents[1] / ".package"
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(_PACKAGE), os.environ.get("PYTHONPATH")])
)
os.environ["LOCKSTEP_OFFLINE"] = "1"  # no test asks the network for CIFAR-10
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each worker
else:
    # Each larger program is compiled once in a session, however many backends and workers are built.
    # JAX locks the folder only if its size is limited, and then looks at all files for each that it
    # writes, which takes longer than compiling a small program.
    _cache = tempfile.TemporaryDirectory(prefix="lockstep-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**33)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def pytest_configure(config: pytest.Config) -> None:
    """In the default run, XLA compiles quickly in place of well: most of the time was compiling.
    The slow tests run what a user runs."""
    if config.option.markexpr == "not slow":
        os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        backends.compile_quickly()


class SilentObserver:
    """Keeps the log lines and counts the steps."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps = 0

    def line(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, steps: int, loss: float) -> None:
        self.steps += steps


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Runs draw no pictures and write no page, which take longer than all else."""
    for name in ("write_pictures", "write_report_page"):
        patch.setattr(report, name, lambda *_: None)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of runs that look at neither pictures nor pages."""
    draw_nothing(monkeypatch)


_built: dict[bytes, Backend] = {}  # by the arguments of `backends.build`


def _build(*arguments: Any) -> Backend:
    key = pickle.dumps(arguments)
    if key not in _built:
        if len(_built) == 8:  # the programs of thirty backends fill a process's memory maps
            _built.clear()
        _built[key] = backends.build(*arguments)
    return _built[key]


def build_once(patch: pytest.MonkeyPatch) -> None:
    """Commands with the same network and options share a backend, and so its programs."""
    patch.setattr(cli, "PACKAGE", cli.PACKAGE._replace(build=_build))


@pytest.fixture
def built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of many runs of one network, none of which changes what a backend computes."""
    build_once(monkeypatch)


@pytest.fixture
def quickly_compiled() -> Iterator[None]:
    """For slow cases of tests that also have fast ones, and so bounds that hold without XLA's
    optimizations."""
    from lockstep.backends.flax_backend import tuning  # imports JAX, which few tests need

    with tuning.few_optimizations():
        yield


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
