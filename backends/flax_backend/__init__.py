"""JAX: `flax.nnx`, `optax.sgd`, `jax.jit`."""
