"""Which functions of the two backends stand beside each other, and their text, cut out of the
sources with `ast`.

A definition is named by file and name, `backend.py:Backend.train_step`; both backend classes are
called `Backend` here. Every definition of both backends belongs to a section: to a pair, or to one
side alone, with the reason why.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lockstep.common.errors import LockstepError

# below the repository's root
FOLDERS = {"torch": "backends/torch_backend", "flax": "backends/flax_backend"}
# called `Backend` in the names of definitions
CLASSES = {"torch": "TorchBackend", "flax": "FlaxBackend"}
FILES = (
    "backend.py",
    "state.py",
    "inputs.py",
    "losses.py",
    "device.py",
    "tuning.py",
    "compiled.py",
    "models/net.py",
    "models/mlp.py",
    "models/resnet20.py",
    "models/convnext.py",
    "models/vit.py",
    "layers.py",
    "kernels.py",
    "optimizer.py",
    "user_module.py",
    "convert.py",
    "activations.py",
    "weight_files.py",
)
SETTINGS = "settings"  # the name of a module's own statements, but for imports


class SourceError(LockstepError):
    """The sources have changed, and what is said of them has not."""


class Line(NamedTuple):
    """One line of a source; a definition's lines are moved to the left margin together."""

    number: int  # in its file, from 1
    text: str


@dataclass(frozen=True)
class Definition:
    """A function, a method, a class without its methods, or a module's own statements."""

    file: str  # below the root, as `backends/torch_backend/models/net.py`
    lines: tuple[Line, ...]

    @property
    def span(self) -> str:
        first, last = self.lines[0].number, self.lines[-1].number
        return f"line {first}" if first == last else f"lines {first} to {last}"


@dataclass(frozen=True)
class Pair:
    """Two definitions that do the same, or one that has no partner."""

    torch: str | None
    flax: str | None
    why: str = ""  # where there is no partner: why not

    @property
    def title(self) -> str:
        names = [
            name.partition(":")[2].removeprefix("Backend.")
            for name in (self.torch, self.flax)
            if name
        ]
        return " / ".join(dict.fromkeys(names))


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    key: str  # for links
    title: str
    text: str
    pairs: tuple[Pair, ...]
    shared: tuple[str, ...] = ()  # of `common`, which both sides are given: `data.py:normalise`


def both(file: str, *names: str) -> tuple[Pair, ...]:
    """Definitions that both sides have by the same name."""
    return tuple(Pair(f"{file}:{name}", f"{file}:{name}") for name in names)


def modules(file: str, *names: str) -> tuple[Pair, ...]:
    """Classes with an `__init__`, and a `forward` in PyTorch, which is `__call__` in Flax."""
    return tuple(
        pair
        for name in names
        for pair in (
            *both(file, name, f"{name}.__init__"),
            Pair(f"{file}:{name}.forward", f"{file}:{name}.__call__"),
        )
    )


