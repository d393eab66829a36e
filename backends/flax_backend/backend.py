"""Training in JAX and Flax. Reads beside backends/torch_backend/backend.py, section by section."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, final

# XLA reads these once, when JAX starts.
# leave PyTorch its share of the card
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lockstep.backends.flax_backend import convert
from lockstep.backends.flax_backend.activations import recorded
from lockstep.backends.flax_backend.optimizer import (
    export_momentum,
    export_schedule,
    learning_rate,
    make_optimizer,
    restore_momentum,
    restore_schedule,
)
from lockstep.backends.flax_backend.user_module import Network, build, examine
from lockstep.common.config import MODELS, Config
from lockstep.common.data import normalise
from lockstep.common.data.dropout import masks
from lockstep.common.dtypes import compute_dtype, numpy_dtype
from lockstep.common.errors import BackendError
from lockstep.common.protocol import Arrays, Dropout, Evaluation, Metrics, Snapshot
from lockstep.common.system import environment

# images per forward pass: the fewer, the less new memory each one asks the system for
EVALUATION_BATCH = 50

SMALL_BATCH = 16  # up to which one thread is quicker than two
# On the CPU. XLA else copies each weight in every step of a loop, lest it change before it is read
# for the last time. `Net` at batch 4, steps per second without and with it, bit for bit the same:
# float32 2,605 and 2,727, float64 1,597 and 1,633; at batch 32 in float32 378 and 385.
XLA = {"xla_cpu_copy_insertion_use_region_analysis": True}

Parameters = Any  # a dictionary of arrays by dotted name; optax and JAX call any such tree a pytree


class State(NamedTuple):
    """What training changes; JAX returns a new one and reuses the memory of the old."""

    parameters: Parameters
    model_state: Parameters
    optimizer_state: Any
    step: jax.Array  # int32 ()


class Data(NamedTuple):
    """A data set on the device."""

    images: jax.Array  # uint8 (n, height, width, channels)
    labels: jax.Array  # int32 (n,)


@final
class FlaxBackend:
    """`lockstep.common.protocol.Backend` in JAX, Flax and optax."""

    name = "flax"

    # --- Set up: the network, the optimizer, and what makes a run comparable

    def __init__(
        self,
        config: Config,
        classes: int,
        dtype: str = "float32",
        device: str = "auto",
        compile: str = "auto",
    ) -> None:
        del compile  # jax.jit always
        with threads_for(config.batch_size):
            self.device = choose_device(device)
        make_comparable(self.device)
        self.config = config
        self.dtype = numpy_dtype(dtype)
        self._compute_dtype = compute_dtype(dtype)
        self.network = in_precision(build(config.model, classes, self.device), self._compute_dtype)
        self._batch_norms = {name.rpartition(".")[0] for name in self.network.statistics}
        if config.model not in MODELS:
            examine(config.model, self.network, classes)
        self.optimizer = make_optimizer(config, self.dtype)
        self._compiled_step = jax.jit(self._step, donate_argnums=0)
        options = XLA if self.device == "cpu" and all(map(has_option, XLA)) else None
        self._compiled_steps = jax.jit(
            self._fused_steps, donate_argnums=0, compiler_options=options
        )
        self._compiled_evaluate = jax.jit(self._evaluate)
        self._compiled_probe = jax.jit(self._probe)
        self._compiled_gather = jax.jit(self._gather)
        # whether XLA's own convolution is part of a step; asked at the first
        self._convolves: bool | None = None
        self._normalised = jnp.asarray(
            normalise(np.arange(256, dtype=np.uint8), self._compute_dtype)
        )  # by pixel

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: leaf.shape
            for name, leaf in (self.network.parameters | self.network.statistics).items()
        }

    def own_names(self) -> dict[str, str]:
        return {name: own for own, name in self.network.names.items()}

    def dropouts(self) -> dict[str, Dropout]:
        return self.network.dropouts

    def init(self, snapshot: Snapshot) -> State:
        tensors = convert.from_canonical(snapshot.parameters | snapshot.model_state)
        parameters = {name: tensors[name] for name in self.network.parameters}
        model_state = {name: tensors[name] for name in self.network.statistics}
        optimizer_state = self.optimizer.init(parameters)
        if snapshot.step > 0:
            momentum = convert.from_canonical(snapshot.momentum)
            optimizer_state = restore_momentum(optimizer_state, momentum)
            optimizer_state = restore_schedule(
                self.config, optimizer_state, snapshot.schedule, snapshot.step
            )
        return State(
            parameters, model_state, optimizer_state, jnp.asarray(snapshot.step, jnp.int32)
        )

    def export(self, state: State) -> Snapshot:
        parameters, model_state, optimizer_state, step = state
        return Snapshot(
            parameters=convert.to_canonical(parameters),
            model_state=convert.to_canonical(model_state),
            momentum=convert.to_canonical(export_momentum(self.config, optimizer_state, int(step))),
            schedule=export_schedule(self.config, optimizer_state) if step > 0 else {},
            step=int(step),
        )

    # --- One step: the unit to read

    def _step(
        self, state: State, images: jax.Array, labels: jax.Array, kept: Parameters
    ) -> tuple[State, Metrics]:
        parameters, model_state, optimizer_state, step = state

        def loss_of(parameters: Parameters) -> tuple[jax.Array, Parameters]:
            logits, new_model_state = self._forward(parameters, model_state | kept, images)
            return cross_entropy(logits, labels, self.config.label_smoothing), new_model_state

        (loss, model_state), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        metrics = Metrics(loss, global_norm(gradients), learning_rate(self.config, optimizer_state))
        updates, optimizer_state = self.optimizer.update(
            gradients, optimizer_state, parameters, value=loss
        )
        parameters = optax.apply_updates(parameters, updates)
        return State(parameters, model_state, optimizer_state, step + 1), metrics

    def _forward(
        self, parameters: Parameters, model_state: Parameters, images: jax.Array
    ) -> tuple[jax.Array, Parameters]:
        """Logits, and the model state that the forward pass leaves behind."""
        model = self._model(parameters, model_state)
        logits = model(images)
        return logits, convert.flatten(nnx.state(model, nnx.BatchStat), self.network.names)

    def _model(
        self, parameters: Parameters, model_state: Parameters, training: bool = True
    ) -> nnx.Module:
        graph = self.network.training if training else self.network.evaluation
        tensors = convert.nest(
            self._rounded(parameters) | self.network.masks | model_state, self.network.names
        )
        return nnx.merge(graph, tensors, self.network.constants)

    def _rounded(self, parameters: Parameters) -> Parameters:
        """To the precision to compute in, but for batch norms', as PyTorch's FSDP does; gradients
        go through."""
        return {
            name: parameter
            if name.rpartition(".")[0] in self._batch_norms
            else parameter.astype(self._compute_dtype)
            for name, parameter in parameters.items()
        }

    def train_step(
        self, state: State, images: np.ndarray, labels: np.ndarray
    ) -> tuple[State, Metrics]:
        kept = self._masks(state, labels.shape)
        return self._compiled_step(state, self._images(images), self._labels(labels), kept)

    # --- Many steps in one call

    def upload(self, images: np.ndarray, labels: np.ndarray) -> Data:
        return Data(jnp.asarray(images), jnp.asarray(labels, jnp.int32))

    def gather(self, uploaded: Data, indices: np.ndarray) -> tuple[jax.Array, jax.Array]:
        return self._compiled_gather(uploaded, indices)

    def _gather(self, uploaded: Data, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._normalised[uploaded.images[indices]], uploaded.labels[indices]

    def train_steps(
        self, state: State, images: np.ndarray, labels: np.ndarray
    ) -> tuple[State, Metrics]:
        batches = self._images(images), self._labels(labels), self._masks(state, labels.shape)
        if self._loops(state, batches):
            state, metrics = self._compiled_steps(state, *batches)
        else:
            history = []
            for number in range(len(labels)):
                state, metrics = self._compiled_step(state, *batch_of(batches, number))
                history.append(metrics)
            metrics = zip(*history, strict=True)
        return state, Metrics(*(np.asarray(series, np.float64) for series in metrics))

    def _fused_steps(
        self, state: State, images: jax.Array, labels: jax.Array, kept: Parameters
    ) -> tuple[State, Metrics]:
        """`_step` over the leading axis, as one compiled loop."""
        return jax.lax.scan(
            lambda state, batch: self._step(state, *batch), state, (images, labels, kept)
        )

    def _loops(self, state: State, batches: Any) -> bool:
        """Whether many steps pay as one program: on the CPU not with the library's convolutions
        (see `layers`)."""
        if self.device != "cpu":
            return True
        if self._convolves is None:
            step = self._compiled_step.trace(state, *batch_of(batches, 0))
            self._convolves = jax.lax.conv_general_dilated_p.name in str(step.jaxpr)
        return not self._convolves

    # --- Looking without touching

    def evaluate(self, state: State, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        predictions, total = [], 0.0
        for start in range(0, len(images), EVALUATION_BATCH):
            batch = slice(start, start + EVALUATION_BATCH)
            truth = self._labels(labels[batch])
            guesses, loss = self._compiled_evaluate(state, self._images(images[batch]), truth)
            predictions.append(np.asarray(guesses, np.int64))
            total += float(loss) * len(truth)  # a smaller last batch weighs less
        return Evaluation(np.concatenate(predictions), total / len(images))

    def _evaluate(
        self, state: State, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        logits = self._model(state.parameters, state.model_state, training=False)(images)
        return logits.argmax(axis=-1), cross_entropy(logits, labels)

    def probe(self, state: State, images: np.ndarray, labels: np.ndarray) -> Arrays:
        batch, truth = self._images(images), self._labels(labels)
        activations, logits, loss, gradients = self._compiled_probe(
            state, batch, truth, self._masks(state, truth.shape)
        )
        return {
            "data/images": convert.to_numpy(batch),
            "data/labels": convert.to_numpy(truth).astype(np.int64),
            **convert.activations_to_canonical(self.network.names, activations),
            "forward/logits": convert.to_numpy(logits),
            "loss/loss": convert.to_numpy(loss),
            **{
                f"backward/{name}": array for name, array in convert.to_canonical(gradients).items()
            },
        }

    def _probe(
        self, state: State, images: jax.Array, labels: jax.Array, kept: Parameters
    ) -> tuple[Any, jax.Array, jax.Array, Parameters]:
        def loss_of(parameters: Parameters) -> tuple[jax.Array, tuple[Any, jax.Array]]:
            model = self._model(parameters, state.model_state | kept)
            with recorded(model) as activations:
                logits = model(images)
            return cross_entropy(logits, labels, self.config.label_smoothing), (activations, logits)

        (loss, (activations, logits)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            state.parameters
        )
        return activations, logits, loss, gradients

    def describe(self) -> dict[str, Any]:
        return {
            "jax": jax.__version__,
            "flax": flax.__version__,
            "optax": optax.__version__,
            "device": self.device,
            "device_name": jax.devices(self.device)[0].device_kind,
            "compiled": True,
        }

    # --- In and out of JAX's layout

    def _images(self, images: np.ndarray) -> jax.Array:
        return jnp.asarray(images, self._compute_dtype)

    def _masks(self, state: State, shape: tuple[int, ...]) -> Parameters:
        """What dropout keeps in the steps to come, for labels of `shape`, by canonical name."""
        if not self.network.dropouts:
            return {}  # and do not wait for `state`
        return convert.from_canonical(
            masks(self.network.dropouts, self.config.seed, int(state.step), shape)
        )

    def _labels(self, labels: np.ndarray) -> jax.Array:
        return jnp.asarray(labels, jnp.int32)


def in_precision(network: Network, dtype: Any) -> Network:
    """With floating-point constants of this dtype, as `torch.nn.Module.to` makes buffers."""

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return network._replace(constants=jax.tree.map(cast, network.constants))


def batch_of(batches: Any, number: int) -> Any:
    return jax.tree.map(lambda array: array[number], batches)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Mean over the batch of -log softmax(logits)[label], in nats; in float32 at least.

    With `smoothing`, that share of each label is spread evenly over all classes, its own included.
    """
    logits = upcast(logits)
    if smoothing == 0:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    else:  # optax smooths distributions, not integers
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), smoothing
        )
        losses = optax.softmax_cross_entropy(logits, targets)
    return losses.mean()


