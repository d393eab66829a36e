"""The contract between a run and a backend: what a backend does, and in which layout.

Everything that crosses this boundary is canonical: NumPy arrays, images NHWC, convolution kernels
HWIO, dense kernels (in, out), dotted names such as `conv1.kernel`. What a state consists of is the
backend's own business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypedDict, TypeVar

import numpy as np

State = TypeVar("State")  # what training changes
Data = TypeVar("Data")  # a data set on the device
Tensor = TypeVar("Tensor")  # the framework's arrays

Arrays = dict[str, np.ndarray]  # canonical tensors by name
# In the order in which a difference travels.
STAGES = ("data", "weights", "forward", "loss", "backward", "update", "evaluate")


def split_slot(tensor: str) -> tuple[str, str]:
    """The slot and the parameter of "<slot> of <parameter>", as an optimizer's state is called; no
    slot for all else."""
    slot, of, parameter = tensor.rpartition(" of ")  # the slot may be a "sum of squares"
    return (slot, parameter) if of else ("", tensor)


class Task(NamedTuple):
    """What a network is built for."""

    classes: int  # or, of sequences and pixels, how many labels there are; 0: none
    inputs: np.ndarray  # (2, ...): two samples, such as uint8 (2, 32, 32, 3)
    targets: np.ndarray  # (2, ...): theirs, such as int64 (2,)


class Metrics(NamedTuple):
    """The metrics of one training step: the framework's scalars. From `train_steps`, each field is a
    float64 array with one entry per step."""

    # Mean cross entropy of the batch before the update, nats, with the run's label smoothing.
    loss: Any
    gradient_norm: Any  # Euclidean norm of the loss's gradients for all parameters together
    lr: Any  # the learning rate of the update


class Evaluation(NamedTuple):
    """The predictions of a network for n images, and their loss."""

    # int64 (n,): the class with the largest logit. Of a user's network that gives no logits of
    # classes, its outputs: floating-point (n, numbers).
    predictions: np.ndarray
    # Mean cross entropy over the images, nats, or a user's own loss; never with label smoothing.
    loss: float


class Dropout(NamedTuple):
    """The dropout of one layer (Srivastava et al. 2014, JMLR 15)."""

    rate: float  # the share that is left out: 0 <= rate < 1
    # Of the mask of one image. Along axes of size 1, all is kept or left out together: (1, 1, 1)
    # leaves out all of an image, as in stochastic depth (Huang et al. 2016, arXiv:1603.09382).
    shape: tuple[int, ...]


GRADIENT_OF = "gradient of "  # begins the name of a gradient among the tensors of a state


class RankDifference(TypedDict):
    """A tensor of a state, or a gradient of its last step, that is not the same in all processes of
    a run."""

    step: int  # optimizer steps done
    rank: int  # the process whose tensor is not rank 0's
    tensor: str
    gap: float | None  # the largest; None if it is not finite, or the tensor is not there


class Snapshot(NamedTuple):
    """A training state in the canonical layout: what a file can hold, and from which either backend
    can resume."""

    parameters: Arrays
    model_state: Arrays  # what the forward pass updates: batch statistics
    # What the optimizer keeps of each parameter: by a slot of `lockstep.common.optimizers.SLOTS`, then
    # by parameter. Empty before the first step. The optimizer's own count of steps is `step`.
    slots: dict[str, Arrays]
    # `lr` of the next step and, for plateau, its counters; empty before the first step.
    schedule: dict[str, float]
    step: int  # optimizer steps done
    # The rest of the state of a pair's own optimizer: numbers and arrays that only one framework can
    # read, by names that begin with it, such as "torch/step of fc1.weight".
    extra: Arrays
    # Of a run of several processes, whose states must be equal: where they are not. No file has it.
    differences: tuple[RankDifference, ...] = ()

    @property
    def tensors(self) -> Arrays:
        """All that the network itself holds."""
        return self.parameters | self.model_state

    @property
    def optimizer_tensors(self) -> Arrays:
        """The optimizer's, by "<slot> of <parameter>"."""
        return {
            f"{slot} of {name}": array
            for slot, arrays in self.slots.items()
            for name, array in arrays.items()
        }

    @classmethod
    def start(cls, weights: Arrays) -> Snapshot:
        """The state before the first step; `weights` may hold the model state, too."""
        return cls(parameters=weights, model_state={}, slots={}, schedule={}, step=0, extra={})


