"""What users' programs in JAX hold: modules of its libraries, as modules of `flax.nnx` (the second
side of a pair), and arrays of several processes."""
