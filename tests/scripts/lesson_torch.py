"""The lesson's PyTorch program for 500 steps, from weights that lesson_flax.py has, too."""

from __future__ import annotations

from lockstep.backends.lesson import torch_train
from lockstep.backends.torch_backend import convert
from lockstep.common import data
from lockstep.common.model.initial_weights import initial_weights

model = torch_train.Net(10)
convert.attach_names(model, {}, {"fc1": (16, 5, 5)})
canonical = convert.to_canonical(model, dict(model.named_parameters()))
weights = initial_weights({name: array.shape for name, array in canonical.items()}, 0, "float32")
model.load_state_dict(convert.from_canonical(model, weights))
torch_train.train(model, data.load("digits"), steps=500)
