"""PyTorch's weight files: state dicts. Reads next to
backends/flax_backend/weight_files.py."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lockstep.backends.torch_backend import convert
from lockstep.backends.torch_backend.user_module import build
from lockstep.common.errors import DataError, shorten
from lockstep.common.model.weight_files import (
    Shapes,
    TensorHeader,
    check_headers,
    check_numbers,
    check_size,
    reader_errors,
    size_limit,
    size_of,
)
from lockstep.common.protocol import Arrays
from lockstep.common.system.storage import write_atomic

KIND = "PyTorch state dict"
Entry = TypeVar("Entry", Tensor, TensorHeader)


def read_weights(path: Path, shapes: Shapes, model: str = "net") -> Arrays:
    """The network's parameters, canonical, from a state dict as `torch.save` writes it; any
    floating-point dtype.

    Args:
        shapes: canonical, from `Backend.shapes`.
        model: Config.model.

    Raises:
        DataError: if the file is damaged, or does not hold exactly the network's parameters.
    """
    limit = size_limit(shapes)
    check_size(path, size_of(path), limit)
    with reader_errors(path, KIND):
        check_headers(
            path, without_buffers(read_headers(path, limit), model), native_shapes(shapes, model)
        )
        arrays = from_native(torch.load(path, map_location="cpu", weights_only=True), model)
    check_numbers(path, arrays)
    return arrays


def write_weights(path: Path, arrays: Arrays, model: str = "net") -> None:
    """Write canonical parameters as a state dict, atomically, for `torch.load(path,
    weights_only=True)`.

    Raises:
        RecordError: if the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(to_native(arrays, model), buffer)
    write_atomic(path, buffer.getvalue())


def read_headers(path: Path, limit: int) -> dict[str, TensorHeader]:
    """Shapes and dtypes of the file's tensors; their numbers are not read.

    `weights_only` keeps a pickle from running code, but not from taking memory: it permits
    `bytearray(10**11)`, and a few bytes of a zip archive can unpack to many.
    """
    remedy = "save it with torch.save(model.state_dict(), FILE)"
    with zipfile.ZipFile(path) as archive:
        check_size(path, sum(entry.file_size for entry in archive.infolist()), limit)
        [pickled] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        operations = list(pickletools.genops(archive.read(pickled)))
    made = {str(argument) for operation, argument, _ in operations if operation.name == "GLOBAL"}
    if others := shorten(name for name in sorted(made) if not is_allowed_global(name)):
        raise DataError(f"{path} is no {KIND}, for it makes {others}: {remedy}")
    loaded = torch.load(path, map_location="meta", weights_only=True)
    entries = loaded if isinstance(loaded, dict) else {"the whole": loaded}
    if others := shorten(
        f"{name} is {type(t).__name__}" for name, t in entries.items() if not isinstance(t, Tensor)
    ):
        raise DataError(f"{path} is no {KIND}, for not all in it are tensors ({others}): {remedy}")
    return {
        str(name): TensorHeader(tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for name, t in entries.items()
    }


def is_allowed_global(name: str) -> bool:
    """Whether a state dict may import `name`, "<module> <name>" in pickle: a storage, a dtype, or a
    function that rebuilds a tensor."""
    module, _, name = name.partition(" ")
    if module in ("torch", "torch.storage"):
        return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
    return (module, name) == ("collections", "OrderedDict") or (
        module == "torch._utils" and name.startswith(("_rebuild_tensor_v", "_rebuild_parameter"))
    )


def from_native(tensors: Mapping[str, Tensor], model: str = "net") -> Arrays:
    """Canonical arrays from a state dict; its other entries are left out."""
    return convert.to_canonical(empty_model(model), without_buffers(tensors, model))


def to_native(arrays: Arrays, model: str = "net") -> dict[str, Tensor]:
    """A whole state dict from canonical arrays: contiguous tensors on the CPU."""
    empty = empty_model(model)
    tensors = {
        name: tensor.contiguous() for name, tensor in convert.from_canonical(empty, arrays).items()
    }
    return tensors | buffers_of(empty)


def native_shapes(shapes: Shapes, model: str = "net") -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors by PyTorch's names: OIHW, and (out, in)."""
    arrays = {name: np.zeros(shape) for name, shape in shapes.items()}
    tensors = convert.from_canonical(empty_model(model), arrays)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def without_buffers(entries: Mapping[str, Entry], model: str) -> dict[str, Entry]:
    """The entries of a state dict that are parameters or statistics."""
    buffers = buffers_of(empty_model(model))
    return {name: entry for name, entry in entries.items() if name not in buffers}


def buffers_of(empty: nn.Module) -> dict[str, Tensor]:
    """The other entries of a state dict: a user's constants, and a batch norm's count of batches,
    which is 0 here, since nothing in these networks reads it."""
    known = {name for name, _ in empty.named_parameters()} | convert.statistics(empty).keys()
    buffers = {name: tensor for name, tensor in empty.state_dict().items() if name not in known}
    return {
        name: torch.zeros_like(t, device="cpu") if t.is_meta else t for name, t in buffers.items()
    }


def empty_model(model: str = "net") -> nn.Module:
    """The network without weights; its layout does not depend on the number of classes."""
    return build(model, 1, "cpu")
