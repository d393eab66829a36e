"""What faults are made of: the frameworks, and the Flax side. Imported when the first fault is applied."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from backends.flax_backend import backend as flax_backend
from backends.flax_backend import convert
from backends.flax_backend import layers as flax_layers
from backends.flax_backend import model as flax_model
from backends.flax_backend import optimizer as flax_optimizer
from backends.flax_backend import resnet20 as flax_resnet20
from backends.flax_backend import vit as flax_vit
from backends.flax_backend.backend import FlaxBackend

__all__ = [
    "FlaxBackend",
    "convert",
    "flax_backend",
    "flax_layers",
    "flax_model",
    "flax_optimizer",
    "flax_resnet20",
    "flax_vit",
    "jax",
    "jnp",
    "nnx",
    "optax",
]
