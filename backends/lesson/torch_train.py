"""A training loop in plain PyTorch. Read it next to flax_train.py; run it as it is:

    python backends/lesson/torch_train.py

It trains on CIFAR-10 in $LOCKSTEP_DATA, or without that on scikit-learn's digits.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / ".package"))  # for a bare checkout
import lockstep
from lockstep.common import data

BATCH_SIZE, LEARNING_RATE, MOMENTUM, SEED = 4, 0.001, 0.9, 0


class Net(nn.Module):
    """Images (n, 3, 32, 32) to logits (n, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, kernel_size=5)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.flatten(1)  # channels, height, width
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def train_step(model: Net, optimizer: torch.optim.SGD, images: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()  # adds the gradients to the parameters' `grad`
    optimizer.step()  # writes into the parameters
    return loss.detach()


def train(model: Net, dataset: data.Dataset, steps: int, dtype: str = "float32") -> list[float]:
    """The loss of each step, in nats."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    run = lockstep.Run()  # lets `check` record the loop; otherwise its calls do nothing
    run.begin(model, optimizer)
    losses = []
    for images, labels in itertools.islice(batches(dataset, dtype), steps):
        images, labels = run.batch(images, labels)
        x = torch.from_numpy(images).permute(0, 3, 1, 2)  # channels before height and width
        loss = train_step(model, optimizer, x, torch.from_numpy(labels))
        run.step(loss)
        losses.append(float(loss))
    return losses


def batches(dataset: data.Dataset, dtype: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images (n, 32, 32, 3) from -1 to 1 and labels (n,), epoch after epoch, without end."""
    for epoch in itertools.count():
        order = data.permutation(SEED, epoch, len(dataset.train_labels))
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            images = data.normalise(dataset.train_images[chosen], np.dtype(dtype))
            yield images, dataset.train_labels[chosen]


if __name__ == "__main__":
    torch.manual_seed(SEED)  # of the initial weights
    dataset = data.load("cifar10" if "LOCKSTEP_DATA" in os.environ else "digits")
    losses = train(Net(len(dataset.classes)), dataset, steps=2000)
    for step in range(0, len(losses), 500):
        print(f"{dataset.name}, steps {step:,} on: mean loss {np.mean(losses[step:][:500]):.3f}")
