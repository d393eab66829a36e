"""The optimizers other than SGD: those of optax, completed to what `torch.optim` does. Reads next to
backends/torch_backend/adaptive.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lockstep.backends.flax_backend.state import OptimizerState, Parameters
from lockstep.common.config import Config
from lockstep.common.optimizers import is_bias_or_norm

# optax's own names of the slots.
OWN_SLOTS = {
    "momentum": "trace",
    "first moment": "mu",
    "second moment": "nu",
    "largest second moment": "nu_max",
    "sum of squares": "sum_of_squares",
}


def make_optimizer(
    config: Config, schedule: optax.Schedule, dtype: np.dtype
) -> optax.GradientTransformation:
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
    none = optax.identity()
    decay = {"weight_decay": config.weight_decay, "mask": decayed(config)}
    match config.optimizer:
        case "adam":
            b1, b2 = options.betas
            if not config.amsgrad:
                return optax.adam(schedule, b1, b2, options.eps, mu_dtype=dtype)
            scale = scale_by_amsgrad(b1, b2, options.eps, dtype)
            return optax.chain(scale, optax.scale_by_learning_rate(schedule))
        case "adamw":
            # optax multiplies the decay by lr, as PyTorch does. It decays the parameters of before
            # the step by adding to the update, PyTorch first: the same sum in another order.
            b1, b2 = options.betas
            if not config.amsgrad:
                return optax.adamw(schedule, b1, b2, options.eps, mu_dtype=dtype, **decay)
            return optax.chain(
                scale_by_amsgrad(b1, b2, options.eps, dtype),
                optax.add_decayed_weights(**decay),
                optax.scale_by_learning_rate(schedule),
            )
        case "rmsprop":
            # optax's default puts epsilon inside the root. `optax.rmsprop` has momentum after the
            # learning rate, so that an old rate acts on after it has changed; PyTorch before it.
            scale = optax.scale_by_stddev if config.centered else optax.scale_by_rms
            return optax.chain(
                scale(options.alpha, options.eps, eps_in_sqrt=False),
                optax.trace(config.momentum) if config.momentum else none,
                optax.scale_by_learning_rate(schedule),
            )
        case "adagrad":
            return optax.chain(
                scale_by_rss(config.initial_accumulator_value, options.eps),
                optax.scale_by_learning_rate(
                    lambda count: (
                        schedule(count) / (1 + config.lr_decay * jnp.asarray(count, jnp.float64))
                    )
                ),
            )
        case _:
            return optax.lion(schedule, *options.betas, mu_dtype=dtype, **decay)


def decayed(config: Config) -> Callable[[Parameters], dict[str, bool]] | None:
    """The mask of `optax.add_decayed_weights`: which parameters decay; None: all."""
    if config.decay_biases_and_norms:
        return None
    return lambda params: {
        name: not is_bias_or_norm(name, array.ndim) for name, array in params.items()
    }


def scale_by_rss(initial_accumulator_value: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_rss` with epsilon outside the root, as in `torch.optim.Adagrad`.

    The sum itself is optax's.
    """
    rss = optax.scale_by_rss(initial_accumulator_value)

    def update(
        updates: optax.Updates, state: OptimizerState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, OptimizerState]:
        _, state = rss.update(updates, state, params)
        sums = cast(Any, state).sum_of_squares
        return jax.tree.map(lambda g, s: g / (jnp.sqrt(s) + eps), updates, sums), state

    return optax.GradientTransformation(rss.init, update)


def scale_by_amsgrad(
    b1: float, b2: float, eps: float, dtype: np.dtype
) -> optax.GradientTransformation:
    """`optax.scale_by_amsgrad` with the bias correction of `torch.optim.Adam`.

    optax takes the largest of the corrected second moments, as the paper's text has it; PyTorch
    corrects the largest of them. The moments themselves are optax's.
    """
    amsgrad = optax.scale_by_amsgrad(b1, b2, eps, mu_dtype=dtype, bias_correction_nu=False)

    def update(
        updates: optax.Updates, state: OptimizerState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, OptimizerState]:
        _, state = amsgrad.update(updates, state, params)
        moments = cast(Any, state)
        m = optax.tree.bias_correction(moments.mu, b1, moments.count)
        v = optax.tree.bias_correction(moments.nu_max, b2, moments.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), m, v), state

    return optax.GradientTransformation(amsgrad.init, update)


def keep_precision(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer` with a state that keeps the precision of the parameters, as PyTorch's does: optax
    would keep that of the gradients, which are upcast."""

    def update(
        updates: optax.Updates, state: OptimizerState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, OptimizerState]:
        updates, new = optimizer.update(updates, state, params)
        return updates, jax.tree.map(lambda after, before: after.astype(before.dtype), new, state)

    return optax.GradientTransformation(optimizer.init, update)
