"""A small classifier in PyTorch; `mlp_jax.py` is its port."""

import argparse

import numpy as np
import torch
from torch import nn

import lockstep

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--fault-from", type=int, default=10**6)  # a step; in `mlp_jax.py` alone
options = parser.parse_args()

model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
draws = np.random.default_rng(0)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.copy_(torch.from_numpy(0.3 * draws.standard_normal(parameter.shape)))
optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9)

run = lockstep.Run()
run.begin(model, optimizer)
for _ in range(options.steps):
    run.sync()
    inputs = torch.from_numpy(draws.standard_normal((8, 5)).astype(np.float32))
    labels = torch.from_numpy(draws.integers(0, 3, 8))
    inputs, labels = run.batch(inputs, labels)
    loss = nn.functional.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.step(loss)
print("final loss", float(loss))
run.finish(logits=model(inputs))
