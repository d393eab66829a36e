"""The optimizers by the names of `torch.optim`: their options, the state they keep, and which
tensors decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from lockstep.common.errors import ConfigError, did_you_mean

# Which options each takes; lr, weight_decay and maximize are of all.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adam": ("betas", "eps", "amsgrad"),
    "adamw": ("betas", "eps", "amsgrad"),
    "rmsprop": ("alpha", "eps", "centered", "momentum"),
    "adagrad": ("eps", "lr_decay", "initial_accumulator_value"),
    "lion": ("betas",),
}
# The name of the optimizer that a user's pair defines. Its only option is lr.
FROM_PAIR = "pair"
# What stands for None: the defaults of torch.optim; of Lion, those of its paper.
DEFAULTS: dict[str, dict[str, float | tuple[float, float]]] = {
    "sgd": {},
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8},
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8},
    "rmsprop": {"alpha": 0.99, "eps": 1e-8},
    "adagrad": {"eps": 1e-10},
    "lion": {"betas": (0.9, 0.99)},
}
# What optimizers keep of each parameter, in the order of computation; by these names in files and
# reports.
SLOTS = (
    "first moment",
    "second moment",
    "largest second moment",
    "sum of squares",
    "momentum",
)
OF_ALL = (
    "weight_decay",
    "decay_biases_and_norms",
    "maximize",
)  # options of all optimizers but FROM_PAIR
NUMBERS = (
    "lr", "momentum", "dampening", "weight_decay", "eps", "lr_decay", "initial_accumulator_value",
)  # fmt: skip
NOT_DECAYED = ("bias", "scale")  # the last part of a tensor's canonical name


class Options(Protocol):
    """A `Config`, as far as its optimizer goes."""

    @property
    def optimizer(self) -> str: ...
    @property
    def momentum(self) -> float: ...
    @property
    def dampening(self) -> float: ...
    @property
    def nesterov(self) -> bool: ...
    @property
    def betas(self) -> tuple[float, float] | None: ...
    @property
    def eps(self) -> float | None: ...
    @property
    def alpha(self) -> float | None: ...
    @property
    def centered(self) -> bool: ...
    @property
    def amsgrad(self) -> bool: ...
    @property
    def lr_decay(self) -> float: ...
    @property
    def initial_accumulator_value(self) -> float: ...


def check(options: Options, defaults: Mapping[str, object], largest: float) -> None:
    """Raise ConfigError for an optimizer that does not exist, an option that it does not take, or a
    value that an option cannot have.

    Args:
        defaults: of all options of all optimizers.
        largest: number that an option may be.
    """
    name = options.optimizer
    if name != FROM_PAIR and name not in OPTIMIZERS:
        raise ConfigError(
            f"unknown optimizer {name!r}: {did_you_mean(name, (*OPTIMIZERS, FROM_PAIR))}"
        )
    known = option_names() if name != FROM_PAIR else (*option_names(), *OF_ALL)
    for option in known:
        taken = OPTIMIZERS.get(name, ())
        if option not in taken and getattr(options, option) != defaults[option]:
            raise ConfigError(
                f"the optimizer of the pair takes no {flag(option)}: set it in the pair, or choose "
                "another --optimizer"
                if name == FROM_PAIR
                else f"{name} takes no {flag(option)}: its options are {', '.join(map(flag, taken))}"
            )
    for option in NUMBERS:
        value, least = getattr(options, option), -largest if option == "dampening" else 0
        if value is not None and not least <= value <= largest:
            raise ConfigError(f"{flag(option)} must be a number between {least:g} and {largest:g}")
    if options.betas is not None and len(options.betas) != 2:
        raise ConfigError("--betas are two numbers")
    for option, values in (("betas", options.betas or ()), ("alpha", (options.alpha or 0.0,))):
        if not all(0 <= value < 1 for value in values):
            raise ConfigError(f"{flag(option)} must be 0 or more, below 1")
    if options.nesterov and (options.momentum == 0 or options.dampening != 0):
        raise ConfigError(
            "--nesterov needs --momentum above 0 and --dampening 0, as torch.optim.SGD does"
        )


def option_names() -> tuple[str, ...]:
    """The options that not all optimizers take."""
    return tuple(dict.fromkeys(option for taken in OPTIMIZERS.values() for option in taken))


def flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def missing_options(options: Options) -> dict[str, Any]:
    """The values of the options that were left out."""
    defaults = DEFAULTS.get(options.optimizer, {})
    return {name: value for name, value in defaults.items() if getattr(options, name) is None}


def slots(options: Options) -> tuple[str, ...]:
    """What the optimizer keeps of each parameter, from the first step on; not of FROM_PAIR."""
    match options.optimizer:
        case "sgd":
            kept = {"momentum": options.momentum != 0}
        case "rmsprop":
            kept = {
                "first moment": options.centered,
                "second moment": True,
                "momentum": options.momentum != 0,
            }
        case "adagrad":
            kept = {"sum of squares": True}
        case "lion":
            kept = {"first moment": True}
        case _:
            kept = {
                "first moment": True,
                "second moment": True,
                "largest second moment": options.amsgrad,
            }
    return tuple(slot for slot, is_kept in kept.items() if is_kept)


def is_bias_or_norm(name: str, dimensions: int) -> bool:
    """Whether a parameter is a bias or belongs to a norm, by its canonical name; other tensors of
    one dimension, such as a layer's scale, count as such."""
    return dimensions < 2 or name.rpartition(".")[2] in NOT_DECAYED
