"""The text of the lesson: sections of the two programs, and notes on their lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class LessonNote:
    """One thing that differs in JAX. Its texts may hold code in backticks."""

    title: str
    torch: str | None  # text of one line of the section, and of no other; None: of no line
    flax: str | None
    text: str
    missed: str  # the mistake of those who miss it
    fault: str | None = None  # of the catalogue, which shows it
    question: str = ""  # that it answers, of someone who knows PyTorch alone


@dataclass(frozen=True)
class Difference:
    """What Lockstep's own backends do otherwise, and the Flax backend's code for it."""

    title: str
    text: str
    code: tuple[str, ...]  # definitions, as `backend.py:Backend._step`


@dataclass(frozen=True)
class LessonSection:
    """Definitions of both programs, next to each other."""

    key: str
    title: str
    text: str
    names: Mapping[str, tuple[str, ...]]  # by side
    notes: tuple[LessonNote, ...]


SECTIONS = (
    LessonSection(
        "network",
        "1. The network",
        "An `nnx.Module` reads like an `nn.Module`: layers are attributes, and a method computes. "
        "Three things differ: random numbers, defaults, and the order of axes.",
        {
            "torch": ("Net", "Net.__init__", "Net.forward"),
            "flax": ("Net", "Net.__init__", "Net.__call__"),
        },
        (
            LessonNote(
                "Random keys are passed on",
                "self.conv1 = nn.Conv2d",
                "self.conv1 = nnx.Conv",
                "PyTorch draws the initial weights from one hidden generator. In JAX nothing is "
                "hidden: each layer is given `rngs` and draws with a key from it. The two draw "
                "other numbers from the same seed, and Flax's biases start at zero.",
                "The runs start apart. Copy the weights over before you compare anything.",
                "zero-biases",
            ),
            LessonNote(
                "Padding has another default",
                "self.conv2 = nn.Conv2d",
                "self.conv2 = nnx.Conv",
                "`nn.Conv2d` pads nothing unless it is told to. `nnx.Conv` pads so that the image "
                'keeps its size, unless it is told `padding="VALID"`.',
                "Shapes differ, or, after a crop, the numbers do.",
                "same-padding",
            ),
            LessonNote(
                "Channels come last",
                "self.conv1(x)",
                "self.conv1(x)",
                "Images are (batch, channels, height, width) in PyTorch and (batch, height, width, "
                "channels) in Flax. A dense kernel is (out, in) in PyTorch and (in, out) in Flax. "
                "Weights that move over are transposed.",
                "A reshape gives the right shape, and wrong numbers.",
                "dense-kernels-reshaped",
            ),
            LessonNote(
                "Why the flatten needs a permutation",
                "x.flatten(1)",
                "x.reshape(len(x), -1)",
                "Both flatten an image in the order of its axes: by channel, height and width in "
                "PyTorch, by height, width and channel in Flax. So the rows of the next kernel "
                "have another order. Permute them once, when the weights move over: the kernel of "
                "fc1 is `weight.reshape(120, 16, 5, 5).transpose(2, 3, 1, 0).reshape(400, 120)`.",
                "The first dense layer multiplies each number by another one's weight.",
                "flatten-rows",
                "Why is the flatten permuted?",
            ),
        ),
    ),
    LessonSection(
        "step",
        "2. One training step",
        "Here the two differ most. PyTorch records each operation and stores gradients in the "
        "parameters. "
        "JAX takes a function and returns another one, which computes the gradients.",
        {"torch": ("train_step",), "flax": ("train_step",)},
        (
            LessonNote(
                "When `jit` runs your Python again",
                None,
                "@nnx.jit",
                "The first call runs the Python code with placeholders in place of arrays. This is "
                "tracing. Then the operations on the arrays are compiled, and later calls run only "
                "the compiled program. "
                "For another shape or type, such as a smaller last batch, the Python code runs "
                "again, and is compiled again. "
                "So a `print` runs once per shape, and `if` cannot ask for an array's value.",
                "A value that Python reads while tracing, such as a learning rate in a global "
                "variable, stays as it was.",
                question="When does `jit` run my Python again?",
            ),
            LessonNote(
                "A module is a tree of arrays",
                "def train_step",
                "model: Net, optimizer",
                "JAX's functions take and return trees of arrays (pytrees): dictionaries, lists, "
                "modules. `nnx.split(model)` gives a module's structure and such a tree, "
                "`nnx.merge` makes the module again. `nnx.jit` does both for you, and writes back "
                "what the step changed in `model` and `optimizer`.",
                "With `jax.jit` alone, all that the step wrote is lost, such as a batch norm's "
                "statistics.",
                "statistics-not-updated",
            ),
            LessonNote(
                "Where `zero_grad` went",
                "optimizer.zero_grad()",
                "nnx.value_and_grad",
                "`backward` adds to the `grad` that each parameter has, so it must be cleared. "
                "`nnx.value_and_grad(loss_of)` is a function that returns the loss and new "
                "gradients. They are stored nowhere, so there is nothing to clear.",
                "In PyTorch, gradients add up from step to step.",
                "gradients-not-zeroed",
                "Where did `zero_grad` go?",
            ),
            LessonNote(
                "The mean is yours to take",
                "F.cross_entropy",
                ".mean()",
                "`F.cross_entropy` returns the mean over the batch. optax returns the loss of each "
                "image.",
                "With a sum, the learning rate is as many times too large as the batch has images.",
                "sum-for-mean",
            ),
            LessonNote(
                "Where the optimizer's state lives",
                "optimizer.step()",
                "optimizer.update(model, gradients)",
                "`torch.optim.SGD` keeps a momentum buffer for each parameter, in "
                "`optimizer.state`. An optax optimizer keeps nothing: it is two functions, `init` "
                "and `update`, and its state is a tree that goes in and comes out. "
                "`nnx.Optimizer` holds that tree in `opt_state` and writes the new parameters into "
                "the model.",
                "If the new state is dropped, each step is a first one.",
                "optimizer-state-lost",
                "Where does the optimizer keep its state?",
            ),
        ),
    ),
    LessonSection(
        "loop",
        "3. The loop",
        "The loop is plain Python on both sides. (`lockstep.Run` records it for "
        "`python compare.py check`; otherwise its calls do nothing.)",
        {"torch": ("train",), "flax": ("train",)},
        (
            LessonNote(
                "Which variables are trained",
                "model.parameters()",
                "wrt=nnx.Param",
                "PyTorch's optimizer is given parameters. Flax's is given the model and a kind of "
                "variable: `nnx.Param`, not the statistics of a batch norm.",
                "A variable that the optimizer does not know is never updated.",
                "layer-not-in-the-optimizer",
            ),
            LessonNote(
                "float64 is off",
                ".permute(0, 3, 1, 2)",
                "x = jnp.asarray(images)",
                "`jnp.asarray` makes float32 of a float64 array, unless `JAX_ENABLE_X64=1` is set "
                "or `jax_enable_x64` is on before the first array. Images come channels last from "
                "NumPy, so PyTorch permutes them.",
                "A comparison in float64 compares float32, without a word.",
                "x64-left-off",
                "Why is everything float32?",
            ),
            LessonNote(
                "Calls return before the device is done",
                "losses.append",
                "losses.append",
                "`float(loss)` waits for the device. So do `loss.item()` and "
                "`jax.block_until_ready(loss)`.",
                "A clock around the call alone measures nothing. Waiting in each step slows a "
                "fast loop down.",
            ),
        ),
    ),
    LessonSection(
        "start",
        "4. Data and seeds",
        "`batches` is the same on both sides: NumPy shuffles, since the two frameworks cannot "
        "shuffle alike.",
        {"torch": ("batches", "settings"), "flax": ("settings",)},
        (
            LessonNote(
                "One order for both",
                "order = data.permutation",
                None,
                "A `DataLoader` shuffles with PyTorch's generator, and no other library can draw "
                "the same order.",
                "The first batch differs, and with it all that follows.",
                "other-shuffle",
            ),
            LessonNote(
                "A seed, or a key",
                "torch.manual_seed",
                "nnx.Rngs",
                "`torch.manual_seed` sets a generator that each draw moves on. A JAX key never "
                "changes: the same key gives the same numbers again, and `jax.random.split` makes "
                "new keys of it. `nnx.Rngs` counts its draws, and gives a new key for each.",
                "A key that is used twice gives the same numbers twice. One that is split at the "
                "wrong place gives a step the dropout mask of another.",
                "dropout-of-the-next-step",
                "Where is the seed?",
            ),
        ),
    ),
)

# With these the page ends.
DIFFERENCES = (
    Difference(
        "Dictionaries in place of modules",
        "The Flax backend takes the module apart once, with `nnx.split`, and trains a flat "
        "dictionary: `conv1.kernel`, `conv1.bias`, ... `_model` puts it together again for the "
        "forward pass. Both backends use the same names and the same layout, so tensors can be "
        "compared one by one, and either backend can continue from a state of the other.",
        ("backend.py:Backend._model",),
    ),
    Difference(
        "A step without side effects",
        "The step takes a state and returns the next one, so it needs `jax.value_and_grad` and "
        "`jax.jit` alone. The old state is given up (donated), and its memory is used again.",
        ("backend.py:Backend._step",),
    ),
    Difference(
        "Many steps in one compiled loop",
        "With four images in a batch, Python takes longer between two steps than the step takes. So "
        "both backends compile a loop of many steps: `jax.lax.scan` here, and a loop under "
        "`torch.compile` in PyTorch.",
        ("compiled.py:ManySteps._scan",),
    ),
    Difference(
        "Sums in the same precision",
        "In bfloat16, some layers of the two libraries add in different precisions. `layers.py` has "
        "layers that add in float32, and Lockstep's own networks use those.",
        ("layers.py:in_float32",),
    ),
)
