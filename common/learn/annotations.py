"""What a reader should know where the two backends differ: what, why, and what goes wrong when it
is missed.

Each note is tied down at three ends: to one line of each side's source, and to known faults
(`backends/faults/`) that show what it says, or to a test that proves it.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lockstep.common.learn.outline import Definition, Line, SourceError, find


class Anchor(NamedTuple):
    """One line of one side."""

    definition: str  # as in `sections`: `models/net.py:Net.forward`
    snippet: str  # what stands in that line, and in no other of the definition


@dataclass(frozen=True)
class Note:
    """One difference that matters. Texts may hold `code` in backticks."""

    title: str
    torch: Anchor
    flax: Anchor
    what: str
    why: str
    missed: str  # what goes wrong then
    faults: tuple[str, ...] = ()  # names of the catalogue
    tests: tuple[str, ...] = ()  # `tests/file.py::name`


_STEP = "backend.py:Backend._step"
_INIT = "backend.py:Backend.__init__"
_MAKE = "optimizer.py:make_optimizer"
_SCHEDULE = "optimizer.py:make_schedule"
_NET = "models/net.py:Net.__init__"

NOTES = (
    # --- Data
    Note(
        title="Channels first, channels last",
        torch=Anchor("inputs.py:Inputs.images", "movedim(-1, -3)"),
        flax=Anchor("inputs.py:Inputs.images", "jnp.asarray(images, self.dtype)"),
        what=(
            "PyTorch's convolutions take (n, channels, height, width), Flax's (n, height, width, channels). The data "
            "set is kept channels last, so that only the PyTorch side moves an axis."
        ),
        why="Each kept the layout of what came before it: Torch, and TensorFlow.",
        missed=(
            "Axes must be moved, never reshaped: a reshape gives an array of the right shape that holds a scrambled "
            "picture, and no error. Training goes on, only worse."
        ),
        faults=("planes-as-pixels",),
    ),
    Note(
        title="Labels are class numbers on both sides",
        torch=Anchor("inputs.py:Inputs.labels", "torch.int64"),
        flax=Anchor("inputs.py:Inputs.labels", "jnp.int32"),
        what=(
            "PyTorch's cross entropy wants int64 class numbers; optax takes integers of any kind, and JAX prefers 32 "
            "bits."
        ),
        why="Both index into the logits, so both count classes from zero.",
        missed=(
            "An index out of range is an error in PyTorch on the CPU. In JAX it is none: `jit` cannot raise, so it "
            "clamps, or fills in NaN."
        ),
        faults=("labels-from-one",),
    ),
    # --- Set-up
    Note(
        title="float64 is off in JAX",
        torch=Anchor(_INIT, "self.dtype = getattr(torch,"),
        flax=Anchor("device.py:configure_determinism", "jax_enable_x64"),
        what="In PyTorch a float64 tensor is float64. JAX makes it float32, unless `jax_enable_x64` is set before.",
        why=(
            "Accelerators are slow in float64, and NumPy makes float64 by default. JAX chose to be quick without "
            "being asked."
        ),
        missed=(
            "Everything runs in float32, often without a word: what was to be proved to twelve digits is computed "
            "with seven."
        ),
        faults=("x64-left-off", "float32-inside"),
    ),
    Note(
        title="Products in less than float32",
        torch=Anchor("device.py:configure_determinism", "matmul.allow_tf32"),
        flax=Anchor("device.py:configure_determinism", "jax_default_matmul_precision"),
        what=(
            "On a GPU, JAX multiplies float32 matrices in TF32 where it can; on a TPU, in bfloat16. PyTorch does so "
            "in cuDNN's convolutions only. Both are told not to."
        ),
        why="Matrix units are several times as fast with 10 or 7 bits of mantissa as with 23.",
        missed="The first layer's output is off in its fourth digit. It looks like a port with a mistake, and is none.",
        faults=("tf32-products", "bfloat16-products"),
    ),
    Note(
        title="A state that changes, a state that is replaced",
        torch=Anchor("state.py:State", "PyTorch changes it in place"),
        flax=Anchor("state.py:State", "JAX returns a new one"),
        what=(
            "`optimizer.step()` overwrites the parameters. A JAX function cannot: it returns new arrays, and the old "
            "ones are what they were, or, once donated, are gone."
        ),
        why="JAX traces functions, and a function that changes its arguments has no trace.",
        missed="Who keeps the old name evaluates, or goes on from, the weights before the step.",
        faults=("weights-of-the-step-before",),
        tests=(
            "tests/backends/test_backends.py::test_neither_the_states_nor_the_snapshots_share_memory",
        ),
    ),
    Note(
        title="Nobody draws weights",
        torch=Anchor("user_module.py:build", 'torch.device("meta")'),
        flax=Anchor("user_module.py:build", "nnx.eval_shape("),
        what="Both sides build the network without any weights. They come from NumPy, drawn as PyTorch draws them.",
        why=(
            "The defaults differ. PyTorch draws kernels and biases uniformly from plus or minus one over the root of "
            "the fan in. Flax draws kernels from `lecun_normal`, and biases are zero."
        ),
        missed=(
            "Two runs from other weights cannot be compared at all. Zero biases are easily overlooked, since such a "
            "network trains just as well."
        ),
        faults=("own-weights", "zero-biases"),
        tests=(
            "tests/backends/test_convert.py::test_initial_weights_are_distributed_as_pytorchs_own",
        ),
    ),
    Note(
        title="Which arrays are trained",
        torch=Anchor(_MAKE, "model.parameters(),"),
        flax=Anchor("user_module.py:split_module", "module, nnx.Param, nnx.BatchStat, Mask, ..."),
        what=(
            "PyTorch's optimizer trains the tensors that it was given. On the Flax side, what is trained is what the "
            "loss is differentiated by: the `nnx.Param` part of the split."
        ),
        why=(
            "PyTorch registers a parameter when a module is assigned to an attribute. `nnx` goes by the type of a "
            "variable."
        ),
        missed=(
            "A layer in a plain Python list is missing from `model.parameters()`, and stays as it was drawn. Nothing "
            "warns."
        ),
        faults=("layer-not-in-the-optimizer", "frozen-layer"),
    ),
    # --- Model
    Note(
        title="Convolutions pad by default in Flax",
        torch=Anchor(_NET, "self.conv1 ="),
        flax=Anchor(_NET, "self.conv1 ="),
        what=(
            '`nn.Conv2d` does not pad unless told to. `nnx.Conv` pads with "SAME" unless told not to, so '
            '`padding="VALID"` is written out.'
        ),
        why="It is a default and no more; the documentation of each says so, in one word of its signature.",
        missed=(
            "The picture keeps its size, and every value near the border differs. Often a later layer complains of "
            "its shape; where sizes happen to fit, nothing does."
        ),
        faults=("same-padding",),
    ),
    Note(
        title="Both correlate, and call it convolution",
        torch=Anchor(_NET, "self.conv2 ="),
        flax=Anchor(_NET, "self.conv2 ="),
        what=(
            "Neither library flips the kernel. Both sides may therefore compute their convolution as a plain product "
            "of patches and kernel on the CPU, where that is quicker (`kernels.py`)."
        ),
        why=(
            "For a network that learns its kernels, flipped or not is all the same; for one that is given them, it is "
            "not."
        ),
        missed="Weights that were trained in a library that flips give other features here.",
        faults=("flipped-kernels",),
    ),
    Note(
        title="Pooling: the stride has to be said",
        torch=Anchor("layers.py:max_pooling", "else nn.MaxPool2d"),
        flax=Anchor("layers.py:max_pooling", "nnx.max_pool"),
        what=(
            "In PyTorch, pooling is a layer whose stride is its window unless something else is said. In Flax it is a "
            "function whose stride is one."
        ),
        why="A layer without parameters needs no object in Flax.",
        missed=(
            "With a stride of one the picture hardly shrinks, and the first dense layer does not fit. With another "
            "kind of pooling everything fits, and the numbers are wrong."
        ),
        faults=("average-pooling",),
        tests=(
            "tests/backends/test_backends.py::test_both_backends_have_the_same_activations_in_the_canonical_layout",
        ),
    ),
    Note(
        title="What a flatten unrolls",
        torch=Anchor("models/net.py:Net.forward", "torch.flatten"),
        flax=Anchor("models/net.py:Net.__call__", "x.reshape(x.shape[0], -1)"),
        what=(
            "The same operation on two layouts: PyTorch unrolls (channels, height, width), Flax (height, width, "
            "channels). The same 400 numbers come out in another order."
        ),
        why="A flatten reads memory as it lies.",
        missed=(
            "The next dense layer multiplies each number by the weight of another one. Trained from scratch the "
            "network learns as well as before, so that only a comparison shows it."
        ),
        faults=("flatten-order",),
    ),
    # --- More networks
    Note(
        title="Batch norm's momentum is the other share",
        torch=Anchor("models/resnet20.py:ResNet20.__init__", "self.bn ="),
        flax=Anchor("models/resnet20.py:ResNet20.__init__", "self.bn ="),
        what=(
            "Of PyTorch's `momentum`, 0.1, is the share of the new batch in the running statistics. Flax's, 0.9, is "
            "the share of the old ones."
        ),
        why="PyTorch's is Torch's; Flax's is what is called the decay of a moving average elsewhere.",
        missed="Training does not show it. The running statistics follow the last batch, and evaluation suffers.",
        faults=("batch-norm-momentum", "statistics-not-updated"),
    ),
    Note(
        title="Which variance is kept",
        torch=Anchor("models/resnet20.py:Block.__init__", "self.bn1 ="),
        flax=Anchor("layers.py:BatchNorm.__call__", "var * pixels / (pixels - 1)"),
        what=(
            "Both normalise a batch by its biased variance. Into the running variance, PyTorch takes the unbiased one, "
            "`nnx.BatchNorm` the biased; so Flax's `layers.py` has one that does as PyTorch does."
        ),
        why="For evaluation the unbiased one is the better guess. Flax keeps what it has computed.",
        missed=(
            "At 32 images of 32 x 32 pixels it is 3 in 100,000, in evaluation only; where a layer sees few pixels, "
            "more."
        ),
        faults=("biased-running-variance",),
    ),
    Note(
        title="Two modes",
        torch=Anchor("backend.py:Backend.evaluate", "state.model.eval()"),
        flax=Anchor("backend.py:Backend._model", "self.network.evaluation"),
        what=(
            "`model.eval()` switches a PyTorch module over, until `model.train()` is called. In Flax the mode is part "
            "of the module's description, so that there are two of these, and each program is traced from one."
        ),
        why="A flag of a traced program is constant. What is switched afterwards has no effect on it.",
        missed=(
            "A network that is left in training mode normalises each test batch by itself, and drops units; one that "
            "is left in evaluation mode never updates its statistics."
        ),
        faults=("evaluated-in-train-mode", "trained-in-evaluation-mode", "dropout-left-on"),
    ),
    Note(
        title="Layer norm's epsilon",
        torch=Anchor("models/vit.py:Block.__init__", "self.norm1 ="),
        flax=Anchor("models/vit.py:Block.__init__", "self.norm1 ="),
        what="`nn.LayerNorm` adds 1e-5 to the variance, `nnx.LayerNorm` 1e-6: so both say it.",
        why="They are defaults of two libraries. Published vision transformers have 1e-6.",
        missed="Activations are off by some millionths. The network trains as well, and is another one.",
        faults=("layer-norm-epsilon", "batch-norm-epsilon"),
    ),
    Note(
        title="GELU has two formulas",
        torch=Anchor("models/vit.py:Block.forward", "F.gelu("),
        flax=Anchor("models/vit.py:Block.__call__", "nnx.gelu"),
        what="`F.gelu` is exact by default, `nnx.gelu` the approximation with tanh: so both say which.",
        why="The approximation was quicker once, and some published weights were trained with it.",
        missed="Activations are off by up to 5e-4, enough to move an accuracy and too little to look like a mistake.",
        faults=("tanh-gelu",),
    ),
    Note(
        title="SAME, with strides, is not symmetric",
        torch=Anchor("models/resnet20.py:Block.__init__", "self.conv1 ="),
        flax=Anchor("models/resnet20.py:Block.__init__", "self.conv1 ="),
        what=(
            "With a stride of 2, `padding=1` pads one pixel before and one after. SAME pads as little as it can: for "
            "even sizes none before and one after."
        ),
        why="SAME fixes how large the result is, and places what is missing at the end first.",
        missed="All shapes fit. The kernel looks at other pixels, half a stride away.",
        faults=("strided-same-padding",),
    ),
    Note(
        title="Nobody draws what dropout leaves out",
        torch=Anchor("layers.py:Dropout.forward", "x * self.mask / (1 - self.rate)"),
        flax=Anchor("layers.py:Dropout.__call__", "x * self.mask / (1 - self.rate)"),
        what=(
            "`nn.Dropout` and `nnx.Dropout` draw their masks themselves, from generators that share no number. Here "
            "both are given masks, drawn in NumPy from the seed and the step."
        ),
        why=(
            "PyTorch's generator is a state outside all modules, JAX's a key that is split. Neither could make the "
            "other's numbers."
        ),
        missed=(
            "Two runs with dropout can then be compared in their statistics only, where a wrong factor or a mask that "
            "is used twice hides."
        ),
        faults=("dropout-scaled-wrongly", "dropout-not-scaled", "dropout-of-the-next-step"),
    ),
    # --- Loss
    Note(
        title="A mean, and one loss per image",
        torch=Anchor("losses.py:cross_entropy", "F.cross_entropy"),
        flax=Anchor("losses.py:cross_entropy", ".mean()"),
        what=(
            "`F.cross_entropy` returns the mean over the batch. optax's function returns one loss per image, and "
            "leaves it to the caller what to do with them. Both take logits, not probabilities."
        ),
        why="PyTorch's losses are made to be used as they are; optax's to be combined.",
        missed=(
            "A sum for a mean multiplies every gradient by the batch size, as if the learning rate were that much "
            "larger. A softmax before the loss is taken twice, and flattens it."
        ),
        faults=("sum-for-mean", "mean-over-padding", "softmax-twice"),
    ),
    # --- Step
    Note(
        title="Gradients that add up, gradients that are returned",
        torch=Anchor(_STEP, "optimizer.zero_grad()"),
        flax=Anchor(_STEP, "jax.value_and_grad(loss_of, has_aux=True)(parameters)"),
        what=(
            "`loss.backward()` adds to what is in `.grad` already. `jax.value_and_grad` returns gradients, and there "
            "is nowhere for old ones to be."
        ),
        why="Adding up lets PyTorch sum over several small batches without a line of code.",
        missed="Without `zero_grad` each step follows the sum of all gradients so far. The first step is still right.",
        faults=("gradients-not-zeroed",),
    ),
    Note(
        title="The optimizer's state has to be handed on",
        torch=Anchor(_STEP, "optimizer.step()"),
        flax=Anchor(_STEP, "updates, optimizer_state = self.optimizer.update("),
        what=(
            "PyTorch's optimizer keeps the momentum buffers to itself. optax's `update` takes the state as an "
            "argument and returns the next one."
        ),
        why=(
            "An optax optimizer is a pair of pure functions, so that it can be compiled, vectorised and differentiated."
        ),
        missed=(
            "Where the returned state is dropped, every step is a first one: momentum never builds up, and a schedule "
            "never moves. The loss still falls."
        ),
        faults=("optimizer-state-lost",),
    ),
    Note(
        title="When the schedule moves on",
        torch=Anchor(_STEP, "scheduler.step(loss)"),
        flax=Anchor(_STEP, "learning_rate(self.config, optimizer_state)"),
        what=(
            "In PyTorch `scheduler.step()` follows `optimizer.step()`, and sets the rate of the next step. optax "
            "calls the schedule with the number of steps done, counted from 0, within the update."
        ),
        why="Before PyTorch 1.1 the order was the other one, and old code still has it.",
        missed="The learning rate of every step is that of its neighbour. Next to nothing shows under a slow schedule.",
        faults=("schedule-off-by-one",),
    ),
    # --- Optimizer
    Note(
        title="Momentum: the learning rate stays outside the buffer",
        torch=Anchor(_MAKE, "momentum=config.momentum,"),
        flax=Anchor(_MAKE, "optax.sgd("),
        what=(
            "In both, the buffer is momentum times itself plus the gradient, and the learning rate multiplies what "
            "comes out. optax keeps the buffer in the gradient's precision unless `accumulator_dtype` says otherwise."
        ),
        why=(
            "Other libraries store the learning rate in the buffer, or take a running mean, in which a gradient "
            "enters times one minus momentum. With a constant rate the first is the same, and the second is a smaller "
            "rate."
        ),
        missed=(
            "Under a schedule an old learning rate acts on. A running mean makes each step ten times as short at "
            "momentum 0.9."
        ),
        faults=("lr-in-the-buffer", "running-mean-for-momentum", "buffer-in-bfloat16"),
        tests=(
            "tests/backends/test_optimizer.py::test_the_momentum_buffer_keeps_the_dtype_of_the_parameters",
        ),
    ),
    Note(
        title="Dampening spares the first step",
        torch=Anchor(_MAKE, "dampening=config.dampening,"),
        flax=Anchor(_MAKE, '("dampening", dampen(config.dampening)'),
        what=(
            "PyTorch's first buffer is the gradient itself. From the second step on, gradients enter it times one "
            "minus dampening. optax has no dampening, so the Flax side counts steps to know the first."
        ),
        why="PyTorch makes the buffer when it is first needed, as a copy of the gradient.",
        missed=(
            "Left out, every step from the second on is too long. Applied from the start, the first is too short, and "
            "the difference stays in the buffer."
        ),
        faults=("dampening-ignored", "dampening-on-the-first-step"),
    ),
    Note(
        title="Weight decay comes before momentum",
        torch=Anchor(_MAKE, "weight_decay=config.weight_decay,"),
        flax=Anchor(_MAKE, "optax.add_decayed_weights(config.weight_decay)"),
        what=(
            "PyTorch's SGD adds the weights, times weight decay, to the gradient, biases included; the sum goes into "
            "the momentum buffer. `optax.sgd` has no weight decay, so a transformation before it adds the same."
        ),
        why=(
            "This is the gradient of an L2 penalty. AdamW and SGDW shrink the weights beside the gradient's step "
            "instead."
        ),
        missed=(
            "In another place of the chain, or without the learning rate, or for kernels only, it is another "
            "algorithm with the same name."
        ),
        faults=(
            "weight-decay-missing",
            "weight-decay-after-momentum",
            "decoupled-weight-decay",
            "biases-not-decayed",
        ),
    ),
    Note(
        title="Clipping comes before the optimizer, and has an epsilon",
        torch=Anchor(_STEP, "clip_grads_with_norm_("),
        flax=Anchor("optimizer.py:clip_gradients", "+ 1e-6"),
        what=(
            "PyTorch scales the gradients in place, by one factor for all, before the optimizer reads them. In optax "
            "clipping is the first link of the chain."
        ),
        why=(
            "Both keep a vanishing norm from dividing by zero: PyTorch adds 1e-6 to it, `optax.clip_by_global_norm` "
            "compares first."
        ),
        missed=(
            "Without the 1e-6 a gradient of norm 1 comes out one part in a million too large, in every step that clips."
        ),
        faults=("clipped-without-epsilon", "clipped-per-tensor"),
        tests=("tests/backends/test_optimizer.py::test_the_comparison_sees_a_fault",),
    ),
    Note(
        title="Nesterov's step",
        torch=Anchor(_MAKE, "nesterov=config.nesterov,"),
        flax=Anchor(_MAKE, "g <- g + momentum b"),
        what=(
            "Both use the same formula: the gradient plus momentum times the new buffer. In optax it is the third "
            "argument of `optax.sgd`."
        ),
        why=(
            "Sutskever's form of Nesterov's method, rewritten so that gradients are taken at the parameters themselves."
        ),
        missed=(
            "The momentum buffer is the same with and without it. Only the parameters part, by one gradient, from the "
            "first step on."
        ),
        faults=("nesterov-missing", "nesterov-unasked"),
    ),
    Note(
        title="Maximize turns the gradient, and not the weight decay",
        torch=Anchor(_MAKE, "maximize=config.maximize,"),
        flax=Anchor(_MAKE, '("maximize", optax.scale(-1.0)'),
        what=(
            "PyTorch turns the gradient's sign before anything else. In the chain, the turn therefore stands before "
            "weight decay."
        ),
        why="To climb the objective while weights still shrink.",
        missed="Behind weight decay, or as a negative learning rate, it makes the weights grow.",
        faults=("maximize-after-weight-decay",),
    ),
    Note(
        title="The sign is in the update",
        torch=Anchor(_MAKE, "p <- p - lr g"),
        flax=Anchor(_MAKE, "the sign is in the update"),
        what="PyTorch subtracts. An optax update has its minus sign already, and `optax.apply_updates` adds.",
        why=(
            "Updates of several transformations can be added up, and a gradient that is not scaled at all is an "
            "update, too."
        ),
        missed="A hand-written step that subtracts optax's updates climbs.",
        tests=("tests/backends/test_optimizer.py::test_a_hundred_steps_are_those_of_torchs_sgd",),
    ),
    Note(
        title="Weights in float32, work in bfloat16",
        torch=Anchor("convert.py:cast_to_compute", "tensor.to(dtype)"),
        flax=Anchor("convert.py:cast_to_compute", "tensor.astype(dtype)"),
        what=(
            "In mixed precision, both round a copy of the weights for each step and differentiate through it, so that "
            "gradients come out in float32. Batch norms keep theirs."
        ),
        why=(
            "`torch.autocast` and Flax's `dtype=` decide operation by operation, and not alike: of a layer norm "
            "on a GPU, autocast gives float32, Flax bfloat16. What is rounded here is the same for both."
        ),
        missed="Weights that are kept in bfloat16 lose each update of less than 0.2 % of them.",
        tests=(
            "tests/backends/test_backends.py::test_mixed_precision_keeps_what_is_too_small_for_bfloat16",
        ),
    ),
    Note(
        title="A learning rate in bfloat16",
        torch=Anchor(_MAKE, "lr=config.lr,"),
        flax=Anchor(_MAKE, '("precision", upcast_gradients()),'),
        what=(
            "PyTorch's kernels compute a bfloat16 update in float32 and round once. optax multiplies in the precision "
            "of the gradient, so the Flax side casts gradients up first."
        ),
        why="JAX rounds after every operation that the program names.",
        missed="A learning rate rounded to bfloat16 is off by up to 0.4 %.",
        tests=(
            "tests/learn/test_side_by_side.py::test_a_learning_rate_is_not_rounded_to_bfloat16_before_it_is_used",
        ),
    ),
    # --- Schedule
    Note(
        title="A staircase that is one step late",
        torch=Anchor(_SCHEDULE, "lr_scheduler.StepLR("),
        flax=Anchor(_SCHEDULE, "period = schedule.period"),
        what=(
            "`StepLR` divides integers. optax's `staircase=True` takes the floor of a division of floats, and XLA "
            "makes of that division a product with the reciprocal. So the Flax side divides integers itself."
        ),
        why="49 times (1 / 49) is less than 1 in floating point.",
        missed=(
            "For some periods, of which 49 is the first, the rate falls one step late: too large by the whole factor, "
            "once."
        ),
        faults=("staircase-one-step-late",),
    ),
    Note(
        title="A learning rate in float32",
        torch=Anchor(_SCHEDULE, "lr_scheduler.ExponentialLR("),
        flax=Anchor(
            _SCHEDULE,
            "return lambda count: rate((jnp.asarray(count) // period).astype(jnp.float64))",
        ),
        what=(
            "PyTorch computes the rate as a Python float, in float64. optax counts steps in int32, and JAX divides "
            "int32 by int32 in float32. So the count is made float64 first."
        ),
        why="JAX's rules for mixed types favour 32 bits, whatever the parameters are.",
        missed="The rate is off by 1e-8 of itself, and so are the weights, in a run that is float64 everywhere else.",
        faults=("lr-in-float32",),
    ),
    Note(
        title="The end of a cosine",
        torch=Anchor(_SCHEDULE, "return lr_scheduler.CosineAnnealingLR("),
        flax=Anchor(_SCHEDULE, "rate = optax.cosine_decay_schedule("),
        what=(
            "PyTorch is given the lowest rate itself, optax the lowest rate as a share of the first. After the "
            "period, PyTorch's rate climbs again, and optax's stays down."
        ),
        why="One continues the formula, the other its last value.",
        missed="A run that is longer than the period trains at two rates. `lockstep.common.config` refuses it.",
        tests=(
            "tests/test_config.py::test_a_cosine_shorter_than_the_run_is_refused_and_one_as_long_is_not",
        ),
    ),
    Note(
        title="A warm-up, and then a cosine",
        torch=Anchor(_SCHEDULE, "lr_scheduler.SequentialLR("),
        flax=Anchor(_SCHEDULE, "optax.join_schedules("),
        what=(
            "Both count the steps of the second schedule from the milestone, and the milestone's step is the second's "
            "first, at the full rate. PyTorch's warm-up begins at a share of the rate, optax's at a rate."
        ),
        why="PyTorch's schedulers multiply the optimizer's rate, optax's schedules are the rate.",
        missed="A warm-up that counts from one is over a step early, and every rate in it is too high.",
        faults=("warm-up-off-by-one",),
        tests=(
            "tests/backends/test_optimizer.py::test_a_warm_up_is_torchs_sequential_schedulers_step_by_step",
        ),
    ),
    Note(
        title="Patience is counted in two ways",
        torch=Anchor(_SCHEDULE, "patience=schedule.patience,"),
        flax=Anchor("optimizer.py:reduce_on_plateau", "patience=schedule.patience + 1,"),
        what=(
            "PyTorch puts up with `patience` windows without improvement, and reduces at the one after. optax reduces "
            "at the last of them. So optax is given one more."
        ),
        why="One asks whether there were more than so many bad windows, the other whether there were as many.",
        missed="The learning rate falls one window early.",
        faults=("plateau-one-window-early",),
    ),
    Note(
        title="A plateau acts on the next step",
        torch=Anchor("optimizer.py:Scheduler.step", "self.schedule.step(self.mean)"),
        flax=Anchor("optimizer.py:reduce_on_plateau", "scaled = jax.tree.map("),
        what=(
            "In PyTorch the reduced rate is that of the next step, for the loss is known after the update. optax "
            "scales the very update whose loss ended the window. So the Flax side scales by the state before, and "
            "then updates it."
        ),
        why="optax's `update` is given the loss, and sees no reason to wait.",
        missed="One step per reduction is too short: a small difference, once, which training carries on.",
        faults=("plateau-acts-at-once",),
    ),
    # --- Many steps
    Note(
        title="Two compilers",
        torch=Anchor("compiled.py:ManySteps.__init__", "torch.compile("),
        flax=Anchor("compiled.py:ManySteps.__init__", "self._scan, donate_argnums=0"),
        what=(
            "`jax.jit` traces the whole loop, and `donate_argnums` lets it reuse the state's memory. `torch.compile` "
            "is given a step written as a function, since `loss.backward()` and `optimizer.step()` would break its "
            "graph."
        ),
        why="JAX compiles everything or nothing; PyTorch compiles what it can, and interprets the rest.",
        missed="A compiled program may add in another order, so its last digits differ. More than these must not.",
        tests=(
            "tests/backends/test_backends.py::test_many_steps_in_one_call_are_as_many_single_steps",
            "tests/backends/test_backends.py::test_a_compiled_loop_in_pytorch_is_as_many_single_steps",
        ),
    ),
    # --- Evaluation
    Note(
        title="A mean over images, not over batches",
        torch=Anchor("backend.py:Backend.evaluate", "* len(batch_labels)"),
        flax=Anchor("backend.py:Backend.evaluate", "* len(batch_labels)"),
        what=(
            "The mean loss of each piece is multiplied by its number of images before it is added up. PyTorch reads "
            "the number with `.item()`, JAX with `float()`; both wait for the device there."
        ),
        why="The last piece is smaller than the others.",
        missed=(
            "A mean of means weighs the images of the last piece too much. A last piece that is left out is not "
            "weighed at all."
        ),
        faults=("mean-of-batch-means", "last-batch-not-evaluated"),
    ),
    Note(
        title="Which weights are evaluated",
        torch=Anchor("backend.py:Backend.evaluate", "logits = self._forward(state.model,"),
        flax=Anchor("backend.py:Backend.evaluate", "self._compiled_evaluate(state,"),
        what=(
            "PyTorch's model holds its weights, and `inference_mode` keeps autograd from recording. In JAX the "
            "weights are an argument, and nothing is recorded unless a gradient is asked for."
        ),
        why="A gradient is a function of a function in JAX, and a record of what happened in PyTorch.",
        missed="In JAX any weights can be handed over: those before the last step, or a copy in another precision.",
        faults=("weights-of-the-step-before", "evaluated-in-bfloat16"),
    ),
    # --- Conversion
    Note(
        title="Kernels of a convolution",
        torch=Anchor(
            "convert.py:kernel_to_canonical",
            "return weight.transpose(*range(2, weight.ndim), 1, 0)",
        ),
        flax=Anchor("convert.py:to_canonical", "to_numpy(array) for name, array in arrays.items()"),
        what="PyTorch's kernels are (out, in, height, width), Flax's (height, width, in, out).",
        why="Each is laid out as its library's images are.",
        missed=(
            "With height and width swapped every shape still fits, for kernels are square: the kernel is mirrored "
            "along its diagonal."
        ),
        faults=("kernels-h-and-w-swapped",),
        tests=(
            "tests/backends/test_convert.py::test_a_square_kernel_is_permuted_by_the_kind_of_its_layer",
        ),
    ),
    Note(
        title="Kernels of a dense layer",
        torch=Anchor("convert.py:kernel_from_canonical", "return kernel.transpose(1, 0)"),
        flax=Anchor(
            "convert.py:from_canonical", "to_array(array) for name, array in arrays.items()"
        ),
        what="PyTorch's are (out, in) and called `weight`, Flax's (in, out) and called `kernel`.",
        why="PyTorch computes x times the transposed weight, Flax x times the kernel.",
        missed=(
            "A reshape gives the right shape and the wrong weights. For a square kernel not even a reshape is needed "
            "to be wrong."
        ),
        faults=("dense-kernels-reshaped",),
        tests=(
            "tests/backends/test_convert.py::test_a_canonical_dense_kernel_maps_inputs_to_outputs",
        ),
    ),
    Note(
        title="Rows in the order of the flatten",
        torch=Anchor(_NET, "nn.Linear(16 * 5 * 5, 120)"),
        flax=Anchor(_NET, "nnx.Linear(5 * 5 * 16, 120, rngs=rngs)"),
        what=(
            "The rows of the first dense kernel belong to flattened pixels, so that they stand in the order of the "
            "flatten. `kernel_to_canonical` reorders them once, and neither network has to transpose its activations."
        ),
        why="See the note on the flatten: the order of what goes in is the order of the rows.",
        missed="Transposed and no more, the kernel has the right shape and its rows in the wrong order.",
        faults=("flatten-rows",),
        tests=(
            "tests/backends/test_convert.py::test_without_the_permutation_of_the_flatten_the_logits_differ",
        ),
    ),
    Note(
        title="bfloat16 on the way to NumPy",
        torch=Anchor(
            "convert.py:to_numpy", "return tensor.float().numpy().astype(ml_dtypes.bfloat16)"
        ),
        flax=Anchor("convert.py:to_numpy", "return np.array(array)"),
        what=(
            "NumPy has no bfloat16. JAX brings one along, `ml_dtypes.bfloat16`, which PyTorch does not know: it goes "
            "through float32, which holds every bfloat16 exactly."
        ),
        why="The dtype was made for JAX and TensorFlow.",
        missed=(
            "The way through float32 loses nothing. A way through bfloat16, for data that has more digits, loses most "
            "of them."
        ),
        faults=("images-in-bfloat16",),
        tests=(
            "tests/backends/test_convert.py::test_every_bit_survives_the_way_into_a_framework_and_back",
        ),
    ),
    Note(
        title="A buffer that is not there yet",
        torch=Anchor("optimizer.py:export_momentum", "if buffer is not None"),
        flax=Anchor("optimizer.py:export_momentum", "if config.momentum != 0 and step > 0"),
        what=(
            "Before the first step PyTorch has no momentum buffers, and optax has zeros. The canonical state has none."
        ),
        why="optax makes its whole state in `init`, since a compiled function cannot make it later.",
        missed="An optimizer that is made anew where a run goes on begins again from none, or from zeros.",
        faults=("momentum-reset-every-epoch",),
        tests=("tests/backends/test_optimizer.py::test_a_snapshot_goes_on_in_the_other_backend",),
    ),
)


def locate(
    notes: Sequence[Note], backends: Mapping[str, Mapping[str, Definition]]
) -> list[tuple[Note, dict[str, Line]]]:
    """Each note with the line that it is tied to on each side.

    Raises:
        SourceError: if a definition or a line is gone, or if a line is not the only one.
    """
    found = []
    for note in notes:
        lines = {}
        for side, anchor in (("torch", note.torch), ("flax", note.flax)):
            if anchor.definition not in backends[side]:
                raise SourceError(
                    f"{side} has no {anchor.definition}, to which the note {note.title!r} is tied"
                )
            lines[side] = find(backends[side][anchor.definition], anchor.definition, anchor.snippet)
        found.append((note, lines))
    return found


def check_faults(
    notes: Sequence[Note], names: Collection[str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Raise SourceError unless each fault is in the catalogue and was measured and found, and each
    note has a proof."""
    measured = {
        row["name"]: any(finding["caught"] for finding in row["lenses"].values()) for row in rows
    }
    for note in notes:
        if not note.faults and not note.tests:
            raise SourceError(
                f"the note {note.title!r} has neither a fault nor a test to show it: name one"
            )
        for fault in note.faults:
            if fault not in names:
                raise SourceError(
                    f"the note {note.title!r} names {fault!r}, which is no known fault: mend the note"
                )
            if not measured.get(fault):
                said = "was not found by any lens" if fault in measured else "is not in the report"
                raise SourceError(
                    f"the fault {fault!r} of the note {note.title!r} {said}: run the faults again"
                )


def check_tests(notes: Sequence[Note], root: Path) -> None:
    """Raise SourceError unless each test that a note names is there."""
    for note in notes:
        for test in note.tests:
            file, _, name = test.partition("::")
            try:
                tree = ast.parse((root / file).read_text(encoding="utf-8"))
            except OSError as error:
                raise SourceError(
                    f"the note {note.title!r} names {file}, which is not there"
                ) from error
            if not any(
                isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body
            ):
                raise SourceError(
                    f"the note {note.title!r} names {test}, and {file} has no such test"
                )
