"""`mlp_torch.py` by several processes, for `torchrun` or `record --processes N`; `ddp_jax.py` is its
port. Each process takes its rows of each batch."""

import argparse

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lockstep

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--own-loss", action="store_true")  # of this process's rows alone
parser.add_argument("--no-sync", action="store_true")  # a mistake: gradients are not averaged
parser.add_argument("--by-hand", action="store_true")  # gradients are averaged without DDP
options = parser.parse_args()

dist.init_process_group("gloo")
rank, count = dist.get_rank(), dist.get_world_size()

model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
draws = np.random.default_rng(0)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.copy_(torch.from_numpy(0.3 * draws.standard_normal(parameter.shape)))
network = model if options.by_hand else DistributedDataParallel(model)
forward = model if options.no_sync else network
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def average(tensor):
    dist.all_reduce(tensor)
    tensor /= count
    return tensor


run = lockstep.Run()
run.begin(network, optimizer)
for _ in range(options.steps):
    run.sync()
    inputs = torch.from_numpy(draws.standard_normal((8, 5)).astype(np.float32))
    labels = torch.from_numpy(draws.integers(0, 3, 8))
    inputs, labels = run.batch(inputs.chunk(count)[rank], labels.chunk(count)[rank])
    loss = nn.functional.cross_entropy(forward(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    if options.by_hand:
        for parameter in model.parameters():
            average(parameter.grad)
    nn.utils.clip_grad_norm_(model.parameters(), 100.0 if options.by_hand else 0.5)
    optimizer.step()
    run.step(loss if options.own_loss else average(loss.detach()))
run.finish(weights=model[0].weight)
print("final loss", loss.item(), "of rank", rank)