class Rank(NamedTuple):
    """One of several processes that train one run together, each on its rows of every batch."""

    number: int  # 0 <= number < count
    count: int  # processes that train the run
    host: str  # where rank 0 listens, for the framework's own group of processes
    port: int  # PyTorch's store, or JAX's coordinator


class Backend(Protocol[State, Data, Tensor]):
    """One framework's way to train. Built by `backends.load(name)(config, classes, dtype, device,
    compile)`.

    A method that takes a state consumes it and returns the next one (PyTorch writes in place, JAX
    donates), except `evaluate`, `probe` and `export`, which leave it unchanged. Images are (n, 32,
    32, 3) arrays of the run's dtype, already normalised; labels are int64 (n,) arrays. A backend
    draws no random numbers: `lockstep.common.data.dropout` draws the masks of dropout.

    Of a run of several processes, each has a backend of its own, with its `Rank`. All are given the
    same calls with the same arguments, at the same time, and have the same results: those of one
    process, up to rounding. `evaluate` and `export` read the process's own copy of the state.
    """

    name: str  # "torch" or "flax"
    device: str  # "cpu" or "cuda"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The canonical shape of every parameter and of every tensor of the model state."""
        ...

    def native_names(self) -> dict[str, str]:
        """The framework's own name of each of them, by canonical name."""
        ...

    def layer_kinds(self) -> dict[str, str]:
        """What each layer is, by its canonical name: a kind of `lockstep.common.model.layers`, by
        the class of its module. Layers of no such kind are left out."""
        ...

    def module_classes(self) -> tuple[type, ...]:
        """The classes of the network and of the modules in it, the outermost first: their sources
        are quoted where two runs diverge."""
        ...

    def dropout_layers(self) -> dict[str, Dropout]:
        """The dropout of each layer, by the canonical name of its mask."""
        ...

    def init(self, snapshot: Snapshot) -> State:
        """A new state with the contents of `snapshot`."""
        ...

    def export(self, state: State) -> Snapshot:
        """The canonical copy of a state."""
        ...

    def train_step(
        self, state: State, images: np.ndarray, labels: np.ndarray
    ) -> tuple[State, Metrics]:
        """One step of the optimizer on one batch: the unit to read."""
        ...

    def upload(self, images: np.ndarray, labels: np.ndarray) -> Data:
        """A data set on the device, once: uint8 images (n, 32, 32, 3) and labels (n,)."""
        ...

    def batches(self, uploaded: Data, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Batches of an uploaded data set, on the device and normalised: indices int64 (steps,
        batch).

        They equal `lockstep.common.data.normalise` of the same images bit for bit, in the
        framework's own layout; the methods that take images and labels take these as well.
        """
        ...

    def download(
        self, images: np.ndarray | Tensor, labels: np.ndarray | Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """The batches as `train_steps` receives them, as canonical NumPy arrays: images (steps,
        batch, 32, 32, 3), labels (steps, batch)."""
        ...

    def masks(self, state: State, shape: Sequence[int]) -> Arrays:
        """The masks of dropout for the next steps, for labels of `shape`, (steps, batch) or
        (batch,): bool (*shape, *shape of the layer), by canonical name; none without dropout."""
        ...

    def train_steps(
        self, state: State, images: np.ndarray | Tensor, labels: np.ndarray | Tensor
    ) -> tuple[State, Metrics]:
        """One step for each batch: images (steps, batch, 32, 32, 3), labels (steps, batch).

        One compiled program with a loop in it, in PyTorch where `compile` asks for it; the same
        numbers as single steps, up to rounding.
        """
        ...

    def evaluate(self, state: State, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        """Predictions for, and the mean loss over, all the images given, however many.

        Labels are not smoothed here: smoothing is a way to train, and the test losses of all runs
        are to be comparable.
        """
        ...

    def probe(self, state: State, images: np.ndarray, labels: np.ndarray) -> Arrays:
        """The tensors of the next step on this batch; the step is not taken.

        Keys are `<stage>/<tensor>`, in the order of computation: `data/images`, `data/labels` (as
        the framework received them), `forward/input of <layer>`, `forward/<layer>` (its output),
        `forward/logits`, `loss/loss`, `backward/<parameter>`.
        """
        ...

    def describe(self) -> dict[str, object]:
        """Versions, device, and whether training is compiled, for the report."""
        ...
