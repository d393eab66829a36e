"""Where the two backends differ: what differs, why, and what goes wrong if a port ignores it.

This file is the text of the lesson; `notes` checks it.
"""

from __future__ import annotations

from lockstep.common.learn.notes import Note, SourceLine

_STEP = "backend.py:Backend._step"
_INIT = "backend.py:Backend.__init__"
_MAKE = "optimizer.py:make_optimizer"
_SCHEDULE = "optimizer.py:make_schedule"
_NET = "models/net.py:Net.__init__"

NOTES = (
    # --- Data
    Note(
        title="Channels first, channels last",
        torch=SourceLine("inputs.py:Inputs.images", "movedim(-1, -self.axes)"),
        flax=SourceLine("inputs.py:Inputs.images", "jnp.asarray(images, self.dtype)"),
        what=(
            "PyTorch's convolutions take (n, channels, height, width), Flax's (n, height, width, "
            "channels). The data set is stored channels last, so only the PyTorch side moves an "
            "axis."
        ),
        why="Each kept the layout of its predecessor: Torch, and TensorFlow.",
        if_ignored=(
            "A port that reshapes in place of moving the axis gets an array of the right shape "
            "with a scrambled picture, and no error. It trains, only worse."
        ),
        faults=("planes-as-pixels",),
    ),
    Note(
        title="Labels are class numbers on both sides",
        torch=SourceLine("inputs.py:Inputs.labels", "torch.int64"),
        flax=SourceLine("inputs.py:Inputs.labels", "jnp.int32"),
        what=(
            "PyTorch's cross entropy wants int64 class numbers; optax takes integers of any kind, "
            "and JAX prefers 32 bits."
        ),
        why="Both index into the logits, so both count classes from zero.",
        if_ignored=(
            "PyTorch on the CPU reports an index out of range. Compiled JAX code cannot raise an "
            "error: it clamps the index, or fills in NaN."
        ),
        faults=("labels-from-one",),
    ),
    # --- Set-up
    Note(
        title="float64 is off in JAX",
        torch=SourceLine(_INIT, "self.dtype = getattr(torch,"),
        flax=SourceLine("device.py:configure_determinism", "jax_enable_x64"),
        what=(
            "In PyTorch a float64 tensor is float64. JAX makes it float32 unless `jax_enable_x64` "
            "is set first."
        ),
        why=(
            "Accelerators are slow in float64, and NumPy makes float64 by default. JAX chose "
            "speed as its default."
        ),
        if_ignored=(
            "Everything runs in float32, often without a warning: a result that should have "
            "sixteen digits has seven."
        ),
        faults=("x64-left-off", "float32-inside"),
    ),
    Note(
        title="Products in lower precision than float32",
        torch=SourceLine("device.py:configure_determinism", "matmul.allow_tf32"),
        flax=SourceLine("device.py:configure_determinism", "jax_default_matmul_precision"),
        what=(
            "On a GPU, JAX multiplies float32 matrices in TF32 where it can; on a TPU, in "
            "bfloat16. PyTorch does so in cuDNN's convolutions only. Here both have this turned "
            "off."
        ),
        why="Matrix units are several times as fast with 10 or 7 bits of mantissa as with 23.",
        if_ignored=(
            "The first layer's output is wrong in its fourth digit. That looks like a mistake in "
            "the port, and is none."
        ),
        faults=("tf32-products", "bfloat16-products"),
    ),
    Note(
        title="A state that changes, a state that is replaced",
        torch=SourceLine("state.py:State", "PyTorch changes it in place"),
        flax=SourceLine("state.py:State", "JAX returns a new one"),
        what=(
            "`optimizer.step()` overwrites the parameters. A JAX function cannot: it returns new "
            "arrays. The old ones stay unchanged or, if they were donated, are deleted."
        ),
        why="JAX traces pure functions; it cannot record that a function changes its arguments.",
        if_ignored=(
            "Code that keeps using the old variable evaluates, or continues from, the weights "
            "before the step."
        ),
        faults=("weights-of-the-step-before",),
        tests=(
            "tests/backends/test_backends.py::test_neither_the_states_nor_the_snapshots_share_memory",
        ),
    ),
    Note(
        title="Neither framework draws the weights",
        torch=SourceLine("user_module.py:build", 'torch.device("meta")'),
        flax=SourceLine("user_module.py:build", "nnx.eval_shape("),
        what=(
            "Both sides build the network without any weights. They come from NumPy, drawn as "
            "PyTorch draws them."
        ),
        why=(
            "The defaults differ. PyTorch draws kernels and biases uniformly from plus or minus "
            "one over the root of the fan in. Flax draws kernels from `lecun_normal`, and biases "
            "are zero."
        ),
        if_ignored=(
            "Two runs from different weights cannot be compared. Zero biases are easy to "
            "overlook, because such a network trains just as well."
        ),
        faults=("own-weights", "zero-biases"),
        tests=(
            "tests/backends/test_convert.py::test_initial_weights_are_distributed_as_pytorchs_own",
        ),
    ),
    Note(
        title="Which arrays are trained",
        torch=SourceLine(_MAKE, "dict(model.named_parameters())"),
        flax=SourceLine(
            "user_module.py:split_module", "module, nnx.Param, nnx.BatchStat, Mask, ..."
        ),
        what=(
            "PyTorch's optimizer trains the tensors that it was given. The Flax side trains the "
            "variables by which it differentiates the loss: the `nnx.Param` group of the split."
        ),
        why=(
            "PyTorch registers a parameter when a module is assigned to an attribute. `nnx` "
            "selects variables by their type."
        ),
        if_ignored=(
            "A layer in a plain Python list is missing from `model.parameters()` and keeps its "
            "initial weights. There is no warning."
        ),
        faults=("layer-not-in-the-optimizer", "frozen-layer"),
    ),
    # --- Model
    Note(
        title="Convolutions pad by default in Flax",
        torch=SourceLine(_NET, "self.conv1 ="),
        flax=SourceLine(_NET, "self.conv1 ="),
        what=(
            '`nn.Conv2d` does not pad by default. `nnx.Conv` pads with "SAME" by default, so the '
            'port sets `padding="VALID"`.'
        ),
        why="The defaults differ; each is one word in the signature of the layer.",
        if_ignored=(
            "The image keeps its size, and every value near the border differs. Often a later "
            "layer reports a wrong shape; if the sizes happen to fit, there is no error."
        ),
        faults=("same-padding",),
    ),
    Note(
        title="Both correlate, and call it convolution",
        torch=SourceLine(_NET, "self.conv2 ="),
        flax=SourceLine(_NET, "self.conv2 ="),
        what=(
            "Neither library flips the kernel. On the CPU both sides may therefore compute a "
            "convolution as a product of patches and kernel, which can be faster (`kernels.py`)."
        ),
        why=(
            "For a network that learns its kernels, flipping makes no difference; for one that "
            "loads them, it does."
        ),
        if_ignored="Weights from a library that flips kernels give different features here.",
        faults=("flipped-kernels",),
    ),
    Note(
        title="Pooling: the stride has to be given",
        torch=SourceLine("layers.py:max_pooling", "else nn.MaxPool2d"),
        flax=SourceLine("layers.py:max_pooling", "nnx.max_pool"),
        what=(
            "In PyTorch, pooling is a layer whose stride defaults to its window. In Flax it is a "
            "function whose stride defaults to one."
        ),
        why="A layer without parameters needs no object in Flax.",
        if_ignored=(
            "With a stride of one the image hardly shrinks, and the first dense layer does not "
            "fit. With another kind of pooling everything fits, and the numbers are wrong."
        ),
        faults=("average-pooling",),
        tests=(
            "tests/backends/test_backends.py::test_both_backends_have_the_same_activations_in_the_canonical_layout",
        ),
    ),
    Note(
        title="The order of a flatten",
        torch=SourceLine("models/net.py:Net.forward", "torch.flatten"),
        flax=SourceLine("models/net.py:Net.__call__", "x.reshape(x.shape[0], -1)"),
        what=(
            "The same operation on two layouts: PyTorch flattens (channels, height, width), Flax "
            "(height, width, channels). The same 400 numbers come out in a different order."
        ),
        why="A flatten reads memory in order.",
        if_ignored=(
            "The next dense layer multiplies each number by the weight of another one. Trained "
            "from scratch, the network learns as well as before, so only a comparison shows the "
            "mistake."
        ),
        faults=("flatten-order",),
    ),
    # --- More networks
    Note(
        title="Batch norm's momentum has two meanings",
        torch=SourceLine("models/resnet20.py:ResNet20.__init__", "self.bn ="),
        flax=SourceLine("models/resnet20.py:ResNet20.__init__", "self.bn ="),
        what=(
            "PyTorch's `momentum`, 0.1, is the weight of the new batch in the running statistics. "
            "Flax's, 0.9, is the weight of the old ones."
        ),
        why="PyTorch kept Torch's meaning; Flax's is the decay of a moving average.",
        if_ignored=(
            "Training looks right. The running statistics follow the last batch, and evaluation is "
            "wrong."
        ),
        faults=("batch-norm-momentum", "statistics-not-updated"),
    ),
    Note(
        title="Which variance is kept",
        torch=SourceLine("models/resnet20.py:Block.__init__", "self.bn1 ="),
        flax=SourceLine("layers.py:BatchNorm.__call__", "var * pixels / (pixels - 1)"),
        what=(
            "Both normalise a batch by its biased variance. For the running variance PyTorch uses "
            "the unbiased one, `nnx.BatchNorm` the biased one; so the Flax side has its own batch "
            "norm (`layers.py`), which follows PyTorch."
        ),
        why=(
            "For evaluation, the unbiased variance is the better estimate. Flax keeps the one it "
            "has computed."
        ),
        if_ignored=(
            "With 32 images of 32 x 32 pixels the variance differs by 3 in 100,000, in evaluation "
            "only; in layers with few pixels it differs more."
        ),
        faults=("biased-running-variance",),
    ),
    Note(
        title="Two modes",
        torch=SourceLine("backend.py:Backend.evaluate", "state.model.eval()"),
        flax=SourceLine("backend.py:Backend._model", "self.network.evaluation"),
        what=(
            "`model.eval()` switches a PyTorch module until `model.train()` is called. In Flax "
            "the mode belongs to the module's description, so there are two descriptions, and "
            "each program is traced from one of them."
        ),
        why="A flag is a constant in a traced program. Changing it later has no effect.",
        if_ignored=(
            "A network in training mode normalises each test batch by itself, and drops units; "
            "one in evaluation mode never updates its statistics."
        ),
        faults=("evaluated-in-train-mode", "trained-in-evaluation-mode", "dropout-left-on"),
    ),
    Note(
        title="Layer norm's epsilon",
        torch=SourceLine("models/vit.py:Block.__init__", "self.norm1 ="),
        flax=SourceLine("models/vit.py:Block.__init__", "self.norm1 ="),
        what=(
            "`nn.LayerNorm` adds 1e-5 to the variance, `nnx.LayerNorm` 1e-6. So both sides set it."
        ),
        why="They are the defaults of two libraries. Published vision transformers use 1e-6.",
        if_ignored=(
            "Activations differ by some millionths. The network trains as well, but it is a "
            "different network."
        ),
        faults=("layer-norm-epsilon", "batch-norm-epsilon"),
    ),
    Note(
        title="GELU has two formulas",
        torch=SourceLine("models/vit.py:Block.forward", "F.gelu("),
        flax=SourceLine("models/vit.py:Block.__call__", "nnx.gelu"),
        what=(
            "`F.gelu` is exact by default, `nnx.gelu` is the approximation with tanh. So both "
            "sides set it."
        ),
        why="The approximation used to be faster, and some published weights were trained with it.",
        if_ignored=(
            "Activations differ by up to 5e-4, enough to change an accuracy and too little to look "
            "like a mistake."
        ),
        faults=("tanh-gelu",),
    ),
    Note(
        title="SAME, with strides, is not symmetric",
        torch=SourceLine("models/resnet20.py:Block.__init__", "self.conv1 ="),
        flax=SourceLine("models/resnet20.py:Block.__init__", "self.conv1 ="),
        what=(
            "With a stride of 2, `padding=1` pads one pixel before and one after. SAME pads as "
            "little as possible: for even sizes none before and one after."
        ),
        why="SAME fixes the size of the result, and puts an odd pixel of padding at the end.",
        if_ignored="All shapes fit. The kernel reads different pixels, half a stride away.",
        faults=("strided-same-padding",),
    ),
    Note(
        title="Neither framework draws dropout masks",
        torch=SourceLine("layers.py:Dropout.forward", "x * self.mask / (1 - self.rate)"),
        flax=SourceLine("layers.py:Dropout.__call__", "x * self.mask / (1 - self.rate)"),
        what=(
            "`nn.Dropout` and `nnx.Dropout` draw their masks themselves, from generators that "
            "share no number. Here both receive masks, drawn in NumPy from the seed and the step."
        ),
        why=(
            "PyTorch's generator is a state outside all modules, JAX's is a key that is split. "
            "Neither can produce the other's numbers."
        ),
        if_ignored=(
            "Two runs with dropout can then be compared in their statistics only, which hide a "
            "wrong factor or a mask that is used twice."
        ),
        faults=("dropout-scaled-wrongly", "dropout-not-scaled", "dropout-of-the-next-step"),
    ),
    # --- Loss
    Note(
        title="A mean, and one loss per image",
        torch=SourceLine("losses.py:cross_entropy", "F.cross_entropy"),
        flax=SourceLine("losses.py:cross_entropy", ".mean()"),
        what=(
            "`F.cross_entropy` returns the mean over the batch. optax's function returns one loss "
            "per image; the caller reduces them. Both take logits, not probabilities."
        ),
        why="PyTorch's losses are ready to use; optax's are meant to be combined.",
        if_ignored=(
            "A sum in place of the mean multiplies every gradient by the batch size, like a "
            "learning rate that is too large. A softmax before the loss is applied twice, and "
            "flattens the probabilities."
        ),
        faults=("sum-for-mean", "mean-over-padding", "softmax-twice"),
    ),
    # --- Step
    Note(
        title="Gradients are accumulated, or returned",
        torch=SourceLine(_STEP, "optimizer.zero_grad()"),
        flax=SourceLine(_STEP, "jax.value_and_grad(loss_of, has_aux=True)(parameters)"),
        what=(
            "`loss.backward()` adds to the values already in `.grad`. `jax.value_and_grad` "
            "returns new gradients; no old ones are stored anywhere."
        ),
        why="This lets PyTorch sum gradients over several small batches without extra code.",
        if_ignored=(
            "Without `zero_grad` each step uses the sum of all gradients so far. The first step is "
            "still right."
        ),
        faults=("gradients-not-zeroed",),
    ),
    Note(
        title="The optimizer's state must be passed on",
        torch=SourceLine(_STEP, "optimizer.step()"),
        flax=SourceLine(_STEP, "updates, optimizer_state = self.optimizer.update("),
        what=(
            "PyTorch's optimizer stores the momentum buffers itself. optax's `update` takes the "
            "state as an argument and returns the next one."
        ),
        why=(
            "An optax optimizer is a pair of pure functions, which can be compiled, vectorised "
            "and differentiated."
        ),
        if_ignored=(
            "A port that drops the returned state repeats the first step: momentum never builds "
            "up, and a schedule never advances. The loss still falls."
        ),
        faults=("optimizer-state-lost",),
    ),
    Note(
        title="When the schedule advances",
        torch=SourceLine(_STEP, "scheduler.step(loss)"),
        flax=SourceLine(_STEP, "learning_rate(self.config, optimizer_state, step)"),
        what=(
            "In PyTorch `scheduler.step()` follows `optimizer.step()`, and sets the rate of the "
            "next step. optax calls the schedule with the number of steps done, counted from 0, "
            "within the update."
        ),
        why="Before PyTorch 1.1 the order was reversed, and old code still has that order.",
        if_ignored=(
            "Every step has the learning rate of its neighbour. Under a slow schedule, hardly "
            "anything shows."
        ),
        faults=("schedule-off-by-one",),
    ),
    # --- Optimizer
    Note(
        title="Momentum: the learning rate stays outside the buffer",
        torch=SourceLine(_MAKE, "momentum=config.momentum,"),
        flax=SourceLine(_MAKE, "optax.sgd("),
        what=(
            "In both, the new buffer is momentum times the old one plus the gradient, and the "
            "learning rate multiplies the new buffer. optax keeps the buffer in the gradient's "
            "precision unless `accumulator_dtype` says otherwise."
        ),
        why=(
            "Other libraries multiply the learning rate into the buffer, or keep a running mean, "
            "in which a gradient is multiplied by one minus momentum. With a constant rate the "
            "first is the same, and the second acts like a smaller rate."
        ),
        if_ignored=(
            "Under a schedule, old learning rates keep their effect. A running mean makes each "
            "step ten times as short at momentum 0.9."
        ),
        faults=("lr-in-the-buffer", "running-mean-for-momentum", "buffer-in-bfloat16"),
        tests=(
            "tests/backends/test_optimizer.py::test_the_momentum_buffer_keeps_the_dtype_of_the_parameters",
        ),
    ),
    Note(
        title="Dampening does not act on the first step",
        torch=SourceLine(_MAKE, "dampening=config.dampening,"),
        flax=SourceLine(_MAKE, '("dampening", dampen(config.dampening)'),
        what=(
            "PyTorch's first buffer is the gradient itself. From the second step on, gradients "
            "are multiplied by one minus dampening. optax has no dampening, so the Flax side "
            "counts steps to recognise the first."
        ),
        why="PyTorch creates the buffer in the first step, as a copy of the gradient.",
        if_ignored=(
            "Without dampening, every step from the second on is too long. With dampening from "
            "the start, the first step is too short, and the difference stays in the buffer."
        ),
        faults=("dampening-ignored", "dampening-on-the-first-step"),
    ),
    Note(
        title="Weight decay comes before momentum",
        torch=SourceLine(_MAKE, "weight_decay=config.weight_decay,"),
        flax=SourceLine(_MAKE, "optax.add_decayed_weights(weight_decay, mask)"),
        what=(
            "PyTorch's SGD adds the weights, biases included, times weight decay to the gradient; "
            "the sum enters the momentum buffer. `optax.sgd` has no weight decay, so a "
            "transformation before it adds the same."
        ),
        why=(
            "This is the gradient of an L2 penalty. AdamW and SGDW shrink the weights separately "
            "from the gradient's step."
        ),
        if_ignored=(
            "At another place in the chain, without the learning rate, or for kernels only, it is "
            "a different algorithm with the same name."
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
        torch=SourceLine(_STEP, "clip_grads_with_norm_("),
        flax=SourceLine("optimizer.py:clip_gradients", "+ 1e-6"),
        what=(
            "PyTorch scales all gradients in place by one factor, before the optimizer reads "
            "them. In optax, clipping is the first link of the chain."
        ),
        why=(
            "Both avoid a division by a norm of zero: PyTorch adds 1e-6 to it, "
            "`optax.clip_by_global_norm` compares first."
        ),
        if_ignored=(
            "Without the 1e-6, a gradient of norm 1 is one millionth too large, in every step "
            "that clips."
        ),
        faults=("clipped-without-epsilon", "clipped-per-tensor"),
        tests=("tests/backends/test_optimizer.py::test_the_comparison_sees_a_fault",),
    ),
    Note(
        title="Nesterov's step",
        torch=SourceLine(_MAKE, "nesterov=config.nesterov,"),
        flax=SourceLine(_MAKE, "g <- g + momentum b"),
        what=(
            "Both use the same formula: the gradient plus momentum times the new buffer. In optax "
            "it is the third argument of `optax.sgd`."
        ),
        why=(
            "Sutskever's form of Nesterov's method, rewritten so that gradients are taken at the "
            "parameters themselves."
        ),
        if_ignored=(
            "The momentum buffer is the same with and without it. Only the parameters differ, by "
            "one gradient, from the first step on."
        ),
        faults=("nesterov-missing", "nesterov-unasked"),
    ),
    Note(
        title="Maximize negates the gradient, not the weight decay",
        torch=SourceLine(_MAKE, "maximize=config.maximize,"),
        flax=SourceLine(_MAKE, '("maximize", optax.scale(-1.0)'),
        what=(
            "PyTorch changes the gradient's sign before anything else. In the chain, the change "
            "of sign therefore stands before weight decay."
        ),
        why="The objective grows while the weights still shrink.",
        if_ignored=(
            "A change of sign after weight decay, or a negative learning rate, makes the weights "
            "grow."
        ),
        faults=("maximize-after-weight-decay",),
    ),
    Note(
        title="The sign is in the update",
        torch=SourceLine(_MAKE, "p <- p - lr g"),
        flax=SourceLine(_MAKE, "the sign is in the update"),
        what=(
            "PyTorch subtracts. An optax update already has its minus sign, and "
            "`optax.apply_updates` adds it."
        ),
        why=(
            "Updates of several transformations can be added, and an unscaled gradient is an "
            "update, too."
        ),
        if_ignored="A hand-written step that subtracts optax's updates increases the loss.",
        tests=("tests/backends/test_optimizer.py::test_a_hundred_steps_are_those_of_torchs_sgd",),
    ),
    Note(
        title="Weights in float32, computation in bfloat16",
        torch=SourceLine("convert.py:cast_to_compute", "tensor.to(dtype)"),
        flax=SourceLine("convert.py:cast_to_compute", "tensor.astype(dtype)"),
        what=(
            "In mixed precision, both round a copy of the weights for each step and differentiate "
            "through the rounding, so gradients are float32. The weights of batch norms are not "
            "rounded."
        ),
        why=(
            "`torch.autocast` and Flax's `dtype=` decide for each operation, and differently: for "
            "a layer norm on a GPU, autocast gives float32, Flax bfloat16. Here both round the "
            "same tensors."
        ),
        if_ignored="Weights in bfloat16 lose every update smaller than 0.2 % of the weight.",
        tests=(
            "tests/backends/test_backends.py::test_mixed_precision_keeps_what_is_too_small_for_bfloat16",
        ),
    ),
    Note(
        title="A learning rate in bfloat16",
        torch=SourceLine(_MAKE, "lr=config.lr,"),
        flax=SourceLine(_MAKE, '("precision", upcast_gradients()),'),
        what=(
            "PyTorch's kernels compute a bfloat16 update in float32 and round once. optax "
            "multiplies in the precision of the gradient, so the Flax side casts gradients to "
            "float32 first."
        ),
        why="JAX rounds after every operation of the program.",
        if_ignored="A learning rate rounded to bfloat16 is wrong by up to 0.4 %.",
        tests=(
            "tests/learn/test_side_by_side.py::test_a_learning_rate_is_not_rounded_to_bfloat16_before_it_is_used",
        ),
    ),
    # --- Schedule
    Note(
        title="A staircase that is one step late",
        torch=SourceLine(_SCHEDULE, "lr_scheduler.StepLR("),
        flax=SourceLine(_SCHEDULE, "period = schedule.period"),
        what=(
            "`StepLR` divides integers. optax's `staircase=True` takes the floor of a division of "
            "floats, and XLA replaces that division by a product with the reciprocal. So the Flax "
            "side divides integers itself."
        ),
        why="49 times (1 / 49) is less than 1 in floating point.",
        if_ignored=(
            "For some periods, of which 49 is the first, the rate falls one step late: for that "
            "step it is too large by the whole factor."
        ),
        faults=("staircase-one-step-late",),
    ),
    Note(
        title="A learning rate in float32",
        torch=SourceLine(_SCHEDULE, "lr_scheduler.ExponentialLR("),
        flax=SourceLine(
            _SCHEDULE,
            "return lambda count: rate((jnp.asarray(count) // period).astype(jnp.float64))",
        ),
        what=(
            "PyTorch computes the rate as a Python float, in float64. optax counts steps in "
            "int32, and JAX divides int32 by int32 in float32. So the Flax side converts the "
            "count to float64 first."
        ),
        why="JAX's rules for mixed types prefer 32 bits, whatever the type of the parameters.",
        if_ignored=(
            "The rate has a relative error of 1e-8, and so have the weights, in a run that is "
            "float64 everywhere else."
        ),
        faults=("lr-in-float32",),
    ),
    Note(
        title="The end of a cosine",
        torch=SourceLine(_SCHEDULE, "return lr_scheduler.CosineAnnealingLR("),
        flax=SourceLine(_SCHEDULE, "rate = optax.cosine_decay_schedule("),
        what=(
            "PyTorch takes the lowest rate itself, optax takes it as a fraction of the first. "
            "After the period, PyTorch's rate rises again, and optax's stays low."
        ),
        why="PyTorch continues the formula, optax keeps its last value.",
        if_ignored=(
            "A run that is longer than the period trains at two different rates. "
            "`lockstep.common.config` refuses it."
        ),
        tests=(
            "tests/test_config.py::test_a_cosine_shorter_than_the_run_is_refused_and_one_as_long_is_not",
        ),
    ),
    Note(
        title="A warm-up, and then a cosine",
        torch=SourceLine(_SCHEDULE, "lr_scheduler.SequentialLR("),
        flax=SourceLine(_SCHEDULE, "optax.join_schedules("),
        what=(
            "Both count the steps of the second schedule from the milestone. The step of the "
            "milestone is the first of the second schedule, at the full rate. PyTorch's warm-up "
            "begins at a fraction of the rate, optax's at a rate."
        ),
        why="PyTorch's schedulers multiply the optimizer's rate, optax's schedules are the rate.",
        if_ignored=(
            "A warm-up that counts from one ends a step early, and every rate in it is too high."
        ),
        faults=("warm-up-off-by-one",),
        tests=(
            "tests/backends/test_optimizer.py::test_a_warm_up_is_torchs_sequential_schedulers_step_by_step",
        ),
    ),
    Note(
        title="Patience is counted in two ways",
        torch=SourceLine(_SCHEDULE, "patience=schedule.patience,"),
        flax=SourceLine("optimizer.py:reduce_on_plateau", "patience=schedule.patience + 1,"),
        what=(
            "PyTorch waits for `patience` windows without improvement, and reduces the rate at "
            "the next one. optax reduces it at the last of them. So the Flax side passes one more."
        ),
        why=(
            "PyTorch tests whether there were more bad windows than `patience`, optax whether "
            "there were as many."
        ),
        if_ignored="The learning rate falls one window early.",
        faults=("plateau-one-window-early",),
    ),
    Note(
        title="A plateau acts on the next step",
        torch=SourceLine("optimizer.py:Scheduler.step", "self.schedule.step(self.mean)"),
        flax=SourceLine("optimizer.py:reduce_on_plateau", "scaled = jax.tree.map("),
        what=(
            "In PyTorch the reduced rate acts on the next step, because the loss is known after "
            "the update. optax scales the update of the step that ended the window. So the Flax "
            "side scales by the old state, and then updates it."
        ),
        why="optax's `update` receives the loss, and uses it at once.",
        if_ignored=(
            "One step per reduction is too short. The difference is small, but stays in the run."
        ),
        faults=("plateau-acts-at-once",),
    ),
    # --- Many steps
    Note(
        title="Two compilers",
        torch=SourceLine("compiled.py:ManySteps._compiled_scan", "torch.compile("),
        flax=SourceLine("compiled.py:ManySteps.__init__", "self._scan, donate_argnums=0"),
        what=(
            "`jax.jit` traces the whole loop, and `donate_argnums` lets it reuse the state's "
            "memory. `torch.compile` compiles a step written as a function, because "
            "`loss.backward()` and `optimizer.step()` would break its graph."
        ),
        why=(
            "JAX compiles everything or nothing; PyTorch compiles the code it can, and interprets "
            "the rest."
        ),
        if_ignored=(
            "A compiled program may add in a different order, so its last digits differ. No other "
            "digit may."
        ),
        tests=(
            "tests/backends/test_backends.py::test_many_steps_in_one_call_are_as_many_single_steps",
            "tests/backends/test_backends.py::test_a_compiled_loop_in_pytorch_is_as_many_single_steps",
        ),
    ),
    # --- Evaluation
    Note(
        title="A mean over images, not over batches",
        torch=SourceLine("backend.py:Backend.evaluate", "weight := label_count("),
        flax=SourceLine("backend.py:Backend.evaluate", "weight := label_count("),
        what=(
            "The mean loss of each batch is multiplied by its number of images before the sum. "
            "PyTorch reads the loss with `.item()`, JAX with `float()`; both wait for the device "
            "there."
        ),
        why="The last batch is smaller than the others.",
        if_ignored=(
            "A mean of means gives the images of the last batch too much weight. A port that "
            "skips the last batch gives them none."
        ),
        faults=("mean-of-batch-means", "last-batch-not-evaluated"),
    ),
    Note(
        title="Which weights are evaluated",
        torch=SourceLine("backend.py:Backend.evaluate", "logits = self._forward(state.model,"),
        flax=SourceLine("backend.py:Backend.evaluate", "self._compiled_evaluate(state,"),
        what=(
            "PyTorch's model holds its weights, and `inference_mode` stops autograd from "
            "recording. In JAX the weights are an argument, and nothing is recorded unless a "
            "gradient is requested."
        ),
        why=(
            "JAX derives a gradient function from a function; PyTorch records the operations as "
            "they run."
        ),
        if_ignored=(
            "In JAX any weights can be passed: those before the last step, or a copy in another "
            "precision."
        ),
        faults=("weights-of-the-step-before", "evaluated-in-bfloat16"),
    ),
    # --- Conversion
    Note(
        title="Kernels of a convolution",
        torch=SourceLine(
            "convert.py:kernel_to_canonical",
            "return weight.transpose(*range(2, weight.ndim), 1, 0)",
        ),
        flax=SourceLine(
            "convert.py:to_canonical", "to_numpy(array) for name, array in arrays.items()"
        ),
        what="PyTorch's kernels are (out, in, height, width), Flax's (height, width, in, out).",
        why="Each has the layout of its library's images.",
        if_ignored=(
            "With height and width swapped every shape still fits, because kernels are square: "
            "the kernel is mirrored along its diagonal."
        ),
        faults=("kernels-h-and-w-swapped",),
        tests=(
            "tests/backends/test_convert.py::test_a_square_kernel_is_permuted_by_the_kind_of_its_layer",
        ),
    ),
    Note(
        title="Kernels of a dense layer",
        torch=SourceLine("convert.py:kernel_from_canonical", "return kernel.transpose(1, 0)"),
        flax=SourceLine(
            "convert.py:from_canonical", "to_array(array) for name, array in arrays.items()"
        ),
        what="PyTorch's are (out, in) and called `weight`, Flax's (in, out) and called `kernel`.",
        why="PyTorch computes x times the transposed weight, Flax x times the kernel.",
        if_ignored=(
            "A reshape gives the right shape and the wrong weights. A square kernel fits even "
            "without one, and is wrong, too."
        ),
        faults=("dense-kernels-reshaped",),
        tests=(
            "tests/backends/test_convert.py::test_a_canonical_dense_kernel_maps_inputs_to_outputs",
        ),
    ),
    Note(
        title="Rows in the order of the flatten",
        torch=SourceLine(_NET, "nn.Linear(16 * 5 * 5, 120)"),
        flax=SourceLine(_NET, "nnx.Linear(5 * 5 * 16, 120, rngs=rngs)"),
        what=(
            "The rows of the first dense kernel belong to flattened pixels, so they stand in the "
            "order of the flatten. `kernel_to_canonical` reorders them once, so neither network "
            "has to transpose its activations."
        ),
        why="See the note on the flatten: the order of the inputs is the order of the rows.",
        if_ignored=(
            "A kernel that is only transposed has the right shape, and its rows in the wrong order."
        ),
        faults=("flatten-rows",),
        tests=(
            "tests/backends/test_convert.py::test_without_the_permutation_of_the_flatten_the_logits_differ",
        ),
    ),
    Note(
        title="bfloat16 on the way to NumPy",
        torch=SourceLine(
            "convert.py:to_numpy", "return tensor.float().numpy().astype(ml_dtypes.bfloat16)"
        ),
        flax=SourceLine("convert.py:to_numpy", "return np.array(array)"),
        what=(
            "NumPy has no bfloat16. JAX uses `ml_dtypes.bfloat16`, which PyTorch does not know: "
            "the PyTorch side converts through float32, which holds every bfloat16 exactly."
        ),
        why="The dtype was made for JAX and TensorFlow.",
        if_ignored=(
            "Converting through float32 loses nothing. Converting data with more digits through "
            "bfloat16 loses most of them."
        ),
        faults=("images-in-bfloat16",),
        tests=(
            "tests/backends/test_convert.py::test_every_bit_survives_the_way_into_a_framework_and_back",
        ),
    ),
    Note(
        title="A buffer that does not exist yet",
        torch=SourceLine("optimizer.py:export_slots", "if tensor is not None"),
        flax=SourceLine("optimizer.py:export_slots", "if step > 0 else {}"),
        what=(
            "Before the first step PyTorch has no momentum buffers, and optax has zeros. The "
            "canonical state has none."
        ),
        why=(
            "optax creates its whole state in `init`, because a compiled function cannot create it "
            "later."
        ),
        if_ignored=(
            "An optimizer that is created again when a run resumes starts without buffers, or with "
            "zeros."
        ),
        faults=("momentum-reset-every-epoch",),
        tests=("tests/backends/test_optimizer.py::test_a_snapshot_goes_on_in_the_other_backend",),
    ),
)