SECTIONS = (
    Section(
        "data",
        "Data",
        "Neither framework loads, normalises or shuffles anything. Both are given the same bytes, made once in NumPy "
        "by the functions below; each then only carries them to its device, in its own layout.",
        (
            *both("inputs.py", "Data", "Inputs", "Inputs.__init__"),
            *both("inputs.py", "Inputs.images", "Inputs.labels", "Inputs.upload", "Inputs.batches"),
            Pair(
                None,
                "inputs.py:Inputs._batches",
                "PyTorch does not compile this: it is two calls.",
            ),
            Pair("inputs.py:as_tensor", None, "JAX's bfloat16 is that of `ml_dtypes`."),
            *both("backend.py", "Backend.upload", "Backend.batches"),
        ),
        shared=(
            "data/dataset.py:normalise",
            "data/batches.py:permutation",
            "data/batches.py:batch_indices",
            "data/augment.py:draw_parameters",
            "data/augment.py:crop_flip",
        ),
    ),
    Section(
        "setup",
        "Set-up: what makes two runs comparable",
        "Defaults differ more than programs do. Precision, determinism and memory are set here, once, before anything "
        "is computed.",
        (
            *both("state.py", "State"),
            Pair(None, "state.py:settings", "PyTorch trains a module and not a tree of arrays."),
            *both("backend.py", "Backend", "Backend.__init__"),
            Pair(
                "user_module.py:empty_copy",
                None,
                "In Flax, `_model` does this, at the start of each step.",
            ),
            *both(
                "user_module.py",
                SETTINGS,
                "build",
                "validate_module",
                "use_exact_sums",
                "exact_layer",
            ),
            Pair(
                None,
                "user_module.py:Network",
                "A PyTorch module is one object, which changes its mode in place.",
            ),
            Pair(None, "user_module.py:split_module", "Likewise."),
            Pair(
                None,
                "user_module.py:definition_order",
                "PyTorch keeps the order in which a module's layers were assigned.",
            ),
            Pair(
                None, "user_module.py:changed_variables", "A PyTorch module has its `state_dict`."
            ),
            Pair(
                None,
                "user_module.py:raw_bits",
                "PyTorch's random numbers have one state, outside of all modules.",
            ),
            Pair(None, "device.py:settings", "PyTorch takes memory on a card as it needs it."),
            *both("device.py", "choose_device", "configure_determinism"),
            *both("backend.py", "Backend.describe"),
            *both("tuning.py", SETTINGS, "compiler_options", "limit_threads"),
            Pair("tuning.py:compiles", None, "JAX always compiles."),
            Pair("tuning.py:channels_last", None, "In Flax, the channels are last everywhere."),
            Pair(None, "tuning.py:xla_has_option", "PyTorch's are chosen by its version."),
            Pair(None, "tuning.py:has_library_convolution", "PyTorch's loop has no such trouble."),
        ),
    ),
    Section(
        "model",
        "Model",
        "The same five layers under the same names. A PyTorch module holds its weights; a Flax module is only a "
        "description until weights are put into it, which `_model` does at the start of each step.",
        (
            *modules("models/net.py", "Net"),
            *both("layers.py", "convolution"),
            Pair(
                "kernels.py:Im2colConv2d",
                None,
                "`nnx.Conv` takes a function to convolve with; PyTorch wants a layer.",
            ),
            Pair("kernels.py:Im2colConv2d.forward", None, "Likewise."),
            Pair("kernels.py:Im2colConv2d.supports", "kernels.py:supports"),
            *both("kernels.py", SETTINGS),
            *both("kernels.py", "im2col_conv"),
            *both("layers.py", "max_pooling"),
            Pair("kernels.py:Pool2x2", None, "PyTorch pools by a layer, Flax by a function."),
            Pair("kernels.py:Pool2x2.forward", "kernels.py:max_pool"),
            Pair("kernels.py:Pool2x2.supports", None, "`max_pool` is for windows of 2 x 2 alone."),
            *both("kernels.py", "maximum_first"),
            Pair(
                "kernels.py:_MaximumFirst",
                None,
                "JAX takes the gradient of `where`. Compiled, PyTorch's is quicker with a gradient of its own.",
            ),
            Pair("kernels.py:_MaximumFirst.forward", None, "Likewise."),
            Pair("kernels.py:_MaximumFirst.setup_context", None, "Likewise."),
            Pair("kernels.py:_MaximumFirst.backward", None, "Likewise."),
        ),
    ),
    Section(
        "networks",
        "More networks",
        "Dense layers alone, batch norm and shortcuts, depthwise convolutions and layer norm, attention. Lists of "
        "layers are `nn.ModuleList` and `nnx.List`; a parameter that belongs to no layer is `nn.Parameter` and "
        "`nnx.Param`. Norms are where defaults differ most: momentum, epsilon, and how the variance is taken. What "
        "dropout leaves out is drawn by neither.",
        (
            *modules("models/mlp.py", "MLP"),
            *modules("models/resnet20.py", "ResNet20", "Block"),
            *modules("models/convnext.py", "ConvNeXt", "Block", "Downsample"),
            Pair(
                "models/convnext.py:channels_last",
                None,
                "In Flax, the channels are last everywhere.",
            ),
            Pair("models/convnext.py:channels_first", None, "Likewise."),
            Pair("models/vit.py:" + SETTINGS, "models/vit.py:" + SETTINGS),
            *modules("models/vit.py", "ViT", "Block", "Attention"),
            *modules("layers.py", "Dropout"),
            Pair(None, "layers.py:Mask", "In PyTorch a buffer, of which it has one kind only."),
            *both("backend.py", "Backend._masks", "Backend.dropout_layers"),
            Pair("convert.py:set_masks", None, "In Flax, masks are an argument of the step."),
            Pair("layers.py:BatchNorm2d", "layers.py:BatchNorm"),
            Pair("layers.py:BatchNorm2d.forward", "layers.py:BatchNorm.__call__"),
            Pair("layers.py:LayerNorm", "layers.py:LayerNorm"),
            Pair(None, "layers.py:LayerNorm.__init__", "In PyTorch, the library's."),
            Pair("layers.py:LayerNorm.forward", "layers.py:LayerNorm.__call__"),
            Pair(None, "layers.py:in_float32", "Most of PyTorch's kernels do this by themselves."),
            Pair(None, "layers.py:Linear", "In PyTorch, `nn.Linear`."),
            Pair(None, "layers.py:Linear.__call__", "Likewise: its kernels sum in float32."),
            Pair(None, "layers.py:Conv", "Likewise."),
            Pair(None, "layers.py:Conv.__call__", "Likewise."),
            Pair(None, "layers.py:promote_bias", "Likewise."),
            Pair(None, "user_module.py:cast_constants", "In PyTorch, `Module.to`."),
        ),
        shared=("data/dropout.py:masks",),
    ),
    Section(
        "loss",
        "Loss and gradient norm",
        "Both are one library call, but the two calls do not give the same thing back.",
        both("losses.py", "cross_entropy", "global_norm", "upcast"),
    ),
    Section(
        "optimizer",
        "Optimizer",
        "`torch.optim.SGD` is one class with six options. optax builds the same from small transformations of the "
        "gradient, each with a state of its own, and the order of the chain is the order of the formula.",
        (
            *both("optimizer.py", "make_optimizer"),
            Pair(
                None,
                "optimizer.py:clip_gradients",
                "In PyTorch, `clip_grads_with_norm_`, which `_step` calls before the optimizer.",
            ),
            Pair(
                None,
                "optimizer.py:upcast_gradients",
                "PyTorch's kernels compute a bfloat16 update in float32 by themselves, and round once at the end.",
            ),
            Pair(
                None,
                "optimizer.py:DampeningState",
                "PyTorch keeps this in the optimizer: is there a buffer yet?",
            ),
            Pair(
                None, "optimizer.py:dampen", "In PyTorch an option of SGD; optax has no dampening."
            ),
        ),
    ),
    Section(
        "schedule",
        "Learning-rate schedule",
        "A PyTorch scheduler is an object that is stepped, and writes `lr` into the optimizer. An optax schedule is a "
        "function of the number of steps done, called inside the compiled update.",
        (
            *both("optimizer.py", "make_schedule"),
            Pair(
                "optimizer.py:Scheduler",
                None,
                "Flax needs no object to step: what changes along a run is part of the optimizer's state.",
            ),
            Pair("optimizer.py:Scheduler.__init__", None, "Likewise."),
            Pair("optimizer.py:Scheduler.lr", "optimizer.py:learning_rate"),
            Pair("optimizer.py:Scheduler.step", "optimizer.py:reduce_on_plateau"),
        ),
    ),
    Section(
        "step",
        "One training step",
        "The unit to read. PyTorch changes objects, statement by statement. JAX is given a state and returns the next "
        "one: nothing is changed, so nothing may be forgotten on the way out.",
        (
            *both("backend.py", "Backend._step"),
            *both("backend.py", "Backend._forward"),
            *both("convert.py", "cast_to_compute"),
            Pair(
                None,
                "backend.py:Backend._model",
                "Likewise: nothing has to be put together before it is called.",
            ),
            *both("backend.py", "Backend.train_step"),
        ),
    ),
    Section(
        "fused",
        "Many steps in one call",
        "JAX compiles the loop over the steps into one program, with `lax.scan`. Where `torch.compile` is on, PyTorch "
        "does so, too, with a `scan` of its own; where it is off, it runs a Python loop.",
        (
            *both("backend.py", "Backend.train_steps"),
            *both("compiled.py", SETTINGS, "ManySteps", "ManySteps.__init__", "ManySteps.__call__"),
            *both("compiled.py", "ManySteps._one_by_one", "ManySteps._scan"),
            Pair(
                "compiled.py:ManySteps._as_one_program",
                None,
                "In Flax the state is a value, which needs no taking out.",
            ),
            Pair(
                "compiled.py:ManySteps._functional_step",
                None,
                "`_step` of the Flax side is written this way already: from arrays to arrays.",
            ),
            Pair(
                None,
                "compiled.py:ManySteps.scan_is_faster",
                "PyTorch's convolutions are as fast inside its loop as outside.",
            ),
            Pair(None, "compiled.py:take_batch", "PyTorch indexes each tensor."),
            Pair("compiled.py:to_array", None, "The Flax side does this in one line."),
            Pair(
                "optimizer.py:Scheduler.advance",
                None,
                "An optax schedule is a function of the step, so the compiled loop can call it.",
            ),
        ),
    ),
    Section(
        "evaluation",
        "Evaluation",
        "Predictions and the mean loss over all test images, in pieces that fit into memory.",
        (
            *both("backend.py", "Backend.evaluate"),
            Pair(
                None,
                "backend.py:Backend._evaluate",
                "PyTorch evaluates eagerly; here it is a program of its own.",
            ),
        ),
    ),
    Section(
        "probe",
        "Looking inside a step",
        "What the next step would compute, tensor by tensor, without taking it: this is how Lockstep finds where two "
        "runs part.",
        (
            *both("backend.py", "Backend.probe"),
            Pair(
                None,
                "backend.py:Backend._probe",
                "PyTorch computes eagerly, so that `probe` can read everything. Here it is a program of its own.",
            ),
            *both("activations.py", "record_activations"),
            Pair(None, "activations.py:" + SETTINGS, "PyTorch's are those in `convert.ROLES`."),
            Pair(
                None,
                "activations.py:has_parameters",
                "PyTorch asks `layer.parameters(recurse=False)`.",
            ),
            Pair(
                None,
                "activations.py:set_attribute",
                "PyTorch has hooks; here each layer is replaced, and put back.",
            ),
        ),
    ),
    Section(
        "conversion",
        "Conversion: layouts, in and out",
        "Files and reports hold Flax's layout, so that its conversion is a copy. PyTorch's transposes kernels, and "
        "reorders the rows of the dense kernel that follows the flatten.",
        (
            *both(
                "backend.py",
                "Backend.shapes",
                "Backend.native_names",
                "Backend.init",
                "Backend.export",
            ),
            *both(
                "convert.py",
                "to_canonical",
                "from_canonical",
                "canonical_names",
                "activations_to_canonical",
            ),
            Pair("convert.py:" + SETTINGS, None, "Canonical roles and layouts are Flax's own."),
            Pair("convert.py:flax_role", None, "Likewise."),
            Pair("convert.py:attach_names", None, "Of a user's pair, Flax needs the names alone."),
            Pair(
                "convert.py:statistics",
                None,
                "In Flax, `nnx.BatchStat` is a kind of variable of its own.",
            ),
            Pair(
                "convert.py:dropout_modules",
                None,
                "In Flax they are found where the module is taken apart.",
            ),
            Pair("convert.py:dropout_layers", None, "Likewise."),
            Pair("convert.py:masks_from_canonical", None, "In Flax, `from_canonical`."),
            Pair(
                "convert.py:kernel_to_canonical",
                None,
                "Flax's kernels are in the canonical layout already.",
            ),
            Pair("convert.py:kernel_from_canonical", None, "Likewise."),
            Pair("convert.py:activation_to_canonical", None, "Likewise for its activations."),
            Pair(
                "convert.py:flattened",
                None,
                "Likewise: its flatten leaves the canonical order behind.",
            ),
            Pair(
                None,
                "convert.py:flatten",
                "PyTorch's `named_parameters` are flat, with dotted names.",
            ),
            Pair(None, "convert.py:nest", "Likewise."),
            *both("convert.py", "to_numpy"),
            Pair("convert.py:to_tensor", "convert.py:to_array"),
            *both(
                "optimizer.py",
                "export_schedule",
                "restore_schedule",
                "export_momentum",
                "restore_momentum",
            ),
        ),
        shared=("model/initial_weights.py:initial_weights",),
    ),
    Section(
        "files",
        "Files: weights from and for elsewhere",
        "PyTorch keeps a state dict, Flax an Orbax checkpoint. What a file claims to hold is checked by the functions "
        "below, before its numbers are read, and these before they are used. Both become the same canonical arrays.",
        (
            *both("weight_files.py", SETTINGS, "read_weights", "write_weights", "read_headers"),
            Pair(
                "weight_files.py:is_allowed_global",
                None,
                "A checkpoint has no pickle, which could make anything.",
            ),
            Pair(
                None,
                "weight_files.py:find_checkpoint",
                "A state dict is one file, a checkpoint a folder.",
            ),
            Pair(
                None,
                "weight_files.py:open_arrays",
                "`torch.load` gives tensors without numbers, if asked.",
            ),
            Pair(
                "weight_files.py:from_native",
                None,
                "The names and the layout of an `nnx` state are the canonical ones.",
            ),
            Pair("weight_files.py:to_native", None, "In Flax, `convert.nest` alone."),
            Pair("weight_files.py:native_shapes", None, "In Flax they are the canonical ones."),
            Pair(
                "weight_files.py:without_buffers",
                None,
                "An `nnx` state holds what is asked for, and nothing else.",
            ),
            Pair("weight_files.py:buffers_of", None, "Likewise."),
            Pair("weight_files.py:empty_model", "weight_files.py:canonical_names"),
        ),
        shared=(
            "model/weight_files.py:check_size",
            "model/weight_files.py:check_headers",
            "model/weight_files.py:check_numbers",
        ),
    ),
)


