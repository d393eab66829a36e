"""Faults of ResNet20, ConvNeXt and ViT: norms, shortcuts, attention and other kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.backends.faults.weights import change_weights
from lockstep.common.config import Config
from lockstep.common.data import Dataset

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import (
        FlaxBackend,
        Tensors,
        flax_resnet20,
        flax_vit,
        jax,
        nnx,
    )


class NetworkOptions(TypedDict):
    """Fields of Config."""

    model: str
    batch_size: int
    steps: int


# These networks are slow, so the runs are short: the faults here show in the first steps, or in
# evaluation.
RESNET20: NetworkOptions = {"model": "resnet20", "batch_size": 8, "steps": 10}
CONVNEXT: NetworkOptions = {"model": "convnext", "batch_size": 8, "steps": 10}
VIT: NetworkOptions = {"model": "vit", "batch_size": 8, "steps": 10}


# --- Batch and layer norms


def _norm(patch: SetAttr, module: ModuleType, name: str, **changes: float) -> None:
    """Build the norms of a network's module with other options."""
    norm = getattr(module, name)
    patch(module, name, lambda features, **options: norm(features, **options | changes))


def _mode(patch: SetAttr, mode: Callable[[bool], bool]) -> None:
    """Run the network in `mode(training)`."""
    from lockstep.backends.faults.frameworks import FlaxBackend

    model_of = FlaxBackend._model

    def in_mode(
        self: FlaxBackend, parameters: Tensors, model_state: Tensors, training: bool = True
    ) -> nnx.Module:
        return model_of(self, parameters, model_state, mode(training))

    patch(FlaxBackend, "_model", in_mode)


