"""Faults of the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.common.config import Config
from lockstep.common.data import Dataset

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import Tensors


def change_gradients(patch: SetAttr, change: Callable[[Tensors], Tensors]) -> None:
    """Change all gradients as they come out of JAX."""
    from lockstep.backends.faults.frameworks import jax

    value_and_grad = jax.value_and_grad

    def changed(
        function: Callable[[Tensors], object], has_aux: bool
    ) -> Callable[[Tensors], tuple[object, Tensors]]:
        right = value_and_grad(function, has_aux=has_aux)

        def call(parameters: Tensors) -> tuple[object, Tensors]:
            value, gradients = right(parameters)
            return value, change(gradients)

        return call

    patch(jax, "value_and_grad", changed)


def _stopped(patch: SetAttr, prefix: str) -> None:
    """Let no gradient through to the parameters whose names begin with `prefix`."""
    from lockstep.backends.faults.frameworks import convert, jax

    nest = convert.nest

    def stopped(
        parameters: Tensors, names: Mapping[str, str] | None = None
    ) -> dict[str | int, object]:
        frozen = {
            name: jax.lax.stop_gradient(p) if name.startswith(prefix) else p
            for name, p in parameters.items()
        }
        return nest(frozen, names)

    patch(convert, "nest", stopped)


@fault("backward", "fc3.bias", "jax docs, lax.stop_gradient")
def stopped_gradient(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The last bias never gets a gradient."""
    _stopped(patch, "fc3.bias")


@fault("backward", "conv1.*", "PyTorch docs, requires_grad; optax docs, set_to_zero")
def frozen_layer(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The first layer is frozen, as it was for fine-tuning."""
    _stopped(patch, "conv1.")


@fault(
    "backward",
    None,
    "jax docs, lax.psum and lax.pmean; PyTorch docs, DistributedDataParallel: averages",
)
def sum_over_devices(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients of two devices are summed, where they should be averaged."""
    from lockstep.backends.faults.frameworks import jax

    change_gradients(patch, lambda gradients: jax.tree.map(lambda g: 2 * g, gradients))


@fault("backward", None, "PyTorch docs, ddp_comm_hooks: bf16_compress_hook", changes_function=False)
def gradients_in_bfloat16(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients are sent between devices in bfloat16."""
    from lockstep.backends.faults.frameworks import jax, jnp

    change_gradients(
        patch,
        lambda gradients: jax.tree.map(lambda g: g.astype(jnp.bfloat16).astype(g.dtype), gradients),
    )


def _ten_bits(patch: SetAttr, names: str) -> None:
    """In float32, round the gradients of the parameters with these names to ten bits."""
    from lockstep.backends.faults.frameworks import jax, jnp

    def rounded(gradient: jax.Array) -> jax.Array:
        if gradient.dtype != jnp.float32:
            return gradient
        bits = jax.lax.bitcast_convert_type(gradient, jnp.int32)
        return jax.lax.bitcast_convert_type((bits + 0x1000) & ~0x1FFF, jnp.float32)

    change_gradients(
        patch,
        lambda gradients: {
            name: rounded(g) if fnmatchcase(name, names) else g for name, g in gradients.items()
        },
    )


@fault(
    "backward",
    None,
    "NVIDIA docs, TF32: 10 bits of mantissa",
    changes_function=False,
    precision="float32",
)
def gradients_of_ten_bits(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """In float32, gradients have a mantissa of 10 bits, as those of a TF32 backward pass."""
    _ten_bits(patch, "*")


@fault(
    "backward",
    "*.kernel",
    "NVIDIA docs, TF32: 10 bits of mantissa",
    changes_function=False,
    precision="float32",
)
def kernels_of_ten_bits(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """In float32, gradients of kernels have a mantissa of 10 bits; those of biases are exact."""
    _ten_bits(patch, "*.kernel")


@fault(
    "backward",
    "conv2.kernel",
    "PyTorch docs, cudnn.allow_tf32: convolutions alone",
    changes_function=False,
    precision="float32",
)
def convolution_of_ten_bits(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """In float32, the second convolution's gradient has a mantissa of 10 bits."""
    _ten_bits(patch, "conv2.kernel")


@fault("backward", "fc2.kernel", "a gradient multiplier of one layer")
def two_percent_larger(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The gradient of one kernel is 2 % larger."""
    change_gradients(
        patch,
        lambda gradients: {n: 1.02 * g if n == "fc2.kernel" else g for n, g in gradients.items()},
    )


@fault("backward", None, "a mean with the divisor of an unbiased variance", batch_size=128)
def divided_by_batch_less_one(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients are divided by one less than the number of images in the batch."""
    size = config.batch_size
    change_gradients(
        patch, lambda gradients: {n: g * (size / (size - 1)) for n, g in gradients.items()}
    )
