"""The inputs and outputs of each layer of a `torch.nn.Module`. Reads next to
backends/flax_backend/activations.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lockstep.backends.torch_backend.convert import ROLES, channels_axis, is_own_norm

LAYERS = (*(kinds for kinds, _ in ROLES), nn.MultiheadAttention)


@contextmanager
def record_activations(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record `input of <layer>` and `<layer>` of PyTorch's own layers with parameters and of a
    user's own norms, in the order of calls; of a layer that is called twice, the last call.

    A user's other layers are left out, since the order of their axes is unknown; that of a norm is
    told by the number of its parameters. PyTorch has hooks for this.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not inputs or (is_own_norm(layer) and not has_known_axes(layer, *inputs, output)):
                return  # no inputs: they were given by keyword, which the hook does not get
            found = inputs[0], output
            if isinstance(layer, nn.MultiheadAttention):  # its second output is the attention
                found = [
                    x if layer.batch_first else x.transpose(0, 1) for x in (found[0], output[0])
                ]
            # Copies: the next layer may write into them, as `ReLU(inplace=True)` does.
            seen[f"input of {name}"], seen[name] = (tensor.clone() for tensor in found)

        return hook

    known = [
        (name, layer)
        for name, layer in model.named_modules()
        if name and (any(isinstance(layer, k) for k in LAYERS) or is_own_norm(layer))
    ]
    layers = [(name, layer) for name, layer in known if list(layer.parameters(recurse=False))]
    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def has_known_axes(layer: nn.Module, *activations: object) -> bool:
    """Whether the inputs and the output of a user's own norm are tensors whose channels are
    known."""
    return all(
        isinstance(activation, Tensor) and channels_axis(layer, tuple(activation.shape)) is not None
        for activation in activations
    )