@fault(
    "forward",
    "bn",
    "Keras docs, BatchNormalization: epsilon is 1e-3; PyTorch's and Flax's is 1e-5",
    **RESNET20,
)
def batch_norm_epsilon(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Batch norms add 1e-3 to the variance in place of 1e-5."""
    from lockstep.backends.faults.frameworks import flax_resnet20

    _norm(patch, flax_resnet20, "BatchNorm", epsilon=1e-3)


@fault(
    "forward",
    "bn",
    "PyTorch docs, Module.eval; flax docs, nnx.BatchNorm: use_running_average",
    **RESNET20,
)
def trained_in_evaluation_mode(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Training normalises by the running statistics, not by the batch's."""
    _mode(patch, lambda training: False)


@fault(
    "update",
    "*.mean",
    "scvi-tools#2309, pytorch#15298: PyTorch's is the new one's share",
    **RESNET20,
)
def batch_norm_momentum(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The momentum of batch norms is PyTorch's 0.1, the share of the new statistics; Flax's is 0.9,
    the share of the old ones."""
    from lockstep.backends.faults.frameworks import flax_resnet20

    _norm(patch, flax_resnet20, "BatchNorm", momentum=1 - 0.9)


@fault(
    "update",
    "*.var",
    "PyTorch docs, BatchNorm2d: running_var is unbiased; Flax's is not",
    **RESNET20,
)
def biased_running_variance(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Batch norms are Flax's own, which keep the biased variance of each batch."""
    from lockstep.backends.faults.frameworks import flax_resnet20, nnx

    patch(flax_resnet20, "BatchNorm", nnx.BatchNorm)


@fault(
    "update",
    "*.mean",
    "flax docs, Batch normalization: batch_stats must be kept from step to step",
    **RESNET20,
)
def statistics_not_updated(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The running statistics stay what they were at the start."""
    from lockstep.backends.faults.frameworks import FlaxBackend

    forward = FlaxBackend._forward

    def without(
        self: FlaxBackend, parameters: Tensors, model_state: Tensors, images: jax.Array
    ) -> tuple[jax.Array, Tensors]:
        return forward(self, parameters, model_state, images)[0], model_state

    patch(FlaxBackend, "_forward", without)


# At lr 0.01, float32 twins of ResNet20 are too far apart after ten steps for this to show.
@fault(
    "evaluate",
    "test loss",
    "PyTorch docs, Module.eval; flax docs, nnx.Module.eval",
    lr=1e-4,
    **RESNET20,
)
def evaluated_in_train_mode(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Evaluation normalises by the statistics of each batch, not by the running ones."""
    _mode(patch, lambda training: True)


@fault(
    "forward",
    "blocks.0.norm1",
    "PyTorch docs, LayerNorm: eps is 1e-5; flax docs, nnx.LayerNorm: 1e-6",
    **VIT,
)
def layer_norm_epsilon(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Layer norms add 1e-5 to the variance, PyTorch's default, in place of 1e-6."""
    from lockstep.backends.faults.frameworks import flax_vit

    _norm(patch, flax_vit, "LayerNorm", epsilon=1e-5)


@fault(
    "update",
    "momentum of *",
    "timm, param_groups_weight_decay: ndim <= 1 is left out",
    weight_decay=0.01,
    **VIT,
)
def only_matrices_decayed(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Weight decay is left off norm scales and all biases, as in many recipes, where SGD's is of
    everything."""
    from lockstep.backends.faults.frameworks import jax, optax

    decayed = optax.add_decayed_weights

    def matrices(parameters: Tensors) -> dict[str, bool]:
        return jax.tree.map(lambda p: p.ndim > 1, parameters)

    patch(optax, "add_decayed_weights", lambda weight_decay, mask: decayed(weight_decay, matrices))


# --- Convolutions and shortcuts


def _shortcut(patch: SetAttr, shortcut: Callable[[jax.Array, int], jax.Array | float]) -> None:
    """Give ResNet20's blocks another shortcut: `shortcut(x, channels)` of the strided input and the
    number of channels to add."""
    from lockstep.backends.faults.frameworks import flax_resnet20, nnx

    def call(self: flax_resnet20.Block, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        x = x[:, :: self.stride, :: self.stride]
        return nnx.relu(y + shortcut(x, y.shape[3] - x.shape[3]))

    patch(flax_resnet20.Block, "__call__", call)


@fault(
    "weights",
    "blocks.*.conv.kernel",
    "PyTorch docs, Conv2d: with groups, (out, in / groups, H, W)",
    **CONVNEXT,
)
def depthwise_kernels_reshaped(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Depthwise kernels, (channels, 1, 7, 7), are reshaped to (7, 7, 1, channels), where they
    should be transposed."""

    def reshaped(name: str, array: np.ndarray) -> np.ndarray:
        if array.ndim != 4 or array.shape[2] != 1:
            return array
        return array.transpose(3, 2, 0, 1).reshape(array.shape)

    change_weights(patch, reshaped)


@fault("forward", "blocks.3.conv1", "TensorFlow docs, tf.nn, Notes on padding: SAME", **RESNET20)
def strided_same_padding(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Convolutions of stride 2 pad SAME, which is 0 before and 1 after, where PyTorch's pad 1 on
    either side."""
    from lockstep.backends.faults.frameworks import flax_layers, flax_resnet20, jax

    right = flax_layers.convolution
    library: Callable[..., jax.Array] = jax.lax.conv_general_dilated

    def on(device: str) -> Callable[..., jax.Array]:
        def convolve(
            images: jax.Array,
            kernel: jax.Array,
            strides: Sequence[int],
            padding: str | Sequence[tuple[int, int]],
            **options: object,
        ) -> jax.Array:
            if set(strides) == {1}:
                return right(device)(images, kernel, strides, padding, **options)
            return library(images, kernel, strides, "SAME", **options)

        return convolve

    patch(flax_resnet20, "convolution", on)


@fault(
    "forward",
    "input of blocks.4.conv1",
    "akamaster/pytorch_resnet_cifar10, resnet.py: option A",
    **RESNET20,
)
def shortcut_padded_both_sides(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Half of a shortcut's new channels come before the old ones, half after; the others are all
    after."""
    from lockstep.backends.faults.frameworks import jnp

    none = (0, 0)
    _shortcut(
        patch, lambda x, channels: jnp.pad(x, (none, none, none, (channels // 2, channels // 2)))
    )


@fault(
    "forward",
    "input of blocks.1.conv1",
    "He et al. 2015, section 4.2: plain and residual networks",
    **RESNET20,
)
def shortcut_left_out(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Blocks have no shortcut."""
    _shortcut(patch, lambda x, channels: 0.0)


# --- Attention


def _attention(
    patch: SetAttr,
    split: Callable[[int, int], tuple[int, int]] = lambda heads, each: (heads, each),
    scores: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    scale: Callable[[int], float] = lambda each: each**-0.5,
) -> None:
    """Replace one operation of `Attention`; `each` is the width of one head."""
    from lockstep.backends.faults.frameworks import flax_vit, jnp, nnx

    scores = scores or (lambda query, key: jnp.einsum("nqhd,nkhd->nhqk", query, key))

    def call(self: flax_vit.Attention, x: jax.Array) -> jax.Array:
        n, tokens, width = x.shape
        each = width // self.heads
        shape = (n, tokens, *split(self.heads, each))
        query, key, value = (
            self.query(x).reshape(shape),
            self.key(x).reshape(shape),
            self.value(x).reshape(shape),
        )
        weights = nnx.softmax(scores(query, key) * scale(each), axis=-1)
        x = jnp.einsum("nhqk,nkhd->nqhd", weights, value)
        return self.out(x.reshape(n, tokens, width))

    patch(flax_vit.Attention, "__call__", call)


@fault(
    "forward",
    "input of blocks.0.fc2",
    "jax docs, nn.gelu: approximate is True; PyTorch docs, GELU: none",
    **VIT,
)
def tanh_gelu(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """GELU is taken by its approximation with tanh, JAX's default."""
    from lockstep.backends.faults.frameworks import nnx

    exact = nnx.gelu
    patch(nnx, "gelu", lambda x, approximate=True: exact(x, approximate=True))


@fault(
    "forward",
    "input of blocks.0.attention.out",
    "transformers, BertSelfAttention: (heads, width of a head)",
    **VIT,
)
def heads_and_width_swapped(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Queries, keys and values are split into as many heads as each should be wide, and as wide as
    heads there are."""
    _attention(patch, split=lambda heads, each: (each, heads))


@fault(
    "forward",
    "input of blocks.0.attention.out",
    "Vaswani et al. 2017, section 3.2.1; T5 has no such factor",
    **VIT,
)
def scores_not_scaled(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Attention's scores are not divided by the root of a head's width."""
    _attention(patch, scale=lambda each: 1.0)


@fault(
    "forward",
    "input of blocks.0.attention.out",
    "PyTorch docs, MultiheadAttention: in_proj_weight stacks query, key and value",
    **VIT,
)
def keys_for_queries(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Keys are taken for queries, and queries for keys."""
    from lockstep.backends.faults.frameworks import jnp

    _attention(patch, scores=lambda query, key: jnp.einsum("nqhd,nkhd->nhqk", key, query))
