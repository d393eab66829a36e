"""The order of the lesson: which definitions of the two backends stand next to each other.

Every definition of both backends belongs to a section: to a pair, or to one side alone, with the
reason why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.common.learn.sources import (
    FOLDERS,
    SETTINGS,
    Definition,
    SourceError,
    read_file,
)


@dataclass(frozen=True)
class Pair:
    """Two definitions that do the same, or one that has no partner."""

    torch: str | None
    flax: str | None
    why: str = ""  # why there is no partner

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
    """A section of the page."""

    key: str  # for links
    title: str
    text: str
    pairs: tuple[Pair, ...]
    shared: tuple[str, ...] = ()  # code of `common` that serves both: `data/dataset.py:normalise`


def same_names(file: str, *names: str) -> tuple[Pair, ...]:
    """Pairs of definitions with the same name on both sides."""
    return tuple(Pair(f"{file}:{name}", f"{file}:{name}") for name in names)


def modules(file: str, *names: str) -> tuple[Pair, ...]:
    """Pairs of classes, of their `__init__`, and of PyTorch's `forward` with Flax's `__call__`."""
    return tuple(
        pair
        for name in names
        for pair in (
            *same_names(file, name, f"{name}.__init__"),
            Pair(f"{file}:{name}.forward", f"{file}:{name}.__call__"),
        )
    )


SECTIONS = (
    Section(
        "data",
        "Data",
        "Neither framework loads, normalises or shuffles anything. Both receive the same bytes, "
        "made once in NumPy by the functions at the end of this page; each only moves them to its "
        "device, in its own layout.",
        (
            *same_names("inputs.py", SETTINGS, "Data", "Inputs", "Inputs.__init__"),
            *same_names(
                "inputs.py", "Inputs.images", "Inputs.labels", "Inputs.upload", "Inputs.batches"
            ),
            *same_names("inputs.py", "Inputs.download"),
            Pair(
                None,
                "inputs.py:Inputs._batches",
                "PyTorch does not compile this: it is two calls.",
            ),
            Pair("inputs.py:as_tensor", None, "JAX uses the bfloat16 of `ml_dtypes`."),
            Pair("inputs.py:as_array", None, "As above."),
            Pair("inputs.py:pixel_axes", None, "In Flax, the channels are last everywhere."),
            *same_names("backend.py", "Backend.upload", "Backend.batches", "Backend.download"),
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
        "Defaults differ more than programs do. This code sets precision, determinism and memory "
        "once, before any computation.",
        (
            *same_names("state.py", "State"),
            Pair(None, "state.py:settings", "PyTorch trains a module, not a tree of arrays."),
            *same_names("backend.py", "Backend", "Backend.__init__"),
            Pair(
                "user_module.py:empty_copy",
                None,
                "In Flax, `_model` does this, at the start of each step.",
            ),
            *same_names(
                "user_module.py",
                SETTINGS,
                "build",
                "build_module",
                "own_start",
                "exchanges",
                "exchanged",
                "own_loss",
                "trial",
                "validate_module",
                "check_outputs",
                "use_exact_sums",
                "exchange",
                "exact_layer",
            ),
            Pair(
                None, "user_module.py:module_classes", "PyTorch's backend keeps the module itself."
            ),
            Pair(None, "user_module.py:declared_names", "In PyTorch, `attach_names`."),
            Pair(
                None,
                "user_module.py:Network",
                "A PyTorch module is one object that changes its mode in place.",
            ),
            Pair(None, "user_module.py:split_module", "As above."),
            Pair(None, "user_module.py:Exchange", "PyTorch exchanges whole layers only."),
            Pair(
                None,
                "user_module.py:definition_order",
                "PyTorch keeps the order in which a module's layers were assigned.",
            ),
            Pair(None, "user_module.py:canonical_names", "PyTorch's are in `convert.py`."),
            Pair(None, "user_module.py:dropouts", "As above."),
            Pair(None, "user_module.py:kept", "A PyTorch module has its `state_dict`."),
            Pair(None, "user_module.py:changed_variables", "As above."),
            Pair(
                None,
                "user_module.py:raw_bits",
                "PyTorch's random numbers have one state, outside all modules.",
            ),
            Pair(None, "device.py:settings", "PyTorch allocates GPU memory as it needs it."),
            *same_names("device.py", "choose_device", "configure_determinism"),
            *same_names("backend.py", "Backend.describe"),
            *same_names("tuning.py", SETTINGS, "compiler_options", "limit_threads"),
            Pair("tuning.py:compiles", None, "JAX always compiles."),
            Pair("tuning.py:channels_last", None, "In Flax, the channels are last everywhere."),
            Pair(
                None, "tuning.py:xla_has_option", ("PyTorch's options depend on its version alone.")
            ),
            Pair(None, "tuning.py:free_programs", "PyTorch compiles far fewer programs."),
            Pair(None, "tuning.py:few_optimizations", "As above."),
            Pair(
                None,
                "tuning.py:has_library_convolution",
                ("PyTorch's loop does not have this problem."),
            ),
        ),
    ),
    Section(
        "model",
        "Model",
        "The same five layers under the same names. A PyTorch module holds its weights. A Flax "
        "module is only a description until `_model` puts weights into it, at the start of each "
        "step.",
        (
            *modules("models/net.py", "Net"),
            *same_names("layers.py", "convolution"),
            Pair(
                "kernels.py:Im2colConv2d",
                None,
                "`nnx.Conv` takes a function that convolves; PyTorch needs a layer.",
            ),
            Pair("kernels.py:Im2colConv2d.forward", None, "As above."),
            Pair("kernels.py:Im2colConv2d.supports", "kernels.py:supports"),
            *same_names("kernels.py", SETTINGS),
            *same_names("kernels.py", "im2col_conv"),
            Pair(
                None,
                "kernels.py:copied_patches",
                "In PyTorch, a part of `im2col_conv`.",
            ),
            Pair(
                None,
                "kernels.py:gathered_patches",
                "PyTorch has `unfold`.",
            ),
            *same_names("layers.py", "max_pooling"),
            Pair("kernels.py:Pool2x2", None, "PyTorch pools with a layer, Flax with a function."),
            Pair("kernels.py:Pool2x2.forward", "kernels.py:max_pool"),
            Pair(
                "kernels.py:Pool2x2.supports", None, "Flax uses `max_pool` only for 2 x 2 windows."
            ),
            Pair(
                None,
                "kernels.py:_max_pool",
                "Each half of the images is pooled by itself.",
            ),
            *same_names("kernels.py", "maximum_first"),
            Pair(
                "kernels.py:_MaximumFirst",
                None,
                "JAX differentiates `where`. Compiled PyTorch code is faster with a gradient "
                "written by hand.",
            ),
            Pair("kernels.py:_MaximumFirst.forward", None, "As above."),
            Pair("kernels.py:_MaximumFirst.setup_context", None, "As above."),
            Pair("kernels.py:_MaximumFirst.backward", None, "As above."),
        ),
    ),
    Section(
        "networks",
        "More networks",
        "Dense layers alone, batch norm and shortcuts, depthwise convolutions and layer norm, "
        "attention. Lists of layers are `nn.ModuleList` and `nnx.List`; a parameter that belongs "
        "to no layer is `nn.Parameter` and `nnx.Param`. Norms have the most defaults that differ: "
        "momentum, epsilon, and the kind of variance. Neither framework draws dropout masks.",
        (
            *modules("models/mlp.py", "MLP"),
            *modules("models/resnet20.py", "ResNet20", "Block"),
            *modules("models/convnext.py", "ConvNeXt", "Block", "Downsample"),
            Pair(
                "models/convnext.py:channels_last",
                None,
                "In Flax, the channels are last everywhere.",
            ),
            Pair("models/convnext.py:channels_first", None, "As above."),
            Pair("models/vit.py:" + SETTINGS, "models/vit.py:" + SETTINGS),
            *modules("models/vit.py", "ViT", "Block", "Attention"),
            *modules("layers.py", "Dropout"),
            Pair(None, "layers.py:Mask", "In PyTorch, a buffer; it has only one kind."),
            *same_names("backend.py", "Backend.masks", "Backend._masks", "Backend.dropout_layers"),
            Pair("convert.py:set_masks", None, "In Flax, masks are an argument of the step."),
            Pair("layers.py:BatchNorm2d", "layers.py:BatchNorm"),
            Pair("layers.py:BatchNorm2d.forward", "layers.py:BatchNorm.__call__"),
            Pair("layers.py:LayerNorm", "layers.py:LayerNorm"),
            Pair(None, "layers.py:LayerNorm.__init__", "In PyTorch, the library has it."),
            Pair("layers.py:LayerNorm.forward", "layers.py:LayerNorm.__call__"),
            Pair(None, "layers.py:in_float32", "Most of PyTorch's kernels already do this."),
            Pair(None, "layers.py:Linear", "In PyTorch, `nn.Linear`."),
            Pair(None, "layers.py:Linear.__call__", "As above: its kernels sum in float32."),
            Pair(None, "layers.py:Conv", "As above."),
            Pair(None, "layers.py:Conv.__call__", "As above."),
            Pair(None, "layers.py:promote_bias", "As above."),
            Pair(None, "layers.py:attention", "In PyTorch, the softmax is of its inputs' dtype."),
            *(
                Pair(None, f"layers.py:{name}", "In PyTorch, the library has it.")
                for cell in ("LSTMCell", "GRUCell")
                for name in (cell, f"{cell}.__init__", f"{cell}.initialize_carry")
            ),
            Pair(None, "layers.py:zero_carry", "As above."),
            Pair(None, "user_module.py:cast_constants", "In PyTorch, `Module.to`."),
        ),
        shared=("data/dropout.py:masks",),
    ),
    Section(
        "loss",
        "Loss and gradient norm",
        "Both are one library call, but the two calls return different things.",
        (
            *same_names("losses.py", SETTINGS, "cross_entropy", "global_norm", "upcast"),
            *same_names("losses.py", "of_pair", "cross_entropy_of_each", "mean_squared_error"),
            *same_names("losses.py", "binary_cross_entropy", "huber", "like"),
            *same_names("backend.py", "Backend._loss"),
        ),
    ),
    Section(
        "optimizer",
        "Optimizer",
        "`torch.optim.SGD` is one class with six options. optax builds the same from small "
        "transformations of the gradient, each with its own state; the order of the chain is the "
        "order of the formula.",
        (
            *same_names("optimizer.py", "make_optimizer"),
            Pair(
                None,
                "optimizer.py:clip_gradients",
                "In PyTorch, `clip_grads_with_norm_`, which `_step` calls before the optimizer.",
            ),
            Pair(
                None,
                "optimizer.py:upcast_gradients",
                "PyTorch's kernels already compute a bfloat16 update in float32, and round once "
                "at the end.",
            ),
            Pair(
                None,
                "optimizer.py:DampeningState",
                "PyTorch's optimizer knows it: is there a buffer yet?",
            ),
            Pair(
                None, "optimizer.py:dampen", "In PyTorch, an option of SGD; optax has no dampening."
            ),
            Pair("optimizer.py:parameter_groups", "adaptive.py:decayed"),
        ),
    ),
    Section(
        "adaptive",
        "Other optimizers",
        "The conventions differ in small print: where epsilon stands, what bias correction divides, "
        "whether the learning rate enters a buffer. Each difference is settled on the Flax side.",
        (
            *same_names("adaptive.py", SETTINGS, "make_optimizer"),
            Pair(
                None,
                "adaptive.py:scale_by_rss",
                "Adagrad: optax has epsilon inside the root, PyTorch outside.",
            ),
            Pair(
                None,
                "adaptive.py:scale_by_amsgrad",
                "optax corrects the second moments before it takes the largest, PyTorch after.",
            ),
            Pair(
                None,
                "adaptive.py:keep_precision",
                "PyTorch's state has the precision of the parameters.",
            ),
            Pair("adaptive.py:Lion", None, "optax has one."),
            Pair("adaptive.py:Lion.__init__", None, "As above."),
            Pair("adaptive.py:Lion.step", None, "As above."),
            Pair("adaptive.py:lion", None, "As above."),
            Pair(
                "adaptive.py:functional_update",
                None,
                "An optax optimizer is functions already.",
            ),
        ),
    ),
    Section(
        "schedule",
        "Learning-rate schedule",
        "A PyTorch scheduler is an object with a `step` method, which writes `lr` into the "
        "optimizer. An optax schedule is a function of the number of steps so far, called inside "
        "the compiled update.",
        (
            *same_names("optimizer.py", "make_schedule"),
            Pair(
                "optimizer.py:Scheduler",
                None,
                "Flax needs no such object: the optimizer's state holds everything that changes "
                "during a run.",
            ),
            Pair("optimizer.py:Scheduler.__init__", None, "As above."),
            Pair("optimizer.py:Scheduler.lr", "optimizer.py:learning_rate"),
            Pair("optimizer.py:Scheduler.step", "optimizer.py:reduce_on_plateau"),
        ),
    ),
    Section(
        "step",
        "One training step",
        "The most important code on this page. PyTorch changes objects, statement by statement. "
        "JAX takes a state and returns the next one: nothing changes in place, so the step must "
        "return everything.",
        (
            *same_names("backend.py", "Backend._step"),
            *same_names("backend.py", "Backend._forward"),
            *same_names("convert.py", "cast_to_compute"),
            Pair(
                None,
                "backend.py:Backend._model",
                "A PyTorch module can be called as it is.",
            ),
            *same_names("backend.py", "Backend.train_step", "Backend._on_device"),
        ),
    ),
    Section(
        "fused",
        "Many steps in one call",
        "JAX compiles the loop over the steps into one program, with `lax.scan`. With "
        "`torch.compile`, PyTorch does so, too, with its own `scan`; without it, PyTorch runs a "
        "Python loop.",
        (
            *same_names("backend.py", "Backend.train_steps"),
            *same_names(
                "compiled.py", SETTINGS, "ManySteps", "ManySteps.__init__", "ManySteps.__call__"
            ),
            *same_names("compiled.py", "ManySteps._one_by_one", "ManySteps._scan"),
            Pair(
                "compiled.py:ManySteps._compiled_scan",
                None,
                "JAX compiles in `__init__`; importing PyTorch's compiler takes a second.",
            ),
            Pair(
                "compiled.py:ManySteps._as_one_program",
                None,
                "In Flax the state is a value already.",
            ),
            Pair(
                "compiled.py:ManySteps._functional_step",
                None,
                "Flax's `_step` already maps arrays to arrays.",
            ),
            Pair("compiled.py:ManySteps._gradients", None, "As above."),
            Pair("compiled.py:ManySteps._update", None, "As above."),
            Pair(
                None,
                "compiled.py:ManySteps.scan_is_faster",
                "PyTorch's convolutions are as fast inside a compiled loop as outside.",
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
        "Predictions and the mean loss over all test images, in batches that fit into memory.",
        (
            *same_names("backend.py", "Backend.evaluate", "Backend._predictions"),
            Pair(
                None,
                "backend.py:Backend._evaluate",
                "PyTorch evaluates eagerly; JAX compiles this function.",
            ),
        ),
    ),
    Section(
        "probe",
        "Looking inside a step",
        "The tensors that the next step would compute, without taking the step. This is how "
        "Lockstep finds where two runs diverge.",
        (
            *same_names("backend.py", "Backend.probe"),
            Pair(
                "backend.py:Backend._gradients",
                None,
                "In JAX, `jax.value_and_grad` gives all of them by name.",
            ),
            Pair(
                None,
                "backend.py:Backend._to_numpy",
                "Several processes gather the batch here; PyTorch's gather the whole probe.",
            ),
            Pair(
                None,
                "backend.py:Backend._probe",
                "PyTorch computes eagerly, so `probe` can read everything; JAX compiles this "
                "function.",
            ),
            *same_names("activations.py", "record_activations"),
            Pair(
                "activations.py:has_known_axes",
                None,
                "In Flax, the last axis is that of the channels.",
            ),
            *(
                Pair(None, f"activations.py:RecordedLayer{method}", "PyTorch has hooks.")
                for method in ("", ".__init__", ".__call__", ".__getattr__")
            ),
            *same_names("activations.py", SETTINGS),
            Pair(
                None,
                "activations.py:has_parameters",
                "PyTorch asks `layer.parameters(recurse=False)`.",
            ),
            Pair(
                None,
                "activations.py:set_attribute",
                "PyTorch has hooks; in Flax each layer is replaced, and restored afterwards.",
            ),
        ),
    ),
    Section(
        "conversion",
        "Conversion: layouts, in and out",
        "Files and reports use Flax's layout, so Flax's conversion is a copy. PyTorch's "
        "conversion transposes kernels, and reorders the rows of the dense kernel after the "
        "flatten.",
        (
            *same_names(
                "backend.py",
                "Backend.shapes",
                "Backend.native_names",
                "Backend.layer_kinds",
                "Backend.module_classes",
                "Backend.init",
                "Backend.export",
            ),
            *same_names(
                "convert.py",
                "to_canonical",
                "from_canonical",
                "canonical_names",
                "activations_to_canonical",
                "outputs_to_canonical",
                "exchanged",
            ),
            Pair("convert.py:" + SETTINGS, None, "The canonical roles and layouts are Flax's."),
            Pair("convert.py:flax_role", None, "As above."),
            Pair("convert.py:attach_names", None, "From a user's pair, Flax needs only the names."),
            Pair(
                "convert.py:statistics",
                None,
                "In Flax, `nnx.BatchStat` is a separate kind of variable.",
            ),
            Pair(
                "convert.py:dropout_modules",
                None,
                "In Flax, `split_module` finds them.",
            ),
            Pair("convert.py:dropout_layers", None, "As above."),
            Pair("convert.py:masks_from_canonical", None, "In Flax, `from_canonical`."),
            Pair(
                "convert.py:kernel_to_canonical",
                None,
                "Flax's kernels already have the canonical layout.",
            ),
            Pair("convert.py:kernel_from_canonical", None, "As above."),
            Pair(
                "convert.py:attention",
                None,
                "As above: a packed matrix is three kernels in Flax.",
            ),
            Pair("convert.py:transposed_convolution", None, "As above."),
            Pair("convert.py:recurrent", None, "As above."),
            Pair(
                "convert.py:attach_converts",
                None,
                "Tensors of a user's Flax module already have the canonical layout.",
            ),
            Pair(
                "convert.py:converts",
                None,
                "Tensors of a user's Flax module already have the canonical layout.",
            ),
            Pair(
                "convert.py:is_converted",
                None,
                "Tensors of a user's Flax module already have the canonical layout.",
            ),
            Pair(
                "convert.py:moved_layers",
                None,
                "Tensors of a user's Flax module already have the canonical layout.",
            ),
            Pair(
                "convert.py:activation_to_canonical",
                None,
                "Flax's activations already have the canonical layout.",
            ),
            Pair("convert.py:has_channels_first", None, "As above."),
            Pair(
                "convert.py:channels_axis",
                None,
                "In Flax, the channels of a user's own norms are last.",
            ),
            Pair("convert.py:layer_kinds", "user_module.py:layer_kinds"),
            Pair("convert.py:is_own_norm", "activations.py:is_own_norm"),
            Pair(
                "convert.py:flattened",
                None,
                "As above: its flatten keeps the canonical order.",
            ),
            Pair(
                None,
                "convert.py:flatten",
                "PyTorch's `named_parameters` are flat, with dotted names.",
            ),
            Pair(None, "convert.py:nest", "As above."),
            *same_names("convert.py", "to_numpy"),
            Pair("convert.py:to_tensor", "convert.py:to_array"),
            *same_names(
                "optimizer.py",
                SETTINGS,
                "export_schedule",
                "restore_schedule",
                "export_slots",
                "export_extra",
                "restore_slots",
            ),
        ),
        shared=("model/initial_weights.py:initial_weights",),
    ),
    Section(
        "files",
        "Files: weights in and out",
        "PyTorch uses a state dict, Flax an Orbax checkpoint. Functions that both share check the "
        "header of a file before its numbers are read, and the numbers before they are used. Both "
        "formats become the same canonical arrays.",
        (
            *same_names(
                "weight_files.py", SETTINGS, "read_weights", "write_weights", "read_headers"
            ),
            Pair(
                "weight_files.py:is_allowed_global",
                None,
                "A checkpoint has no pickle, which could create any object.",
            ),
            Pair(
                None,
                "weight_files.py:find_checkpoint",
                "A state dict is one file, a checkpoint is a folder.",
            ),
            Pair(
                None,
                "weight_files.py:open_arrays",
                "`torch.load` can return tensors without their numbers.",
            ),
            Pair(
                "weight_files.py:from_native",
                None,
                "An `nnx` state has the canonical names and layout.",
            ),
            Pair("weight_files.py:to_native", None, "In Flax, `convert.nest` alone."),
            Pair("weight_files.py:native_shapes", None, "In Flax, the canonical shapes."),
            Pair(
                "weight_files.py:without_buffers",
                None,
                "An `nnx` state holds only the requested variables.",
            ),
            Pair("weight_files.py:buffers_of", None, "As above."),
            Pair("weight_files.py:empty_model", "weight_files.py:canonical_names"),
        ),
        shared=(
            "model/weight_files.py:check_size",
            "model/weight_files.py:check_headers",
            "model/weight_files.py:check_numbers",
        ),
    ),
)


def read_shared(root: Path, sections: Sequence[Section] = SECTIONS) -> dict[str, Definition]:
    """The definitions of `common` that serve both sides, by `file:name`.

    Raises:
        SourceError: if one is missing.
    """
    names = [name for section in sections for name in section.shared]
    files = dict.fromkeys(name.partition(":")[0] for name in names)
    found = {
        f"{f}:{key}": value for f in files for key, value in read_file(root, f"common/{f}").items()
    }
    for name in names:
        if name not in found:
            raise SourceError(f"common has no {name} any more: change common/learn/outline.py")
    return {name: found[name] for name in names}


def check(
    backends: dict[str, dict[str, Definition]], sections: Sequence[Section] = SECTIONS
) -> None:
    """Check that each definition of each side is in exactly one section, and that each pair has two
    sides.

    Raises:
        SourceError: naming the first definition for which that does not hold.
    """
    for name, side, other in sides(sections):
        if name not in backends[side]:
            where = f"{other} only" if name in backends[other] else "neither side"
            raise SourceError(
                f"{name} is in {where}: give it a partner, or declare it one-sided in outline.py"
            )
    for section in sections:
        for pair in section.pairs:
            for name, other in ((pair.torch, "flax"), (pair.flax, "torch")):
                if name and None in (pair.torch, pair.flax) and name in backends[other]:
                    raise SourceError(
                        f"{name} is declared one-sided, and {other} has it: pair them in outline.py"
                    )
    for side in FOLDERS:
        listed = [name for name, listed_side, _ in sides(sections) if listed_side == side]
        for name in backends[side]:
            if listed.count(name) != 1:
                times = "in no section" if name not in listed else "in more than one section"
                raise SourceError(f"{name} of {side} is {times}: change common/learn/outline.py")


def sides(sections: Sequence[Section]) -> Iterator[tuple[str, str, str]]:
    """Each definition of the sections, its side, and the other side."""
    for section in sections:
        for pair in section.pairs:
            if pair.torch:
                yield pair.torch, "torch", "flax"
            if pair.flax:
                yield pair.flax, "flax", "torch"