def global_norm(gradients: Parameters) -> jax.Array:
    """The Euclidean norm of all gradients together, in float64.

    In float32, PyTorch's on the CPU is off by 8e-6 of itself for the 786,432 weights of MLP's first
    layer.
    """

    def sum_of_squares(gradient: jax.Array) -> jax.Array:
        squares = gradient.astype(jnp.float64).reshape(-1) ** 2
        # By halves: XLA's sum alone takes one number after the other. Of 500 or fewer it is as
        # quick.
        while squares.size > 500 and squares.size % 2 == 0:
            first, second = jnp.split(squares, 2)
            squares = first + second
        return squares.sum()

    return jnp.sqrt(sum(map(sum_of_squares, gradients.values())))


def upcast(array: jax.Array) -> jax.Array:
    """bfloat16 as float32: three digits are too few to sum in."""
    return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array


@contextmanager
def threads_for(batch_size: int) -> Iterator[None]:
    """Where JAX starts within the context, it has one thread for small batches; otherwise, the
    context does nothing.

    Once started, JAX cannot change them, so the first backend of a process decides for all. `Net`
    on two cores, steps per second with one thread / with two: batch 4 in float32 1,780 / 1,190,
    batch 32 in float32 190 / 290.
    """
    given = os.environ.get("NPROC")  # read by XLA when JAX starts
    if given is None and batch_size <= SMALL_BATCH:
        os.environ["NPROC"] = "1"
    elif given is None and environment.sharing > 1:
        os.environ["NPROC"] = str(max(1, environment.cores() // environment.sharing))
    try:
        yield
    finally:
        if given is None:
            os.environ.pop("NPROC", None)


def choose_device(device: str) -> str:
    """ "auto", "cpu" or "cuda" as "cpu" or "cuda".

    Raises:
        BackendError: if CUDA is asked for and JAX finds none.
    """
    available = any(found.platform == "gpu" for found in jax.devices())
    if device == "cuda" and not available:
        raise BackendError(
            "JAX finds no CUDA device here: use --device cpu, or install it: pip install -e '.[gpu]'"
        )
    if device == "auto":
        return "cuda" if available else "cpu"
    return device


@functools.cache
def has_option(name: str) -> bool:
    """Whether the XLA at hand can be told this: such options come and go with its releases."""
    try:
        jax.jit(lambda: 0, compiler_options={name: True}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def make_comparable(device: str) -> None:
    """Full float32, float64 where asked for: JAX's defaults are TF32 on a GPU, and no float64
    anywhere."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_default_device", jax.devices(device)[0])
