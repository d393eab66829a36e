"""Images and labels on the device, in PyTorch's layout. Reads next to
backends/flax_backend/inputs.py."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from lockstep.common.data import normalise

Array = np.ndarray | Tensor  # in NumPy's layout, or on the device in the framework's


class Data(NamedTuple):
    """A data set on the device."""

    images: Tensor  # uint8 (n, channels, height, width), or with the channels last
    labels: Tensor  # int64 (n,)


class Inputs:
    """From NumPy's arrays, images with the channels last, to tensors with the channels first.

    Args:
        dtype: of normalised images.
        device: "cpu" or "cuda".
        channels_last: leave the images in NumPy's order in memory.
    """

    def __init__(self, dtype: np.dtype, device: str, channels_last: bool) -> None:
        self.dtype, self.device, self.channels_last = dtype, device, channels_last
        table = normalise(np.arange(256, dtype=np.uint8), dtype)
        self._pixel_table = as_tensor(table).to(device)

    def images(self, images: Array) -> Tensor:
        """(..., height, width, channels) to (..., channels, height, width); tensors are returned
        unchanged."""
        if isinstance(images, Tensor):
            return images
        images = as_tensor(images).to(self.device).movedim(-1, -3)
        return images if self.channels_last else images.contiguous()

    def labels(self, labels: Array) -> Tensor:
        if isinstance(labels, Tensor):
            return labels
        return torch.from_numpy(labels).to(self.device, torch.int64)

    def upload(self, images: np.ndarray, labels: np.ndarray) -> Data:
        pixels = torch.from_numpy(images).to(self.device)
        pixels = pixels if self.channels_last else pixels.movedim(-1, -3).contiguous()
        return Data(pixels, self.labels(labels))

    def batches(self, uploaded: Data, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(indices).to(self.device)
        if self.device == "cpu":
            # In NumPy's memory, which glibc reuses from chunk to chunk, unlike PyTorch's.
            images = as_tensor(normalise(uploaded.images.numpy()[indices], self.dtype))
            images = images.movedim(-1, -3) if self.channels_last else images
            return images, uploaded.labels[chosen]
        pixels = uploaded.images[chosen]
        images = self._pixel_table.index_select(0, pixels.flatten().int()).view(pixels.shape)
        return images, uploaded.labels[chosen]

    def download(self, images: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
        return as_array(self.images(images).movedim(-3, -1)), as_array(self.labels(labels))


def as_array(tensor: Tensor) -> np.ndarray:
    """The inverse of `as_tensor`, from any device."""
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory. NumPy's bfloat16 is `ml_dtypes`', which PyTorch does
    not know."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
