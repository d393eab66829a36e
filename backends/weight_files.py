"""Weight files of other programs: PyTorch's state dicts, safetensors, and Orbax checkpoints.

The ending tells a file's kind; a folder is an Orbax checkpoint. No framework is imported before a
file needs it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from lockstep import backends
from lockstep.common.errors import BackendError, DataError
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
from lockstep.common.runs import checkpoint, record
from lockstep.common.system.storage import read_tensors, write_atomic

# endings of files, by format
ENDINGS = {
    "torch": (".pt", ".pth", ".bin"),
    "safetensors": (".safetensors",),
    "orbax": (),
}
# what a user writes to load the file elsewhere, by format
LOADING = {
    "torch": "model.load_state_dict(torch.load({path!r}, weights_only=True))",
    "safetensors": "safetensors.torch.load_model(model, {path!r})",
    "orbax": "nnx.update(model, orbax.checkpoint.StandardCheckpointer().restore({path!r}))",
}
KIND = "safetensors file"
MAX_HEADER = 2**22  # bytes of names and shapes; safetensors itself takes 100 MB
# Limit of the size of Lockstep's own files, in sizes of the network: they hold losses and
# activations, too.
NATIVE_RATIO = 512


class NativeFile(NamedTuple):
    """A kind of file that Lockstep itself writes."""

    group: str  # prefix of the parameters' names
    what: str
    schema: int


NATIVE_FILES = (
    NativeFile("final/", "record", record.SCHEMA),
    NativeFile("parameters/", "checkpoint", checkpoint.SCHEMA),
)


def read_weights(path: Path, shapes: Shapes, model: str = "net") -> Arrays:
    """The network's parameters, canonical, of any floating-point dtype.

    Args:
        path: a state dict, a safetensors file in PyTorch's names and layout or in Flax's, an Orbax
            checkpoint, or one of Lockstep's own records or checkpoints.
        shapes: canonical, from `Backend.shapes`.
        model: Config.model.

    Raises:
        DataError: if it is missing, damaged, or does not hold exactly the network's parameters.
        RecordError: if it is Lockstep's own, and damaged, or of another version.
        BackendError: if the framework of the format is not installed.
    """
    if os.path.isdir(path):  # unlike `path.is_dir()`, no error for a name that is too long
        return files_of("flax").read_weights(path, shapes, model)
    if path.suffix.lower() in ENDINGS["torch"]:
        return files_of("torch").read_weights(path, shapes, model)
    if path.suffix.lower() in ENDINGS["safetensors"]:
        return _read_safetensors(path, shapes, model)
    check_name(path)
    raise AssertionError(path)


def check_name(path: Path) -> None:
    """Check, without a framework, that the file is there and that its ending is known.

    Raises:
        DataError: otherwise.
    """
    size_of(path)  # raises if it does not exist
    known = [ending for names in ENDINGS.values() for ending in names]
    if not os.path.isdir(path) and path.suffix.lower() not in known:
        raise DataError(
            f"the name of {path} does not say what it is: "
            f"let it end in {', '.join(known)}, or give an Orbax folder"
        )


def write_weights(path: Path, arrays: Arrays, form: str, model: str = "net") -> None:
    """Write canonical parameters for use elsewhere, atomically.

    Args:
        model: Config.model.
        form: one of config.FORMATS; safetensors get PyTorch's names and layout, for
            `safetensors.torch.load_model`.

    Raises:
        RecordError: if it cannot be written, or is an Orbax folder that exists.
        BackendError: if the framework of the format is not installed.
    """
    if form == "safetensors":
        tensors = files_of("torch").to_native(arrays, model)

        from safetensors.torch import save

        write_atomic(path, save(tensors, metadata={"format": "pt"}))
    else:
        files_of({"torch": "torch", "orbax": "flax"}[form]).write_weights(path, arrays, model)


def files_of(name: str) -> ModuleType:
    """The module `weight_files` of one backend."""
    backends.load(name)  # sets what its framework reads at its first import
    try:
        if name == "torch":
            from lockstep.backends.torch_backend import weight_files
        else:
            from lockstep.backends.flax_backend import weight_files
    except ModuleNotFoundError as error:
        raise BackendError(
            f"this needs {error.name}, which is not installed: pip install -e ."
        ) from error
    return weight_files


def _read_safetensors(path: Path, shapes: Shapes, model: str) -> Arrays:
    """Names that end in `.weight` make a file PyTorch's; others are canonical. Shapes decide
    nothing."""
    from safetensors import safe_open

    size = size_of(path)
    check_size(path, size, size_limit(shapes, NATIVE_RATIO))
    with reader_errors(path, KIND):
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER:
            raise damaged_file(path, KIND, f"a header of {header:,} bytes")
        with safe_open(path, framework="numpy") as file:
            metadata, names = file.metadata() or {}, file.keys()
            slices = {name: file.get_slice(name) for name in names}
            headers = {
                name: TensorHeader(tuple(s.get_shape()), _dtype(s.get_dtype()))
                for name, s in slices.items()
            }
        if {"facts", "digest"} <= metadata.keys():
            return _read_native(path, headers, shapes)
        check_size(path, size, size_limit(shapes))
        if any(name.endswith(".weight") for name in headers):
            torch = files_of("torch")
            check_headers(
                path, torch.without_buffers(headers, model), torch.native_shapes(shapes, model)
            )
            with safe_open(path, framework="pt") as file:
                arrays = torch.from_native({name: file.get_tensor(name) for name in headers}, model)
        else:
            check_headers(path, headers, shapes)
            with safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in headers}
    check_numbers(path, arrays)
    return arrays


def _read_native(path: Path, headers: Mapping[str, TensorHeader], shapes: Shapes) -> Arrays:
    """The parameters after the last step in one of Lockstep's records or checkpoints."""
    found = [kind for kind in NATIVE_FILES if any(name.startswith(kind.group) for name in headers)]
    native = (found or NATIVE_FILES)[0]
    mine = {
        name.removeprefix(native.group): header
        for name, header in headers.items()
        if name.startswith(native.group)
    }
    check_headers(path, mine, shapes)
    _, arrays = read_tensors(path, native.schema, native.what, "give another file with --weights")
    arrays = {name: arrays[native.group + name] for name in mine}
    check_numbers(path, arrays)
    return arrays


def _dtype(name: str) -> str:
    return {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(
        name, name
    )
