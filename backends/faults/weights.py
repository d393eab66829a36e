"""Faults of the initial weights, mostly of their layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.common.config import Config
from lockstep.common.data import Dataset

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import Tensors


def change_weights(patch: SetAttr, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Change canonical weights on their way into JAX."""
    from lockstep.backends.faults.frameworks import convert

    from_canonical = convert.from_canonical

    def changed(arrays: dict[str, np.ndarray]) -> Tensors:
        return from_canonical(
            {name: np.ascontiguousarray(change(name, a)) for name, a in arrays.items()}
        )

    patch(convert, "from_canonical", changed)


@fault("weights", "fc2.kernel", "flax docs, nnx.Linear: kernel_init is lecun_normal")
def own_weights(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """One layer keeps the weights that Flax drew for it."""
    from lockstep.backends.faults.frameworks import jax, nnx

    draw = nnx.initializers.lecun_normal()

    def own(name: str, array: np.ndarray) -> np.ndarray:
        return (
            np.asarray(draw(jax.random.key(0), array.shape, array.dtype))
            if name == "fc2.kernel"
            else array
        )

    change_weights(patch, own)


@fault("weights", "*.bias", "flax docs, nnx.Conv: bias_init is zeros")
def zero_biases(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Biases start from zero, as Flax's do."""
    change_weights(patch, lambda name, array: array * 0 if name.endswith(".bias") else array)


@fault(
    "weights",
    "conv*.kernel",
    "flax docs, Convert PyTorch models to Flax: kernels from OIHW to HWIO",
)
def kernels_h_and_w_swapped(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Convolution kernels are transposed from OIHW to WHIO."""
    change_weights(patch, lambda name, array: array.swapaxes(0, 1) if array.ndim == 4 else array)


@fault(
    "weights",
    "fc*.kernel",
    "flax docs, Convert PyTorch models to Flax: dense kernels must be transposed",
)
def dense_kernels_reshaped(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Dense kernels are reshaped to Flax's shape where they should be transposed."""
    change_weights(
        patch, lambda name, array: array.T.reshape(array.shape) if array.ndim == 2 else array
    )


@fault(
    "weights",
    "fc1.kernel",
    "flax docs, Convert PyTorch models to Flax: Convolutions and Dense Layers",
)
def flatten_rows(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The rows of the dense kernel after the flatten stay in PyTorch's order of channels, height
    and width."""

    def by_channel(name: str, array: np.ndarray) -> np.ndarray:
        if name != "fc1.kernel":
            return array
        return array.reshape(5, 5, 16, -1).transpose(2, 0, 1, 3).reshape(array.shape)

    change_weights(patch, by_channel)


@fault("weights", None, "transformers docs, from_pretrained: torch_dtype", changes_function=False)
def weights_in_half(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The weights came from a file in half precision."""
    change_weights(patch, lambda name, array: array.astype(np.float16).astype(array.dtype))
