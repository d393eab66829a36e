"""Faults of dropout in ViT, and of stochastic depth in ConvNeXt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lockstep.backends.faults.networks import CONVNEXT, VIT
from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.common.config import Config
from lockstep.common.data import Dataset

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import flax_layers, jax


def _dropout(patch: SetAttr, of: Callable[[jax.Array, jax.Array, float], jax.Array]) -> None:
    """Replace dropout in training by `of(x, mask, rate)`."""
    from lockstep.backends.faults.frameworks import flax_layers

    def call(self: flax_layers.Dropout, x: jax.Array) -> jax.Array:
        return x if self.deterministic else of(x, self.mask[...], self.rate)

    patch(flax_layers.Dropout, "__call__", call)


@fault(
    "forward",
    "input of blocks.0.*",
    "PyTorch docs, Dropout: outputs are scaled by 1 / (1 - p)",
    **VIT,
)
def dropout_scaled_wrongly(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The activations that dropout keeps are multiplied by the share that is kept, where they
    should be divided by it."""
    _dropout(patch, lambda x, mask, rate: x * mask * (1 - rate))


@fault(
    "forward",
    "input of blocks.0.*",
    "Srivastava et al. 2014, section 4: the weights are scaled at test time",
    **VIT,
)
def dropout_not_scaled(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The activations that dropout keeps are not scaled, in training and in evaluation."""
    _dropout(patch, lambda x, mask, rate: x * mask)


@fault(
    "forward",
    "input of blocks.0.*",
    "flax docs, nnx.Dropout: broadcast_dims; Keras: SpatialDropout1D",
    **VIT,
)
def dropout_of_whole_features(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Dropout leaves a feature out of all tokens of an image, or of none."""
    _dropout(patch, lambda x, mask, rate: x * mask[:, :1] / (1 - rate))


@fault(
    "data",
    "batch",
    "jax docs, Pseudorandom numbers: a key that is used again or split late",
    **VIT,
)
def dropout_of_the_next_step(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Each step uses the dropout mask of the next step."""
    from lockstep.backends.faults.frameworks import flax_backend

    drawn = flax_backend.draw_masks
    patch(
        flax_backend,
        "draw_masks",
        lambda layers, seed, step, shape: drawn(layers, seed, step + 1, shape),
    )


@fault(
    "forward",
    "input of blocks.*",
    "torchvision docs, stochastic_depth: mode is batch or row; timm: drop_path",
    **CONVNEXT,
)
def depth_of_whole_batches(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Stochastic depth leaves a branch out of all images of a batch, or of none."""
    _dropout(patch, lambda x, mask, rate: x * mask[:1] / (1 - rate))
