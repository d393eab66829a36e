"""What training in JAX changes. Reads next to backends/torch_backend/state.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

Parameters = Any  # a dictionary of arrays by dotted name; optax and JAX call any such tree a pytree


class State(NamedTuple):
    """What training changes; JAX returns a new one and reuses the memory of the old."""

    parameters: Parameters
    model_state: Parameters
    optimizer_state: Any
    step: jax.Array  # int32 ()
