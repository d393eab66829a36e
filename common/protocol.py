"""The contract between a run and a backend: what each of the two sides must be able to do, and in
which layout.

Everything that crosses this boundary is canonical: NumPy arrays, images NHWC, convolution kernels
HWIO, dense kernels (in, out), names dotted as in `conv1.kernel`. What a `State` is made of is the
backend's own business.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]  # canonical tensors by name
STAGES = (
    "data",
    "weights",
    "forward",
    "loss",
    "backward",
    "update",
    "evaluate",
)  # in the order a difference travels


class Metrics(NamedTuple):
    """What one training step reports; from `train_steps`, each field is a float64 array with one
    entry per step."""

    loss: Any  # mean cross entropy of the batch, nats, before the update; with the run's label smoothing
    gradient_norm: (
        Any  # Euclidean norm of the loss's gradient with respect to all parameters together
    )
    lr: Any  # the learning rate that the update used


class Evaluation(NamedTuple):
    """What a network says of a set of images."""

    predictions: np.ndarray  # int64 (n,): the class with the largest logit
    loss: float  # mean cross entropy over the n images, nats; without label smoothing, whatever the run's is


class Dropout(NamedTuple):
    """What one layer leaves out in training (Srivastava et al. 2014, JMLR 15)."""

    rate: float  # the share that is left out: 0 <= rate < 1
    # Of what is drawn for one image. Along axes of size 1, all is kept or left out together: (1, 1,
    # 1) leaves out all of an image, as in stochastic depth (Huang et al. 2016, arXiv:1603.09382).
    shape: tuple[int, ...]


class Snapshot(NamedTuple):
    """A training state in the canonical layout: what a file can hold, and what either backend can
    go on from."""

    parameters: Arrays
    model_state: (
        Arrays  # what the forward pass updates (batch statistics); empty for networks without
    )
    momentum: Arrays  # the momentum buffer of each parameter; empty before the first step and without momentum
    schedule: dict[
        str, float
    ]  # `lr` of the next step and, for plateau, its counters; empty before the first step
    step: int  # optimizer steps done

    @property
    def tensors(self) -> Arrays:
        """All that the network itself holds."""
        return self.parameters | self.model_state

    @classmethod
    def start(cls, weights: Arrays) -> Snapshot:
        """The state before the first step; `weights` may hold the model state, too."""
        return cls(parameters=weights, model_state={}, momentum={}, schedule={}, step=0)


class Backend(Protocol):
    """One framework's way to train. Built by `backends.load(name)(config, classes, dtype, device,
    compile)`.

    A method that takes a state consumes it and returns the next one (PyTorch writes in place, JAX
    donates), but `evaluate`, `probe` and `export`, which leave it as it was. Images are (n, 32, 32,
    3) arrays of the run's dtype, already normalised; labels are int64 (n,) arrays. A backend draws
    no random numbers: what dropout leaves out is drawn by `lockstep.common.data.dropout`.
    """

    name: str  # "torch" or "flax"
    device: str  # "cpu" or "cuda"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The canonical shape of every parameter and of every tensor of the model state."""
        ...

    def native_names(self) -> dict[str, str]:
        """What the framework's module itself calls each of them, by canonical name."""
        ...

    def dropout_layers(self) -> dict[str, Dropout]:
        """What the layers leave out in training, by the canonical names of their masks."""
        ...

    def init(self, snapshot: Snapshot) -> Any:
        """A state of its own that holds what `snapshot` holds."""
        ...

    def export(self, state: Any) -> Snapshot:
        """The canonical copy of a state."""
        ...

    def train_step(self, state: Any, images: np.ndarray, labels: np.ndarray) -> tuple[Any, Metrics]:
        """One step of SGD on one batch: the unit to read."""
        ...

    def upload(self, images: np.ndarray, labels: np.ndarray) -> Any:
        """A data set on the device, once: uint8 images (n, 32, 32, 3) and labels (n,)."""
        ...

    def batches(self, uploaded: Any, indices: np.ndarray) -> tuple[Any, Any]:
        """Batches of what was uploaded, on the device and normalised: indices int64 (steps, batch).

        They are bit for bit what `lockstep.common.data.normalise` makes of the same images, in the
        framework's own layout; the methods that take images and labels take these as well.
        """
        ...

    def train_steps(self, state: Any, images: Any, labels: Any) -> tuple[Any, Metrics]:
        """As many steps as there are batches: images (steps, batch, 32, 32, 3), labels (steps,
        batch).

        One compiled program with a loop in it, in PyTorch where `compile` says so; the same numbers
        as single steps, up to rounding.
        """
        ...

    def evaluate(self, state: Any, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        """Predictions for, and the mean loss over, all the images given, however many.

        Labels are not smoothed here: that is a way to train, and test losses of all runs are to
        mean the same.
        """
        ...

    def probe(self, state: Any, images: np.ndarray, labels: np.ndarray) -> Arrays:
        """What the next step would compute on this batch, tensor by tensor, without taking it.

        Keys are `<stage>/<tensor>`, in the order in which they are computed: `data/images`,
        `data/labels` (as the framework received them), `forward/input of <layer>`,
        `forward/<layer>` (its output), `forward/logits`, `loss/loss`, `backward/<parameter>`.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Versions, device, and whether what trains is compiled, for the report."""
        ...
