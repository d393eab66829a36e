"""Faults that no rule of the verdict was set with.

The rule of the split is the date: every fault of the other files was there, and was looked at, when
the rules of the verdict were last set, on 26 November 2026; those of this file came after. The rate
of detection is stated on them apart. A fault for which a rule is changed moves to the file of its
stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lockstep.backends.faults.backward import change_gradients
from lockstep.backends.faults.batches import change_upload
from lockstep.backends.faults.data import change_images
from lockstep.backends.faults.evaluate import change_evaluation
from lockstep.backends.faults.forward import change_network
from lockstep.backends.faults.loss import change_loss
from lockstep.backends.faults.lost_updates import after_each_step
from lockstep.backends.faults.registry import SetAttr, fault
from lockstep.backends.faults.transforms import append_transform, prepend_transform, replace_sgd
from lockstep.common.config import Config
from lockstep.common.data import Dataset
from lockstep.common.protocol import Evaluation, Snapshot

if TYPE_CHECKING:
    from lockstep.backends.faults.frameworks import State, Tensors, jax


@fault(
    "update",
    "momentum of *",
    "PyTorch docs, clip_grad_value_ and clip_grad_norm_; optax docs, clip",
    clip_norm=0.1,
)
def clipped_by_value(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Each entry of a gradient is clipped, not the norm of all of them."""
    from lockstep.backends.faults.frameworks import flax_optimizer, optax

    patch(flax_optimizer, "clip_gradients", optax.clip)


