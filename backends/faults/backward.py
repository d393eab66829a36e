"""Faults of the gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.common.config import Config
from lockstep.common.data import Dataset

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import Tensors


def _gradients(patch: SetAttr, change: Callable[[Tensors], Tensors]) -> None:
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

    _gradients(patch, lambda gradients: jax.tree.map(lambda g: 2 * g, gradients))


@fault("backward", None, "PyTorch docs, ddp_comm_hooks: bf16_compress_hook", changes_function=False)
def gradients_in_bfloat16(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients are sent between devices in bfloat16."""
    from lockstep.backends.faults.frameworks import jax, jnp

    _gradients(
        patch,
        lambda gradients: jax.tree.map(lambda g: g.astype(jnp.bfloat16).astype(g.dtype), gradients),
    )
