"""`export`: the trained weights of a run, for use elsewhere."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lockstep.common.cli import parser as options_of
from lockstep.common.cli.parser import Invocation, Parser
from lockstep.common.config import BACKENDS, DTYPES, FORMATS
from lockstep.common.errors import ConfigError, DataError, RecordError, printable
from lockstep.common.model import pair as pairs
from lockstep.common.system import program

SUFFIX = {"torch": ".pt", "safetensors": "-weights.safetensors", "orbax": "-orbax"}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="the folder of a run")
    options_of.add_choice(
        parser, "--to", FORMATS, "as a state dict, safetensors, or an Orbax checkpoint"
    )
    options_of.add_backend(parser, "whose weights (default: PyTorch's, if they are there)")
    options_of.add_dtype(parser, "of which precision (default: the most precise one)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: in the folder of the run"
    )
    parser.add_argument("--quiet", action="store_true", help="print no hint for loading")


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    if options.run is None or options.to is None:
        raise ConfigError(
            f"export needs a run's folder and a format: {program.name()} export RUN --to torch"
        )
    taken = find_trained_record(options.run, options.backend, options.dtype)

    from lockstep.common.runs import record

    weight_files = invocation.backends.module("weight_files")
    path = options.out or taken.with_name(taken.stem + SUFFIX[options.to])
    endings = weight_files.ENDINGS[options.to]
    if endings and path.suffix.lower() not in endings:
        raise ConfigError(
            f"--out {path} must end in {' or '.join(endings)}, which names its format"
        )
    if path.exists() and path.samefile(taken):
        raise ConfigError(f"--out {path} is the record itself: choose another name")
    found = record.read(taken)
    if found.config.get("pair") != pairs.source_digest(found.config["model"]):
        raise DataError(
            f"{found.config['model']} has changed since {taken} was trained: restore it"
        )
    weight_files.write_weights(path, found.final, options.to, found.config["model"])
    loading = weight_files.LOADING[options.to].format(
        path=str(path.absolute() if options.to == "orbax" else path)
    )
    print(printable(f"{path}: the trained weights of {taken.name}; load them with {loading}"))
    return 0


def find_trained_record(folder: Path, backend: str | None, dtype: str | None) -> Path:
    """The first record of a run: PyTorch's before Flax's, and the more precise one first.

    Raises:
        RecordError: if there is none.
    """
    from lockstep.common.runs import record

    names = BACKENDS if backend in (None, "both") else (backend,)
    dtypes = (dtype,) if dtype else DTYPES
    stems = [record.file_stem(name, dtype) for name in names for dtype in dtypes]
    found = [path for stem in stems if os.path.exists(path := folder / f"{stem}.safetensors")]
    if not found:
        raise RecordError(
            f"{folder} holds no record of a finished run ({stems[0]}.safetensors or the like): "
            "give the folder of one"
        )
    return found[0]
