"""Training in PyTorch. Reads beside backends/flax_backend/backend.py, section by section."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn
from torch._higher_order_ops import scan
from torch.func import functional_call, grad_and_value
from torch.nn import functional as F
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import SGD
from torch.optim.sgd import sgd

from lockstep.backends.torch_backend import convert
from lockstep.backends.torch_backend.activations import recorded
from lockstep.backends.torch_backend.optimizer import (
    Scheduler,
    export_momentum,
    export_schedule,
    make_optimizer,
    restore_momentum,
    restore_schedule,
)
from lockstep.backends.torch_backend.user_module import build, examine
from lockstep.common.config import MODELS, Config
from lockstep.common.data import normalise
from lockstep.common.data.dropout import masks
from lockstep.common.dtypes import compute_dtype, numpy_dtype
from lockstep.common.errors import BackendError
from lockstep.common.protocol import Arrays, Dropout, Evaluation, Metrics, Snapshot
from lockstep.common.system import environment

# images per forward pass: the fewer, the less new memory each one asks the system for
EVALUATION_BATCH = 50
ALL_THREADS = torch.get_num_threads()
SMALL_BATCH = 16  # up to which one thread is quicker than two
# steps from which on compiling, half a minute, pays: a step is a millisecond shorter
LONG_RUN = 20_000
# On the CPU. What reads up to four values, inductor else computes anew wherever it is used, and so
# pools once for each of the views of a pooled image that the next convolution's rows hold. And its
# loop calls its kernels from C++, not from Python; with torch 2.11 that does not compile.
INDUCTOR: dict[str, Any] = {"realize_reads_threshold": 3}
INDUCTOR |= {"cpp_wrapper": True} if torch.__version__ >= "2.15" else {}
# Up to which batch compiled steps are quicker than eager ones. `Net`, steps per second, eager and
# compiled: batch 32 in float32 302 and 543, float64 141 and 271, bfloat16 287 and 526; batch 128
# 103 and 130, 41 and 61, 123 and 147; batch 512 in float32 29 and 18. With torch 2.11, batch 32 in
# float32, 303 and 272. ResNet20's step of 32 is not compiled after five minutes.
COMPILED_BATCH = {"net": 128} if "cpp_wrapper" in INDUCTOR else {}  # of the others: `SMALL_BATCH`
# On the CPU images lie as NumPy has them, channels last, in networks in which that is quicker.
# `Net` at batch 32 and 128, training steps per second without and with it, in turn: float32 109 and
# 118, 60 and 66; bfloat16 67 and 122, 26 and 71; float64 157 and 158, 44 and 44, with one thread at
# batch 32 107 and 112. The others gain little; PyTorch's batch norm may then sum in float32 (means
# off by 6e-6, else by 4e-8); a user's network may ask for its own order with `view`.
CHANNELS_LAST = ("net",)

# parameters, buffers, momentum; own names
Carry = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]
Batch = tuple[Tensor, Tensor, dict[str, Tensor], Tensor]  # images, labels, masks of dropout, and lr


class State(NamedTuple):
    """What training changes; PyTorch changes it in place."""

    model: nn.Module
    optimizer: SGD
    scheduler: Scheduler
    step: int


class Data(NamedTuple):
    """A data set on the device."""

    images: Tensor  # uint8 (n, channels, height, width), or with the channels last
    labels: Tensor  # int64 (n,)


@final
class TorchBackend:
    """`lockstep.common.protocol.Backend` in PyTorch."""

    name = "torch"

    # --- Set up: the network, the optimizer, and what makes a run comparable

    def __init__(
        self,
        config: Config,
        classes: int,
        dtype: str = "float32",
        device: str = "auto",
        compile: str = "auto",
    ) -> None:
        self.device = choose_device(device)
        make_comparable(self.device)
        set_threads(config.batch_size)
        self.config = config
        self.dtype = getattr(torch, numpy_dtype(dtype).name)
        self._compute_dtype = compute_dtype(dtype)  # as NumPy calls it
        self.classes = classes
        most = COMPILED_BATCH.get(config.model, SMALL_BATCH)
        pays = (config.steps or 0) >= LONG_RUN and config.batch_size <= most
        wanted = compile == "on" or (compile == "auto" and pays)
        # whose next lr hangs on the losses
        self.compiled = wanted and config.schedule.kind != "plateau"
        self._skeleton = build(config.model, classes, self.device).to(self.dtype)
        self._dropouts = convert.dropouts(self._skeleton)
        self._batch_norms = {name.rpartition(".")[0] for name in convert.statistics(self._skeleton)}
        if config.model not in MODELS:
            examine(config.model, self._skeleton, classes)
        # all backends of a process share `_scan`'s programs
        torch._dynamo.config.recompile_limit = 1024
        options = INDUCTOR if self.device == "cpu" else None
        self._compiled_scan = torch.compile(
            self._scan, fullgraph=True, dynamic=False, options=options
        )
        table = normalise(np.arange(256, dtype=np.uint8), self._compute_dtype)
        self._normalised = self._tensor(table).to(self.device)  # by pixel
        self._channels_last = self.device == "cpu" and config.model in CHANNELS_LAST

    def shapes(self) -> dict[str, tuple[int, ...]]:
        model = self._skeleton
        tensors = dict(model.named_parameters()) | convert.statistics(model)
        zeros = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in tensors.items()}
        return {name: array.shape for name, array in convert.to_canonical(model, zeros).items()}

    def own_names(self) -> dict[str, str]:
        return {name: own for own, name in convert.canonical_names(self._skeleton).items()}

    def dropouts(self) -> dict[str, Dropout]:
        return self._dropouts

    def init(self, snapshot: Snapshot) -> State:
        model = self._empty_model()
        model.load_state_dict(
            model.state_dict()
            | convert.from_canonical(model, snapshot.parameters | snapshot.model_state)
        )
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
            model_state=convert.to_canonical(model, convert.statistics(model)),
            momentum=convert.to_canonical(model, export_momentum(model, optimizer)),
            schedule=export_schedule(scheduler) if step > 0 else {},
            step=step,
        )

    # --- One step: the unit to read

    def _step(
        self, state: State, images: Tensor, labels: Tensor, kept: dict[str, Tensor]
    ) -> tuple[State, Metrics]:
        model, optimizer, scheduler, step = state
        convert.put_masks(model, kept)
        optimizer.zero_grad()
        loss = cross_entropy(self._forward(model, images), labels, self.config.label_smoothing)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        metrics = Metrics(loss.detach(), global_norm(gradients), scheduler.lr)
        if self.config.clip_norm is not None:
            clip_grads_with_norm_(model.parameters(), self.config.clip_norm, metrics.gradient_norm)
        optimizer.step()
        scheduler.step(loss)
        return State(model, optimizer, scheduler, step + 1), metrics

    def _forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits; in mixed precision of parameters that are rounded for this pass only."""
        if self._normalised.dtype == self.dtype:
            return model(images)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        return functional_call(model, self._rounded(tensors), (images,))

    def _rounded(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """To the precision to compute in, but for batch norms', as PyTorch's FSDP does; gradients
        go through."""
        dtype = self._normalised.dtype
        return {
            name: tensor.to(dtype)
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and name.rpartition(".")[0] not in self._batch_norms
        }

    def train_step(
        self, state: State, images: np.ndarray, labels: np.ndarray
    ) -> tuple[State, Metrics]:
        return self._step(
            state, self._images(images), self._labels(labels), self._masks(state.step, labels.shape)
        )

    # --- Many steps in one call

    def upload(self, images: np.ndarray, labels: np.ndarray) -> Data:
        pixels = torch.from_numpy(images).to(self.device)
        return Data(
            pixels if self._channels_last else pixels.movedim(-1, -3).contiguous(),
            self._labels(labels),
        )

    def gather(self, uploaded: Data, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(indices).to(self.device)
        if self.device == "cpu":
            # In NumPy's memory. PyTorch aligns its own, and what it gives back glibc does not find
            # again for another tensor of its size: chunk by chunk, the tutorial's float64 run grew
            # to 5.1 GB. So it stays below 1.8.
            images = self._tensor(normalise(uploaded.images.numpy()[indices], self._compute_dtype))
            return images.movedim(-1, -3) if self._channels_last else images, uploaded.labels[
                chosen
            ]
        pixels = uploaded.images[chosen]
        images = self._normalised.index_select(0, pixels.flatten().int()).view(pixels.shape)
        return images, uploaded.labels[chosen]

    def train_steps(
        self, state: State, images: np.ndarray | Tensor, labels: np.ndarray | Tensor
    ) -> tuple[State, Metrics]:
        images, labels = self._images(images), self._labels(labels)
        if self.compiled and len(labels) > 1:
            if state.step > 0:
                return self._fused_steps(state, images, labels)
            # it makes the momentum buffers
            state, first = self.train_steps(state, images[:1], labels[:1])
            state, others = self.train_steps(state, images[1:], labels[1:])
            return state, Metrics(*map(np.concatenate, zip(first, others, strict=True)))
        history = []
        for batch, truth in zip(images, labels, strict=True):
            state, metrics = self._step(state, batch, truth, self._masks(state.step, truth.shape))
            history.append(metrics)
        loss, gradient_norm, lr = zip(*history, strict=True)
        return state, Metrics(
            to_array(torch.stack(loss)), to_array(torch.stack(gradient_norm)), np.array(lr)
        )

    def _fused_steps(self, state: State, images: Tensor, labels: Tensor) -> tuple[State, Metrics]:
        """`_step` over the leading axis, as one compiled loop."""
        model, optimizer, scheduler, step = state
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        kept, momentum = self._masks(step, labels.shape), export_momentum(model, optimizer)
        buffers = {name: buffer for name, buffer in model.named_buffers() if name not in kept}
        lr = scheduler.advance(len(labels))
        # `grad_and_value` takes the gradients; autograd has nothing to record
        with torch.no_grad():
            rates = torch.from_numpy(lr).to(self.device)
            start = parameters, buffers, momentum
            carry, (loss, gradient_norm) = self._compiled_scan(start, (images, labels, kept, rates))
        parameters, buffers, momentum = carry
        model.load_state_dict(model.state_dict() | parameters | buffers)
        restore_momentum(model, optimizer, momentum)
        metrics = Metrics(to_array(loss), to_array(gradient_norm), lr)
        return State(model, optimizer, scheduler, step + len(labels)), metrics

    def _scan(self, carry: Carry, batches: Batch) -> tuple[Carry, tuple[Tensor, Tensor]]:
        """PyTorch's `lax.scan`; a prototype in its own words, so tests hold it against single
        steps."""
        return scan(self._functional_step, carry, batches)

    def _functional_step(self, carry: Carry, batch: Batch) -> tuple[Carry, tuple[Tensor, Tensor]]:
        """What torch.compile can trace whole: `loss.backward` and `SGD.step` break its graph, these
        do not.

        `sgd` is the function that `SGD.step` calls; it writes into the parameters and the momentum
        that it is given.
        """
        parameters, buffers, momentum = carry
        images, labels, kept, lr = batch

        def loss_of(parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            # the forward pass writes into it
            new_buffers = {name: buffer.clone() for name, buffer in buffers.items()}
            tensors = parameters | new_buffers
            logits = functional_call(
                self._skeleton, (tensors | self._rounded(tensors), kept), (images,)
            )
            return cross_entropy(logits, labels, self.config.label_smoothing), new_buffers

        gradients, (loss, buffers) = grad_and_value(loss_of, has_aux=True)(parameters)
        norm = global_norm(list(gradients.values()))
        # what `clip_grads_with_norm_` does to gradients that parameters hold
        if self.config.clip_norm is not None:
            factor = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = {name: gradient * factor for name, gradient in gradients.items()}
        parameters = {name: parameter.clone() for name, parameter in parameters.items()}
        momentum = {name: buffer.clone() for name, buffer in momentum.items()}
        sgd(
            list(parameters.values()),
            list(gradients.values()),
            list(momentum.values()) or [None] * len(gradients),
            foreach=False,  # within `scan`, torch 2.15 fails on it
            lr=lr,
            momentum=self.config.momentum,
            dampening=self.config.dampening,
            weight_decay=self.config.weight_decay,
            nesterov=self.config.nesterov,
            maximize=self.config.maximize,
        )
        return (parameters, buffers, momentum), (loss, norm)

    # --- Looking without touching

    @torch.inference_mode()
    def evaluate(self, state: State, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        predictions, total = [], 0.0
        state.model.eval()
        for start in range(0, len(images), EVALUATION_BATCH):
            batch = slice(start, start + EVALUATION_BATCH)
            truth = self._labels(labels[batch])
            logits = self._forward(state.model, self._images(images[batch]))
            predictions.append(logits.argmax(dim=-1).cpu().numpy())
            # a smaller last batch weighs less
            total += cross_entropy(logits, truth).double().item() * len(truth)
        state.model.train()
        return Evaluation(np.concatenate(predictions), total / len(images))

    def probe(self, state: State, images: np.ndarray, labels: np.ndarray) -> Arrays:
        model = state.model
        batch, truth = self._images(images), self._labels(labels)
        convert.put_masks(model, self._masks(state.step, truth.shape))
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with recorded(model) as activations:
            logits = self._forward(model, batch)
        loss = cross_entropy(logits, truth, self.config.label_smoothing)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        for name, buffer in model.named_buffers():  # the forward pass wrote into its statistics
            buffer.copy_(before[name])
        return {
            "data/images": convert.to_numpy(batch.permute(0, 2, 3, 1)),
            "data/labels": convert.to_numpy(truth),
            **convert.activations_to_canonical(model, activations),
            "forward/logits": convert.to_numpy(logits),
            "loss/loss": convert.to_numpy(loss),
            **{
                f"backward/{name}": array
                for name, array in convert.to_canonical(model, gradients).items()
            },
        }

    def describe(self) -> dict[str, Any]:
        return {
            "torch": str(
                torch.__version__
            ),  # a class of PyTorch's own, which nobody can unpickle without importing it
            "device": self.device,
            "device_name": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "compiled": self.compiled,
            "threads": torch.get_num_threads(),
        }

    # --- In and out of PyTorch's layout

    def _empty_model(self) -> nn.Module:
        """The network on the device, for weights to be loaded into."""
        model = copy.deepcopy(self._skeleton)
        if self.config.model not in MODELS:  # it may have constants of its own
            return model.to(self.device)
        model.to_empty(device=self.device)
        for buffer in model.buffers():
            buffer.zero_()
        return model

    def _images(self, images: np.ndarray | Tensor) -> Tensor:
        """(..., height, width, channels) to (..., channels, height, width); a tensor is left as it
        is."""
        if isinstance(images, Tensor):
            return images
        images = self._tensor(images).to(self.device).movedim(-1, -3)
        return images if self._channels_last else images.contiguous()

    def _tensor(self, images: np.ndarray) -> Tensor:
        """The same memory as a tensor; bfloat16 is `ml_dtypes`' in NumPy, which PyTorch does not
        know."""
        if images.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(images.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(images)

    def _masks(self, step: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """What dropout keeps in the steps from `step` on, for labels of `shape`, by PyTorch's
        names."""
        kept = convert.masks_from_canonical(
            self._skeleton, masks(self._dropouts, self.config.seed, step, shape)
        )
        return {name: mask.to(self.device) for name, mask in kept.items()}

    def _labels(self, labels: np.ndarray | Tensor) -> Tensor:
        if isinstance(labels, Tensor):
            return labels
        return torch.from_numpy(labels).to(self.device, torch.int64)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean over the batch of -log softmax(logits)[label], in nats; in float32 at least.

    With `smoothing`, that share of each label is spread evenly over all classes, its own included.
    """
    return F.cross_entropy(upcast(logits), labels, label_smoothing=smoothing)


def global_norm(gradients: Sequence[Tensor | None]) -> Tensor:
    """The Euclidean norm of all gradients together, in float64.

    In float32, PyTorch's on the CPU is off by 8e-6 of itself for the 786,432 weights of MLP's first
    layer.
    """
    wide = [gradient.double() for gradient in gradients if gradient is not None]
    # Tensor by tensor on the CPU, as `foreach` does there, too; compiled, this becomes part of
    # other loops.
    return get_total_norm(wide, foreach=False if wide[0].device.type == "cpu" else None)


def upcast(tensor: Tensor) -> Tensor:
    """bfloat16 as float32: three digits are too few to sum in."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


def to_array(series: Tensor) -> np.ndarray:
    """Scalars on the device as a float64 array on the host, with one synchronisation for all."""
    return series.double().cpu().numpy()


def choose_device(device: str) -> str:
    """ "auto", "cpu" or "cuda" as "cpu" or "cuda".

    Raises:
        BackendError: if CUDA is asked for and PyTorch finds none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            "PyTorch finds no CUDA device here: use --device cpu, or install a CUDA build of torch"
        )
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def set_threads(batch_size: int) -> None:
    """One thread for small batches: what a second one gains there, waiting for it loses.

    `Net` in eager mode on two cores, steps per second with one thread / with two: batch 4 in
    float32 583 / 515, batch 32 in float32 210 / 296.
    """
    torch.set_num_threads(
        1 if batch_size <= SMALL_BATCH else max(1, ALL_THREADS // environment.sharing)
    )


def make_comparable(device: str) -> None:
    """Full float32 and deterministic kernels: TF32 keeps three digits of a float32's seven."""
    # what cuBLAS needs to be deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    # on the CPU they are; inductor would be half as fast
    torch.use_deterministic_algorithms(device == "cuda")
