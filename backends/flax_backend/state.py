"""The training state in JAX. Reads next to backends/torch_backend/state.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

# Pytrees: JAX and optax return them with the structure that they were given.
Parameters = Any  # dict[str, jax.Array]: arrays by dotted name
OptimizerState = Any  # of `optimizer.make_optimizer`


class State(NamedTuple):
    """The state of training; JAX returns a new one and reuses the memory of the old."""

    parameters: Parameters
    model_state: Parameters
    optimizer_state: OptimizerState
    step: jax.Array  # int32 ()
