"""Faults of the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.common.config import Config
from lockstep.common.data import Dataset

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import Tensors, flax_model, jax, nnx

    Layer = Callable[[jax.Array], jax.Array]


def change_network(
    patch: SetAttr,
    relu: Layer | None = None,
    last_relu: Layer | None = None,
    pool: Layer | None = None,
    flatten: Layer | None = None,
) -> None:
    """Replace one operation of `Net`."""
    from lockstep.backends.faults.frameworks import flax_model, nnx

    relu = relu or nnx.relu

    def call(self: flax_model.Net, x: jax.Array) -> jax.Array:
        x = (pool or self.pool)(relu(self.conv1(x)))
        x = (pool or self.pool)(relu(self.conv2(x)))
        x = flatten(x) if flatten else x.reshape(x.shape[0], -1)
        x = relu(self.fc1(x))
        x = (last_relu or relu)(self.fc2(x))
        return self.fc3(x)

    patch(flax_model.Net, "__call__", call)


def _convolution(patch: SetAttr, convolve: Callable[..., jax.Array]) -> None:
    """Convolve by `convolve(images, kernel, strides, padding, **options)`."""
    from lockstep.backends.faults.frameworks import flax_model

    patch(flax_model, "convolution", lambda device: convolve)


def _layers(patch: SetAttr, **attributes: object) -> None:
    """Set attributes of every layer of `Net`."""
    from lockstep.backends.faults.frameworks import flax_model

    init = flax_model.Net.__init__

    def built(self: flax_model.Net, classes: int, device: str, rngs: nnx.Rngs) -> None:
        init(self, classes, device, rngs)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2, self.fc3):
            for name, value in attributes.items():
                setattr(layer, name, value)

    patch(flax_model.Net, "__init__", built)


def _rounded_products(patch: SetAttr, mantissa_bits: int) -> None:
    """Round the factors of every float32 product, as an accelerator's matrix unit does."""
    from flax.nnx.nn.dtypes import promote_dtype

    from lockstep.backends.faults.frameworks import jax, jnp

    def promoted(
        arrays: tuple[jax.Array, jax.Array, jax.Array | None], dtype: jax.typing.DTypeLike | None
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        inputs, kernel, bias = promote_dtype(arrays, dtype=dtype)
        if inputs.dtype == jnp.float32:
            inputs, kernel = (
                jax.lax.reduce_precision(a, 8, mantissa_bits) for a in (inputs, kernel)
            )
        return inputs, kernel, bias

    _layers(patch, promote_dtype=promoted)


@fault(
    "forward",
    "input of fc1",
    "flax docs, Convert PyTorch models to Flax: Convolutions and Dense Layers",
)
def flatten_order(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The flatten orders its features by channel, height and width; the weights expect height,
    width and channel."""
    change_network(patch, flatten=lambda x: x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1))


@fault("forward", "conv1", "flax docs, nnx.Conv: padding defaults to SAME")
def same_padding(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Convolutions pad, as Flax's do by default, and their output is cropped to the size that the
    next layer needs."""
    from lockstep.backends.faults.frameworks import jax

    convolve: Callable[..., jax.Array] = jax.lax.conv_general_dilated

    def same(
        images: jax.Array,
        kernel: jax.Array,
        strides: Sequence[int],
        padding: str,
        **options: object,
    ) -> jax.Array:
        return convolve(images, kernel, strides, "SAME", **options)[:, :-4, :-4]

    _convolution(patch, same)


@fault(
    "forward", "conv1", "jax docs, lax.conv and scipy.signal.convolve: correlation, and convolution"
)
def flipped_kernels(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Layers convolve, with flipped kernels, where both libraries correlate."""
    from lockstep.backends.faults.frameworks import flax_model

    correlate = flax_model.convolution("cpu")
    _convolution(
        patch,
        lambda images, kernel, *rest, **options: correlate(
            images, kernel[::-1, ::-1], *rest, **options
        ),
    )


@fault("forward", "conv2", "flax docs, nnx.Conv: use_bias")
def missing_bias(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """One convolution has no bias."""
    from lockstep.backends.faults.frameworks import convert, jnp

    nest = convert.nest

    def without(
        parameters: Tensors, names: Mapping[str, str] | None = None
    ) -> dict[str | int, object]:
        if "conv2.bias" in parameters:
            parameters = dict(parameters) | {"conv2.bias": jnp.zeros_like(parameters["conv2.bias"])}
        return nest(parameters, names)

    patch(convert, "nest", without)


@fault("forward", "input of conv2", "flax docs, nnx.avg_pool and nnx.max_pool")
def average_pooling(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Windows are averaged, where their maximum should be taken."""
    from lockstep.backends.faults.frameworks import nnx

    change_network(patch, pool=lambda x: nnx.avg_pool(x, window_shape=(2, 2), strides=(2, 2)))


@fault(
    "forward",
    "input of conv2",
    "jax docs, nn.leaky_relu: negative_slope is 0.01; Keras' LeakyReLU: 0.3",
)
def leaky_rectifier(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The rectifier lets one hundredth of negative values through."""
    from lockstep.backends.faults.frameworks import nnx

    change_network(patch, relu=lambda x: nnx.leaky_relu(x, 0.01))


@fault(
    "forward",
    "input of *",
    "PyTorch docs, ReLU6: min(max(0, x), 6); MobileNet uses it",
    lr=0.05,
    steps=90,
)
def relu6(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The rectifier stops at six, which activations reach after a while."""
    from lockstep.backends.faults.frameworks import nnx

    change_network(patch, relu=nnx.relu6)


@fault("forward", "input of fc3", "Keras docs, Dense: activation defaults to None")
def missing_rectifier(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """There is no rectifier between the last two layers."""
    change_network(patch, last_relu=lambda x: x)


@fault(
    "forward",
    "logits",
    "jax docs, Common Gotchas: Double (64bit) precision",
    changes_function=False,
    precision="float64",
)
def float32_inside(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The logits pass through float32."""
    from lockstep.backends.faults.frameworks import flax_model, jnp

    call = flax_model.Net.__call__
    patch(
        flax_model.Net,
        "__call__",
        lambda self, x: call(self, x).astype(jnp.float32).astype(x.dtype),
    )


@fault(
    "forward",
    "conv1",
    "flax docs, nnx.Linear: dtype, the dtype of the computation",
    changes_function=False,
)
def bfloat16_layers(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Mixed precision is left on: layers compute in bfloat16."""
    from lockstep.backends.faults.frameworks import jnp

    _layers(patch, dtype=jnp.bfloat16)


@fault(
    "forward",
    "conv1",
    "jax docs, Matmul precision: TF32 on recent GPUs",
    changes_function=False,
    precision="float32",
)
def tf32_products(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Products are taken in TF32, with 10 bits of mantissa, as JAX does on a GPU by default."""
    _rounded_products(patch, 10)


@fault(
    "forward",
    "conv1",
    "jax docs, Matmul precision: bfloat16 on TPU",
    changes_function=False,
    precision="float32",
)
def bfloat16_products(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Products are taken in bfloat16, with 7 bits of mantissa, as JAX does on a TPU by default."""
    _rounded_products(patch, 7)
