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

    # uint8 (n, channels, height, width), or with the channels last; of a user's pair, any inputs
    images: Tensor
    labels: Tensor  # int64 (n,); of a user's pair, any targets


class Inputs:
    """From NumPy's arrays, images with the channels last, to tensors with the channels first.

    Args:
        dtype: of normalised images.
        device: "cpu" or "cuda".
        channels_last: leave the images in NumPy's order in memory.
        axes: of one input, and of one target, if the last one is that of the channels; else 1.
    """

    def __init__(
        self, dtype: np.dtype, device: str, channels_last: bool, axes: tuple[int, int] = (3, 1)
    ) -> None:
        self.dtype, self.device, self.channels_last = dtype, device, channels_last
        self.axes, self.target_axes = axes
        table = normalise(np.arange(256, dtype=np.uint8), dtype)
        self._pixel_table = as_tensor(table).to(device)

    def images(self, images: Array) -> Tensor:
        """(..., height, width, channels) to (..., channels, height, width); tensors are returned
        unchanged."""
        if isinstance(images, Tensor):
            return images
        images = as_tensor(images).to(self.device).movedim(-1, -self.axes)
        return images if self.channels_last else images.contiguous()

    def labels(self, labels: Array) -> Tensor:
        if isinstance(labels, Tensor):
            return labels
        if labels.dtype.kind == "f":  # of a user's pair
            wide = self.dtype if self.dtype == np.float64 else np.float32
            targets = torch.from_numpy(labels.astype(wide)).to(self.device)
        else:
            targets = torch.from_numpy(labels).to(self.device, torch.int64)
        return targets.movedim(-1, -self.target_axes)

    def upload(self, images: np.ndarray, labels: np.ndarray) -> Data:
        if images.dtype.kind == "f":  # of a user's pair
            images = normalise(images, self.dtype)
        pixels = as_tensor(images).to(self.device)
        if not self.channels_last:
            pixels = pixels.movedim(-1, -self.axes).contiguous()
        return Data(pixels, self.labels(labels))

    def batches(self, uploaded: Data, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(indices).to(self.device)
        if uploaded.images.dtype != torch.uint8:  # of a user's pair
            return uploaded.images[chosen], uploaded.labels[chosen]
        if self.device == "cpu":
            # In NumPy's memory, which glibc reuses from chunk to chunk, unlike PyTorch's.
            images = as_tensor(normalise(uploaded.images.numpy()[indices], self.dtype))
            images = images.movedim(-1, -3) if self.channels_last else images
            return images, uploaded.labels[chosen]
        pixels = uploaded.images[chosen]
        images = self._pixel_table.index_select(0, pixels.flatten().int()).view(pixels.shape)
        return images, uploaded.labels[chosen]

    def download(self, images: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
        images, labels = self.images(images), self.labels(labels)
        return as_array(images.movedim(-self.axes, -1)), as_array(
            labels.movedim(-self.target_axes, -1)
        )


def pixel_axes(array: np.ndarray) -> int:
    """How many axes a sample has, if it has pixels: three or more, of which the last one is that of
    the channels; else 1.

    Args:
        array: of some samples, (n, ...).
    """
    return array.ndim - 1 if array.ndim > 3 else 1


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
