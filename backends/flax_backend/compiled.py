"""Many steps as one compiled program: `FlaxBackend._step` inside `jax.lax.scan`. Reads next to
backends/torch_backend/compiled.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import jax
import numpy as np

from lockstep.backends.flax_backend.state import Parameters, State
from lockstep.backends.flax_backend.tuning import compiler_options, has_library_convolution
from lockstep.common.protocol import Metrics

Batches = tuple[jax.Array, jax.Array, Parameters]  # images, labels, dropout masks; (steps, ...)
Step = Callable[..., tuple[State, Metrics]]  # of a state, images, labels and dropout masks


class ManySteps:
    """Takes a training step for each batch along the leading axis: in one compiled loop, or one by
    one."""

    def __init__(self, step: Step, compiled_step: jax.stages.Wrapped, device: str) -> None:
        self._step, self._compiled_step, self.device = step, compiled_step, device
        options = compiler_options(device)
        self._compiled_scan = jax.jit(self._scan, donate_argnums=0, compiler_options=options)
        self._has_library_convolution: bool | None = None  # known once the first step is traced

    def __call__(
        self, state: State, images: jax.Array, labels: jax.Array, masks: Parameters
    ) -> tuple[State, Metrics]:
        """Train on images (steps, batch, height, width, channels), labels (steps, batch) and masks
        (steps, batch, ...)."""
        if self.scan_is_faster(state, (images, labels, masks)):
            state, metrics = self._compiled_scan(state, images, labels, masks)
        else:
            state, metrics = self._one_by_one(state, images, labels, masks)
        return state, Metrics(*(np.asarray(series, np.float64) for series in metrics))

    def _one_by_one(
        self, state: State, images: jax.Array, labels: jax.Array, masks: Parameters
    ) -> tuple[State, Iterable[tuple[jax.Array, ...]]]:
        history = []
        for number in range(len(labels)):
            batch = take_batch((images, labels, masks), number)
            state, metrics = self._compiled_step(state, *batch)
            history.append(metrics)
        return state, zip(*history, strict=True)

    def _scan(
        self, state: State, images: jax.Array, labels: jax.Array, masks: Parameters
    ) -> tuple[State, Metrics]:
        return jax.lax.scan(
            lambda state, batch: self._step(state, *batch), state, (images, labels, masks)
        )

    def scan_is_faster(self, state: State, batches: Batches) -> bool:
        """Whether one program is faster than steps one by one: on the CPU, unless the step uses
        XLA's own convolution."""
        if self.device != "cpu":
            return True
        if self._has_library_convolution is None:
            step = self._compiled_step.trace(state, *take_batch(batches, 0))
            self._has_library_convolution = has_library_convolution(step)
        return not self._has_library_convolution


def take_batch(batches: Batches, number: int) -> Batches:
    """Images, labels and masks of one step."""
    return jax.tree.map(lambda array: array[number], batches)
