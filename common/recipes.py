"""`RECIPES`: named presets, each a run and how it is compared."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lockstep.common.config import Config, Schedule
from lockstep.common.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Recipe:
    """A preset: a run, its precisions, and the twins per backend in every precision but float64."""

    summary: str
    config: Config
    dtypes: tuple[str, ...] = ("float64", "float32")
    twins: int = 2


# 300 steps of batch 32, with momentum.
_SHORT = Config(steps=300, batch_size=32, momentum=0.9)
_AUGMENTED = replace(
    _SHORT,
    weight_decay=1e-4,
    augment="crop-flip",
    schedule=Schedule("warmup-cosine", warmup=30),
)
_REGULARISED = replace(_AUGMENTED, lr=0.1, label_smoothing=0.1, clip_norm=1.0)

RECIPES: dict[str, Recipe] = {
    "quick": Recipe(
        "500 steps of batch 32, a minute on two cores",
        Config(steps=500, batch_size=32, lr=0.01, momentum=0.9),
    ),
    "tutorial": Recipe(
        "PyTorch's 'Training a Classifier': batch 4, lr 0.001, momentum 0.9, 3 epochs",
        Config(epochs=3, batch_size=4, lr=0.001, momentum=0.9),
    ),
    "basic": Recipe(
        "plain SGD, as in PyTorch's 'Neural Networks': batch 4, lr 0.01, 3 epochs",
        Config(epochs=3, batch_size=4, lr=0.01),
    ),
    "mlp": Recipe("300 steps of batch 32", replace(_SHORT, model="mlp", lr=0.01)),
    "resnet20": Recipe(
        "300 steps of batch 32: weight decay, random crops and flips, warm-up and cosine",
        # At lr 0.1, float64's rounding grows from 1e-15 to 1e-2 of the loss in 60 steps; at 0.01 to
        # 3e-14 in 300.
        replace(_AUGMENTED, model="resnet20", lr=0.01),
    ),
    "convnext": Recipe(
        "the same, with label smoothing and clipping", replace(_REGULARISED, model="convnext")
    ),
    "vit": Recipe("the same", replace(_REGULARISED, model="vit")),
}


def recipe_named(name: str) -> Recipe:
    """Raises ConfigError if there is none of that name."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}: {did_you_mean(name, RECIPES)}")
    return RECIPES[name]
