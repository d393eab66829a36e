"""The configuration of a run: `Schedule` and `Config`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from lockstep.common import optimizers
from lockstep.common.errors import ConfigError, did_you_mean, nearest

BACKENDS = ("torch", "flax")
FRAMEWORKS = {"torch": "PyTorch", "flax": "Flax"}  # by backend, as a user knows them
MAX_COUNT = 2**31 - 1  # optax counts steps in int32
MAX_NUMBER = 1e30  # so that no option overflows in float32
DTYPES = ("float64", "float32", "bfloat16", "mixed_bfloat16")  # the last one by Keras' name
# Lockstep's networks, and where they are in the folder of either backend.
MODELS = {
    "net": "net:Net",
    "mlp": "mlp:MLP",
    "resnet20": "resnet20:ResNet20",
    "convnext": "convnext:ConvNeXt",
    "vit": "vit:ViT",
}
FORMATS = ("torch", "safetensors", "orbax")  # of weights for use elsewhere
AUGMENTATIONS = ("crop-flip",)
# Whose initial weights: those of a module of the user's, or drawn with NumPy from the seed.
INITS = (*BACKENDS, "numpy")
# How batch norms of a run in several processes take their statistics.
BATCH_NORMS = ("global", "local")
# Omitted from a configuration's JSON if they have their default: older runs, which did not have
# them, keep their fingerprints.
OMIT_IF_DEFAULT = (
    "weights", "pair", "init", "clip_norm", "label_smoothing", "augment", "optimizer", "betas",
    "eps", "alpha", "centered", "amsgrad", "lr_decay", "initial_accumulator_value",
    "decay_biases_and_norms", "exact_sums", "batch_norm",
)  # fmt: skip

# Which options each schedule takes. All counts are in optimizer steps, except those of `patience`
# and `cooldown`, which are in windows.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": (),
    "step": ("period", "gamma"),
    "multistep": ("milestones", "gamma"),
    "exponential": ("gamma",),
    "cosine": ("period", "min_lr"),
    "warmup-cosine": ("warmup", "start", "period", "min_lr"),
    "plateau": ("window", "patience", "gamma", "threshold", "cooldown", "min_lr"),
}


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


Option = int | float | tuple[int, ...] | None  # the value of a schedule's option


@dataclass(frozen=True)
class Schedule:
    """How the learning rate changes from step to step; None stands for a value that `resolve`
    derives from the run.

    The names are those of `torch.optim.lr_scheduler`, the unit of time is one optimizer step.
    """

    kind: str = "constant"  # one of SCHEDULES
    # Steps between two decays (step), or until `min_lr` is reached (cosine, after a warm-up).
    period: int | None = None
    milestones: tuple[int, ...] | None = None  # steps at which to decay
    gamma: float | None = None  # factor of one decay; exponential: of one step
    window: int | None = None  # plateau: steps whose mean training loss is one observation
    patience: int | None = None  # plateau: windows without improvement that are tolerated
    threshold: float | None = None  # plateau: relative improvement that counts as one
    cooldown: int | None = None  # plateau: windows after a decay that are not counted
    min_lr: float | None = None  # the floor of the learning rate; of a warm-up, where it ends
    warmup: int | None = None  # warmup-cosine: steps in which the learning rate rises in a line
    start: float | None = None  # warmup-cosine: the first learning rate, as a share of `lr`

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ConfigError(
                f"unknown schedule {self.kind!r}: {did_you_mean(self.kind, SCHEDULES)}"
            )
        for field, value in self.options().items():
            if value is not None and field not in SCHEDULES[self.kind]:
                known = ", ".join(SCHEDULES[self.kind]) or "none"
                raise ConfigError(
                    f"schedule {self.kind!r} has no option {field!r}; its options: {known}"
                )
        for field in ("period", "window", "warmup"):
            value = getattr(self, field)
            _check(
                value is None or 1 <= value <= MAX_COUNT,
                f"schedule: {field} must be 1 or more, at most {MAX_COUNT}",
            )
        for field in ("patience", "cooldown", "min_lr"):
            value = getattr(self, field)
            _check(
                value is None or 0 <= value < MAX_COUNT,
                f"schedule: {field} must be 0 or more, below {MAX_COUNT}",
            )
        _check(
            self.threshold is None or 0 < self.threshold < 1,
            "schedule: threshold must lie between 0 and 1",
        )
        for field in ("gamma", "start"):
            value = getattr(self, field)
            _check(
                value is None or 0 < value <= 1, f"schedule: {field} must be above 0 and at most 1"
            )
        _check(
            self.kind != "plateau" or self.gamma is None or self.gamma < 1,
            "schedule: plateau needs gamma below 1",
        )
        milestones = self.milestones
        if milestones is not None:
            rising = bool(milestones) and list(milestones) == sorted(set(milestones))
            within = rising and milestones[0] >= 1 and milestones[-1] <= MAX_COUNT
            _check(
                within,
                f"schedule: milestones must rise from 1 to at most {MAX_COUNT}, as in 100+200",
            )

    def options(self) -> dict[str, Option]:
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "kind"
        }

    def resolve(self, steps: int) -> Schedule:
        """Fill in what was left out, for a run of `steps` steps."""
        warmup = max(1, steps // 20) if self.warmup is None else self.warmup
        defaults: dict[str, dict[str, Option]] = {
            "constant": {},
            "step": {"period": max(1, steps // 3), "gamma": 0.1},
            "multistep": {"milestones": (max(1, steps // 2), max(2, 3 * steps // 4)), "gamma": 0.1},
            "exponential": {"gamma": 0.1 ** (1 / max(1, steps))},
            "cosine": {"period": max(1, steps), "min_lr": 0.0},
            "warmup-cosine": {
                "warmup": warmup,
                "start": 0.01,
                "period": max(1, steps - warmup),
                "min_lr": 0.0,
            },
            "plateau": {
                "window": max(1, steps // 50),
                "patience": 5,
                "gamma": 0.1,
                "threshold": 1e-4,
                "cooldown": 0,
                "min_lr": 0.0,
            },
        }
        missing = {
            name: value
            for name, value in defaults[self.kind].items()
            if getattr(self, name) is None
        }
        return _replace(self, missing)

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read `kind` or `kind:option=value,option=value`; milestones are joined by `+`.

        Raises:
            ConfigError: for anything else.
        """
        kind, _, rest = text.partition(":")
        options: dict[str, Option] = {}
        for item in filter(None, rest.split(",")):
            name, equals, value = item.partition("=")
            if not equals or name not in {field.name for field in dataclasses.fields(cls)} - {
                "kind"
            }:
                if kind not in SCHEDULES:
                    return cls(kind)  # which says so
                known, proposal = SCHEDULES[kind], nearest(name, SCHEDULES[kind])
                hint = f"did you mean {proposal}? " if proposal else ""
                wrong = f"schedule {kind!r} has no option {name!r}"
                if not equals:
                    wrong = f"schedule option {item!r} is not NAME=VALUE"
                raise ConfigError(f"{wrong}; {hint}its options: {', '.join(known) or 'none'}")
            try:
                if name == "milestones":
                    options[name] = tuple(int(step) for step in value.split("+"))
                elif name in ("period", "window", "patience", "cooldown", "warmup"):
                    options[name] = int(value)
                else:
                    options[name] = float(value)
            except ValueError:
                raise ConfigError(f"schedule option {item!r}: {value!r} is not a number") from None
        return _replace(cls(kind), options)


