"""A linen module as a `flax.nnx.Module`: Flax's own `nnx.bridge.ToNNX`, which is told whether it
trains, and whose layers are known."""

from __future__ import annotations

import inspect
from typing import Any

import jax
from flax import linen, nnx

from lockstep.backends.adapters.modules import Parts, keep
from lockstep.common.model.layers import (
    ATTENTION,
    CONVOLUTION,
    DENSE,
    EMBEDDING,
    NORM,
    kind_of_class,
)

KINDS = (
    ((linen.Conv, linen.ConvTranspose), CONVOLUTION),
    ((linen.Dense, linen.DenseGeneral), DENSE),
    (
        (linen.BatchNorm, linen.InstanceNorm, linen.LayerNorm, linen.GroupNorm, linen.RMSNorm),
        NORM,
    ),
    (linen.Embed, EMBEDDING),
    (linen.MultiHeadDotProductAttention, ATTENTION),
)
# What a module's `__call__` may take to be told whether it trains; and whether that is the opposite.
FLAGS = {"train": False, "training": False, "is_training": False}
FLAGS |= {"deterministic": True, "use_running_average": True, "eval": True}


class Linen(nnx.bridge.ToNNX):
    """Its variables are under the names that they have in linen: `Dense_0.kernel`.

    Args:
        module: one that returns its outputs; it is given `train`, or another of FLAGS, if its
            `__call__` takes that.
        inputs: some, from whose shapes linen makes the parameters.
    """

    def __init__(self, module: linen.Module, inputs: jax.Array, rngs: nnx.Rngs) -> None:
        super().__init__(module, rngs)
        taken = inspect.signature(type(module).__call__).parameters
        self.to_nnx__flag = next((name for name in FLAGS if name in taken), None)
        self.to_nnx__trains = False
        found: dict[str, linen.Module] = {}

        def look(call: Any, arguments: Any, options: Any, context: Any) -> Any:
            found.setdefault(".".join(context.module.path), context.module)
            return call(*arguments, **options)

        with linen.intercept_methods(look):
            self.lazy_init(inputs)
        for name, layer in found.items():
            if isinstance(layer, linen.ConvTranspose) and layer.transpose_kernel:
                raise ValueError(f"{name} has transpose_kernel=True, a layout that is not known")
        # From here on, linen itself refuses what draws random numbers.
        self.to_nnx__rngs = None
        kinds = {name: kind_of_class(layer, KINDS) for name, layer in found.items()}
        classes = dict.fromkeys([type(module), *map(type, found.values())])
        self.to_nnx__parts = Parts(kinds, tuple(classes))

    def __call__(self, *inputs: jax.Array) -> Any:
        flag, parts = self.to_nnx__flag, vars(self).get("to_nnx__parts")
        options: dict[str, Any] = {"mutable": ["batch_stats"] if self.to_nnx__trains else False}
        if flag is not None:
            options[flag] = self.to_nnx__trains != FLAGS[flag]
        if parts is None or parts.seen is None:
            return super().__call__(*inputs, **options)

        def record(call: Any, arguments: Any, named: Any, context: Any) -> Any:
            output, name = call(*arguments, **named), ".".join(context.module.path)
            is_layer = isinstance(context.module, LAYERS) or parts.kinds.get(name) == NORM
            if name and is_layer and context.method_name == "__call__":
                keep(parts, name, arguments, output)
            return output

        with linen.intercept_methods(record):
            return super().__call__(*inputs, **options)

    def train(self, **attributes: object) -> None:
        self.to_nnx__trains = True

    def eval(self, **attributes: object) -> None:
        self.to_nnx__trains = False


# As in `activations.py`, without the dense layers within an attention.
LAYERS = (
    linen.Dense,
    *(each for classes, _ in (KINDS[0], KINDS[2]) for each in classes),
    linen.Embed,
    linen.MultiHeadDotProductAttention,
)
