"""Images and labels on the device, in JAX's layout. Reads next to
backends/torch_backend/inputs.py."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lockstep.common.data import normalise

Array = np.ndarray | jax.Array  # in NumPy's layout, or on the device in the framework's


class Data(NamedTuple):
    """A data set on the device."""

    images: jax.Array  # uint8 (n, height, width, channels); of a user's pair, any inputs
    labels: jax.Array  # int32 (n,); of a user's pair, any targets


class Inputs:
    """From NumPy's arrays, images with the channels last, to JAX's, in the same layout.

    Args:
        dtype: of normalised images.
    """

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self._pixel_table = jnp.asarray(normalise(np.arange(256, dtype=np.uint8), dtype))
        self._compiled_batches = jax.jit(self._batches)

    def images(self, images: Array) -> jax.Array:
        if images.dtype.kind in "iu":  # tokens, of a user's pair
            return jax.device_put(images)
        return jnp.asarray(images, self.dtype)

    def labels(self, labels: Array) -> jax.Array:
        if labels.dtype.kind == "f":  # of a user's pair
            return jnp.asarray(labels, self.dtype if self.dtype == np.float64 else np.float32)
        return jnp.asarray(labels, jnp.int32)

    def upload(self, images: np.ndarray, labels: np.ndarray) -> Data:
        if images.dtype.kind == "f":  # of a user's pair
            images = normalise(images, self.dtype)
        return Data(jnp.asarray(images), self.labels(labels))

    def batches(self, uploaded: Data, indices: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return self._compiled_batches(uploaded, indices)

    def download(self, images: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.images(images)), np.asarray(self.labels(labels))

    def _batches(self, uploaded: Data, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = uploaded.images[indices]
        if images.dtype == jnp.uint8:
            images = self._pixel_table[images]
        return images, uploaded.labels[indices]
