"""Known faults: the Flax side with one mistake each, made where a person makes it who ports training code.

The catalogue is in the order in which a difference travels: data, weights, forward, loss, backward, update, evaluate.
A fault is applied round all that the Flax side does: `injected` puts it in and takes it out again. PyTorch's side stays
as it is. No framework is imported before a fault is applied.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import ml_dtypes
import numpy as np

from common import augment, data, train
from common.config import Config, Schedule
from common.data import Dataset
from common.errors import ConfigError
from common.protocol import Evaluation

if TYPE_CHECKING:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from backends.flax_backend import backend as flax_backend
    from backends.flax_backend import convert
    from backends.flax_backend import model as flax_model
    from backends.flax_backend import optimizer as flax_optimizer
    from backends.flax_backend.backend import FlaxBackend

Patch = Callable[[object, str, Any], None]  # puts a value into an attribute, as pytest's `monkeypatch.setattr`
Apply = Callable[[Patch, Config, Dataset], None]


@dataclass(frozen=True)
class Fault:
    """One mistake, and where its first difference lies: which the report should name, whether it does or not."""

    name: str  # lower case, with dashes
    sentence: str  # what is wrong
    stage: str  # one of `common.protocol.STAGES`
    tensor: str | None  # a name or a pattern such as `momentum of *`; None where no tensor of the stage is to blame
    source: str  # where the mistake, or what it goes against, is documented
    apply: Apply  # for a configuration that is resolved, and the data that the run is given
    options: dict[str, Any]  # fields of Config without which it does not show
    train_images: int | None  # shows at the end of an epoch, so that only the first so many images are trained on
    needs_colour: bool  # on grey images there is no difference
    changes_function: bool  # False where exact arithmetic would give the same numbers, and rounding alone is at fault
    lens: str | None  # the only lens that has this fault; None where all have it


@contextmanager
def injected(fault: Fault, config: Config, dataset: Dataset) -> Iterator[None]:
    """Within the context, the Flax side has this fault. Build, train and evaluate in it: programs are traced late."""
    with ExitStack() as stack:
        fault.apply(
            lambda target, name, value: stack.enter_context(mock.patch.object(target, name, value)), config, dataset
        )
        yield


def named(name: str) -> Fault:
    """The fault called `name`.

    Raises:
        ConfigError: if there is none.
    """
    for fault in FAULTS:
        if fault.name == name:
            return fault
    raise ConfigError(f"unknown fault {name!r}: choose one of {', '.join(fault.name for fault in FAULTS)}")


_collected: list[Fault] = []


def known(
    stage: str,
    tensor: str | None,
    source: str,
    *,
    train_images: int | None = None,
    needs_colour: bool = False,
    changes_function: bool = True,
    lens: str | None = None,
    **options: Any,
) -> Callable[[Apply], Apply]:
    """Add a function to the catalogue: its name is the fault's name, its docstring the sentence, `options` Config's."""

    def collect(function: Apply) -> Apply:
        def apply(patch: Patch, config: Config, dataset: Dataset) -> None:
            _import_frameworks()
            function(patch, config, dataset)

        _collected.append(
            Fault(
                name=function.__name__.replace("_", "-"),
                sentence=function.__doc__ or "",
                stage=stage,
                tensor=tensor,
                source=source,
                apply=apply,
                options=options,
                train_images=train_images,
                needs_colour=needs_colour,
                changes_function=changes_function,
                lens=lens,
            )
        )
        return function

    return collect


def _import_frameworks() -> None:
    """What the functions of this file are made of; imported when the first of them is applied."""
    global jax, jnp, nnx, optax, convert, flax_backend, flax_model, flax_optimizer, FlaxBackend
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx

    from backends.flax_backend import backend as flax_backend
    from backends.flax_backend import convert
    from backends.flax_backend import model as flax_model
    from backends.flax_backend import optimizer as flax_optimizer
    from backends.flax_backend.backend import FlaxBackend


# --- Data


def _images(patch: Patch, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change images, (..., n, 32, 32, 3) and normalised, on their way into JAX."""
    images_of = FlaxBackend._images
    patch(FlaxBackend, "_images", lambda self, images: images_of(self, np.ascontiguousarray(change(images))))


def _batches(patch: Patch, own: Callable[[Config, int], Iterator[np.ndarray]]) -> None:
    """Train on other batches. What a record says of its order stays as it is."""
    chunks = train.chunks

    def replaced(config: Config, images: int, bytes_per_image: int) -> Iterator[np.ndarray]:
        batches = own(config, images)
        for indices in chunks(config, images, bytes_per_image):
            yield np.stack([next(batches) for _ in indices])

    patch(train, "chunks", replaced)


def _imagenet(images: np.ndarray) -> np.ndarray:
    """Images normalised by 0.5 and 0.5, normalised by ImageNet's mean and deviation instead."""
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((images * 0.5 + 0.5 - mean) / deviation).astype(images.dtype)