@dataclass(frozen=True)
class Config:
    """One training run, up to the precision it is computed in. Every field has its command-line
    option.

    Raises:
        ConfigError: if the fields contradict each other.
    """

    # Which network: a name, or a user's pair, PATH/TO/FILE.py:NAME or PACKAGE.MODULE:NAME.
    model: str = "net"
    epochs: int = 1  # passes over the training images
    steps: int | None = None  # stop after so many optimizer steps; None: after `epochs`
    batch_size: int = 4  # images per step
    drop_last: bool = False  # leave out an epoch's last batch if it is smaller than the others
    # One of `optimizers.OPTIMIZERS`, or "pair": the one that the user's pair defines. The options
    # have the names that `torch.optim` gives them, and None stands for its default; only those that
    # the optimizer takes may be given.
    optimizer: str = "sgd"
    lr: float = 0.001  # learning rate, per step
    momentum: float = 0.0  # factor of the momentum buffer; 0: no buffer
    dampening: float = 0.0  # share of the gradient kept out of the buffer, from the second step on
    # L2 penalty, added to the gradient before all else; adamw and lion shrink the weights themselves
    # by lr times this. 0 for every optimizer, also where `torch.optim` has another default.
    weight_decay: float = 0.0
    decay_biases_and_norms: bool = True  # False: weight decay of all other tensors only
    nesterov: bool = False  # look one momentum step ahead
    maximize: bool = False  # climb instead of descending
    betas: tuple[float, float] | None = None  # of the first and second moment; lion has its own two
    eps: float | None = None  # added to the root of the second moment
    alpha: float | None = None  # of rmsprop's second moment
    centered: bool = False  # rmsprop: by the variance in place of the second moment
    amsgrad: bool = False  # adam, adamw: by the largest second moment so far
    lr_decay: float = 0.0  # adagrad: lr is divided by 1 + lr_decay times the steps done
    initial_accumulator_value: float = 0.0  # adagrad: where the sum of squares starts
    # Largest norm of all gradients together, which are scaled down to it; None: no limit.
    clip_norm: float | None = None
    # Share of each label that the training loss spreads evenly over all classes.
    label_smoothing: float = 0.0
    augment: str | None = None  # one of AUGMENTATIONS, of training images; None: unchanged
    schedule: Schedule = Schedule()
    seed: int = 0  # of the initial weights, the order of the batches, their augmentation, the twins
    # SHA-256 of the user's initial weights, read by --weights; None: drawn from `seed`.
    weights: str | None = None
    # SHA-256 of the file that the user's `model` is in, found where it is not given.
    pair: str | None = None
    # Whose initial weights both start from, one of INITS; None: those of the PyTorch module of a
    # user's pair, and Lockstep's own draw for Lockstep's own networks.
    init: str | None = None
    # Layers of the user's `model` whose sums are coarse are exchanged for Lockstep's own.
    exact_sums: bool = False
    # One of BATCH_NORMS, for a run in several processes. "global": statistics of the whole batch.
    # "local": each process takes those of its own images, and the running ones are rank 0's.
    batch_norm: str = "global"

    def __post_init__(self) -> None:
        if self.pair is None and self.model not in MODELS and ":" in self.model:
            from lockstep.common.model.pair import source_digest  # which imports this module

            object.__setattr__(self, "pair", source_digest(self.model))
        known = self.pair is not None or self.model in MODELS
        _check(
            known,
            f"unknown model {self.model!r}: {did_you_mean(self.model, MODELS)}, "
            "or a pair of your own",
        )
        _check(
            self.init in (None, *INITS),
            f"unknown --init {self.init!r}: {did_you_mean(str(self.init), INITS)}",
        )
        _check(
            self.init not in BACKENDS or self.pair is not None,
            f"--init {self.init} is for a pair of your own: Lockstep draws the initial weights of its "
            "networks itself",
        )
        _check(
            self.optimizer != optimizers.FROM_PAIR or self.pair is not None,
            "--optimizer pair is the optimizer of your own pair: name the pair with --model",
        )
        _check(
            self.init is None or self.weights is None,
            "--init and --weights both say what the run starts from: give one of them",
        )
        _check(1 <= self.epochs <= MAX_COUNT, f"--epochs must be 1 or more, at most {MAX_COUNT}")
        _check(
            self.steps is None or 1 <= self.steps <= MAX_COUNT,
            f"--steps must be 1 or more, at most {MAX_COUNT}: a run of no steps shows nothing",
        )
        _check(self.batch_size >= 1, "--batch-size must be 1 or more")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        optimizers.check(self, defaults, MAX_NUMBER)
        _check(
            self.clip_norm is None or 0 < self.clip_norm <= MAX_NUMBER,
            f"--clip-norm must be a number above 0, at most {MAX_NUMBER:g}: without the option, "
            "nothing is clipped",
        )
        _check(0 <= self.label_smoothing < 1, "--label-smoothing must be 0 or more, below 1")
        _check(
            self.batch_norm in BATCH_NORMS,
            f"unknown --batch-norm {self.batch_norm!r}: {did_you_mean(self.batch_norm, BATCH_NORMS)}",
        )
        known = ", ".join(AUGMENTATIONS)
        _check(
            self.augment in (None, *AUGMENTATIONS),
            f"unknown --augment {self.augment!r}: choose {known}, or none",
        )
        _check(0 <= self.seed < 2**32, "--seed must lie between 0 and 4294967295")
        if self.schedule.min_lr is not None and self.schedule.min_lr > self.lr:
            raise ConfigError(
                f"schedule: min_lr {self.schedule.min_lr:g} is above --lr {self.lr:g}: choose a "
                "smaller one"
            )

    def batches_per_epoch(self, images: int) -> int:
        """How many batches an epoch over `images` training images has."""
        whole, rest = divmod(images, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def resolve(self, images: int) -> Config:
        """The same run with nothing left open, given the number of training images.

        Raises:
            ConfigError: if a batch is larger than the data.
        """
        if self.batch_size > images:
            raise ConfigError(
                f"--batch-size {self.batch_size} is larger than the data: choose {images} or less"
            )
        steps = self.epochs * self.batches_per_epoch(images)
        if self.steps is not None:
            steps = self.steps
        if steps > MAX_COUNT:
            raise ConfigError(f"{steps} steps are more than {MAX_COUNT}: choose fewer --epochs")
        epochs = -(-steps // self.batches_per_epoch(images))
        schedule = self.schedule.resolve(steps)
        decay_steps, period = steps - (schedule.warmup or 0), schedule.period
        if "cosine" in schedule.kind and period is not None and period < decay_steps:
            # PyTorch's learning rate would rise again after `period`, optax's would stay
            run = "the run" if schedule.warmup is None else "the run after its warm-up"
            raise ConfigError(
                f"schedule: cosine's period {period} is shorter than {run}: give {decay_steps} or "
                "more"
            )
        missing = optimizers.missing_options(self)
        return replace(self, epochs=epochs, steps=steps, schedule=schedule, **missing)

    @property
    def starts_from(self) -> str:
        """Whose initial weights both start from, unless `weights` are given: one of INITS."""
        return self.init or ("numpy" if self.pair is None else "torch")

    @property
    def total_steps(self) -> int:
        """Optimizer steps of a resolved run."""
        assert self.steps is not None, "resolve() comes first"
        return self.steps

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and strings, without schedule options that do not apply and without the
        defaults of OMIT_IF_DEFAULT."""
        fields = dataclasses.asdict(self)
        for name in OMIT_IF_DEFAULT:
            if fields[name] == getattr(type(self), name):
                del fields[name]
        fields["schedule"] = {
            name: value for name, value in fields["schedule"].items() if value is not None
        }
        return json.loads(json.dumps(fields))

    @classmethod
    def from_json(cls, fields: object) -> Config:
        """The inverse of `to_json`.

        Raises:
            ConfigError: if a field is missing, unknown or of another type, or if they contradict
                each other.
        """
        if (
            isinstance(fields, dict)
            and not fields.get("pair")
            and fields.get("model") not in MODELS
        ):
            raise ConfigError("Config.pair is missing")  # no file is looked at for it
        return _from_json(cls, fields)

    def fingerprint(self, data_digest: str) -> str:
        """Twelve hexadecimal digits, equal for two runs that should give the same numbers."""
        text = json.dumps([self.to_json(), data_digest], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _replace(schedule: Schedule, options: Mapping[str, Option]) -> Schedule:
    """`schedule` with other options."""
    values: dict[str, Any] = dict(options)
    return replace(schedule, **values)


T = TypeVar("T", Schedule, Config)


def _from_json(cls: type[T], fields: object) -> T:
    """A Config or a Schedule from its JSON; a field that `to_json` omits has its default."""
    types = get_type_hints(cls)
    if not isinstance(fields, dict) or not fields.keys() <= types.keys():
        raise ConfigError(f"{cls.__name__} has the fields {', '.join(types)}, and no others")
    values: dict[str, Any] = {}
    for name, kind in types.items():
        default = getattr(cls, name) if name in OMIT_IF_DEFAULT else None
        options, value = get_args(kind) or (kind,), fields.get(name, default)
        if kind is Schedule:
            value = _from_json(Schedule, value)
        elif get_origin(options[0]) is tuple and isinstance(value, list):
            item_types = get_args(options[0])  # of `milestones`: int and an ellipsis
            long_enough = item_types[-1] is ... or len(value) == len(item_types)
            if long_enough and all(type(item) in (item_types[0], int) for item in value):
                value = tuple(value)
        allowed = [get_origin(option) or option for option in options]
        if type(value) not in (*allowed, int if float in allowed else None):
            raise ConfigError(f"{cls.__name__}.{name} is no {getattr(kind, '__name__', kind)}")
        values[name] = value
    return cls(**values)
