"""The work of a process of `lockstep bench`: train by one loop and measure the time.

No framework is imported before a worker builds its own `Loop`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from lockstep import backends
from lockstep.common.config import BACKENDS, Config
from lockstep.common.errors import DataError

if TYPE_CHECKING:
    from lockstep.common.evidence.bench import CompileTime, Turn, WorkerFacts
    from lockstep.common.protocol import Backend

UNLIMITED = 10**9  # steps: more than any measurement takes
SIZE = 2048  # rows and columns of the matrices whose product is the arithmetic limit


@dataclass(frozen=True)
class BenchmarkJob:
    """The task of one worker."""

    path: str  # one of `lockstep.common.evidence.bench`'s PATHS or PRODUCTS
    batch_size: int
    images: int  # train on the first so many images
    classes: int
    dtype: str
    device: str  # "cpu" or "cuda"
    seed: int
    folder: Path  # where `write_images` left the images


class Progress(NamedTuple):
    """The steps that one call trained."""

    steps: int
    images: int


class Loop(Protocol):
    """One way to train, or a product of matrices."""

    compile_calls: int  # the calls that compile, or set up in another way; at least the first one
    warmup_calls: int  # the calls after which a new iterator of `steps` runs at full speed
    processes: int  # of a data loader, in addition to this process

    def steps(self) -> Iterator[Progress]:
        """Train without end; every `next` is one step, or one chunk of steps. A second iterator
        continues the training."""
        ...

    def wait(self) -> None:
        """Wait until the device has finished."""
        ...

    def describe(self) -> dict[str, object]:
        """Versions, threads and the like, for the report."""
        ...


class Timer:
    """Measures one loop. The constructor takes the first step."""

    def __init__(self, job: BenchmarkJob) -> None:
        self._loop = make_loop(job)
        self._iterator = self._loop.steps()
        start = time.perf_counter()
        self._steps = next(self._iterator).steps
        self._loop.wait()
        self._seconds = time.perf_counter() - start

    def compile(self) -> CompileTime:
        """Finish the calls that compile. The result counts all of them, the first included."""
        start = time.perf_counter()
        for _ in range(self._loop.compile_calls - 1):
            self._steps += next(self._iterator).steps
        self._loop.wait()
        self._seconds += time.perf_counter() - start
        del self._iterator  # this also ends a loader's processes
        return {"steps": self._steps, "seconds": self._seconds}

    def run(self, seconds: float) -> Turn:
        """Train for at least `seconds`, in whole calls."""
        iterator = self._loop.steps()
        for _ in range(self._loop.warmup_calls):
            next(iterator)
        self._loop.wait()
        steps = images = 0
        start = time.perf_counter()
        while steps == 0 or time.perf_counter() - start < seconds:
            done = next(iterator)
            steps, images = steps + done.steps, images + done.images
        self._loop.wait()
        return {"steps": steps, "images": images, "seconds": time.perf_counter() - start}

    def describe(self) -> WorkerFacts:
        """Peak memory is that of this process so far. `flops_per_image` is None for a loop that
        does not know its network's shapes."""
        from lockstep.common.evidence.bench_report import flops_per_image

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


def make_loop(job: BenchmarkJob) -> Loop:
    """Import what the job needs, read the images and build the loop."""
    framework, _, kind = job.path.partition(" ")
    if kind == "product":
        return TorchProduct(job) if framework == "torch" else FlaxProduct(job)
    images, labels = read_images(job)
    if framework in BACKENDS:
        return Training(framework, kind == "fused", job, images, labels)

    import torch

    from lockstep.backends.benchmark.tutorial import InMemoryLoop, TutorialLoop

    torch.manual_seed(job.seed)
    loop = {"tutorial": TutorialLoop, "eager": InMemoryLoop}[framework]
    return loop(images, labels, job.classes, job.batch_size, job.dtype, job.device)


