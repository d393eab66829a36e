"""`run`: train in both frameworks and compare the two runs."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.common import session
from lockstep.common.cli import parser as options_of
from lockstep.common.cli.output import print_json
from lockstep.common.cli.parser import Invocation, Parser
from lockstep.common.config import (
    AUGMENTATIONS,
    BACKENDS,
    BATCH_NORMS,
    INITS,
    SCHEDULES,
    Config,
    Schedule,
)
from lockstep.common.errors import ConfigError, DataError
from lockstep.common.model import pair as pairs
from lockstep.common.optimizers import FROM_PAIR, OPTIMIZERS, flag, option_names
from lockstep.common.recipes import RECIPES
from lockstep.common.request import Request

if TYPE_CHECKING:
    from lockstep.common.runs.launched import Launched

# Seconds in which a signal may come again, from one of several processes.
SAME_SIGNAL = 3.0
# The options that may change when a run is resumed.
CHANGEABLE = (
    "resume", "run", "backend", "data", "data_dir", "device", "compile", "cluster", "processes",
    "log_every", "tensorboard", "checkpoint_every", "keep_going", "quiet", "verbose", "json",
    "command",
)  # fmt: skip


def add_arguments(parser: Parser) -> None:
    add_run_options(parser)
    group = parser.add_argument_group("resume")
    group.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="resume the run in this folder; with the other --backend, from where the first one "
        "stopped",
    )
    group.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="N",
        help="steps between checkpoints; 0: only where a run is stopped (default: 1000 in runs of "
        "5000 or more)",
    )


def add_run_options(parser: Parser) -> None:
    """The options that `run` and `locate` share."""
    options_of.add_backend(parser, "which to train (default: both)")
    recipes = "; ".join(f"{name}: {recipe.summary}" for name, recipe in RECIPES.items())
    parser.add_argument(
        "--recipe",
        type=options_of.one_of(RECIPES),
        metavar="NAME",
        help=f"{recipes} (default: --model's, or quick)",
    )
    options_of.add_data(parser)

    add_training_options(parser)
    group = parser.add_argument_group("the comparison")
    options_of.add_dtype(group, "one precision only (default: the recipe's)")
    options_of.add_twins(group)
    options_of.add_processes(options_of.add_device(parser))
    options_of.add_cluster(parser)
    options_of.add_output(
        parser, "folder of the run (default: results/runs/<recipe>-<fingerprint>)"
    )
    group.add_argument(
        "--keep-going",
        action="store_true",
        help="train all runs, even if float64 differs in the first steps",
    )
    group = parser.add_argument_group("log")
    group.add_argument(
        "--log-every", type=int, default=2000, metavar="N", help="steps between log lines; 0: none"
    )
    group.add_argument(
        "--tensorboard",
        type=Path,
        metavar="DIR",
        help="write losses, gaps and images for TensorBoard, too",
    )


def add_training_options(parser: Parser) -> None:
    """The options of training, which override the recipe."""
    group = parser.add_argument_group("the run (each option overrides the recipe)")
    options_of.add_model(group)
    group.add_argument("--epochs", type=int, metavar="N", help="passes over the training images")
    options_of.add_steps(group, "stop after N optimizer steps")
    options_of.add_batch_size(group)
    options_of.add_switch(group, "--drop-last", "leave out an epoch's last batch if it is smaller")
    add_optimizer_options(group)
    group.add_argument(
        "--clip-norm", type=float, metavar="X", help="largest norm of all gradients together"
    )
    group.add_argument(
        "--label-smoothing",
        type=float,
        metavar="X",
        help="share of each label that is spread over all classes",
    )
    options_of.add_switch(
        group, "--exact-sums", "exchange layers of a pair of yours for some that sum more exactly"
    )
    options_of.add_choice(
        group,
        "--batch-norm",
        BATCH_NORMS,
        "with --processes: statistics of the whole batch (the default), or of each process's images",
    )
    group.add_argument(
        "--schedule",
        metavar="KIND[:OPTION=VALUE,...]",
        help="; ".join(
            f"{kind} ({', '.join(names)})" if names else kind for kind, names in SCHEDULES.items()
        ),
    )
    options_of.add_choice(
        group,
        "--augment",
        AUGMENTATIONS,
        "training images: padded by 4 black pixels, cropped and flipped at random",
    )
    options_of.add_seed(group)
    options_of.add_choice(
        group,
        "--init",
        INITS,
        "whose initial weights both start from (default: your PyTorch module's; numpy: drawn by "
        "Lockstep, as for its own networks)",
    )
    group.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help="start from these: a PyTorch state dict (.pt, .pth), safetensors, or the folder of "
        "an Orbax checkpoint",
    )


def add_optimizer_options(group: argparse._ActionsContainer) -> None:
    """Those of `torch.optim`, by its names."""
    options_of.add_choice(
        group,
        "--optimizer",
        (*OPTIMIZERS, FROM_PAIR),
        "; ".join(f"{name} ({', '.join(map(flag, taken))})" for name, taken in OPTIMIZERS.items())
        + "; pair (the optimizer of your own pair, the default if it has one); one other than the "
        "recipe's takes none of its options",
    )
    for option, text in {
        "--lr": "learning rate",
        "--momentum": "factor of the momentum buffer",
        "--dampening": "share of the gradient kept out of the buffer",
        "--weight-decay": "L2 penalty; of adamw and lion, decay of the weights themselves",
        "--eps": "epsilon, added to the root of the second moment",
        "--alpha": "factor of rmsprop's second moment",
        "--lr-decay": "of adagrad, for each step done",
        "--initial-accumulator-value": "of adagrad: where the sum of squares starts",
    }.items():
        group.add_argument(option, type=float, metavar="X", help=text)
    group.add_argument(
        "--betas", type=float, nargs=2, metavar="X", help="factors of the first and second moment"
    )
    options_of.add_switch(group, "--nesterov", "Nesterov momentum")
    options_of.add_switch(group, "--centered", "rmsprop by the variance of the gradient")
    options_of.add_switch(group, "--amsgrad", "adam by the largest second moment so far")
    options_of.add_switch(group, "--maximize", "climb instead of descending")
    options_of.add_switch(
        group, "--decay-biases-and-norms", "weight decay of biases and norms, too (the default)"
    )


def execute(options: argparse.Namespace, invocation: Invocation) -> int:
    launched = None
    if options.processes is None and "RANK" in os.environ:
        from lockstep.common.runs.launched import Launched  # slow, and not for --help

        launched = Launched.read()
    if launched is not None:
        return execute_launched(launched, options, invocation)
    return carry_out(any_request(options, invocation), options, invocation)


def any_request(options: argparse.Namespace, invocation: Invocation) -> Request:
    if options.resume is not None:
        return resume_request(options, options.resume, invocation.arguments)
    return new_request(options, invocation.arguments)


def execute_launched(
    launched: Launched, options: argparse.Namespace, invocation: Invocation
) -> int:
    """Lead the processes that torchrun has started, or be one of them.

    Raises:
        LockstepError: if the processes cannot work together.
    """
    from lockstep.common.runs import launched as launching

    if options.backend in (None, "both"):
        raise ConfigError(
            "torchrun trains one framework at a time: --backend torch, then --backend flax"
        )
    folder: Path | None = options.resume or options.out
    if folder is None:
        raise ConfigError("under torchrun, name the folder of the run: --out DIR")
    if launched.number > 0:
        launching.serve_rank(launched, options.backend, invocation.arguments)
    leader = launching.Leader(launched, options.backend, invocation.arguments)
    if launched.restarts and options.resume is None and (folder / "run.json").exists():
        given = options_of.command_parser(options.command).parse_args([])
        for name in {*CHANGEABLE} & {*vars(given), "command"}:
            setattr(given, name, getattr(options, name))
        given.resume, options = folder, given
    request = dataclasses.replace(
        any_request(options, invocation), processes=launched.count, start_ranks=leader
    )
    # torchrun passes on each signal, and ends us all soon after the first.
    invocation.signals.patience = launching.JOIN
    return carry_out(request, options, invocation)


def carry_out(request: Request, options: argparse.Namespace, invocation: Invocation) -> int:
    """Compare, print what `--json` asks for, and return the exit status."""
    from lockstep.common.report import Terminal
    from lockstep.common.runs.trainer import resume_hint

    if request.processes > 1 and not invocation.signals.patience:
        invocation.signals.patience = SAME_SIGNAL
    terminal = Terminal(quiet=options.quiet, to_stderr=options.json, verbose=options.verbose)
    result = session.compare(request, invocation.backends, terminal, invocation.signals)
    if options.json:
        print_json(result.report, invocation.stdout)
    if result.interrupted_at is not None:
        print(f"interrupted: {resume_hint(result.folder)}", file=sys.stderr)
        return invocation.signals.status()
    return 1 if result.verdict in ("disagree", "diverged") else 0


def new_request(options: argparse.Namespace, arguments: Sequence[str] = ()) -> Request:
    """The recipe, with what the options override.

    Raises:
        ConfigError: if the options describe no run.
    """
    name = options.recipe or (options.model if options.model in RECIPES else "quick")
    recipe = RECIPES[name]
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(Config)
        if getattr(options, field.name, None) is not None and field.name != "weights"
    }  # the weights are not read yet
    if options.betas is not None:
        given["betas"] = tuple(options.betas)
    if options.model is not None:
        given["pair"] = pairs.source_digest(options.model)
        if options.optimizer is None and pairs.has_optimizer(options.model):
            given["optimizer"] = FROM_PAIR
    if given.get("optimizer", recipe.config.optimizer) != recipe.config.optimizer:
        # A recipe's options are of its own optimizer.
        own = ("lr", "weight_decay", *option_names())
        defaults = {name: getattr(Config, name) for name in own}
        given = defaults | given
    if options.exact_sums and given.get("pair") is None:
        raise ConfigError(
            "--exact-sums exchanges layers of a pair of your own: name one with --model"
        )
    if options.schedule is not None:
        given["schedule"] = Schedule.parse(options.schedule)
    if options.epochs is not None and options.steps is not None:
        raise ConfigError("--epochs and --steps both say how long the run is: give one of them")
    if options.epochs is not None:
        given["steps"] = None  # --epochs alone overrides a recipe's number of steps
    return Request(
        config=dataclasses.replace(recipe.config, **given),
        dtypes=recipe.dtypes if options.dtype is None else (options.dtype,),
        twins=recipe.twins if options.twins is None else options.twins,
        backends=chosen_backends(options.backend),
        recipe=name,
        data=options.data,
        data_dir=options.data_dir,
        device=options.device,
        compile=options.compile,
        cluster=options.cluster,
        processes=1 if options.processes is None else options.processes,
        weights=options.weights,
        out=options.out,
        log_every=options.log_every,
        checkpoint_every=getattr(options, "checkpoint_every", None),
        tensorboard=options.tensorboard,
        keep_going=options.keep_going,
        command=tuple(arguments),
    )


def resume_request(options: argparse.Namespace, folder: Path, arguments: Sequence[str]) -> Request:
    """The request that the run in `folder` was started with.

    Raises:
        ConfigError: for an option that cannot change when a run is resumed.
        RecordError: if there is no such run.
        DataError: if the user's pair of networks has changed since.
    """
    from lockstep.common.runs import request as requests

    default = vars(options_of.command_parser(options.command).parse_args([]))
    given = [
        name
        for name, value in vars(options).items()
        if name != "command" and value != default[name]
    ]
    for name in given:
        if name not in CHANGEABLE:
            raise ConfigError(
                f"--{name.replace('_', '-')} cannot change when a run is resumed: it continues as "
                "it was started, in its own folder"
            )
    started = requests.read(folder)
    kept = {
        name: getattr(options if name in given else started, name)
        for name in ("backend", "data", "device", "compile", "processes", "checkpoint_every")
        if hasattr(options, name)
    }
    recipe = started.to_recipe()
    model = started.config["model"]
    if started.config.get("pair") != pairs.source_digest(model):
        raise DataError(
            f"{model} has changed since {folder} was started: restore it, or start the run again"
        )
    return Request(
        config=recipe.config,
        dtypes=recipe.dtypes,
        twins=recipe.twins,
        backends=chosen_backends(kept.pop("backend")),
        recipe=started.recipe,
        data_dir=options.data_dir,
        weights=None if started.weights is None else Path(started.weights),
        resume=folder,
        resumed=started,
        cluster=options.cluster,
        log_every=options.log_every,
        tensorboard=options.tensorboard,
        keep_going=options.keep_going,
        command=tuple(arguments),
        **kept,
    )


def chosen_backends(option: str | None) -> tuple[str, ...]:
    return BACKENDS if option in (None, "both") else (str(option),)
