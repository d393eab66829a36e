"""Training in PyTorch. Reads beside backends/flax_backend/backend.py, section by section."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.optim import SGD
from torch.optim.sgd import sgd

from backends.torch_backend import convert
from backends.torch_backend.activations import recorded
from backends.torch_backend.model import Net
from backends.torch_backend.optimizer import (
    Scheduler,
    export_momentum,
    export_schedule,
    make_optimizer,
    restore_momentum,
    restore_schedule,
)
from common.config import Config
from common.errors import BackendError
from common.protocol import Arrays, Evaluation, Metrics, Snapshot

EVALUATION_BATCH = 1000  # images per forward pass: large enough to be quick, small enough for float64 in memory
ALL_THREADS = torch.get_num_threads()


class State(NamedTuple):
    """What training changes; PyTorch changes it in place."""

    model: Net
    optimizer: SGD
    scheduler: Scheduler
    step: int


@final
class TorchBackend:
    """`common.protocol.Backend` in PyTorch."""

    name = "torch"

    # --- Set up: the network, the optimizer, and what makes a run comparable

    def __init__(
        self, config: Config, classes: int, dtype: str = "float32", device: str = "auto", compile: str = "auto"
    ) -> None:
        self.device = choose_device(device)
        make_comparable()
        set_threads(config.batch_size)
        self.config = config
        self.dtype = getattr(torch, dtype)
        self.classes = classes
        self.compiled = compile == "on" or (compile == "auto" and self.device == "cuda")
        torch._dynamo.config.recompile_limit = 1024  # all backends of a process share `_functional_step`'s programs
        self._compiled_step = torch.compile(self._functional_step, fullgraph=True, disable=not self.compiled)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        model = self._empty_model("cpu")
        return {
            name: array.shape for name, array in convert.to_canonical(model, dict(model.named_parameters())).items()
        }

    def init(self, snapshot: Snapshot) -> State:
        model = self._empty_model(self.device)
        model.load_state_dict(convert.from_canonical(model, snapshot.parameters | snapshot.model_state))
        optimizer = make_optimizer(self.config, model)
        scheduler = Scheduler(self.config, optimizer)
        if snapshot.step > 0:
            restore_momentum(model, optimizer, convert.from_canonical(model, snapshot.momentum))
            restore_schedule(scheduler, snapshot.schedule, snapshot.step)
        return State(model, optimizer, scheduler, snapshot.step)

    def export(self, state: State) -> Snapshot:
        model, optimizer, scheduler, step = state
        return Snapshot(
            parameters=convert.to_canonical(model, dict(model.named_parameters())),
            model_state=convert.to_canonical(model, dict(model.named_buffers())),
            momentum=convert.to_canonical(model, export_momentum(model, optimizer)),
            schedule=export_schedule(scheduler) if step > 0 else {},
            step=step,
        )

    # --- One step: the unit to read

    def _step(self, state: State, images: Tensor, labels: Tensor) -> tuple[State, Metrics]:
        model, optimizer, scheduler, step = state
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        metrics = Metrics(loss.detach(), global_norm(gradients), scheduler.lr)
        optimizer.step()
        scheduler.step(loss)
        return State(model, optimizer, scheduler, step + 1), metrics

    def train_step(self, state: State, images: np.ndarray, labels: np.ndarray) -> tuple[State, Metrics]:
        return self._step(state, self._images(images), self._labels(labels))

    # --- Many steps in one call

    def train_steps(self, state: State, images: np.ndarray, labels: np.ndarray) -> tuple[State, Metrics]:
        step = self._fused_step if self.compiled else self._step
        history = []
        for batch, truth in zip(self._images(images), self._labels(labels), strict=True):
            state, metrics = step(state, batch, truth)
            history.append(metrics)
        loss, gradient_norm, lr = zip(*history, strict=True)
        return state, Metrics(stack(loss), stack(gradient_norm), np.array(lr))

    def _fused_step(self, state: State, images: Tensor, labels: Tensor) -> tuple[State, Metrics]:
        """`_step` with forward pass, backward pass and update in one compiled program."""
        model, optimizer, scheduler, step = state
        # detached, they share the model's memory, and autograd records nothing beside `grad_and_value`
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        buffers = list(export_momentum(model, optimizer).values())
        if step == 0 or (self.config.momentum != 0 and not buffers):
            return self._step(state, images, labels)  # it makes the buffers; and schedulers insist on one SGD.step
        lr = torch.tensor(scheduler.lr, dtype=torch.float64)  # as a number, each new lr would be compiled anew
        loss, gradient_norm = self._compiled_step(model, parameters, buffers, lr, images, labels)
        metrics = Metrics(loss, gradient_norm, scheduler.lr)
        scheduler.step(loss)
        return State(model, optimizer, scheduler, step + 1), metrics

    def _functional_step(
        self,
        model: Net,
        parameters: Mapping[str, Tensor],
        buffers: list[Tensor],
        lr: Tensor,
        images: Tensor,
        labels: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What torch.compile can trace whole: `loss.backward` and `SGD.step` break its graph, these do not.

        `sgd` is the function that `SGD.step` calls; it writes into `parameters` and `buffers`.
        """

        def loss_of(parameters: Mapping[str, Tensor]) -> Tensor:
            return cross_entropy(functional_call(model, dict(parameters), (images,)), labels)

        gradients, loss = grad_and_value(loss_of)(parameters)
        gradients = list(gradients.values())
        with torch.no_grad():
            sgd(
                list(parameters.values()),
                gradients,
                list(buffers) or [None] * len(gradients),
                foreach=True,
                lr=lr,
                momentum=self.config.momentum,
                dampening=self.config.dampening,
                weight_decay=self.config.weight_decay,
                nesterov=self.config.nesterov,
                maximize=self.config.maximize,
            )
        return loss, global_norm(gradients)

    # --- Looking without touching

    @torch.inference_mode()
    def evaluate(self, state: State, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        predictions, total = [], 0.0
        for start in range(0, len(images), EVALUATION_BATCH):
            batch = slice(start, start + EVALUATION_BATCH)
            truth = self._labels(labels[batch])
            logits = state.model(self._images(images[batch]))
            predictions.append(logits.argmax(dim=-1).cpu().numpy())
            total += cross_entropy(logits, truth).double().item() * len(truth)  # a smaller last batch weighs less
        return Evaluation(np.concatenate(predictions), total / len(images))

    def probe(self, state: State, images: np.ndarray, labels: np.ndarray) -> Arrays:
        model = state.model
        batch, truth = self._images(images), self._labels(labels)
        with recorded(model) as activations:
            logits = model(batch)
        loss = cross_entropy(logits, truth)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        return {
            "data/images": convert.to_numpy(batch.permute(0, 2, 3, 1)),
            "data/labels": convert.to_numpy(truth),
            **{f"forward/{name}": convert.activation_to_canonical(model, name, a) for name, a in activations.items()},
            "forward/logits": convert.to_numpy(logits),
            "loss/loss": convert.to_numpy(loss),
            **{f"backward/{name}": array for name, array in convert.to_canonical(model, gradients).items()},
        }

    def describe(self) -> dict[str, Any]:
        return {
            "torch": torch.__version__,
            "device": self.device,
            "device_name": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "compiled": self.compiled,
            "threads": torch.get_num_threads(),
        }

    # --- In and out of PyTorch's layout

    def _empty_model(self, device: str) -> Net:
        """Built on no device, so that PyTorch draws no random weights that nobody uses."""
        with torch.device("meta"):
            model = Net(self.classes).to(self.dtype)
        return model.to_empty(device=device)

    def _images(self, images: np.ndarray) -> Tensor:
        """(..., height, width, channels) to (..., channels, height, width)."""
        if self.dtype == torch.bfloat16:
            tensor = torch.from_numpy(images.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(images)
        return tensor.to(self.device).movedim(-1, -3).contiguous()

    def _labels(self, labels: np.ndarray) -> Tensor:
        return torch.from_numpy(labels).to(self.device, torch.int64)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch of -log softmax(logits)[label], in nats; in float32 at least."""
    return F.cross_entropy(upcast(logits), labels)


def global_norm(gradients: Sequence[Tensor | None]) -> Tensor:
    """The Euclidean norm of all gradients together; in float32 at least."""
    return get_total_norm([upcast(gradient) for gradient in gradients if gradient is not None])


def upcast(tensor: Tensor) -> Tensor:
    """bfloat16 as float32: three digits are too few to sum in."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def stack(values: tuple[Tensor, ...]) -> np.ndarray:
    """Scalars on the device as one float64 array on the host, with one synchronisation for all."""
    return torch.stack(values).double().cpu().numpy()


def choose_device(device: str) -> str:
    """ "auto", "cpu" or "cuda" as "cpu" or "cuda".

    Raises:
        BackendError: if CUDA is asked for and PyTorch finds none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("PyTorch finds no CUDA device here: use --device cpu, or install a CUDA build of torch")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def set_threads(batch_size: int) -> None:
    """One thread for small batches: what a second one gains there, waiting for it loses.

    `Net` in eager mode on two cores, steps per second with one thread / with two: batch 4 in float32 583 / 515, batch
    32 in float32 210 / 296.
    """
    torch.set_num_threads(1 if batch_size <= 16 else ALL_THREADS)


def make_comparable() -> None:
    """Full float32 and deterministic kernels: TF32 keeps three digits of a float32's seven."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
