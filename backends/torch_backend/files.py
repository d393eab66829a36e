"""Weights from and for PyTorch elsewhere: a state dict. Reads beside backends/flax_backend/files.py."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backends.torch_backend import convert
from backends.torch_backend.model import Net
from common.errors import DataError
from common.files import Claim, Shapes, check_claims, check_numbers, check_size, few, reading, room_for, size_of
from common.protocol import Arrays
from common.storage import write_whole

KIND = "PyTorch state dict"


def read_weights(path: Path, shapes: Shapes) -> Arrays:
    """The network's parameters, canonical, from a state dict as `torch.save` writes it; any floating-point dtype.

    Args:
        shapes: canonical.

    Raises:
        DataError: if the file is damaged, or does not hold exactly the network's parameters.
    """
    room = room_for(shapes)
    check_size(path, size_of(path), room)
    with reading(path, KIND):
        check_claims(path, read_claims(path, room), own_shapes(shapes))
        arrays = from_own(torch.load(path, map_location="cpu", weights_only=True))
    check_numbers(path, arrays)
    return arrays


def write_weights(path: Path, arrays: Arrays) -> None:
    """Keep canonical parameters as a state dict, whole or not at all, for `torch.load(path, weights_only=True)`.

    Raises:
        RecordError: if the file cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(to_own(arrays), buffer)
    write_whole(path, buffer.getvalue())


def read_claims(path: Path, room: int) -> dict[str, Claim]:
    """What the file says of its tensors; its numbers are not read.

    `weights_only` keeps a pickle from running code, but not from taking memory: it lets `bytearray(10**11)` pass, and
    a few bytes of a zip archive may unpack to many.
    """
    remedy = "save it with torch.save(model.state_dict(), FILE)"
    with zipfile.ZipFile(path) as archive:
        check_size(path, sum(entry.file_size for entry in archive.infolist()), room)
        [pickled] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        operations = list(pickletools.genops(archive.read(pickled)))
    made = {str(argument) for operation, argument, _ in operations if operation.name == "GLOBAL"}
    if others := few(name for name in sorted(made) if not belongs(name)):
        raise DataError(f"{path} is no {KIND}, for it makes {others}: {remedy}")
    loaded = torch.load(path, map_location="meta", weights_only=True)
    entries = loaded if isinstance(loaded, dict) else {"the whole": loaded}
    if others := few(f"{name} is {type(t).__name__}" for name, t in entries.items() if not isinstance(t, Tensor)):
        raise DataError(f"{path} is no {KIND}, for not all in it are tensors ({others}): {remedy}")
    return {str(name): Claim(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in entries.items()}


def belongs(name: str) -> bool:
    """Whether a state dict needs what pickle calls `name`, "<module> <name>": storages, dtypes, what joins them."""
    module, _, name = name.partition(" ")
    if module in ("torch", "torch.storage"):
        return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)
    return (module, name) == ("collections", "OrderedDict") or (
        module == "torch._utils" and name.startswith(("_rebuild_tensor_v", "_rebuild_parameter"))
    )


def from_own(tensors: Mapping[str, Tensor]) -> Arrays:
    """PyTorch's tensors by PyTorch's names as canonical arrays."""
    return convert.to_canonical(empty_model(), tensors)


def to_own(arrays: Arrays) -> dict[str, Tensor]:
    """The inverse of `from_own`: contiguous tensors on the CPU."""
    return {name: tensor.contiguous() for name, tensor in convert.from_canonical(empty_model(), arrays).items()}


def own_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters by PyTorch's names: OIHW, and (out, in)."""
    zeros = to_own({name: np.zeros(shape) for name, shape in shapes.items()})
    return {name: tuple(tensor.shape) for name, tensor in zeros.items()}


def empty_model() -> Net:
    """The network without weights; its layout does not depend on the number of classes."""
    with torch.device("meta"):
        return Net(classes=1)