@fault("update", "momentum of *", "optax docs, MultiSteps: gradients are averaged, not added")
def averaged_twice(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients of two micro-batches are averaged in the loss, and once more in the optimizer."""
    from lockstep.backends.faults.frameworks import optax

    prepend_transform(patch, lambda: optax.scale(0.5))


@fault("update", None, "optax docs, ema: debias", momentum=0.9)
def momentum_debiased(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The momentum buffer is divided by one minus momentum to the power of the step, as in Adam."""
    replace_sgd(
        patch,
        lambda buffer, g, momentum, lr, count: (
            (b := momentum * buffer + g),
            lr * b / (1 - momentum ** (count + 1)),
        ),
    )


@fault("data", "images", "torchvision docs, RandomCrop: padding; an index off by one")
def images_off_by_one_column(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Images are shifted by one column, the last one in the place of the first."""
    change_images(patch, lambda images: np.roll(images, 1, axis=-2))


@fault("data", "batch", "a cache that is written with the last files missing", train_images=1024)
def last_images_overwritten(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The last four images of the copy on the device are the first one, with its label."""

    def change(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images[-4:], labels[-4:] = images[0], labels[0]
        return images, labels

    change_upload(patch, change)


@fault("forward", "input of fc3", "jax docs, nn.silu and nn.relu")
def silu_for_the_last_rectifier(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The last rectifier is a SiLU."""
    from lockstep.backends.faults.frameworks import nnx

    change_network(patch, last_relu=nnx.silu)


@fault("forward", "logits", "Gemma 2 (arXiv:2408.00118): logits are capped softly")
def logits_capped(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Logits are 30 tanh(logits / 30)."""
    from lockstep.backends.faults.frameworks import flax_model, jnp

    call = flax_model.Net.__call__
    patch(flax_model.Net, "__call__", lambda self, x: 30 * jnp.tanh(call(self, x) / 30))


@fault("loss", "loss", "PaLM (arXiv:2204.02311): the z-loss")
def z_loss(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """1e-4 times the squared logarithm of the softmax's denominator is added."""
    from lockstep.backends.faults.frameworks import jax, optax

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (entropy + 1e-4 * jax.nn.logsumexp(logits, axis=-1) ** 2).mean()

    change_loss(patch, loss)


@fault("loss", "loss", "Lin et al. 2017 (arXiv:1708.02002): the focal loss")
def focal_loss(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Each example's loss is weighted by the square root of one minus its probability."""
    from lockstep.backends.faults.frameworks import jnp, optax

    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return (jnp.sqrt(1 - jnp.exp(-entropy)) * entropy).mean()

    change_loss(patch, loss)


@fault("backward", None, "Bengio et al. 2013 (arXiv:1308.3432): straight-through estimators")
def closed_rectifiers_leak(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """A hundredth of the gradient passes the last rectifier where it is closed."""
    from lockstep.backends.faults.frameworks import jax, nnx

    def rectifier(x: jax.Array) -> jax.Array:
        leaky = nnx.leaky_relu(x, 0.01)
        return leaky + jax.lax.stop_gradient(nnx.relu(x) - leaky)

    change_network(patch, last_relu=rectifier)


@fault("backward", None, "PyTorch docs, ddp_comm_hooks: fp16_compress_hook", changes_function=False)
def gradients_in_float16(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Gradients are sent through float16, as a compressed sum over devices does."""
    from lockstep.backends.faults.frameworks import jax, jnp

    def rounded(gradients: Tensors) -> Tensors:
        return jax.tree.map(lambda g: g.astype(jnp.float16).astype(g.dtype), gradients)

    change_gradients(patch, rounded)


@fault("update", "momentum of *", "optax docs, contrib: centralize", momentum=0.9)
def gradients_centralised(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The mean over its inputs is taken from each gradient of a kernel."""
    from lockstep.backends.faults.frameworks import optax

    prepend_transform(patch, optax.centralize)


@fault("update", None, "PyTorch docs, clip_grad_norm_: before the optimizer", momentum=0.9)
def update_clipped(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Each entry of an update is clipped to 1e-3, after momentum."""
    from lockstep.backends.faults.frameworks import jnp

    append_transform(patch, lambda name, update, parameter: jnp.clip(update, -1e-3, 1e-3))


@fault("update", "momentum of *", "Sutskever et al. 2013: momentum grows", momentum=0.9)
def momentum_warmed_up(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Momentum grows from half of its value in the first ten steps."""
    from lockstep.backends.faults.frameworks import jnp

    def step(
        buffer: jax.Array, g: jax.Array, momentum: float, lr: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        share = jnp.minimum(1, 0.5 + count / 20).astype(g.dtype)
        b = share * momentum * buffer + g
        return b, lr * b

    replace_sgd(patch, step)


@fault("update", None, "Zhang et al. 2019 (arXiv:1907.08610): lookahead", momentum=0.9)
def lookahead(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """After every fifth step, the parameters go back half of the way of the last five."""
    slow: dict[str, np.ndarray] = {}

    def back(before: Snapshot, after: Snapshot) -> Snapshot:
        if before.step == 0:
            slow.update(before.parameters)
        if after.step % 5:
            return after
        mixed = {
            name: (array + (slow[name] - array) / 2).astype(array.dtype)
            for name, array in after.parameters.items()
        }
        slow.update(mixed)
        return after._replace(parameters=mixed)

    after_each_step(patch, back)


@fault("update", None, "a master copy in bfloat16", changes_function=False, momentum=0.9)
def parameters_in_bfloat16(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Parameters are kept in bfloat16 between two steps."""
    from lockstep.backends.faults.frameworks import jnp

    def rounded(name: str, update: jax.Array, parameter: jax.Array) -> jax.Array:
        return (parameter + update).astype(jnp.bfloat16).astype(parameter.dtype) - parameter

    append_transform(patch, rounded)


@fault("evaluate", "test loss", "PyTorch docs, CrossEntropyLoss: one loss for both")
def smoothed_in_evaluation(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """The test loss has label smoothing 0.1."""
    from lockstep.backends.faults.frameworks import flax_backend

    loss = flax_backend.FlaxBackend._loss
    patch(
        flax_backend.FlaxBackend,
        "_loss",
        lambda self, logits, labels, smoothing=0.1: loss(self, logits, labels, smoothing),
    )


@fault("evaluate", None, "an average over flips at test time (torchvision docs, hflip)")
def evaluated_mirrored(patch: SetAttr, config: Config, dataset: Dataset) -> None:
    """Every fourth test image is mirrored."""

    def mirrored(
        evaluate: Callable[..., Evaluation], state: State, images: np.ndarray, labels: np.ndarray
    ) -> Evaluation:
        images = images.copy()
        images[::4] = images[::4, :, ::-1]
        return evaluate(state, images, labels)

    change_evaluation(patch, mirrored)
