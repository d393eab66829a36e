"""The optimizers other than SGD: those of `torch.optim`, and Lion, which it does not have. Reads next
to backends/flax_backend/adaptive.py, where each difference in convention is explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.rmsprop import rmsprop

from lockstep.common.config import Config

# One step of an optimizer, by slot: writes into parameters and slots.
Update = Callable[[list[Tensor], list[Tensor], Mapping[str, list[Tensor]], list[Tensor]], None]
# PyTorch's own names of the slots, by optimizer.
ADAM = {
    "first moment": "exp_avg",
    "second moment": "exp_avg_sq",
    "largest second moment": "max_exp_avg_sq",
}
OWN_SLOTS = {
    "sgd": {"momentum": "momentum_buffer"},
    "adam": ADAM,
    "adamw": ADAM,
    "rmsprop": {
        "first moment": "grad_avg",
        "second moment": "square_avg",
        "momentum": "momentum_buffer",
    },
    "adagrad": {"sum of squares": "sum"},
    "lion": {"first moment": "exp_avg"},
}


def make_optimizer(config: Config, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer that `config` names. For gradient g, which holds `weight_decay p` unless it is
    AdamW's or Lion's, parameters p, moments m and v, learning rate lr, steps done t:

    adam       m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
               p <- p - lr m / (1 - beta1^(t+1)) / (sqrt(v / (1 - beta2^(t+1))) + eps)
               amsgrad: the largest v so far in its place
    adamw      p <- (1 - lr weight_decay) p, then as adam
    rmsprop    v <- alpha v + (1 - alpha) g^2;   u = g / (sqrt(v) + eps)
               centered: m <- alpha m + (1 - alpha) g, and v - m^2 in place of v
               momentum: b <- momentum b + u, and b in place of u;   p <- p - lr u
    adagrad    s <- s + g^2;   p <- p - lr / (1 + lr_decay t) g / (sqrt(s) + eps)
    lion       p <- p - lr (sign(beta1 m + (1 - beta1) g) + weight_decay p)
               m <- beta2 m + (1 - beta2) g

    Source: the documentation of torch.optim, and for Lion Chen et al. 2023 (arXiv:2302.06675).
    """
    options: Any = config  # resolved, so that no option is None
    shared = {"lr": config.lr, "weight_decay": config.weight_decay, "maximize": config.maximize}
    match config.optimizer:
        case "adam":
            return Adam(
                groups, betas=options.betas, eps=options.eps, amsgrad=config.amsgrad, **shared
            )
        case "adamw":
            return AdamW(
                groups, betas=options.betas, eps=options.eps, amsgrad=config.amsgrad, **shared
            )
        case "rmsprop":
            return RMSprop(
                groups,
                alpha=options.alpha,
                eps=options.eps,
                centered=config.centered,
                momentum=config.momentum,
                **shared,
            )
        case "adagrad":
            return Adagrad(
                groups,
                eps=options.eps,
                lr_decay=config.lr_decay,
                initial_accumulator_value=config.initial_accumulator_value,
                **shared,
            )
        case _:
            return Lion(groups, betas=options.betas, **shared)


class Lion(Optimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675), as `optax.lion` has it; `torch.optim` has none."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        del closure
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    m = state.setdefault("exp_avg", torch.zeros_like(p))
                    options = {name: group[name] for name in self.defaults}
                    lion([p], [p.grad], [m], **options)


def lion(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    maximize: bool,
) -> None:
    """The function behind `Lion.step`, as `torch.optim` has one for each of its optimizers."""
    beta1, beta2 = betas
    for p, gradient, m in zip(params, grads, exp_avgs, strict=True):
        g = -gradient if maximize else gradient
        p.mul_(1 - lr * weight_decay)
        p.sub_(lr * torch.sign(beta1 * m + (1 - beta1) * g))
        m.mul_(beta2).add_(g, alpha=1 - beta2)


def functional_update(config: Config, lr: Tensor, weight_decay: float) -> Update:
    """The function behind `step` of the optimizer, for a compiled program."""
    options: Any = config
    shared = {"lr": lr, "weight_decay": weight_decay, "maximize": config.maximize}
    plain = cast(Any, shared | {"foreach": False})  # inside `scan`, torch 2.15 fails on True

    def update(
        p: list[Tensor], g: list[Tensor], slots: Mapping[str, list[Tensor]], steps: list[Tensor]
    ) -> None:
        first, second = slots.get("first moment", []), slots.get("second moment", [])
        match config.optimizer:
            case "adam" | "adamw":
                beta1, beta2 = options.betas
                adam(
                    *(p, g, first, second, slots.get("largest second moment", []), steps),
                    decoupled_weight_decay=config.optimizer == "adamw",
                    amsgrad=config.amsgrad,
                    beta1=beta1,
                    beta2=beta2,
                    eps=options.eps,
                    **plain,
                )
            case "rmsprop":
                rmsprop(
                    *(p, g, second, first, slots.get("momentum", []), steps),
                    alpha=options.alpha,
                    eps=options.eps,
                    momentum=config.momentum,
                    centered=config.centered,
                    **plain,
                )
            case "adagrad":
                adagrad(
                    *(p, g, slots["sum of squares"], steps),
                    lr_decay=config.lr_decay,
                    eps=options.eps,
                    **plain,
                )
            case _:
                lion(p, g, first, betas=options.betas, **shared)

    return update
