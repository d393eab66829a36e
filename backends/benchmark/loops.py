"""What a worker of `compare.py bench` does: train in one way, under the clock.

No framework is imported before a worker builds its own `Loop`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from lockstep import backends
from lockstep.common.config import BACKENDS, Config
from lockstep.common.errors import DataError

if TYPE_CHECKING:
    from lockstep.common.protocol import Backend

ENDLESS = 10**9  # steps: more than are ever taken
SIZE = 2048  # rows and columns of the matrices whose product is the arithmetic limit


@dataclass(frozen=True)
class Job:
    """What one worker is to time."""

    path: str  # one of `lockstep.common.evidence.bench`'s PATHS or PRODUCTS
    batch_size: int
    images: int  # training images: the first so many
    classes: int
    dtype: str
    device: str  # "cpu" or "cuda"
    seed: int
    folder: Path  # of `write_images`


class Done(NamedTuple):
    """What one call has done."""

    steps: int
    images: int


class Loop(Protocol):
    """One way to train, or a product of matrices."""

    opening: int  # calls in which all is made ready (compiled, where it is), the first one included
    untimed: int  # calls after which a new iterator of `calls` has its pace
    processes: int  # of a loader, beside this one

    def calls(self) -> Iterator[Done]:
        """Endless work; every `next` is one step, or one chunk of steps. Another iterator goes on
        with the training."""
        ...

    def wait(self) -> None:
        """Until the device has finished what it was told."""
        ...

    def describe(self) -> dict[str, Any]:
        """Versions, threads and the like, for the report."""
        ...


class Stopwatch:
    """One way to train, under the clock. When it has been built, it has taken its first step."""

    def __init__(self, job: Job) -> None:
        self._loop = make_loop(job)
        self._calls = self._loop.calls()
        start = time.perf_counter()
        self._steps = next(self._calls).steps
        self._loop.wait()
        self._seconds = time.perf_counter() - start

    def opening(self) -> dict[str, Any]:
        """Finish the calls in which all is made ready: `steps` and `seconds` of all of them, the
        first included."""
        start = time.perf_counter()
        for _ in range(self._loop.opening - 1):
            self._steps += next(self._calls).steps
        self._loop.wait()
        self._seconds += time.perf_counter() - start
        del self._calls  # and with it a loader's processes
        return {"steps": self._steps, "seconds": self._seconds}

    def run(self, seconds: float) -> dict[str, Any]:
        """Train for at least so long, whole calls only: `steps`, `images`, and the `seconds` that
        it was."""
        calls = self._loop.calls()
        for _ in range(self._loop.untimed):
            next(calls)
        self._loop.wait()
        steps = images = 0
        start = time.perf_counter()
        while steps == 0 or time.perf_counter() - start < seconds:
            done = next(calls)
            steps, images = steps + done.steps, images + done.images
        self._loop.wait()
        return {"steps": steps, "images": images, "seconds": time.perf_counter() - start}

    def facts(self) -> dict[str, Any]:
        """`environment`; peak resident `memory` of this process, bytes; of a loader's processes
        `loader`, the largest's and how many; and the network's `flops_per_image` where a backend
        knows its shapes."""
        from lockstep.common.evidence.bench import flops_per_image

        loop = self._loop
        return {
            "environment": loop.describe(),
            "memory": peak_memory(),
            "loader": {"processes": loop.processes, "memory": peak_memory_of_children()}
            if loop.processes
            else None,
            "flops_per_image": flops_per_image(loop.backend.shapes())
            if isinstance(loop, Training)
            else None,
        }


# --- Ways to train


def make_loop(job: Job) -> Loop:
    """Import what the job needs, read the images, build."""
    framework, _, kind = job.path.partition(" ")
    if kind == "product":
        return TorchProduct(job) if framework == "torch" else FlaxProduct(job)
    images, labels = read_images(job)
    if framework in BACKENDS:
        return Training(framework, kind == "fused", job, images, labels)

    import torch

    from lockstep.backends.benchmark.tutorial import Eager, Tutorial

    torch.manual_seed(job.seed)
    loop = {"tutorial": Tutorial, "eager": Eager}[framework]
    return loop(images, labels, job.classes, job.batch_size, job.dtype, job.device)


class Training:
    """A backend's training, as `lockstep.common.runs.training.train` has it: images uploaded once,
    chunk after chunk gathered from them.

    Fused, a chunk is one call of `train_steps`; else each of its batches is gathered and given to
    `train_step`. Either way the metrics are fetched at the end of the chunk.
    """

    untimed, processes = 1, 0

    def __init__(
        self, name: str, fused: bool, job: Job, images: np.ndarray, labels: np.ndarray
    ) -> None:
        from lockstep.common.dtypes import compute_dtype
        from lockstep.common.model.initial_weights import initial_weights
        from lockstep.common.protocol import Snapshot
        from lockstep.common.runs.chunks import chunks
        from lockstep.common.runs.record import FIRST_STEPS

        steps = FIRST_STEPS + ENDLESS
        config = Config(
            lr=0.001,
            momentum=0.9,
            batch_size=job.batch_size,
            seed=job.seed,
            drop_last=True,
            steps=steps,
        )
        config = config.resolve(len(images))
        self.backend: Backend = backends.load(name)(
            config, job.classes, job.dtype, job.device, "auto" if fused else "off"
        )
        self.fused = fused
        self.data = self.backend.upload(images, labels)
        weights = initial_weights(self.backend.shapes(), job.seed, job.dtype)
        self.state = self.backend.init(Snapshot.start(weights))
        self.chunks = chunks(
            config, len(images), bytes_per_image=3072 * compute_dtype(job.dtype).itemsize
        )
        # chunks of one step; the next one is as long as all others will be
        self.opening = FIRST_STEPS + 1

    def calls(self) -> Iterator[Done]:
        for indices in self.chunks:
            if self.fused:
                images, labels = self.backend.batches(self.data, indices)
                self.state, metrics = self.backend.train_steps(self.state, images, labels)
                self.losses = metrics.loss
            else:
                history = []
                for batch in indices:
                    images, labels = self.backend.batches(self.data, batch)
                    self.state, metrics = self.backend.train_step(self.state, images, labels)
                    history.append(metrics.loss)
                self.losses = np.array([float(loss) for loss in history])
            yield Done(steps=len(indices), images=indices.size)

    def wait(self) -> None:
        """The metrics have been fetched."""

    def describe(self) -> dict[str, Any]:
        return self.backend.describe()


class TorchProduct:
    """Square matrices multiplied in PyTorch, with its own number of threads; a step is one
    product."""

    opening, untimed, processes = 1, 1, 0

    def __init__(self, job: Job) -> None:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = False  # full float32, as the backends have it
        self.matrices = torch.rand(2, SIZE, SIZE, device=job.device).to(getattr(torch, job.dtype))

    def calls(self) -> Iterator[Done]:
        while True:
            self.product = self.matrices[0] @ self.matrices[1]
            self.wait()
            yield Done(steps=1, images=0)

    def wait(self) -> None:
        self.product[0, 0].item()

    def describe(self) -> dict[str, Any]:
        import torch

        return {"torch": torch.__version__, "threads": torch.get_num_threads()}


class FlaxProduct:
    """The same in JAX."""

    opening, untimed, processes = 1, 1, 0

    def __init__(self, job: Job) -> None:
        import jax

        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_default_matmul_precision", "highest")
        with jax.default_device(jax.devices(job.device)[0]):
            self.matrices = jax.random.uniform(jax.random.key(0), (2, SIZE, SIZE)).astype(job.dtype)
        self.multiply = jax.jit(lambda matrices: matrices[0] @ matrices[1])

    def calls(self) -> Iterator[Done]:
        while True:
            self.product = self.multiply(self.matrices)
            self.wait()
            yield Done(steps=1, images=0)

    def wait(self) -> None:
        self.product.block_until_ready()

    def describe(self) -> dict[str, Any]:
        import jax

        return {"jax": jax.__version__}


def smallest_backend(name: str, device: str) -> Backend:
    """To be asked what it finds here."""
    return backends.load(name)(Config(), 2, "float32", device, "off")


# --- What they are given, and what they take


def write_images(images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Leave the training images for the workers: reading them takes no framework and no more memory
    than they do.

    Args:
        images: uint8 (n, 32, 32, 3).
        labels: int64 (n,).

    Raises:
        DataError: if there is no room for them.
    """
    try:
        images.tofile(folder / "images")
        labels.tofile(folder / "labels")
    except OSError as error:
        raise DataError(
            f"the images cannot be written to {folder} ({error}): free some space, or set TMPDIR"
        ) from error


def read_images(job: Job) -> tuple[np.ndarray, np.ndarray]:
    images = np.fromfile(job.folder / "images", np.uint8, count=job.images * 3072)
    return images.reshape(job.images, 32, 32, 3), np.fromfile(
        job.folder / "labels", np.int64, count=job.images
    )


def peak_memory() -> int:
    """The most memory that this process has held, bytes; counted from its start, which on Linux
    rusage does not do: there a process starts with what the one held that started it."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return _rusage("RUSAGE_SELF")


def peak_memory_of_children() -> int:
    """The same of the largest of the processes that this one had; memory that they share with it is
    counted again."""
    return _rusage("RUSAGE_CHILDREN")


def _rusage(who: str) -> int:
    import resource

    return resource.getrusage(getattr(resource, who)).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
