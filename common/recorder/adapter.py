"""The interface of the two adapters, `lockstep.backends.*_backend.recorder`: what a recorder has to
know of a framework."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from lockstep.common.errors import ConfigError
from lockstep.common.protocol import Arrays

# (name, array) -> the array to use in its place
Change = Callable[[str, np.ndarray], np.ndarray]
# (tensor, array): called for each tensor of a forward pass; without an array where a program that
# will compute it is traced
Keep = Callable[[str, np.ndarray | None], None]
# Whatever a script passes around: modules, optimizers, arrays, and trees of them, of any library.
Tree = Any
State = tuple[Tree, ...]  # what a script gave to `Run.begin`

# The common names of the slots of an optimizer's state, by PyTorch's and optax's own.
SLOTS = {
    "momentum_buffer": "momentum",
    "trace": "momentum",
    "exp_avg": "first moment",
    "grad_avg": "first moment",
    "mu": "first moment",
    "exp_avg_sq": "second moment",
    "square_avg": "second moment",
    "nu": "second moment",
    "exp_inf": "second moment",  # of Adamax; optax calls it nu
    "e_g": "second moment",
    "max_exp_avg_sq": "largest second moment",
    "nu_max": "largest second moment",
    "sum": "sum of squares",
    "sum_of_squares": "sum of squares",
    "acc_delta": "mean squared update",
    "e_x": "mean squared update",
}


# What 1 - b^t of Adam's bias correction may be off by where it is computed in float32, as optax does;
# PyTorch computes it in float64. At b = 0.999 it is 6e-5 of the first one.
SCALARS_ROUNDING = 2.0**-24


class Adapter(Protocol):
    """What a recorder asks of a framework. One object for one run."""

    def begin(self, state: State, change: Change, keep: Keep) -> State:
        """Pass each float parameter, buffer and optimizer tensor through `change`; from now on,
        report the tensors of each forward pass to `keep`.

        Returns:
            The same things: modules and optimizers changed in place, other trees new.
        """
        ...

    def sync(self, state: State, change: Change) -> State:
        """Pass each float parameter, buffer and optimizer tensor through `change`, as they are now:
        the latter as "<slot> of <parameter>".

        Args:
            state: as `begin` returned it, after some steps; () if all of it is changed in place.

        Returns:
            The same things, as `begin`.

        Raises:
            ConfigError: if `state` is needed.
        """
        ...

    def move_scalars(self, share: float) -> None:
        """Of a twin, move the scalars of Adam's bias correction by what float32 may round of them.

        Args:
            share: of that, from -1 to 1. 0 moves nothing, and brings back what an earlier call
                changed outside this adapter.
        """
        ...

    def start(self) -> Arrays:
        """Parameters and buffers after `begin`, by name, in the order of their definition."""
        ...

    def weights(self, params: Tree = None) -> Arrays:
        """Parameters and buffers as they are now.

        Args:
            params: as `Run.step` was given them; None: those of the modules. Without either, none.
        """
        ...

    def parameters(self) -> list[str]:
        """The names of those that are trained."""
        ...

    def gradients(self, grads: Tree = None) -> Arrays:
        """By the parameter's name: the gradients of the last step, before clipping."""
        ...

    def optimizer_state(self, opt_state: Tree = None) -> Arrays:
        """By "<slot> of <parameter>", with the names of SLOTS."""
        ...

    def learning_rate(self) -> float | None:
        """That of the last step, if the framework knows it."""
        ...

    def map_arrays(self, value: Tree, change: Change) -> Tree:
        """Pass every array of a tree through `change`, and return the tree with the results, in the
        arrays' own kind. The names are the paths, such as "" or ".image"."""
        ...

    def tap(self, name: str, value: Tree) -> None:
        """Report a tensor to `keep`, now or when the compiled program runs."""
        ...

    def wait(self) -> None:
        """Wait until all tensors of the step have been reported."""
        ...

    def end_first_steps(self) -> None:
        """From now on report nothing to `keep`."""
        ...

    def random(self, numbers: np.ndarray, state: State) -> Tree:
        """`numbers` as the framework's array, in the precision of the first parameter of `state`."""
        ...

    def detached(self, value: Tree) -> Tree:
        """A scalar that holds no graph; `float` reads it later."""
        ...

    def notes(self) -> list[str]:
        """What could not be recorded, a sentence each."""
        ...

    def describe(self) -> dict[str, object]:
        """Versions, device and threads."""
        ...


def framework_of(state: Sequence[Tree]) -> str:
    """ "torch" or "flax": the adapter for these things.

    Raises:
        ConfigError: if neither framework has been imported.
    """
    if "torch" in sys.modules and any(_is_torch(thing) for thing in state):
        return "torch"
    if "jax" in sys.modules:
        return "flax"
    if "torch" in sys.modules:
        return "torch"
    raise ConfigError("run.begin: neither PyTorch nor JAX has been imported: give it their tensors")


def _is_torch(thing: Tree) -> bool:
    """Whether there is anything of PyTorch's in modules, dictionaries, lists and tuples."""
    torch = sys.modules["torch"]
    if isinstance(thing, dict):
        return any(map(_is_torch, thing.values()))
    if isinstance(thing, (list, tuple)):
        return any(map(_is_torch, thing))
    kinds = (torch.nn.Module, torch.Tensor, torch.optim.Optimizer)
    return isinstance(thing, kinds)


def adapter_for(state: Sequence[Tree], backend_module: Callable[[str], ModuleType]) -> Adapter:
    """A new adapter for what a script gave to `Run.begin`."""
    return backend_module(f"{framework_of(state)}_backend.recorder").Adapter()
