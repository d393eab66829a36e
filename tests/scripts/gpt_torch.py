"""A character model in PyTorch: two blocks of `nn.MultiheadAttention`, a tied head, AdamW with
warm-up, decay of matrices only, clipping; on request dropout and gradient accumulation."""

import argparse

import numpy as np
import shared
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lockstep


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x, future, keep):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, attn_mask=future, need_weights=False)[0]
        return x + self.mlp(self.norm2(x)) * keep


class GPT(nn.Module):
    def __init__(self, vocabulary: int, width: int, heads: int, blocks: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x, keep):
        """x: int64 (batch, length); keep: (blocks, batch, length, width), what dropout leaves."""
        length = x.shape[1]
        future = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        h = self.tokens(x) + self.positions(torch.arange(length))
        for block, kept in zip(self.blocks, keep, strict=True):
            h = block(h, future, kept)
        return self.head(self.norm(h))


def load(model: GPT, weights: dict[str, np.ndarray]) -> None:
    """The matrices of `weights`, biases of 0; the norms start as they are."""
    w = {name: torch.from_numpy(array) for name, array in weights.items()}
    state = {"tokens.weight": w["tokens"], "positions.weight": w["positions"]}
    for i in range(len(model.blocks)):
        packed = torch.cat([w[f"{i}.{name}"].T for name in ("query", "key", "value")])
        state[f"blocks.{i}.attention.in_proj_weight"] = packed
        state[f"blocks.{i}.attention.out_proj.weight"] = w[f"{i}.out"].T
        state[f"blocks.{i}.mlp.0.weight"] = w[f"{i}.up"].T
        state[f"blocks.{i}.mlp.2.weight"] = w[f"{i}.down"].T
    model.load_state_dict(state, strict=False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    options, _ = parser.parse_known_args()  # the other side may have options of its own

    model = GPT(shared.VOCABULARY, shared.WIDTH, shared.HEADS, shared.BLOCKS, shared.CONTEXT)
    load(model, shared.gpt_weights())
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))

    run = lockstep.Run()
    run.begin(model, optimizer)
    forward = torch.compile(model) if options.compile else model
    for inputs, targets in shared.texts(options.steps):
        x, y = run.batch(torch.from_numpy(inputs), torch.from_numpy(targets))
        drawn = run.random("dropout", (shared.BLOCKS, *x.shape, shared.WIDTH), kind="uniform")
        keep = (drawn >= options.dropout) / (1 - options.dropout)
        optimizer.zero_grad()
        loss = torch.zeros(())
        parts = options.accumulate
        for x_part, y_part, kept in zip(
            x.chunk(parts), y.chunk(parts), keep.chunk(parts, dim=1), strict=True
        ):
            logits = forward(x_part, kept)
            part = cross_entropy(
                logits.flatten(0, 1), y_part.flatten(), ignore_index=shared.PADDING
            )
            (part / parts).backward()
            loss += part.detach() / parts
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        run.step(loss)
    inputs, _ = next(shared.texts(1, seed=1))
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs), torch.ones(shared.BLOCKS, 1, 1, 1))
    print(f"loss after {options.steps} steps: {loss.item():.4f}")
    run.finish(logits=logits, predictions=logits.argmax(-1))


if __name__ == "__main__":
    main()
