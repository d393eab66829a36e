"""`lockstep.Run`: the calls with which a training script lets Lockstep record it.

Outside a command of Lockstep every call returns at once and records nothing. This module imports
no NumPy: a script pays for what it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from lockstep.common.recorder import settings

if TYPE_CHECKING:
    from lockstep.common.recorder.recorder import Recorder

T = TypeVar("T")
_runs: list[Run] = []  # those of this process


class Run:
    """One training run of a script.

    The order of the calls: `begin` once; in each step `sync` (optional), `batch`, then `step`;
    `finish` at the end.
    """

    def __init__(self, backend_module: Callable[[str], ModuleType]) -> None:
        """
        Args:
            backend_module: imports a module of `lockstep.backends`.
        """
        self._backend_module = backend_module
        self._recorder: Recorder | None = None
        self._state: tuple[Any, ...] = ()
        self._drawn: dict[str, int] = {}  # how often each name was drawn in this step
        self._step = 0
        if (found := settings.active()) is not None:
            from lockstep.common.recorder.recorder import Recorder

            self._recorder = Recorder(found, backend_module)
            _runs.append(self)

    def begin(self, *state: Any) -> Any:
        """Register what is trained, before the first step.

        In a float64 run parameters become float64; a twin's are moved by an ulp.

        Args:
            state: PyTorch modules and optimizers, `nnx` modules and optimizers, or any pytrees of
                arrays: parameters, statistics, optimizer states.

        Returns:
            What was given: one thing, or a tuple. Modules and optimizers are changed in place;
            pytrees are new ones.
        """
        if self._recorder is not None:
            state = self._recorder.begin(state)
        self._state = state
        return state[0] if len(state) == 1 else state

    def sync(self, *state: Any) -> Any:
        """Optional, first in each step: lets Lockstep replay single steps of both scripts.

        Two float64 runs may drift apart late because training amplifies rounding, or because a
        step computes something else. Where both scripts call this, `check` tells the two apart: it
        takes such a step again on both sides, from the state of the first script.

        Args:
            state: what `begin` was given, in the same order. PyTorch and `nnx` need none: their
                modules and optimizers are changed in place.

        Returns:
            What was given: one thing, or a tuple. Pytrees may be new ones: go on with these.
        """
        if self._recorder is not None:
            state = self._recorder.sync(state)
        return state[0] if len(state) == 1 else state

    def batch(self, *arrays: Any) -> Any:
        """One batch: arrays, or trees of arrays, of NumPy or of the script's framework.

        Its digest is recorded, and in the first two steps its values. In a float64 run float arrays
        become float64; a twin's are moved by an ulp. A step may call it several times.

        Returns:
            What was given: one thing, or a tuple.
        """
        if self._recorder is not None:
            arrays = self._recorder.batch(arrays)
        return arrays[0] if len(arrays) == 1 else arrays

    def tap(self, name: str, value: T) -> T:
        """Record a tensor of the forward pass in the first two steps, and return it.

        It may be called inside `jax.jit`, `jax.grad` and `jax.lax.scan`, where the last call of a
        step counts.
        """
        if self._recorder is not None:
            self._recorder.tap(name, value)
        return value

    def random(self, name: str, shape: tuple[int, ...] = (), kind: str = "normal") -> Any:
        """Random numbers that are the same on both sides: a function of name, step and seed.

        Call it outside `jax.jit`, and pass the numbers in. A second call of the same name in one
        step gives other numbers. Without a command of Lockstep the seed is 0.

        Args:
            kind: "normal" (mean 0, variance 1) or "uniform" (from 0 to below 1).

        Returns:
            An array of `shape`, of the framework and the precision of what `begin` was given.
        """
        from lockstep.common.recorder.adapter import adapter_for
        from lockstep.common.recorder.random import draw

        count = self._drawn.get(name, 0)
        self._drawn[name] = count + 1
        seed = 0 if self._recorder is None else self._recorder.settings.seed
        numbers = draw(seed, self._step, name, count, shape, kind)
        return adapter_for(self._state, self._backend_module).random(numbers, self._state)

    def step(
        self,
        loss: Any,
        *,
        params: Any = None,
        grads: Any = None,
        opt_state: Any = None,
        lr: Any = None,
    ) -> None:
        """The end of one training step.

        Args:
            loss: a scalar, or a dictionary of scalars by name.
            params: the updated parameters, in the structure that `begin` was given. PyTorch and
                `nnx` need none: `begin` was given the modules.
            grads: the gradients as they were computed, before clipping, in the same structure.
            opt_state: of `optax`.
            lr: the learning rate of this step.
        """
        self._step += 1
        if self._drawn:
            self._drawn.clear()
        if self._recorder is not None:
            self._recorder.step(loss, params, grads, opt_state, lr)

    def finish(self, **results: Any) -> None:
        """The end of the run.

        Args:
            results: numbers and arrays by name, such as predictions and accuracy.
        """
        if self._recorder is not None:
            self._recorder.finish(results)

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()


def steps_taken() -> int:
    """How many steps this process has recorded."""
    return sum(run._step for run in _runs)


def close() -> None:
    """Write the recording of a script that has ended without `finish`.

    Raises:
        RecordError: if it cannot be written.
    """
    for run in _runs:
        run._close()