@known("data", "images", "OpenCV docs, imread: channels are stored in B G R order", needs_colour=True)
def bgr(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Images are read with their channels the other way round, blue first."""
    _images(patch, lambda images: images[..., ::-1])


@known("data", "images", "CIFAR-10's page: each row holds the red plane, then the green, then the blue one")
def planes_as_pixels(patch: Patch, config: Config, dataset: Dataset) -> None:
    """CIFAR-10's planes are reshaped to (32, 32, 3) without being transposed."""
    _images(patch, lambda images: np.moveaxis(images, -1, -3).reshape(images.shape))


@known("data", "images", "torchvision's ImageNet weights: mean 0.485, 0.456, 0.406, deviation 0.229, 0.224, 0.225")
def other_normalisation(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Images are normalised by ImageNet's mean and deviation, not by 0.5 and 0.5."""
    _images(patch, _imagenet)


@known("data", "images", "torchvision docs, ToTensor: scales 0..255 to 0..1, by 255")
def divided_by_256(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Pixels are divided by 256 in place of 255."""
    _images(patch, lambda images: (((images + 1) * (255 / 256)) - 1).astype(images.dtype))


@known("data", "images", "algorithmic-efficiency: preprocessing in bfloat16 on TPUs", changes_function=False)
def images_in_bfloat16(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Images pass through bfloat16 on their way to the device."""
    _images(patch, lambda images: images.astype(ml_dtypes.bfloat16).astype(images.dtype))


@known("data", "images", "jax docs, Common Gotchas: Double (64bit) precision", changes_function=False, lens="float64")
def x64_left_off(patch: Patch, config: Config, dataset: Dataset) -> None:
    """JAX was not told to enable float64, so everything is float32 without a word."""
    init, images_of, to_array = FlaxBackend.__init__, FlaxBackend._images, convert.to_array

    def built(self: Any, config: Config, classes: int, dtype: str, *more: Any, **named: Any) -> None:
        init(self, config, classes, "float32", *more, **named)

    patch(FlaxBackend, "__init__", built)
    patch(FlaxBackend, "_images", lambda self, images: images_of(self, images.astype(np.float32)))
    patch(convert, "to_array", lambda array: to_array(array.astype(np.float32)))


@known("data", "images", "torchvision docs, RandomHorizontalFlip")
def augmentation_left_on(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The first image of each batch is mirrored."""

    def mirrored(images: np.ndarray) -> np.ndarray:
        images = images.copy()
        images[..., 0, :, :, :] = images[..., 0, :, ::-1, :]
        return images

    _images(patch, mirrored)


@known("data", "images", "torchvision docs, RandomCrop and RandomHorizontalFlip: in which order", augment="crop-flip")
def flipped_before_cropping(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Images are flipped and then cropped, by the same draws, so that what was cropped on the left is on the right."""
    right = augment.crop_flip

    def flipped_first(images: np.ndarray, given: augment.Draws) -> np.ndarray:
        mirrored = np.where(given.flip[..., None, None, None], images[..., ::-1, :], images)
        return right(mirrored, given._replace(flip=np.zeros_like(given.flip)))

    patch(augment, "crop_flip", flipped_first)


@known("data", "images", "torchvision docs, RandomCrop: fill is 0, of what it is given", augment="crop-flip")
def padded_after_normalising(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Images are padded when they are normalised already, by zeros, which are grey then and not black."""

    def late(config: Config, images: np.ndarray, indices: np.ndarray, step: int, dtype: Any) -> np.ndarray:
        normalised = data.normalise(images[indices], dtype)
        return augment.crop_flip(normalised, augment.drawn(config, len(images), indices, step))

    patch(augment, "batches", late)


@known("data", "images", "PyTorch docs, Reproducibility: each library has a random generator of its own")
def other_shuffle(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The port shuffles for itself."""
    _batches(patch, lambda config, n: data.batch_indices(dataclasses.replace(config, seed=config.seed + 1), n))


@known("data", "images", "PyTorch docs, DataLoader: shuffle defaults to False")
def not_shuffled(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Images come in the order in which they are stored."""

    def in_order(config: Config, images: int) -> Iterator[np.ndarray]:
        starts = range(0, images - config.batch_size + 1, config.batch_size)
        return itertools.cycle(np.arange(start, start + config.batch_size) for start in starts)

    _batches(patch, in_order)


@known(
    "data", "images", "PyTorch docs, DistributedSampler: without set_epoch the order never changes", train_images=1024
)
def same_order_every_epoch(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Every epoch has the order of the first."""

    def repeated(config: Config, images: int) -> Iterator[np.ndarray]:
        first = dataclasses.replace(config, steps=config.batches_per_epoch(images))
        return itertools.cycle(list(data.batch_indices(first, images)))

    _batches(patch, repeated)


@known("data", "images", "PyTorch docs, DataLoader: drop_last; tf.data, batch: drop_remainder", train_images=1000)
def last_batch_dropped(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The smaller last batch of each epoch is left out."""
    _batches(patch, lambda config, n: data.batch_indices(dataclasses.replace(config, drop_last=True), n))


@known("data", "labels", "MATLAB counts from 1, as do the labels of its .mat files (SVHN's 10 is a 0)")
def labels_from_one(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Labels count from one, modulo the number of classes."""
    labels_of, classes = FlaxBackend._labels, len(dataset.classes)
    patch(FlaxBackend, "_labels", lambda self, labels: labels_of(self, (labels + 1) % classes))


@known("data", "labels", "Northcutt et al. 2021, Pervasive Label Errors in Test Sets", train_images=1000)
def one_label_in_a_thousand(patch: Patch, config: Config, dataset: Dataset) -> None:
    """One training label in a thousand is wrong."""
    wrong = {image.tobytes() for image in dataset.train_images[::1000]}

    def relabelled(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        pixels = np.rint((images.astype(np.float64) * 0.5 + 0.5) * 255).astype(np.uint8)
        found = np.array([pixels[place].tobytes() in wrong for place in np.ndindex(labels.shape)])
        return np.where(found.reshape(labels.shape), (labels + 1) % len(dataset.classes), labels)

    for name in ("train_step", "train_steps", "probe"):
        patch(FlaxBackend, name, _with_labels(getattr(FlaxBackend, name), relabelled))


def _with_labels(
    method: Callable[..., Any], change: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Callable[..., Any]:
    return lambda self, state, images, labels: method(self, state, images, change(images, labels))


# --- Weights


def _weights(patch: Patch, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Change canonical weights on their way into JAX."""
    from_canonical = convert.from_canonical

    def changed(arrays: dict[str, np.ndarray]) -> Any:
        return from_canonical({name: np.ascontiguousarray(change(name, a)) for name, a in arrays.items()})

    patch(convert, "from_canonical", changed)


@known("weights", "fc2.kernel", "flax docs, nnx.Linear: kernel_init is lecun_normal")
def own_weights(patch: Patch, config: Config, dataset: Dataset) -> None:
    """One layer keeps the weights that Flax drew for it."""
    draw = nnx.initializers.lecun_normal()

    def own(name: str, array: np.ndarray) -> np.ndarray:
        return np.asarray(draw(jax.random.key(0), array.shape, array.dtype)) if name == "fc2.kernel" else array

    _weights(patch, own)


@known("weights", "*.bias", "flax docs, nnx.Conv: bias_init is zeros")
def zero_biases(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Biases start from zero, as Flax's do."""
    _weights(patch, lambda name, array: array * 0 if name.endswith(".bias") else array)


@known("weights", "conv*.kernel", "flax docs, Convert PyTorch models to Flax: kernels from OIHW to HWIO")
def kernels_h_and_w_swapped(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Convolution kernels are transposed from OIHW to WHIO."""
    _weights(patch, lambda name, array: array.swapaxes(0, 1) if array.ndim == 4 else array)


@known("weights", "fc*.kernel", "flax docs, Convert PyTorch models to Flax: dense kernels must be transposed")
def dense_kernels_reshaped(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Dense kernels are reshaped to Flax's shape where they should be transposed."""
    _weights(patch, lambda name, array: array.T.reshape(array.shape) if array.ndim == 2 else array)


@known("weights", "fc1.kernel", "flax docs, Convert PyTorch models to Flax: Convolutions and Dense Layers")
def flatten_rows(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The rows of the dense kernel after the flatten stay in PyTorch's order of channels, height and width."""

    def by_channel(name: str, array: np.ndarray) -> np.ndarray:
        if name != "fc1.kernel":
            return array
        return array.reshape(5, 5, 16, -1).transpose(2, 0, 1, 3).reshape(array.shape)

    _weights(patch, by_channel)


@known("weights", None, "transformers docs, from_pretrained: torch_dtype", changes_function=False)
def weights_in_half(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The weights came from a file in half precision."""
    _weights(patch, lambda name, array: array.astype(np.float16).astype(array.dtype))


# --- Forward


def _network(
    patch: Patch,
    relu: Callable[[Any], Any] | None = None,
    last_relu: Callable[[Any], Any] | None = None,
    pool: Callable[[Any], Any] | None = None,
    flatten: Callable[[Any], Any] | None = None,
) -> None:
    """`Net` with one part replaced."""
    relu = relu or nnx.relu

    def call(self: Any, x: jax.Array) -> jax.Array:
        x = (pool or self.pool)(relu(self.conv1(x)))
        x = (pool or self.pool)(relu(self.conv2(x)))
        x = flatten(x) if flatten else x.reshape(x.shape[0], -1)
        x = relu(self.fc1(x))
        x = (last_relu or relu)(self.fc2(x))
        return self.fc3(x)

    patch(flax_model.Net, "__call__", call)


def _convolution(patch: Patch, convolve: Callable[..., Any]) -> None:
    """Convolve by `convolve(images, kernel, strides, padding, **options)`."""
    patch(flax_model, "convolution", lambda device: convolve)


def _layers(patch: Patch, **attributes: Any) -> None:
    """Set attributes of every layer of `Net`."""
    init = flax_model.Net.__init__

    def built(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2, self.fc3):
            for name, value in attributes.items():
                setattr(layer, name, value)

    patch(flax_model.Net, "__init__", built)


def _rounded_products(patch: Patch, mantissa_bits: int) -> None:
    """Round the factors of every float32 product, as an accelerator's matrix unit does."""
    from flax.nnx.nn.dtypes import promote_dtype

    def promoted(arrays: Any, **options: Any) -> Any:
        inputs, kernel, bias = promote_dtype(arrays, **options)
        if inputs.dtype == jnp.float32:
            inputs, kernel = (jax.lax.reduce_precision(a, 8, mantissa_bits) for a in (inputs, kernel))
        return inputs, kernel, bias

    _layers(patch, promote_dtype=promoted)


@known("forward", "input of fc1", "flax docs, Convert PyTorch models to Flax: Convolutions and Dense Layers")
def flatten_order(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The flatten unrolls channels, height and width, and the weights are those of height, width and channels."""
    _network(patch, flatten=lambda x: x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1))


@known("forward", "conv1", "flax docs, nnx.Conv: padding defaults to SAME")
def same_padding(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Convolutions pad, as Flax's do by default, and are cut back to the size that the next layer needs."""

    def same(images: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(images, kernel, strides, "SAME", **options)[:, :-4, :-4]

    _convolution(patch, same)


@known("forward", "conv1", "jax docs, lax.conv and scipy.signal.convolve: correlation, and convolution")
def flipped_kernels(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Layers convolve, with flipped kernels, where both libraries correlate."""
    correlate = flax_model.convolution("cpu")
    _convolution(
        patch, lambda images, kernel, *rest, **options: correlate(images, kernel[::-1, ::-1], *rest, **options)
    )


@known("forward", "conv2", "flax docs, nnx.Conv: use_bias")
def missing_bias(patch: Patch, config: Config, dataset: Dataset) -> None:
    """One convolution has no bias."""
    nest = convert.nest

    def without(parameters: Any, *names: Any) -> Any:
        if "conv2.bias" in parameters:
            parameters = dict(parameters) | {"conv2.bias": jnp.zeros_like(parameters["conv2.bias"])}
        return nest(parameters, *names)

    patch(convert, "nest", without)


@known("forward", "input of conv2", "flax docs, nnx.avg_pool and nnx.max_pool")
def average_pooling(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Windows are averaged, where their maximum should be taken."""
    _network(patch, pool=lambda x: nnx.avg_pool(x, window_shape=(2, 2), strides=(2, 2)))


@known("forward", "input of conv2", "jax docs, nn.leaky_relu: negative_slope is 0.01; Keras' LeakyReLU: 0.3")
def leaky_rectifier(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The rectifier leaks one hundredth of what is negative."""
    _network(patch, relu=lambda x: nnx.leaky_relu(x, 0.01))


@known("forward", "input of *", "PyTorch docs, ReLU6: min(max(0, x), 6); MobileNet uses it", lr=0.05, steps=90)
def relu6(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The rectifier stops at six, which activations reach after a while."""
    _network(patch, relu=nnx.relu6)


@known("forward", "input of fc3", "Keras docs, Dense: activation defaults to None")
def missing_rectifier(patch: Patch, config: Config, dataset: Dataset) -> None:
    """There is no rectifier between the last two layers."""
    _network(patch, last_relu=lambda x: x)


@known(
    "forward", "logits", "jax docs, Common Gotchas: Double (64bit) precision", changes_function=False, lens="float64"
)
def float32_inside(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The logits pass through float32."""
    call = flax_model.Net.__call__
    patch(flax_model.Net, "__call__", lambda self, x: call(self, x).astype(jnp.float32).astype(x.dtype))


@known("forward", "conv1", "flax docs, nnx.Linear: dtype, the dtype of the computation", changes_function=False)
def bfloat16_layers(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Mixed precision is left on: layers compute in bfloat16."""
    _layers(patch, dtype=jnp.bfloat16)


@known("forward", "conv1", "jax docs, Matmul precision: TF32 on recent GPUs", changes_function=False, lens="float32")
def tf32_products(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Products are taken in TF32, with 10 bits of mantissa, as JAX does on a GPU by default."""
    _rounded_products(patch, 10)


@known("forward", "conv1", "jax docs, Matmul precision: bfloat16 on TPU", changes_function=False, lens="float32")
def bfloat16_products(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Products are taken in bfloat16, with 7 bits of mantissa, as JAX does on a TPU by default."""
    _rounded_products(patch, 7)


# --- Loss


def _loss(patch: Patch, loss: Callable[[Any, Any], Any]) -> None:
    """Replace the mean cross entropy by `loss(logits, labels)`."""
    patch(flax_backend, "cross_entropy", lambda logits, labels, smoothing=0.0: loss(logits, labels))


@known("loss", "loss", "PyTorch docs, CrossEntropyLoss: reduction is mean; optax returns one loss per example")
def sum_for_mean(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The loss is summed over the batch."""
    _loss(patch, lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum())


@known("loss", "loss", "PyTorch docs, CrossEntropyLoss: the mean is over examples, not over classes")
def mean_over_classes(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The mean is over examples and classes, since labels are one-hot vectors."""

    def over_all(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return -jnp.mean(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype) * jax.nn.log_softmax(logits))

    _loss(patch, over_all)


@known("loss", "loss", "optax docs, smooth_labels; PyTorch docs, CrossEntropyLoss: label_smoothing is 0")
def label_smoothing(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Labels are smoothed by one hundredth."""

    def smoothed(logits: jax.Array, labels: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), 0.01)
        return optax.softmax_cross_entropy(logits, targets).mean()

    _loss(patch, smoothed)


@known("loss", "loss", "The Annotated Transformer, LabelSmoothing: smoothing / (size - 2)", label_smoothing=0.1)
def smoothed_over_the_others(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Label smoothing is spread over the other classes only, PyTorch's and optax's over all."""
    right = flax_backend.cross_entropy

    def over_others(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
        classes = logits.shape[-1]
        return right(logits, labels, smoothing * classes / (classes - 1))  # of which the label itself gets one share

    patch(flax_backend, "cross_entropy", over_others)


@known("loss", "loss", "tflearn#562, lightning-bolts#654: softmax applied twice")
def softmax_twice(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The loss takes a softmax of what is a softmax already."""
    right = flax_backend.cross_entropy
    _loss(patch, lambda logits, labels: right(jax.nn.softmax(logits), labels))


@known("loss", "loss", "Keras docs, config.epsilon: 1e-7")
def epsilon_in_the_logarithm(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The logarithm is taken of the probability plus 1e-7."""

    def guarded(logits: jax.Array, labels: jax.Array) -> jax.Array:
        probabilities = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=-1)
        return -jnp.log(probabilities + 1e-7).mean()

    _loss(patch, guarded)


@known(
    "loss", "loss", "algorithmic-efficiency#318: a smaller last batch, and what a mean divides by", train_images=1000
)
def mean_over_padding(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The last batch is padded to full size, and the loss of its images divided by that size."""

    def padded(logits: jax.Array, labels: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.sum() / max(len(labels), config.batch_size)

    _loss(patch, padded)


# --- Backward


def _gradients(patch: Patch, change: Callable[[Any], Any]) -> None:
    """Change all gradients, a dictionary by name, as they come out of JAX."""
    value_and_grad = jax.value_and_grad

    def changed(function: Any, **options: Any) -> Any:
        right = value_and_grad(function, **options)

        def call(parameters: Any) -> Any:
            value, gradients = right(parameters)
            return value, change(gradients)

        return call

    patch(jax, "value_and_grad", changed)


def _stopped(patch: Patch, prefix: str) -> None:
    """Let no gradient through to the parameters whose names begin with `prefix`."""
    nest = convert.nest

    def stopped(parameters: Any, *names: Any) -> Any:
        held = {name: jax.lax.stop_gradient(p) if name.startswith(prefix) else p for name, p in parameters.items()}
        return nest(held, *names)

    patch(convert, "nest", stopped)


@known("backward", "fc3.bias", "jax docs, lax.stop_gradient")
def stopped_gradient(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The last bias never gets a gradient."""
    _stopped(patch, "fc3.bias")


@known("backward", "conv1.*", "PyTorch docs, requires_grad; optax docs, set_to_zero")
def frozen_layer(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The first layer is frozen, as it was for fine-tuning."""
    _stopped(patch, "conv1.")


@known("backward", None, "jax docs, lax.psum and lax.pmean; PyTorch docs, DistributedDataParallel: averages")
def sum_over_devices(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Gradients are summed over two devices, where their mean should be taken."""
    _gradients(patch, lambda gradients: jax.tree.map(lambda g: 2 * g, gradients))


@known("backward", None, "PyTorch docs, ddp_comm_hooks: bf16_compress_hook", changes_function=False)
def gradients_in_bfloat16(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Gradients are sent between devices in bfloat16."""
    _gradients(patch, lambda gradients: jax.tree.map(lambda g: g.astype(jnp.bfloat16).astype(g.dtype), gradients))


# --- Update


def _optimizer(patch: Patch, **changes: Any) -> None:
    """An optimizer made from another configuration; the schedule and what is reported stay."""
    make = flax_optimizer.make_optimizer
    patch(flax_backend, "make_optimizer", lambda config, dtype: make(dataclasses.replace(config, **changes), dtype))


def _before_the_rest(patch: Patch, transformation: Callable[[], Any]) -> None:
    """Put a transformation of the gradients in front of weight decay and momentum."""
    in_float32 = flax_optimizer.in_float32
    patch(flax_optimizer, "in_float32", lambda: optax.chain(in_float32(), transformation()))


def _sgd(patch: Patch, step: Callable[[Any, Any, Any, Any, Any], tuple[Any, Any]]) -> None:
    """`optax.sgd` with `step(buffer, gradient, momentum, lr, count)`, which gives the buffer and what is subtracted."""
    sgd = optax.sgd

    def own(rate: Any, momentum: Any = None, nesterov: bool = False, accumulator_dtype: Any = None) -> Any:
        right = sgd(rate, momentum, nesterov, accumulator_dtype)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            trace, counted = state
            buffers, changes = {}, {}
            for name, gradient in updates.items():
                lr = jnp.asarray(rate(counted.count), gradient.dtype)
                buffers[name], change = step(trace.trace[name], gradient, momentum, lr, counted.count)
                changes[name] = -change
            return changes, (trace._replace(trace=buffers), counted._replace(count=counted.count + 1))

        return optax.GradientTransformationExtraArgs(right.init, update)

    patch(optax, "sgd", own)


def _after_momentum(patch: Patch, change: Callable[[Config, str, Any, Any], Any]) -> None:
    """Change each update by `change(config, name, update, parameter)` after all else."""
    make = flax_backend.make_optimizer

    def changed(config: Config, dtype: Any) -> Any:
        inner = make(config, dtype)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            updates, state = inner.update(updates, state, params, **extra)
            return {name: change(config, name, u, params[name]) for name, u in updates.items()}, state

        return optax.GradientTransformationExtraArgs(inner.init, update)

    patch(flax_backend, "make_optimizer", changed)


def _rate(patch: Patch, change: Callable[[Config, Callable[[Any], Any]], Any]) -> None:
    """Replace a schedule, a function of the steps done, by `change(config, schedule)`."""
    make = flax_optimizer.make_schedule
    patch(flax_optimizer, "make_schedule", lambda config: change(config, make(config)))


@known("update", "momentum of *", "a slip of the pen; the field: PyTorch docs, SGD: momentum", momentum=0.9)
def momentum_089(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Momentum is 0.89 in place of 0.9."""
    _optimizer(patch, momentum=0.89)


@known("update", "momentum of *", "optax docs, trace and ema: often confused", momentum=0.9)
def running_mean_for_momentum(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The buffer is a running mean: it starts from zero, and gradients enter it times one minus momentum."""
    _sgd(patch, lambda buffer, g, momentum, lr, count: ((b := momentum * buffer + (1 - momentum) * g), lr * b))


@known("update", "momentum of *", "optax docs, Getting started: opt_state must be passed on", momentum=0.9)
def optimizer_state_lost(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The optimizer's new state is not kept, so that every step is a first one."""
    _sgd(patch, lambda buffer, g, momentum, lr, count: (buffer, lr * (momentum * buffer + g)))


@known("update", "momentum of *", "lightning docs: optimizers made anew by each fit", train_images=1024, momentum=0.9)
def momentum_reset_every_epoch(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The optimizer is made anew for every epoch, with empty buffers."""
    batches = config.batches_per_epoch(len(dataset.train_images))

    def step(buffer: Any, g: Any, momentum: Any, lr: Any, count: Any) -> tuple[Any, Any]:
        b = jnp.where(count % batches == 0, jnp.zeros_like(buffer), momentum * buffer) + g
        return b, lr * b

    _sgd(patch, step)


@known("update", "momentum of *", "optax docs, sgd: accumulator_dtype", changes_function=False, momentum=0.9)
def buffer_in_bfloat16(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Momentum is kept in bfloat16."""
    sgd = optax.sgd
    patch(optax, "sgd", lambda *arguments, **options: sgd(*arguments, **options | {"accumulator_dtype": jnp.bfloat16}))


@known("update", None, "PyTorch docs, SGD: nesterov", momentum=0.9, nesterov=True)
def nesterov_missing(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Nesterov momentum is asked for and left out."""
    _optimizer(patch, nesterov=False)


@known("update", None, "optax docs, sgd: nesterov", momentum=0.9)
def nesterov_unasked(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Nesterov momentum is used where it was not asked for."""
    _optimizer(patch, nesterov=True)


@known("update", "momentum of *", "optax's sgd has no dampening (optax, _src/alias.py)", momentum=0.9, dampening=0.5)
def dampening_ignored(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Dampening is ignored."""
    _optimizer(patch, dampening=0.0)


@known("update", "momentum of *", "mlx#473: the first buffer is the gradient itself", momentum=0.9, dampening=0.5)
def dampening_on_the_first_step(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Every gradient is dampened, the first one too."""
    patch(flax_optimizer, "dampen", lambda dampening: optax.scale(1.0 - dampening))


@known("update", "momentum of *", "mlx#440: weight decay without effect; optax's sgd has none", weight_decay=0.01)
def weight_decay_missing(patch: Patch, config: Config, dataset: Dataset) -> None:
    """There is no weight decay."""
    _optimizer(patch, weight_decay=0.0)


@known("update", "momentum of *", "optax docs, losses: l2_loss has the factor one half", weight_decay=0.01)
def weight_decay_doubled(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The penalty is the weights' square without one half of it, so that its gradient is twice as large."""
    _optimizer(patch, weight_decay=2 * config.weight_decay)


@known("update", "momentum of *.bias", "Keras docs, exclude_from_weight_decay; timm: bias left out", weight_decay=0.01)
def biases_not_decayed(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Biases are left out of weight decay."""
    decayed, kernels = optax.add_decayed_weights, lambda params: {name: name.endswith("kernel") for name in params}
    patch(optax, "add_decayed_weights", lambda weight_decay: decayed(weight_decay, mask=kernels))


@known("update", "momentum of *", "pytorch#13801: PyTorch's own C++ SGD did so", weight_decay=0.01)
def weight_decay_after_momentum(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Weight decay is added to the momentum buffer's output, not to the gradient."""
    decay = config.lr * config.weight_decay
    _optimizer(patch, weight_decay=0.0)
    _after_momentum(patch, lambda config, name, update, parameter: update - decay * parameter)


@known("update", "momentum of *", "Loshchilov and Hutter 2019, SGDW; pytorch#22466", weight_decay=0.01)
def decoupled_weight_decay(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Weights shrink by weight decay itself, beside the gradient's step and without the learning rate."""
    decay = config.weight_decay
    _optimizer(patch, weight_decay=0.0)
    _after_momentum(patch, lambda config, name, update, parameter: update - decay * parameter)


@known("update", "momentum of *", "PyTorch docs, SGD: the sign turns first", maximize=True, weight_decay=0.01)
def maximize_after_weight_decay(patch: Patch, config: Config, dataset: Dataset) -> None:
    """With `maximize`, weight decay's sign is turned together with the gradient's."""
    decayed = optax.add_decayed_weights
    patch(optax, "add_decayed_weights", lambda weight_decay: decayed(-weight_decay))


@known("update", "momentum of *", "PyTorch docs, clip_grad_norm_; optax docs, clip_by_global_norm", lr=0.05)
def clipped_gradients(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Gradients are clipped to a norm of one."""
    _before_the_rest(patch, lambda: optax.clip_by_global_norm(1.0))


@known("update", "momentum of *", "PyTorch docs, clip_grads_with_norm_; optax docs: no epsilon", clip_norm=0.1)
def clipped_without_epsilon(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Gradients are clipped by the norm itself, as optax does, and not by the norm plus 1e-6."""
    patch(flax_optimizer, "clip_gradients", optax.clip_by_global_norm)


@known("update", "momentum of *", "Keras docs, optimizers: clipnorm, beside global_clipnorm", clip_norm=0.1)
def clipped_per_tensor(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Each tensor's gradient is clipped by its own norm, not by that of all together."""

    together = flax_optimizer.clip_gradients

    def apart(clip_norm: float) -> Any:
        clip = together(clip_norm)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            clipped: list[Any] = [clip.update({name: g}, state)[0] for name, g in updates.items()]
            return {name: g for one in clipped for name, g in one.items()}, state

        return optax.GradientTransformation(clip.init, update)

    patch(flax_optimizer, "clip_gradients", apart)


@known("update", "momentum of *", "Zhang et al. 2016, Staleness-aware Async-SGD")
def stale_gradients(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The optimizer is given the gradients of the step before, and zeros in the first."""

    def late() -> Any:
        return optax.GradientTransformation(
            lambda params: optax.tree.zeros_like(params), lambda updates, state, params=None: (state, updates)
        )

    _before_the_rest(patch, late)


@known("update", "momentum of *", "PyTorch docs, Optimizer.zero_grad; its recipe on zeroing out gradients")
def gradients_not_zeroed(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Gradients are added to those of all steps before."""

    def summed() -> Any:
        def update(updates: Any, state: Any, params: Any = None) -> Any:
            total = jax.tree.map(jnp.add, updates, state)
            return total, total

        return optax.GradientTransformation(lambda params: optax.tree.zeros_like(params), update)

    _before_the_rest(patch, summed)


@known("update", "momentum of fc1.*", "PyTorch docs, ModuleList: layers in a plain list are not registered")
def layer_not_in_the_optimizer(patch: Patch, config: Config, dataset: Dataset) -> None:
    """One layer's parameters were not given to the optimizer."""

    def left_out(updates: Any, params: Any) -> Any:
        return {name: 0 * update if name.startswith("fc1.") else update for name, update in updates.items()}

    _before_the_rest(patch, lambda: optax.stateless(left_out))


@known("update", "*.bias", "Caffe's LeNet example: lr_mult is 2 for biases")
def biases_twice_as_fast(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Biases have twice the learning rate."""
    _after_momentum(patch, lambda config, name, u, parameter: 2 * u if name.endswith(".bias") else u)


@known("update", "momentum of *", "Keras, optimizers/sgd.py; pytorch#1099", momentum=0.9, schedule=Schedule("cosine"))
def lr_in_the_buffer(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Gradients enter the momentum buffer times the learning rate, so that an old rate acts on after it has changed."""
    _sgd(patch, lambda buffer, g, momentum, lr, count: ((b := momentum * buffer + lr * g), b))


@known("update", "lr", "a wrong digit")
def lr_off_by_one_percent(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The learning rate is one percent too large."""
    _rate(patch, lambda config, schedule: lambda count: 1.01 * schedule(count))


@known("update", "lr", "a wrong digit")
def lr_off_by_one_in_a_thousand(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The learning rate is one part in a thousand too large."""
    _rate(patch, lambda config, schedule: lambda count: 1.001 * schedule(count))


@known("update", "lr", "a wrong digit")
def lr_off_by_one_in_a_million(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The learning rate is one part in a million too large."""
    _rate(patch, lambda config, schedule: lambda count: (1 + 1e-6) * schedule(count))


@known(
    "update", "lr", "jax docs, Type promotion: int32 / int32 is float32", changes_function=False,
    schedule=Schedule("exponential"),
)  # fmt: skip
def lr_in_float32(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The learning rate is computed in float32."""
    _rate(patch, lambda config, schedule: lambda count: schedule(count).astype(jnp.float32))


@known("update", "lr", "pytorch#20124: the order of scheduler and optimizer", schedule=Schedule("exponential"))
def schedule_off_by_one(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The learning rate is that of the step after."""
    _rate(patch, lambda config, schedule: lambda count: schedule(count + 1))


@known(
    "update",
    "lr",
    "NVIDIA/apex#609, pytorch/torchtitan#1261: counted from one",
    schedule=Schedule("warmup-cosine", warmup=10, start=0.1),
)
def warm_up_off_by_one(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The warm-up counts its steps from one, so that it ends one step early."""
    warmup = config.schedule.warmup
    _rate(patch, lambda config, schedule: lambda count: schedule(jnp.where(count < warmup, count + 1, count)))


@known("update", "lr", "optax docs, exponential_decay: staircase", schedule=Schedule("step", period=49, gamma=0.1))
def staircase_one_step_late(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The step schedule is optax's staircase, which XLA computes by a reciprocal: it decays one step late."""

    def staircase(config: Config, schedule: Any) -> Any:
        period, gamma = config.schedule.period, config.schedule.gamma
        assert period is not None and gamma is not None, "the schedule is resolved"
        decay = optax.exponential_decay(config.lr, transition_steps=period, decay_rate=gamma, staircase=True)
        return lambda count: decay(jnp.asarray(count, jnp.float64))

    _rate(patch, staircase)


# A threshold that no window passes, so that the learning rate does fall within a short run.
_PLATEAU = Schedule("plateau", window=5, patience=2, gamma=0.5, threshold=0.9)


@known("update", "lr", "PyTorch docs, ReduceLROnPlateau; optax docs, reduce_on_plateau: patience", schedule=_PLATEAU)
def plateau_one_window_early(patch: Patch, config: Config, dataset: Dataset) -> None:
    """`patience` windows without improvement reduce the learning rate, where PyTorch puts up with so many."""
    reduce = flax_optimizer.reduce_on_plateau
    patience = (config.schedule.patience or 0) - 1
    sooner = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, patience=patience))
    patch(flax_optimizer, "reduce_on_plateau", lambda config: reduce(sooner))


@known("update", None, "optax docs, reduce_on_plateau: the scale applies to the update at hand", schedule=_PLATEAU)
def plateau_acts_at_once(patch: Patch, config: Config, dataset: Dataset) -> None:
    """A plateau reduces the very update whose loss ended the window, PyTorch the one after."""
    reduce = flax_optimizer.reduce_on_plateau

    def at_once(config: Config) -> Any:
        right = reduce(config)

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            _, state = right.update(updates, state, params, **extra)
            return jax.tree.map(lambda u: u * state.scale.astype(u.dtype), updates), state

        return optax.GradientTransformationExtraArgs(right.init, update)

    patch(flax_optimizer, "reduce_on_plateau", at_once)


# --- Evaluate


def _evaluation(patch: Patch, change: Callable[..., Evaluation]) -> None:
    """Evaluate by `change(evaluate, state, images, labels)`, where `evaluate` is the right way."""
    evaluate = FlaxBackend.evaluate

    def changed(self: Any, state: Any, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        return change(lambda *arguments: evaluate(self, *arguments), state, images, labels)

    patch(FlaxBackend, "evaluate", changed)


@known("evaluate", None, "PyTorch docs, DataLoader: drop_last")
def last_batch_not_evaluated(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Evaluation leaves out the last batch of 64, which is smaller."""

    def whole_batches(evaluate: Any, state: Any, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        count = len(images) // 64 * 64
        return evaluate(state, images[:count], labels[:count])

    _evaluation(patch, whole_batches)


@known("evaluate", "test loss", "algorithmic-efficiency#318, #227: averaged per batch")
def mean_of_batch_means(patch: Patch, config: Config, dataset: Dataset) -> None:
    """The test loss is a mean of batch means, in which the smaller last batch weighs too much."""

    def by_batch(evaluate: Any, state: Any, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        starts = range(0, len(images), 300)
        parts = [evaluate(state, images[start : start + 300], labels[start : start + 300]) for start in starts]
        return Evaluation(np.concatenate([part.predictions for part in parts]), float(np.mean([p.loss for p in parts])))

    _evaluation(patch, by_batch)


@known("evaluate", "test loss", "torchvision docs: training and evaluation have transforms of their own")
def other_test_normalisation(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Test images are normalised by ImageNet's mean and deviation, training images by 0.5 and 0.5."""
    _evaluation(patch, lambda evaluate, state, images, labels: evaluate(state, _imagenet(images), labels))


@known("evaluate", "test loss", "torchvision docs, CIFAR10: train defaults to True")
def training_images_evaluated(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Evaluation reads the training images."""

    def on_training(evaluate: Any, state: Any, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        own = data.normalise(dataset.train_images[: len(images)], images.dtype)
        return evaluate(state, own, dataset.train_labels[: len(images)])

    _evaluation(patch, on_training)


@known("evaluate", "test loss", "optax docs, Getting started: apply_updates returns new parameters", momentum=0.9)
def weights_of_the_step_before(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Evaluation uses the weights before the last step."""

    def one_step_back(evaluate: Any, state: Any, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        last = state.optimizer_state["sgd"][0].trace
        parameters = {name: p + config.lr * last[name] for name, p in state.parameters.items()}
        return evaluate(state._replace(parameters=parameters), images, labels)

    _evaluation(patch, one_step_back)


@known("evaluate", "test loss", "PyTorch docs, Module.eval; flax docs, nnx.Dropout: deterministic")
def dropout_left_on(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Half of the units before the last layer are dropped in evaluation, others each time."""
    generator = np.random.default_rng(0)

    def dropped(evaluate: Any, state: Any, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        kernel = state.parameters["fc3.kernel"]
        kept = jnp.asarray(2.0 * generator.integers(0, 2, (len(kernel), 1)), kernel.dtype)
        return evaluate(state._replace(parameters=state.parameters | {"fc3.kernel": kernel * kept}), images, labels)

    _evaluation(patch, dropped)


@known("evaluate", "test loss", "PyTorch docs, Module.bfloat16 and half: for inference", changes_function=False)
def evaluated_in_bfloat16(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Weights are rounded to bfloat16 for evaluation."""

    def rounded(evaluate: Any, state: Any, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        parameters = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(p.dtype), state.parameters)
        return evaluate(state._replace(parameters=parameters), images, labels)

    _evaluation(patch, rounded)


@known("evaluate", "predictions", "torchvision docs, ImageFolder: classes are sorted by name")
def classes_moved(patch: Patch, config: Config, dataset: Dataset) -> None:
    """Predicted classes count from one, modulo their number."""

    def moved(evaluate: Any, state: Any, images: np.ndarray, labels: np.ndarray) -> Evaluation:
        right = evaluate(state, images, labels)
        return right._replace(predictions=(right.predictions + 1) % len(dataset.classes))

    _evaluation(patch, moved)


FAULTS = tuple(_collected)
# One of each stage, all of which show on grey images and in the fewest steps.
QUICK = (
    "labels-from-one",
    "zero-biases",
    "flatten-order",
    "sum-for-mean",
    "stopped-gradient",
    "momentum-089",
    "classes-moved",
)