def definitions(source: str, file: str) -> dict[str, Definition]:
    """The definitions of one file by name; what lies between them belongs to none."""
    text = source.splitlines()
    found: dict[str, list[Line]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and (methods := _methods(node)):
            found[node.name] = _cut(text, _first(node), _first(methods[0]) - 1)
            found |= {
                f"{node.name}.{m.name}": _cut(text, _first(m), m.end_lineno or 0) for m in methods
            }
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = _cut(text, _first(node), node.end_lineno or 0)
        elif not isinstance(node, ast.Import | ast.ImportFrom) and not _is_docstring(node):
            first = node.lineno
            while text[first - 2].startswith("#") and not text[first - 2].startswith("# --- "):
                first -= 1
            found.setdefault(SETTINGS, []).extend(_cut(text, first, node.end_lineno or 0))
    return {name: Definition(file, tuple(lines)) for name, lines in found.items()}


def _methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [child for child in node.body if isinstance(child, ast.FunctionDef)]


def _first(node: ast.FunctionDef | ast.ClassDef) -> int:
    """The line of a definition's first decorator, or of the definition itself."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _cut(text: Sequence[str], first: int, last: int) -> list[Line]:
    """Lines `first` to `last`, without what is blank or the heading of a section, at the left
    margin."""
    lines = [Line(number, text[number - 1]) for number in range(first, last + 1)]
    lines = [
        line for line in lines if line.text.strip() and not line.text.strip().startswith("# --- ")
    ]
    margin = len(lines[0].text) - len(lines[0].text.lstrip())
    return [Line(line.number, line.text[margin:]) for line in lines]


def read_backends(root: Path) -> dict[str, dict[str, Definition]]:
    """The definitions of each side, by `file:name`.

    Raises:
        SourceError: if a source is missing or cannot be parsed.
    """
    return {
        side: {
            f"{name}:{_renamed(key, CLASSES[side])}": definition
            for name in FILES
            for key, definition in _read(root, f"{folder}/{name}").items()
        }
        for side, folder in FOLDERS.items()
    }


def read_shared(root: Path, sections: Sequence[Section] = SECTIONS) -> dict[str, Definition]:
    """The definitions of `common` that both sides are given, by `file:name`.

    Raises:
        SourceError: if one is missing.
    """
    names = [name for section in sections for name in section.shared]
    files = dict.fromkeys(name.partition(":")[0] for name in names)
    found = {
        f"{f}:{key}": value for f in files for key, value in _read(root, f"common/{f}").items()
    }
    for name in names:
        if name not in found:
            raise SourceError(f"common has no {name} any more: change common/learn/outline.py")
    return {name: found[name] for name in names}


def _renamed(name: str, cls: str) -> str:
    head, dot, rest = name.partition(".")
    return ("Backend" if head == cls else head) + dot + rest


def _read(root: Path, file: str) -> dict[str, Definition]:
    try:
        return definitions((root / file).read_text(encoding="utf-8"), file)
    except OSError as error:
        raise SourceError(
            f"the source {file} cannot be read: make the page from a checkout of the project"
        ) from error
    except SyntaxError as error:
        raise SourceError(
            f"the source {file} cannot be parsed (line {error.lineno}): mend it first"
        ) from error


def check(
    backends: dict[str, dict[str, Definition]], sections: Sequence[Section] = SECTIONS
) -> None:
    """Raise SourceError unless each definition of each side stands in one section, and each pair
    has two sides."""
    for name, side, other in sides(sections):
        if name not in backends[side]:
            where = f"{other} only" if name in backends[other] else "neither side"
            raise SourceError(
                f"{name} is in {where}: give it a partner, or declare it one-sided in sections.py"
            )
    for section in sections:
        for pair in section.pairs:
            for name, other in ((pair.torch, "flax"), (pair.flax, "torch")):
                if name and None in (pair.torch, pair.flax) and name in backends[other]:
                    raise SourceError(
                        f"{name} is declared one-sided, and {other} has it: pair them in sections.py"
                    )
    for side in FOLDERS:
        listed = [name for name, listed_side, _ in sides(sections) if listed_side == side]
        for name in backends[side]:
            if listed.count(name) != 1:
                times = "in no section" if name not in listed else "in more than one section"
                raise SourceError(f"{name} of {side} is {times}: change common/learn/outline.py")


def sides(sections: Sequence[Section]) -> Iterator[tuple[str, str, str]]:
    """Each definition that is spoken of, its side, and the other side."""
    for section in sections:
        for pair in section.pairs:
            if pair.torch:
                yield pair.torch, "torch", "flax"
            if pair.flax:
                yield pair.flax, "flax", "torch"


def head(definition: Definition) -> Line | None:
    """The line that gives a definition its name; a module's own statements have none."""
    return next(
        (line for line in definition.lines if line.text.startswith(("def ", "class "))), None
    )


def find(definition: Definition, name: str, snippet: str) -> Line:
    """The one line of `definition` that holds `snippet`.

    Raises:
        SourceError: if none does, or more than one.
    """
    lines = [line for line in definition.lines if snippet in line.text]
    if len(lines) != 1:
        times = "nowhere" if not lines else f"{len(lines)} times"
        raise SourceError(
            f"{definition.file}: {snippet!r} stands {times} in {name}: change what is said of it"
        )
    return lines[0]
