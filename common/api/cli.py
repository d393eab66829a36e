"""The two entries, which hand `lockstep.backends` to `lockstep.common`: the command line and
`lockstep.compare`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from lockstep import backends
from lockstep.common.backends import BackendPackage
from lockstep.common.cli import main as program
from lockstep.common.system import environment
from lockstep.common.system.interrupt import SignalHandler

if TYPE_CHECKING:
    from lockstep.common.config import Config
    from lockstep.common.request import Result


def backend_module(name: str) -> ModuleType:
    """A module of `lockstep.backends`, such as "faults", imported when it is asked for."""
    return importlib.import_module(f"lockstep.backends.{name}")


PACKAGE = BackendPackage(backends.load, backends.build, backend_module)


def main(argv: list[str] | None = None) -> int:
    """Carry out one command line and return its exit status."""
    return program.main(PACKAGE, argv)


def compare(
    config: Config | None = None,
    *,
    recipe: str = "quick",
    model: str | None = None,
    dtypes: Sequence[str] | None = None,
    twins: int | None = None,
    data: str | Path = "auto",
    out: Path | str | None = None,
    device: str = "auto",
    compile: str = "auto",
    processes: int = 1,
    weights: Path | str | None = None,
    quiet: bool = True,
) -> Result:
    """Train in PyTorch and in Flax and say whether the two runs are the same run.

    Args:
        config: the run; None: the recipe's.
        recipe: a name in RECIPES, for what is not given.
        model: in place of the configuration's; one of Lockstep's own, or "FILE.py:PAIR".
        dtypes: precisions, such as ("float64", "float32"); None: the recipe's.
        twins: per framework, in every precision but float64; None: the recipe's.
        data: "auto", "cifar10", "digits", a folder of class folders, or an .npz file.
        out: folder of the report and the records; None: one in results/runs.
        device: "auto", "cpu" or "cuda".
        compile: "auto", "on" or "off": torch.compile.
        processes: that train each run together, each on its share of every batch.
        weights: initial weights, as a file that `--weights` takes; None: drawn from the seed.
        quiet: print nothing.

    Raises:
        LockstepError: if the request cannot be carried out; the message says what to do.
    """
    from lockstep.common import session
    from lockstep.common.report import Terminal
    from lockstep.common.request import make_request

    request = make_request(
        config,
        recipe=recipe,
        model=model,
        dtypes=dtypes,
        twins=twins,
        data=str(data),
        out=None if out is None else Path(out),
        device=device,
        compile=compile,
        processes=processes,
        weights=None if weights is None else Path(weights),
    )
    with SignalHandler() as signals:
        return session.compare(request, PACKAGE, None if quiet else Terminal(), signals)


def run_and_exit() -> NoReturn:
    """The whole program: carry out the command line, then end the process."""
    environment.relax_gc()
    if sys.argv[1:2] == ["pair"]:  # its programs run once or twice
        backends.compile_quickly()
    environment.exit_fast(main())
