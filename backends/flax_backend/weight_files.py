"""Flax's weight files: Orbax checkpoints. Reads next to
backends/torch_backend/weight_files.py."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from tensorstore import KvStore, TensorStore

from lockstep.backends.flax_backend import convert
from lockstep.backends.flax_backend.user_module import build
from lockstep.common.errors import DataError, RecordError, shorten
from lockstep.common.model.weight_files import (
    Shapes,
    TensorHeader,
    check_headers,
    check_numbers,
    check_size,
    damaged_file,
    reader_errors,
    size_limit,
    size_of,
)
from lockstep.common.protocol import Arrays
from lockstep.common.system.storage import flush_folder

KIND = "Orbax checkpoint"
MARK = "_METADATA"  # the file that marks a folder as a checkpoint


def read_weights(path: Path, shapes: Shapes, model: str = "net") -> Arrays:
    """The network's parameters, canonical, from an Orbax checkpoint of an `nnx` state; any
    floating-point dtype.

    Args:
        shapes: canonical, from `Backend.shapes`.
        model: Config.model.

    Raises:
        DataError: if the folder is damaged, or does not hold exactly the network's parameters.
    """
    folder = find_checkpoint(path)
    check_size(folder, size_of(folder), size_limit(shapes))
    with reader_errors(path, KIND):
        stores = open_arrays(folder)
        if not stores:
            raise damaged_file(path, KIND, "no arrays")
        names = canonical_names(model)
        stores = {names.get(native, native): store for native, store in stores.items()}
        check_headers(path, read_headers(path, stores), shapes)
        arrays = {name: np.array(store.read().result()) for name, store in stores.items()}
    check_numbers(path, arrays)
    return arrays


def write_weights(path: Path, arrays: Arrays, model: str = "net") -> None:
    """Write canonical parameters as an Orbax checkpoint, atomically, for
    `StandardCheckpointer.restore`.

    Raises:
        RecordError: if the folder cannot be written, or exists: like Orbax, this replaces none.
    """
    path = path.resolve()  # Orbax takes absolute paths only
    try:
        if path.exists():
            raise RecordError(
                f"{path} is there already: remove it, or choose another folder with --out"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(
                    Path(aside) / path.name, convert.nest(arrays, canonical_names(model))
                )
            (Path(aside) / path.name).rename(path)
        flush_folder(path.parent)
    except (OSError, ValueError) as error:  # ValueError: tensorstore's
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise RecordError(
            f"cannot write {path} ({reason}): choose another folder with --out or free some space"
        ) from error


def canonical_names(model: str) -> dict[str, str]:
    """The canonical names by Flax's own, which do not depend on the number of classes."""
    return build(model, 1, "cpu").names


def find_checkpoint(path: Path) -> Path:
    """The checkpoint's folder: `path` itself, or the only checkpoint in it, as a manager that keeps
    one step writes it.

    Raises:
        DataError: if there is none, or more than one.
    """
    size_of(path)  # raises if it cannot be read
    path = path.resolve()
    found = [path] if (path / MARK).exists() else sorted(mark.parent for mark in path.rglob(MARK))
    if len(found) != 1:
        names = shorten(str(folder.relative_to(path)) for folder in found) or "none in it"
        raise DataError(f"{path} is no {KIND} ({names}): give the folder that has a file {MARK}")
    return found[0]


def read_headers(path: Path, stores: Mapping[str, TensorStore]) -> dict[str, TensorHeader]:
    """Shapes and dtypes of the checkpoint's arrays; their numbers are not read.

    Raises:
        DataError: if an array is stored in pieces that are larger than itself: a small file could
            then need any amount of memory.
    """
    headers = {}
    for name, store in stores.items():
        headers[name] = TensorHeader(store.shape, store.dtype.name)
        pieces = store.chunk_layout.read_chunk.shape or ()
        if any(
            (piece or 0) > max(1, size) for piece, size in zip(pieces, store.shape, strict=True)
        ):
            raise damaged_file(path, KIND, f"{name} is {store.shape}, in pieces of {pieces}")
    return headers


def open_arrays(folder: Path) -> dict[str, TensorStore]:
    """The arrays of a checkpoint by dotted name, without the last level `value` of an `nnx.State`.

    Read one by one with TensorStore, with which Orbax writes: at a damaged array, Orbax's reader
    would leave reads of others running, which print their errors later.
    """
    store: dict[str, object] = {"driver": "file", "path": f"{folder}/"}
    if (folder / "manifest.ocdbt").exists():
        store = {"driver": "ocdbt", "base": store}
    keys = KvStore.open(store).result().list().result()
    stores = {}
    for name, _, file in (key.decode().rpartition("/") for key in keys):
        driver = {".zarray": "zarr", "zarr.json": "zarr3"}.get(file)
        if driver is not None:
            found = tensorstore.open(
                {"driver": driver, "kvstore": store, "path": f"{name}/"}, read=True
            ).result()
            stores[name.replace("/", ".").removesuffix(".value")] = found
    return stores
