"""Faults of what ResNet20, ConvNeXt and ViT bring in: norms, shortcuts, attention, dropout, other
kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.backends.faults.weights import change_weights
from lockstep.common.config import Config
from lockstep.common.data import Dataset

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import jax

# Each network in a run that is short, for they are slow: what is wrong here shows in the first
# steps, or in evaluation.
RESNET20: dict[str, Any] = {"model": "resnet20", "batch_size": 8, "steps": 10}
CONVNEXT: dict[str, Any] = {"model": "convnext", "batch_size": 8, "steps": 10}
VIT: dict[str, Any] = {"model": "vit", "batch_size": 8, "steps": 10}


# --- Batch and layer norms


def _norm(
    patch: SetAttr, module: Any, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Build the norms of a network's module with other options."""
    norm = getattr(module, name)
    patch(module, name, lambda features, **options: norm(features, **options | change(options)))


def _mode(patch: SetAttr, mode: Callable[[bool], bool]) -> None:
    """Train, or evaluate, in the other mode."""
    from lockstep.backends.faults.frameworks import FlaxBackend

    model_of = FlaxBackend._model

    def in_mode(self: Any, parameters: Any, model_state: Any, training: bool = True) -> Any:
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

    _norm(patch, flax_resnet20, "BatchNorm", lambda options: {"epsilon": 1e-3})


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
    """The momentum of batch norms is PyTorch's 0.1, where Flax's is what is kept, 0.9."""
    from lockstep.backends.faults.frameworks import flax_resnet20

    _norm(patch, flax_resnet20, "BatchNorm", lambda options: {"momentum": 1 - options["momentum"]})


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

    def without(self: Any, parameters: Any, model_state: Any, images: Any) -> Any:
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

    _norm(patch, flax_vit, "LayerNorm", lambda options: {"epsilon": 1e-5})


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

    def matrices(parameters: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, parameters)

    patch(optax, "add_decayed_weights", lambda weight_decay: decayed(weight_decay, mask=matrices))


# --- Convolutions and shortcuts


def _shortcut(patch: SetAttr, shortcut: Callable[[Any, int], Any]) -> None:
    """ResNet20's blocks with `shortcut(x, channels)`, of the input, strided already, and how many
    are to be added."""
    from lockstep.backends.faults.frameworks import flax_resnet20, nnx

    def call(self: Any, x: jax.Array) -> jax.Array:
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

    def on(device: str) -> Any:
        def convolve(
            images: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any
        ) -> jax.Array:
            if set(strides) == {1}:
                return right(device)(images, kernel, strides, padding, **options)
            return jax.lax.conv_general_dilated(images, kernel, strides, "SAME", **options)

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
    scores: Callable[[Any, Any], Any] | None = None,
    scale: Callable[[int], float] = lambda each: each**-0.5,
) -> None:
    """`Attention` with one part replaced; `each` is the width of one head."""
    from lockstep.backends.faults.frameworks import flax_vit, jnp, nnx

    scores = scores or (lambda query, key: jnp.einsum("nqhd,nkhd->nhqk", query, key))

    def call(self: Any, x: jax.Array) -> jax.Array:
        n, tokens, width = x.shape
        each = width // self.heads
        parts = (n, tokens, *split(self.heads, each))
        query, key, value = (
            self.query(x).reshape(parts),
            self.key(x).reshape(parts),
            self.value(x).reshape(parts),
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


# --- Dropout


def _dropout(patch: SetAttr, of: Callable[[jax.Array, jax.Array, float], jax.Array]) -> None:
    """In training, `of(x, mask, rate)` in place of dropout."""
    from lockstep.backends.faults.frameworks import flax_layers

    def call(self: Any, x: jax.Array) -> jax.Array:
        return x if self.deterministic else of(x, self.mask[...], self.rate)

    patch(flax_layers.Dropout, "__call__", call)


@fault(
    "forward",
    "input of blocks.0.*",
    "PyTorch docs, Dropout: outputs are scaled by 1 / (1 - p)",
    **VIT,
)
def dropout_scaled_wrongly(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """What dropout keeps is multiplied by the share that is kept, where it should be divided by
    it."""
    _dropout(patch, lambda x, mask, rate: x * mask * (1 - rate))


@fault(
    "forward",
    "input of blocks.0.*",
    "Srivastava et al. 2014, section 4: the weights are scaled at test time",
    **VIT,
)
def dropout_not_scaled(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """What dropout keeps is left as it is, in training and in evaluation."""
    _dropout(patch, lambda x, mask, rate: x * mask)


@fault(
    "forward",
    "input of blocks.0.*",
    "flax docs, nnx.Dropout: broadcast_dims; Keras: SpatialDropout1D",
    **VIT,
)
def dropout_of_whole_features(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """A feature is left out of all tokens of an image together, or of none."""
    _dropout(patch, lambda x, mask, rate: x * mask[:, :1] / (1 - rate))


@fault(
    "forward",
    "input of blocks.0.*",
    "jax docs, Pseudorandom numbers: a key that is used again or split late",
    **VIT,
)
def dropout_of_the_next_step(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Each step leaves out what the next one should."""
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
    """A branch is left out of all images of a batch together, or of none."""
    _dropout(patch, lambda x, mask, rate: x * mask[:1] / (1 - rate))
