"""Recordings made by hand, and a small GPT in PyTorch's names and layout and in linen's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lockstep.common.protocol import Arrays
from lockstep.common.recorder.recording import Recording

WIDTH, HEADS, WORDS, LENGTH = 12, 3, 17, 5
ATTENTION = "MultiHeadDotProductAttention_0"
PARTS = ("query", "key", "value")


def recording(
    weights: Arrays,
    framework: str = "torch",
    gradients: Arrays | None = None,
    parameters: Sequence[str] | None = None,
    history: Arrays | None = None,
) -> Recording:
    """A recording with these weights."""
    first = {f"0/backward/{name}": values for name, values in (gradients or {}).items()}
    return Recording(
        name=f"{framework}.py",
        framework=framework,
        dtype="float64",
        twin=None,
        script=f"{framework}.py",
        arguments=[],
        source="",
        environment={},
        complete=True,
        weights=weights,
        parameters=list(weights) if parameters is None else list(parameters),
        first_steps=first,
        parameter_history=history or {},
    )


def gpt(seed: int = 0, blocks: int = 2) -> Arrays:
    """As PyTorch has it: `nn.MultiheadAttention` packs q, k and v."""
    draw = np.random.default_rng(seed).normal
    d = WIDTH
    found = {"wte.weight": draw(size=(WORDS, d)), "wpe.weight": draw(size=(LENGTH, d))}
    for i in range(blocks):
        own = {
            "ln1.weight": np.ones(d),
            "ln1.bias": np.zeros(d),
            "attn.in_proj_weight": draw(size=(3 * d, d)),
            "attn.in_proj_bias": np.zeros(3 * d),
            "attn.out_proj.weight": draw(size=(d, d)),
            "attn.out_proj.bias": np.zeros(d),
            "ln2.weight": np.ones(d),
            "ln2.bias": np.zeros(d),
            "mlp.0.weight": draw(size=(4 * d, d)),
            "mlp.0.bias": np.zeros(4 * d),
            "mlp.2.weight": draw(size=(d, 4 * d)),
            "mlp.2.bias": np.zeros(d),
        }
        found |= {f"blocks.{i}.{name}": values for name, values in own.items()}
    return found | {"ln_f.weight": np.ones(d), "ln_f.bias": np.zeros(d)}


def linen(weights: Arrays, blocks: int = 2) -> Arrays:
    """The same, or anything else by the same names, as linen has it."""
    found = {
        "params.Embed_0.embedding": weights["wte.weight"],
        "params.Embed_1.embedding": weights["wpe.weight"],
        "params.LayerNorm_0.scale": weights["ln_f.weight"],
        "params.LayerNorm_0.bias": weights["ln_f.bias"],
    }
    for i in range(blocks):
        prefix = f"blocks.{i}."
        own = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
        found |= {f"params.Block_{i}.{name}": values for name, values in _block(own).items()}
    return dict(sorted(found.items()))


def _block(own: Arrays) -> Arrays:
    d, heads = WIDTH, (HEADS, WIDTH // HEADS)
    found = {
        f"{ATTENTION}.out.kernel": own["attn.out_proj.weight"].T.reshape(*heads, d),
        f"{ATTENTION}.out.bias": own["attn.out_proj.bias"],
    }
    for j, part in enumerate(PARTS):
        rows = slice(j * d, (j + 1) * d)
        kernel = own["attn.in_proj_weight"][rows].T.reshape(d, *heads)
        found[f"{ATTENTION}.{part}.kernel"] = kernel
        found[f"{ATTENTION}.{part}.bias"] = own["attn.in_proj_bias"][rows].reshape(heads)
    for j in (0, 1):
        found[f"LayerNorm_{j}.scale"] = own[f"ln{j + 1}.weight"]
        found[f"LayerNorm_{j}.bias"] = own[f"ln{j + 1}.bias"]
        found[f"Dense_{j}.kernel"] = own[f"mlp.{2 * j}.weight"].T
        found[f"Dense_{j}.bias"] = own[f"mlp.{2 * j}.bias"]
    return found


def pairs_of_gpt(blocks: int = 2) -> dict[str, str]:
    """By the linen name, the PyTorch name."""
    found = {
        "params.Embed_0.embedding": "wte.weight",
        "params.Embed_1.embedding": "wpe.weight",
        "params.LayerNorm_0.scale": "ln_f.weight",
        "params.LayerNorm_0.bias": "ln_f.bias",
    }
    for i in range(blocks):
        one, other = f"blocks.{i}.", f"params.Block_{i}."
        for part in PARTS:
            found[f"{other}{ATTENTION}.{part}.kernel"] = f"{one}attn.in_proj_weight"
            found[f"{other}{ATTENTION}.{part}.bias"] = f"{one}attn.in_proj_bias"
        found[f"{other}{ATTENTION}.out.kernel"] = f"{one}attn.out_proj.weight"
        found[f"{other}{ATTENTION}.out.bias"] = f"{one}attn.out_proj.bias"
        for j in (0, 1):
            found[f"{other}LayerNorm_{j}.scale"] = f"{one}ln{j + 1}.weight"
            found[f"{other}LayerNorm_{j}.bias"] = f"{one}ln{j + 1}.bias"
            found[f"{other}Dense_{j}.kernel"] = f"{one}mlp.{2 * j}.weight"
            found[f"{other}Dense_{j}.bias"] = f"{one}mlp.{2 * j}.bias"
    return found


def coarse(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)
