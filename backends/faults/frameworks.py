"""The objects that faults change: the frameworks, and the Flax backend. A fault imports from here when it is
applied, so that the catalogue can be listed without a framework."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lockstep.backends.flax_backend import backend as flax_backend
from lockstep.backends.flax_backend import convert
from lockstep.backends.flax_backend import layers as flax_layers
from lockstep.backends.flax_backend import losses as flax_losses
from lockstep.backends.flax_backend import optimizer as flax_optimizer
from lockstep.backends.flax_backend.backend import FlaxBackend
from lockstep.backends.flax_backend.inputs import Inputs
from lockstep.backends.flax_backend.models import net as flax_model
from lockstep.backends.flax_backend.models import resnet20 as flax_resnet20
from lockstep.backends.flax_backend.models import vit as flax_vit
from lockstep.backends.flax_backend.state import State

Tensors = dict[str, jax.Array]  # parameters, gradients or buffers by canonical name

__all__ = [
    "FlaxBackend",
    "Inputs",
    "State",
    "convert",
    "flax_backend",
    "flax_layers",
    "flax_losses",
    "flax_model",
    "flax_optimizer",
    "flax_resnet20",
    "flax_vit",
    "jax",
    "jnp",
    "nnx",
    "optax",
]