class Training:
    """A backend trains as in `lockstep.common.runs.training.train`: it uploads the images once and
    gathers chunk after chunk.

    Fused: one call of `train_steps` for a chunk. Otherwise: gather each batch and call
    `train_step`. Both fetch the metrics at the end of the chunk.
    """

    warmup_calls, processes = 1, 0

    def __init__(
        self, name: str, fused: bool, job: BenchmarkJob, images: np.ndarray, labels: np.ndarray
    ) -> None:
        from lockstep.common.dtypes import compute_dtype
        from lockstep.common.model.initial_weights import initial_weights
        from lockstep.common.protocol import Snapshot
        from lockstep.common.runs.chunks import chunks
        from lockstep.common.runs.record import FIRST_STEPS

        steps = FIRST_STEPS + UNLIMITED
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
        # FIRST_STEPS chunks of one step, then the first chunk of full length
        self.compile_calls = FIRST_STEPS + 1

    def steps(self) -> Iterator[Progress]:
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
            yield Progress(steps=len(indices), images=indices.size)

    def wait(self) -> None:
        """Nothing to do: `steps` has fetched the metrics."""

    def describe(self) -> dict[str, object]:
        return self.backend.describe()


class TorchProduct:
    """Multiplies square matrices in PyTorch, with PyTorch's default number of threads; a step is
    one product."""

    compile_calls, warmup_calls, processes = 1, 1, 0

    def __init__(self, job: BenchmarkJob) -> None:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = False  # full float32, as in the backends
        self.matrices = torch.rand(2, SIZE, SIZE, device=job.device).to(getattr(torch, job.dtype))

    def steps(self) -> Iterator[Progress]:
        while True:
            self.product = self.matrices[0] @ self.matrices[1]
            self.wait()
            yield Progress(steps=1, images=0)

    def wait(self) -> None:
        self.product[0, 0].item()

    def describe(self) -> dict[str, object]:
        import torch

        return {"torch": torch.__version__, "threads": torch.get_num_threads()}


class FlaxProduct:
    """Multiplies square matrices in JAX; a step is one product."""

    compile_calls, warmup_calls, processes = 1, 1, 0

    def __init__(self, job: BenchmarkJob) -> None:
        import jax

        jax.config.update("jax_enable_x64", True)
        jax.config.update("jax_default_matmul_precision", "highest")
        with jax.default_device(jax.devices(job.device)[0]):
            self.matrices = jax.random.uniform(jax.random.key(0), (2, SIZE, SIZE)).astype(job.dtype)
        self.multiply = jax.jit(lambda matrices: matrices[0] @ matrices[1])

    def steps(self) -> Iterator[Progress]:
        while True:
            self.product = self.multiply(self.matrices)
            self.wait()
            yield Progress(steps=1, images=0)

    def wait(self) -> None:
        self.product.block_until_ready()

    def describe(self) -> dict[str, object]:
        import jax

        return {"jax": jax.__version__}


def smallest_backend(name: str, device: str) -> Backend:
    """Build a minimal backend, whose `describe` says which device it found."""
    return backends.load(name)(Config(), 2, "float32", device, "off")


# --- Images for the workers, and the memory that they use


def write_images(images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write the training images to files that the workers read without a framework and without
    extra memory.

    Args:
        images: uint8 (n, 32, 32, 3).
        labels: int64 (n,).

    Raises:
        DataError: if there is no room for the files.
    """
    try:
        images.tofile(folder / "images")
        labels.tofile(folder / "labels")
    except OSError as error:
        raise DataError(
            f"the images cannot be written to {folder} ({error}): free some space, or set TMPDIR"
        ) from error


def read_images(job: BenchmarkJob) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (n, 32, 32, 3), and labels, int64 (n,)."""
    images = np.fromfile(job.folder / "images", np.uint8, count=job.images * 3072)
    return images.reshape(job.images, 32, 32, 3), np.fromfile(
        job.folder / "labels", np.int64, count=job.images
    )


def peak_memory() -> int:
    """The peak resident memory of this process, bytes. On Linux from /proc, since rusage there
    starts with the memory of the parent process."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return _rusage("RUSAGE_SELF")


def peak_memory_of_children() -> int:
    """The peak memory of the largest child process that has ended, bytes; memory shared with this
    process counts again."""
    return _rusage("RUSAGE_CHILDREN")


def _rusage(who: str) -> int:
    import resource

    return resource.getrusage(getattr(resource, who)).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
