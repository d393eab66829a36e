"""Training in JAX and Flax. Reads next to backends/torch_backend/backend.py, section by section."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lockstep.backends.flax_backend import convert, tuning
from lockstep.backends.flax_backend.activations import record_activations
from lockstep.backends.flax_backend.compiled import ManySteps
from lockstep.backends.flax_backend.device import choose_device, configure_determinism
from lockstep.backends.flax_backend.inputs import Array, Data, Inputs
from lockstep.backends.flax_backend.losses import cross_entropy, global_norm
from lockstep.backends.flax_backend.optimizer import (
    export_extra,
    export_schedule,
    export_slots,
    learning_rate,
    make_optimizer,
    restore_schedule,
    restore_slots,
)
from lockstep.backends.flax_backend.pair_optimizer import validate_optimizer
from lockstep.backends.flax_backend.state import Parameters, State
from lockstep.backends.flax_backend.user_module import (
    build,
    cast_constants,
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


class FlaxBackend:
    """`lockstep.common.protocol.Backend` in JAX, Flax and optax."""

    name = "flax"

    # --- Set up: the network, the optimizer, and what makes a run comparable

    def __init__(
        self,
        config: Config,
        classes: int | Task,
        dtype: str = "float32",
        device: str = "auto",
        compile: str = "auto",  # not used: `jax.jit` always compiles
        concurrent_processes: int = 1,
    ) -> None:
        with tuning.limit_threads(config.batch_size, concurrent_processes):
            self.device = choose_device(device)
        configure_determinism(self.device)
        self.config, task = config, task_of(config.model, classes)
        self.dtype = numpy_dtype(dtype)
        self._compute_dtype = compute_dtype(dtype)
        network = build(config.model, task, self.device, exchanges(config, dtype))
        self.network = cast_constants(network, self._compute_dtype)
        self._own_loss = own_loss(config, task)
        batch_norms = {name.rpartition(".")[0] for name in self.network.statistics}
        self._cast = partial(convert.cast_to_compute, dtype=self._compute_dtype, keep=batch_norms)
        if config.model not in MODELS:
            validate_module(config.model, self.network, task, self._own_loss)
        self.optimizer = make_optimizer(config, self.dtype)
        if config.optimizer == FROM_PAIR:
            validate_optimizer(config, self.optimizer, self.network.parameters)
        self._compiled_step = jax.jit(self._step, donate_argnums=0)
        self._many_steps = ManySteps(self._step, self._compiled_step, self.device)
        self._compiled_evaluate = jax.jit(self._evaluate)
        self._compiled_probe = jax.jit(self._probe)
        self._inputs = Inputs(self._compute_dtype)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        tensors = self.network.parameters | self.network.statistics
        return {name: leaf.shape for name, leaf in tensors.items()}

    def native_names(self) -> dict[str, str]:
        return {name: own for own, name in self.network.names.items()}

    def layer_kinds(self) -> dict[str, str]:
        return self.network.kinds

    def module_classes(self) -> tuple[type, ...]:
        return self.network.classes

    def dropout_layers(self) -> dict[str, Dropout]:
        return self.network.dropout_layers

    def init(self, snapshot: Snapshot) -> State:
        tensors = convert.from_canonical(snapshot.parameters | snapshot.model_state)
        parameters = {name: tensors[name] for name in self.network.parameters}
        model_state = {name: tensors[name] for name in self.network.statistics}
        optimizer_state = self.optimizer.init(parameters)
        if snapshot.step > 0:
            slots = {
                slot: convert.from_canonical(arrays) for slot, arrays in snapshot.slots.items()
            }
            schedule, step = snapshot.schedule, snapshot.step
            optimizer_state = restore_slots(
                self.config, optimizer_state, slots, step, parameters, snapshot.extra
            )
            optimizer_state = restore_schedule(self.config, optimizer_state, schedule, step)
        step = jnp.asarray(snapshot.step, jnp.int32)
        return State(parameters, model_state, optimizer_state, step)

    def export(self, state: State) -> Snapshot:
        parameters, model_state, optimizer_state, step = state
        slots = export_slots(self.config, optimizer_state, int(step), parameters)
        return Snapshot(
            parameters=convert.to_canonical(parameters),
            model_state=convert.to_canonical(model_state),
            slots={slot: convert.to_canonical(arrays) for slot, arrays in slots.items()},
            schedule=export_schedule(self.config, optimizer_state, int(step)) if step > 0 else {},
            step=int(step),
            extra=export_extra(self.config, optimizer_state, int(step), parameters),
        )

    # --- One step: the unit to read

    def _step(
        self, state: State, images: jax.Array, labels: jax.Array, masks: Parameters
    ) -> tuple[State, Metrics]:
        parameters, model_state, optimizer_state, step = state

        def loss_of(parameters: Parameters) -> tuple[jax.Array, Parameters]:
            logits, new_model_state = self._forward(parameters, model_state | masks, images)
            return self._loss(logits, labels, self.config.label_smoothing), new_model_state

        (loss, model_state), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        lr = learning_rate(self.config, optimizer_state, step)
        metrics = Metrics(loss, global_norm(gradients), lr)
        updates, optimizer_state = self.optimizer.update(
            gradients, optimizer_state, parameters, value=loss
        )
        parameters = optax.apply_updates(parameters, updates)
        return State(parameters, model_state, optimizer_state, step + 1), metrics

    def _loss(self, logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
        """Cross entropy, or the loss of a user's pair."""
        if self._own_loss is None:
            return cross_entropy(logits, labels, smoothing)
        return self._own_loss(logits, labels)

    def _forward(
        self, parameters: Parameters, model_state: Parameters, images: jax.Array
    ) -> tuple[jax.Array, Parameters]:
        """Logits, and the new model state."""
        model = self._model(parameters, model_state)
        logits = model(images)
        return logits, convert.flatten(nnx.state(model, nnx.BatchStat), self.network.names)

    def _model(
        self, parameters: Parameters, model_state: Parameters, training: bool = True
    ) -> nnx.Module:
        graph = self.network.training if training else self.network.evaluation
        tensors = self._cast(parameters) | self.network.masks | model_state
        tensors = convert.nest(tensors, self.network.names)
        return nnx.merge(graph, tensors, self.network.constants)

    def train_step(
        self, state: State, images: np.ndarray, labels: np.ndarray
    ) -> tuple[State, Metrics]:
        return self._compiled_step(state, *self._on_device(state, images, labels))

    def _on_device(
        self, state: State, images: Array, labels: Array, axis: int = 0
    ) -> tuple[jax.Array, jax.Array, Parameters]:
        """Batches, and the masks of dropout for them; `axis` is that of the images of a batch."""
        masks = self._masks(state, labels.shape[: axis + 1])
        return self._inputs.images(images), self._inputs.labels(labels), masks

    # --- Many steps in one call

    def upload(self, images: np.ndarray, labels: np.ndarray) -> Data:
        return self._inputs.upload(images, labels)

    def batches(self, uploaded: Data, indices: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return self._inputs.batches(uploaded, indices)

    def download(self, images: Array, labels: Array) -> tuple[np.ndarray, np.ndarray]:
        return self._inputs.download(images, labels)

    def train_steps(self, state: State, images: Array, labels: Array) -> tuple[State, Metrics]:
        return self._many_steps(state, *self._on_device(state, images, labels, axis=1))

    def masks(self, state: State, shape: Sequence[int]) -> Arrays:
        layers = self.network.dropout_layers
        if not layers:
            return {}  # without waiting for `state`
        return draw_masks(layers, self.config.seed, int(state.step), shape)

    def _masks(self, state: State, shape: Sequence[int]) -> Parameters:
        """The same on the device."""
        return convert.from_canonical(self.masks(state, shape))

    # --- Looking without touching

    def evaluate(self, state: State, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        predictions, total, count = [], 0.0, 0
        for start in range(0, len(images), tuning.EVALUATION_BATCH):
            batch = slice(start, start + tuning.EVALUATION_BATCH)
            batch_images = self._inputs.images(images[batch])
            batch_labels = self._inputs.labels(labels[batch])
            logits, loss = self._compiled_evaluate(state, batch_images, batch_labels)
            predictions.append(self._predictions(logits))
            if weight := label_count(labels[batch]):  # a smaller last batch weighs less
                total, count = total + float(loss) * weight, count + weight
        return Evaluation(np.concatenate(predictions), total / max(1, count))

    def _evaluate(
        self, state: State, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        logits = self._model(state.parameters, state.model_state, training=False)(images)
        loss = self._loss(logits, labels)
        return logits.argmax(axis=-1) if self._own_loss is None else logits, loss

    def _predictions(self, found: jax.Array) -> np.ndarray:
        if self._own_loss is None:
            return np.asarray(found, np.int64)
        return flat(convert.outputs_to_canonical(found))

    def probe(self, state: State, images: np.ndarray, labels: np.ndarray) -> Arrays:
        batch = self._on_device(state, images, labels)
        found = self._compiled_probe(state, *batch)
        (loss, (activations, logits)), gradients = found
        gradients = convert.to_canonical(gradients)
        outputs = convert.outputs_to_canonical(logits)
        if self._own_loss is None:
            outputs = {"logits": outputs["output"]}
        images, labels = map(self._to_numpy, batch[:2])
        return {
            "data/images": images,
            "data/labels": labels if labels.dtype.kind == "f" else labels.astype(np.int64),
            **convert.activations_to_canonical(self.network.names, activations),
            **{f"forward/{name}": array for name, array in outputs.items()},
            "loss/loss": convert.to_numpy(loss),
            **{f"backward/{name}": array for name, array in gradients.items()},
        }

    def _to_numpy(self, array: jax.Array) -> np.ndarray:
        return convert.to_numpy(array)

    def _probe(
        self, state: State, images: jax.Array, labels: jax.Array, masks: Parameters
    ) -> tuple[tuple[jax.Array, tuple[Parameters, jax.Array]], Parameters]:
        def loss_of(parameters: Parameters) -> tuple[jax.Array, tuple[Parameters, jax.Array]]:
            model = self._model(parameters, state.model_state | masks)
            with record_activations(model) as activations:
                logits = model(images)
            return self._loss(logits, labels, self.config.label_smoothing), (activations, logits)

        return jax.value_and_grad(loss_of, has_aux=True)(state.parameters)

    def describe(self) -> dict[str, object]:
        return {
            **{module.__name__: module.__version__ for module in (jax, flax, optax)},
            "device": self.device,
            "device_name": jax.devices(self.device)[0].device_kind,
            "compiled": True,
            **convert.exchanged(self.network.exchanged),
        }
