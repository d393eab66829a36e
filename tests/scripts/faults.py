"""The planted faults: where each has to be found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Where the two runs differ first."""

    stage: str  # "<stage>", or "<stage> <step>" where it is not step 0
    # Patterns of names, of PyTorch's side. The tensor or layer that is named must match one.
    tensors: tuple[str, ...]
    arguments: tuple[str, ...] = ()  # of both scripts


ANY = ("*",)

# Of gpt_linen_faults.py, against gpt_torch.py.
GPT_FAULTS = {
    # LayerNorm's in the first block: 1e-6 for 1e-5
    "epsilon": Fault("forward", ("blocks.0.norm1",)),
    # AdamW's: 1e-6 for 1e-8
    "adam-epsilon": Fault("update", ANY),
    # 0.95 for 0.999
    "beta2": Fault("update", ("second moment of *",)),
    # the scales of the norms are decayed, too
    "decay-on-norms": Fault("update", ("*norm*.weight",)),
    # Adam with L2 in place of AdamW
    "decay-in-gradient": Fault("update", ("first moment of *",)),
    "no-bias-correction": Fault("update", ANY),
    # the rate of the first step is 0
    "warm-up": Fault("update", ANY),
    "tanh-gelu": Fault("forward", ("blocks.0.mlp*",)),
    # the weights of queries and of keys have changed places when they were loaded
    "swapped-q-k": Fault("weights", ("blocks.0.attention*",)),
    # each place sees the next one
    "causal-mask": Fault("forward", ("blocks.0.attention*",)),
    # targets are moved by two
    "label-shift": Fault("loss", ("loss",)),
    # padding counts in the mean of the loss
    "padding": Fault("loss", ("loss",)),
    "positions": Fault("forward", ("positions",)),
    # what dropout leaves is not divided by its share
    "dropout-scale": Fault("forward", ("blocks.0", "blocks.0.mlp*"), ("--dropout", "0.1")),
    # gradients of parts of a batch are added, and not averaged
    "accumulation": Fault("backward", ANY, ("--accumulate", "2")),
    # each tensor is clipped by its own norm
    "clipping": Fault("update", ("first moment of *",)),
    # loss and gradients are those of the parameters of the step before
    "stale": Fault("forward 1", ("tokens", "positions")),
    # times the root of the width
    "embedding-scale": Fault("forward", ("tokens", "blocks.0.norm1")),
    # the head has a kernel of its own, with the values of the embedding
    "untied-head": Fault("backward", ("tokens.weight", "head*")),
    # nothing is added to the first kernel of the second block's MLP
    "frozen": Fault("update", ("blocks.1.mlp.0.*",)),
}

# Of the pairs of two scripts with a fault of their own: PyTorch's, JAX's, and where to find it.
PAIRS = {
    "regression": ("regression_torch.py", "regression_jax.py"),
    "recurrent": ("recurrent_torch.py", "recurrent_equinox.py"),
    "gan": ("gan_torch.py", "gan_nnx.py"),
    "policy": ("policy_torch.py", "policy_jax.py"),
    "vae": ("vae_torch.py", "vae_linen.py"),
}
PAIR_FAULTS = {
    # Huber's delta is 0.9 for 1.0
    ("regression", "delta"): Fault("loss", ("loss",)),
    # the reset gate acts before the product with the weights
    ("recurrent", "reset-before"): Fault("forward", ("gru",)),
    # the discriminator's Adam has 0.9 for 0.5
    ("gan", "beta1"): Fault("update", ("first moment of 1.*",)),
    # rewards are discounted by 0.9 for 0.95
    ("policy", "discount"): Fault("data", ("batch[[]2]",)),
    # the noise is multiplied by the variance, and not by the deviation
    ("vae", "deviation"): Fault("forward", ("decoder.0",)),
}
