"""Faults of layers and losses that only a user's pair has: embeddings, recurrent layers, transposed
convolutions, masked losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.common.config import Config
from lockstep.common.data import Dataset

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import jax, nnx

PLACE = "lockstep.backends.faults.layer_pairs"
SHORT: dict[str, Any] = {"steps": 10, "batch_size": 8}
TAGGER: dict[str, Any] = SHORT | {"model": f"{PLACE}:TAGGER"}
PAINTER: dict[str, Any] = SHORT | {"model": f"{PLACE}:PAINTER"}


# --- Transposed convolutions


@fault(
    "forward",
    "larger",
    "flax docs, ConvTranspose: transpose_kernel; PyTorch's kernel lies the other way round",
    **PAINTER,
)
def transposed_kernel_unflipped(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The kernels of transposed convolutions are not flipped."""
    from lockstep.backends.faults.frameworks import jax

    convolution = jax.lax.conv_transpose
    patch(
        jax.lax,
        "conv_transpose",
        lambda x, kernel, *others, **options: convolution(
            x, kernel[::-1, ::-1], *others, **options
        ),
    )


@fault("forward", "larger", "flax docs, ConvTranspose: padding is SAME", **PAINTER)
def transposed_same_padding(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Transposed convolutions have SAME padding, which cuts a pixel on the other side."""
    from lockstep.backends.faults.frameworks import jax

    convolution = jax.lax.conv_transpose
    patch(
        jax.lax,
        "conv_transpose",
        lambda x, kernel, strides, padding, **options: convolution(
            x, kernel, strides, "SAME", **options
        ),
    )


# --- Recurrent layers


def _gru(
    cell: nnx.GRUCell,
    h: jax.Array,
    x: jax.Array,
    reset: int = 0,
    update: int = 1,
    reset_first: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """A GRU's step.

    Args:
        reset, update: the place of each gate among the three.
        reset_first: multiply by the reset gate before the matrix.
    """
    from lockstep.backends.faults.frameworks import jax, jnp

    own, hidden = (jnp.split(dense, 3, -1) for dense in (cell.dense_i(x), cell.dense_h(h)))
    r, z = (jax.nn.sigmoid(own[place] + hidden[place]) for place in (reset, update))
    new = jnp.split(cell.dense_h(r * h), 3, -1)[2] if reset_first else r * hidden[2]
    h = (1 - z) * jnp.tanh(own[2] + new) + z * h
    return h, h


@fault(
    "forward",
    "input of head",
    "PyTorch docs, GRU: weight_ih_l is (W_ir|W_iz|W_in); Keras has z first",
    **TAGGER,
)
def gru_gates_swapped(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """A GRU's reset gate is taken for its update gate, and the other way round."""
    from lockstep.backends.faults.frameworks import nnx

    patch(nnx.GRUCell, "__call__", lambda cell, h, x: _gru(cell, h, x, reset=1, update=0))


@fault(
    "forward",
    "input of head",
    "Cho et al. 2014 (arXiv:1406.1078); Keras docs, GRU: reset_after",
    **TAGGER,
)
def gru_reset_before_product(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """A GRU's reset gate multiplies the hidden state before the matrix and the bias, not after."""
    from lockstep.backends.faults.frameworks import nnx

    patch(nnx.GRUCell, "__call__", lambda cell, h, x: _gru(cell, h, x, reset_first=True))


def _change_lstm(patch: SetAttr, order: str = "ifgo", forget_bias: float = 0.0) -> None:
    from lockstep.backends.faults.frameworks import jax, jnp, nnx

    def step(
        cell: nnx.OptimizedLSTMCell, carry: tuple[jax.Array, jax.Array], x: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        c, h = carry
        gates = dict(zip(order, jnp.split(cell.dense_i(x) + cell.dense_h(h), 4, -1), strict=True))
        i, f, o = (jax.nn.sigmoid(gates[name] + forget_bias * (name == "f")) for name in "ifo")
        c = f * c + i * jnp.tanh(gates["g"])
        h = o * jnp.tanh(c)
        return (c, h), h

    patch(nnx.OptimizedLSTMCell, "__call__", step)


@fault(
    "forward",
    "input of head",
    "PyTorch docs, LSTM: (W_ii|W_if|W_ig|W_io); TensorFlow's cell had i, g, f, o",
    **TAGGER,
)
def lstm_gates_swapped(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """An LSTM's forget gate is taken for its cell gate, and the other way round."""
    _change_lstm(patch, order="igfo")


@fault(
    "forward",
    "input of head",
    "Jozefowicz et al. 2015; Haiku adds 1 to the forget gate, Keras has unit_forget_bias",
    **TAGGER,
)
def lstm_forget_bias_of_one(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """One is added to an LSTM's forget gate."""
    _change_lstm(patch, forget_bias=1.0)


@fault(
    "backward",
    "gru.cell.dense_h.bias",
    "PyTorch docs, GRU: bias_ih_l and bias_hh_l, where Flax's cell has one bias",
    **TAGGER,
)
def one_bias_of_two(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """A GRU has the sum of PyTorch's two biases, and trains one of them."""
    from lockstep.backends.faults.frameworks import jax, nnx

    call = nnx.GRUCell.__call__

    def step(cell: nnx.GRUCell, h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        bias = cell.dense_h.bias
        assert bias is not None
        kept = bias[...]
        bias[...] = jax.lax.stop_gradient(kept)
        try:
            return call(cell, h, x)
        finally:
            bias[...] = kept

    patch(nnx.GRUCell, "__call__", step)


# --- Embeddings and masks


@fault(
    "backward",
    "embed.embedding",
    "PyTorch docs, Embedding: padding_idx; flax's Embed has none",
    **TAGGER,
)
def padding_trained(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The embedding of the padding is trained as that of any word."""
    from lockstep.backends.faults import layer_pairs

    patch(layer_pairs, "fixed_padding", lambda words, embedded: embedded)


@fault("loss", "loss", "PyTorch docs, CrossEntropyLoss: ignore_index", **TAGGER)
def masked_mean_over_all(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Labels of the padding are left out of the sum of losses, but counted in its divisor."""
    from lockstep.backends.faults.frameworks import flax_losses, jnp

    mean = flax_losses.cross_entropy_of_each

    def over_all(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return mean(logits, labels) * jnp.mean(labels != flax_losses.IGNORED, dtype=logits.dtype)

    _change_loss(patch, over_all)


@fault("loss", "loss", "transformers docs: labels of -100 are ignored", **TAGGER)
def padding_labelled(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Labels of the padding count as the first class."""
    from lockstep.backends.faults.frameworks import flax_losses, jnp

    mean = flax_losses.cross_entropy_of_each
    _change_loss(patch, lambda logits, labels: mean(logits, jnp.maximum(labels, 0)))


def _change_loss(patch: SetAttr, loss: Callable[[jax.Array, jax.Array], jax.Array]) -> None:
    """Replace the cross entropy of pairs by `loss(logits, labels)`."""
    from lockstep.backends.faults.frameworks import flax_losses

    patch(flax_losses, "LOSSES", {**flax_losses.LOSSES, "cross entropy": loss})
