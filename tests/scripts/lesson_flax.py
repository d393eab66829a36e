"""The lesson's Flax program for 500 steps, from weights that lesson_torch.py has, too."""

from __future__ import annotations

import sys

from flax import nnx

from lockstep.backends.flax_backend import convert
from lockstep.backends.lesson import flax_train
from lockstep.common import data
from lockstep.common.model.initial_weights import initial_weights

model = flax_train.Net(10, nnx.Rngs(0))
shapes = {name: leaf.shape for name, leaf in convert.flatten(nnx.state(model, nnx.Param)).items()}
weights = initial_weights(shapes, 0, "float32")
nnx.update(model, convert.nest(convert.from_canonical(weights)))
if "--fault" in sys.argv:
    flax_train.MOMENTUM = 0.89
flax_train.train(model, data.load("digits"), steps=500)
