"""The loops with which `lockstep bench` compares: PyTorch's tutorial 'Training a Classifier', and
the same loop without a loader.

Both use eager mode and PyTorch's own layers, threads and defaults, as the tutorial does. Source:
sections 1 to 4 of
https://docs.pytorch.org/tutorials/beginner/blitz/cifar10_tutorial.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn, optim
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lockstep.backends.benchmark.loops import Progress
from lockstep.common.data import normalise


class Net(nn.Module):
    """The tutorial's network: images (n, 3, 32, 32) to logits (n, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)  # flatten all dimensions except batch
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = self.fc3(x)
        return x


class InMemoryDataset(Dataset):
    """Does for any images what `torchvision.datasets.CIFAR10` does: makes a PIL image of each and
    transforms it."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        transform: Callable[[Image.Image], torch.Tensor],
    ) -> None:
        self.data, self.targets, self.transform = images, labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


class TutorialLoop:
    """The tutorial's loop as written, without the line that it prints every 2000 steps.

    Args:
        images: uint8 (n, 32, 32, 3).
        labels: int64 (n,).
        dtype: the tutorial's is "float32"; for others the network and each batch are converted.
        workers: processes of the loader; the tutorial's number is 2.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        classes: int,
        batch_size: int,
        dtype: str = "float32",
        device: str = "cpu",
        workers: int = 2,
    ) -> None:
        self.dtype, self.device = getattr(torch, dtype), device
        transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
        )
        self.trainset = InMemoryDataset(images, labels, transform)
        self.trainloader = DataLoader(
            self.trainset, batch_size=batch_size, shuffle=True, num_workers=workers
        )
        self.net = Net(classes).to(self.device, self.dtype)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = optim.SGD(self.net.parameters(), lr=0.001, momentum=0.9)
        self.compile_calls, self.processes = 1, workers
        # a new loader has prefetched so many batches
        self.warmup_calls = 1 + workers * (self.trainloader.prefetch_factor or 0)

    def steps(self) -> Iterator[Progress]:
        """One step for each `next`, from the start of an epoch; the loader's processes live as long
        as this iterator."""
        while True:  # loop over the dataset multiple times
            running_loss = 0.0
            for data in self.trainloader:
                # get the inputs; data is a list of [inputs, labels]
                inputs, labels = data[0].to(self.device, self.dtype), data[1].to(self.device)

                # zero the parameter gradients
                self.optimizer.zero_grad()

                # forward + backward + optimize
                outputs = self.net(inputs)
                loss = self.criterion(outputs, labels)
                loss.backward()
                self.optimizer.step()

                running_loss += loss.item()
                self.loss = loss.detach()
                yield Progress(steps=1, images=len(labels))

    def wait(self) -> None:
        """Nothing to do: `loss.item()` has waited."""

    def describe(self) -> dict[str, object]:
        return describe()


class InMemoryLoop:
    """The same loop with the normalised images in memory, or on the GPU: no loader, no transforms,
    no `.item()`."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        classes: int,
        batch_size: int,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        precise = np.float64 if dtype == "float64" else np.float32
        self.images = torch.from_numpy(normalise(planes, precise)).to(device, getattr(torch, dtype))
        self.labels = torch.from_numpy(labels).to(device)
        self.batch_size = batch_size
        self.net = Net(classes).to(device, self.images.dtype)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = optim.SGD(self.net.parameters(), lr=0.001, momentum=0.9)
        self.compile_calls, self.warmup_calls, self.processes = 1, 1, 0

    def steps(self) -> Iterator[Progress]:
        """One step for each `next`, from the start of an epoch. A GPU queues the steps; `wait`
        waits for them."""
        while True:
            for batch in torch.randperm(len(self.images), device=self.images.device).split(
                self.batch_size
            ):
                inputs, labels = self.images[batch], self.labels[batch]
                self.optimizer.zero_grad()
                outputs = self.net(inputs)
                loss = self.criterion(outputs, labels)
                loss.backward()
                self.optimizer.step()
                self.loss = loss.detach()
                yield Progress(steps=1, images=len(labels))

    def wait(self) -> None:
        self.loss.item()

    def describe(self) -> dict[str, object]:
        return describe()


def describe() -> dict[str, object]:
    """Versions and threads, for the report."""
    return {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "threads": torch.get_num_threads(),
    }
