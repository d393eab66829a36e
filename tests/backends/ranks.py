"""A run in several processes, each of which goes through the whole training loop by itself, and a
small network with a batch norm."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from flax import nnx
from torch import Tensor, nn

from lockstep import Pair
from lockstep.backends import build
from lockstep.backends.flax_backend import layers as flax_layers
from lockstep.backends.torch_backend import layers as torch_layers
from lockstep.common import data
from lockstep.common.config import Config
from lockstep.common.model.pair import source_digest
from lockstep.common.protocol import Arrays, Rank
from lockstep.common.runs import training
from lockstep.common.system.process import Report, WorkerProcess
from tests.conftest import SilentObserver

SMALL = "tests.backends.ranks:PAIR"  # its `model`, which needs `pair=source_digest(SMALL)`


class Small(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)
        self.bn = torch_layers.BatchNorm2d(6, eps=1e-5, momentum=0.1)
        self.fc = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


class SmallFlax(nnx.Module):
    def __init__(self, classes: int, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 6, (4, 4), strides=4, padding="VALID", rngs=rngs)
        self.bn = flax_layers.BatchNorm(6, epsilon=1e-5, momentum=0.9, rngs=rngs)
        self.fc = nnx.Linear(6, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc(nnx.relu(self.bn(self.conv(x))).mean((1, 2)))


PAIR = Pair(torch=Small, flax=SmallFlax)


class Run(NamedTuple):
    """What one process has of a run."""

    loss: np.ndarray
    gradient_norm: np.ndarray
    lr: np.ndarray
    first_steps: Arrays
    final: Arrays
    test_loss: float


class Trainer:
    """In a process of its own: trains runs, one after the other."""

    def __init__(self, rank: Rank | None) -> None:
        self.rank = rank

    def train(
        self, backend: str, dtype: str, fields: Mapping[str, Any], images: int, compile: str
    ) -> Run:
        dataset = data.load("digits").first_test_images(20)
        dataset = dataclasses.replace(
            dataset,
            train_images=dataset.train_images[:images],
            train_labels=dataset.train_labels[:images],
        )
        if fields.get("model") == SMALL:
            fields = {**fields, "pair": source_digest(SMALL)}
        config = Config(**fields).resolve(images)
        trained = build(config, 10, "cpu", compile, backend, dtype, 1, self.rank)
        found = training.train(trained, config, dataset, dtype, SilentObserver(), log_every=0)
        return Run(
            found.loss,
            found.gradient_norm,
            found.lr,
            found.first_steps,
            found.final,
            found.test_loss,
        )


def make(report: Report, rank: Rank | None) -> Trainer:
    del report
    return Trainer(rank)


def start(count: int) -> list[WorkerProcess]:
    """`count` processes of one group; one alone is in none."""
    if count == 1:
        return [WorkerProcess(make, None)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [WorkerProcess(make, Rank(n, count, "127.0.0.1", port)) for n in range(count)]


def train(processes: Sequence[WorkerProcess], *arguments: object) -> list[Run]:
    """The same run in each of the processes, at the same time. What one raises, all should."""
    calls = [process.send("train", *arguments) for process in processes]
    return [process.receive(call) for process, call in zip(processes, calls, strict=True)]
