"""Training in PyTorch. Reads next to backends/flax_backend/backend.py, section by section."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import clip_grads_with_norm_

from lockstep.backends.torch_backend import convert, tuning
from lockstep.backends.torch_backend.activations import record_activations
from lockstep.backends.torch_backend.compiled import ManySteps
from lockstep.backends.torch_backend.device import choose_device, configure_determinism
from lockstep.backends.torch_backend.inputs import Array, Data, Inputs, pixel_axes
from lockstep.backends.torch_backend.losses import cross_entropy, global_norm
from lockstep.backends.torch_backend.optimizer import (
    Scheduler,
    export_extra,
    export_schedule,
    export_slots,
    make_optimizer,
    restore_schedule,
    restore_slots,
)
from lockstep.backends.torch_backend.pair_optimizer import validate_optimizer
from lockstep.backends.torch_backend.state import State
from lockstep.backends.torch_backend.user_module import (
    build,
    empty_copy,
    exchanges,
    own_loss,
    validate_module,
)
from lockstep.common.config import MODELS, Config
from lockstep.common.data import label_count
from lockstep.common.data.dropout import masks as draw_masks
from lockstep.common.data.of_pair import task as task_of
from lockstep.common.dtypes import compute_dtype, numpy_dtype
from lockstep.common.model.trees import flat
from lockstep.common.optimizers import FROM_PAIR
from lockstep.common.protocol import Arrays, Dropout, Evaluation, Metrics, Snapshot, Task


class TorchBackend:
    """`lockstep.common.protocol.Backend` in PyTorch."""

    name = "torch"

    # --- Set up: the network, the optimizer, and what makes a run comparable

    def __init__(
        self,
        config: Config,
        classes: int | Task,
        dtype: str = "float32",
        device: str = "auto",
        compile: str = "auto",
        concurrent_processes: int = 1,
    ) -> None:
        self.device = choose_device(device)
        configure_determinism(self.device)
        tuning.limit_threads(config.batch_size, concurrent_processes)
        self.config, task = config, task_of(config.model, classes)
        self.dtype = getattr(torch, numpy_dtype(dtype).name)
        self._compute_dtype = getattr(torch, compute_dtype(dtype).name)
        self.compiled = tuning.compiles(config, compile)
        channels_last = tuning.channels_last(config.model, self.device)
        kinds = exchanges(config, dtype)
        self._template = build(config.model, task.classes, self.device, kinds).to(self.dtype)
        self._dropout_layers = convert.dropout_layers(self._template)
        self._own_loss = own_loss(config, task)
        batch_norms = {name.rpartition(".")[0] for name in convert.statistics(self._template)}
        self._cast = partial(convert.cast_to_compute, dtype=self._compute_dtype, keep=batch_norms)
        axes = pixel_axes(task.inputs), pixel_axes(task.targets)
        self._inputs = Inputs(compute_dtype(dtype), self.device, channels_last, axes)
        if config.model not in MODELS:
            validate_module(config.model, self._template, task, self._inputs, self._own_loss)
        if config.optimizer == FROM_PAIR:
            validate_optimizer(config, self._template)
        self._many_steps = ManySteps(
            config, self._template, self._step, self._loss, self._cast, self.device, self.compiled
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        model = self._template
        tensors = dict(model.named_parameters()) | convert.statistics(model)
        zeros = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in tensors.items()}
        return {name: array.shape for name, array in convert.to_canonical(model, zeros).items()}

    def native_names(self) -> dict[str, str]:
        return {name: own for own, name in convert.canonical_names(self._template).items()}

    def layer_kinds(self) -> dict[str, str]:
        return convert.layer_kinds(self._template)

    def module_classes(self) -> tuple[type, ...]:
        return tuple(dict.fromkeys(type(module) for module in self._template.modules()))

    def dropout_layers(self) -> dict[str, Dropout]:
        return self._dropout_layers

    def init(self, snapshot: Snapshot) -> State:
        model = empty_copy(self._template, self.config.model, self.device)
        model.load_state_dict(
            model.state_dict()
            | convert.from_canonical(model, snapshot.parameters | snapshot.model_state)
        )
        optimizer = make_optimizer(self.config, model)
        scheduler = Scheduler(self.config, optimizer)
        if snapshot.step > 0:
            slots = {
                slot: convert.from_canonical(model, arrays)
                for slot, arrays in snapshot.slots.items()
            }
            restore_slots(self.config, model, optimizer, slots, snapshot.step, snapshot.extra)
            restore_schedule(scheduler, snapshot.schedule, snapshot.step)
        return State(model, optimizer, scheduler, snapshot.step)

    def export(self, state: State) -> Snapshot:
        model, optimizer, scheduler, step = state
        slots = export_slots(self.config, model, optimizer, step)
        return Snapshot(
            parameters=convert.to_canonical(model, dict(model.named_parameters())),
            model_state=convert.to_canonical(model, convert.statistics(model)),
            slots={slot: convert.to_canonical(model, tensors) for slot, tensors in slots.items()},
            schedule=export_schedule(scheduler) if step > 0 else {},
            step=step,
            extra=export_extra(self.config, model, optimizer, step),
        )

    # --- One step: the unit to read

    def _step(
        self, state: State, images: Tensor, labels: Tensor, masks: dict[str, Tensor]
    ) -> tuple[State, Metrics]:
        model, optimizer, scheduler, step = state
        convert.set_masks(model, masks)
        optimizer.zero_grad()
        loss = self._loss(self._forward(model, images), labels, self.config.label_smoothing)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        metrics = Metrics(loss.detach(), global_norm(gradients), scheduler.lr)
        if self.config.clip_norm is not None:
            clip_grads_with_norm_(model.parameters(), self.config.clip_norm, metrics.gradient_norm)
        optimizer.step()
        scheduler.step(loss)
        return State(model, optimizer, scheduler, step + 1), metrics

    def _loss(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross entropy, or the loss of a user's pair."""
        if self._own_loss is None:
            return cross_entropy(logits, labels, smoothing)
        return self._own_loss(logits, labels)

    def _forward(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits; in mixed precision, with parameters rounded for this pass only."""
        if self._compute_dtype == self.dtype:
            return model(images)
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        return functional_call(model, self._cast(tensors), (images,))

    def train_step(
        self, state: State, images: np.ndarray, labels: np.ndarray
    ) -> tuple[State, Metrics]:
        return self._step(state, *self._on_device(state, images, labels))

    def _on_device(
        self, state: State, images: Array, labels: Array, axis: int = 0
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Batches, and the masks of dropout for them; `axis` is that of the images of a batch."""
        masks = self._masks(state, labels.shape[: axis + 1])
        return self._inputs.images(images), self._inputs.labels(labels), masks

    # --- Many steps in one call

    def upload(self, images: np.ndarray, labels: np.ndarray) -> Data:
        return self._inputs.upload(images, labels)

    def batches(self, uploaded: Data, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return self._inputs.batches(uploaded, indices)

    def download(self, images: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
        return self._inputs.download(images, labels)

    def train_steps(self, state: State, images: Array, labels: Array) -> tuple[State, Metrics]:
        return self._many_steps(state, *self._on_device(state, images, labels, axis=1))

    def masks(self, state: State, shape: Sequence[int]) -> Arrays:
        return draw_masks(self._dropout_layers, self.config.seed, state.step, shape)

    def _masks(self, state: State, shape: Sequence[int]) -> dict[str, Tensor]:
        """The same on the device, by PyTorch's names."""
        masks = convert.masks_from_canonical(self._template, self.masks(state, shape))
        return {name: mask.to(self.device) for name, mask in masks.items()}

    # --- Looking without touching

    @torch.inference_mode()
    def evaluate(self, state: State, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        predictions, total, count = [], 0.0, 0
        state.model.eval()
        for start in range(0, len(images), tuning.EVALUATION_BATCH):
            batch = slice(start, start + tuning.EVALUATION_BATCH)
            batch_labels = self._inputs.labels(labels[batch])
            logits = self._forward(state.model, self._inputs.images(images[batch]))
            loss = self._loss(logits, batch_labels)
            predictions.append(self._predictions(logits))
            if weight := label_count(labels[batch]):  # a smaller last batch weighs less
                total, count = total + loss.double().item() * weight, count + weight
        state.model.train()
        return Evaluation(np.concatenate(predictions), total / max(1, count))

    def _predictions(self, logits: Tensor) -> np.ndarray:
        if self._own_loss is None:
            return logits.argmax(dim=-1).cpu().numpy()
        return flat(convert.outputs_to_canonical(logits))

    def probe(self, state: State, images: np.ndarray, labels: np.ndarray) -> Arrays:
        model = state.model
        batch, batch_labels, masks = self._on_device(state, images, labels)
        convert.set_masks(model, masks)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with record_activations(model) as activations:
            logits = self._forward(model, batch)
        loss = self._loss(logits, batch_labels, self.config.label_smoothing)
        gradients = convert.to_canonical(model, self._gradients(model, loss))
        for name, buffer in model.named_buffers():  # the forward pass has updated the statistics
            buffer.copy_(before[name])
        outputs = convert.outputs_to_canonical(logits)
        if self._own_loss is None:
            outputs = {"logits": outputs["output"]}
        images, labels = self._inputs.download(batch, batch_labels)
        return {
            "data/images": images.copy(),
            "data/labels": labels.copy(),
            **convert.activations_to_canonical(model, activations),
            **{f"forward/{name}": array for name, array in outputs.items()},
            "loss/loss": convert.to_numpy(loss),
            **{f"backward/{name}": array for name, array in gradients.items()},
        }

    def _gradients(self, model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
        names, parameters = zip(*model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))

    def describe(self) -> dict[str, object]:
        return {
            "torch": str(torch.__version__),  # a plain string unpickles without PyTorch
            "device": self.device,
            "device_name": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "compiled": self.compiled,
            "threads": torch.get_num_threads(),
            **convert.exchanged(self._template),
        }
