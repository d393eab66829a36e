"""Modules of other JAX libraries, as modules of `flax.nnx`: the second side of a user's pair."""
