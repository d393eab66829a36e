"""Sequences sorted into four classes in PyTorch: `nn.GRU`, RMSprop, clipping by value."""

import argparse

import shared
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lockstep

HIDDEN = 24


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, HIDDEN, bias=False, batch_first=True)
        self.head = nn.Linear(HIDDEN, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.gru(x)
        return self.head(states[:, -1])


def load(model: Classifier) -> None:
    (inputs,), (states,) = shared.dense(10, 2, 3 * HIDDEN), shared.dense(11, HIDDEN, 3 * HIDDEN)
    (head,) = shared.dense(12, HIDDEN, 4)
    state = {
        "gru.weight_ih_l0": torch.from_numpy(inputs.T),
        "gru.weight_hh_l0": torch.from_numpy(states.T),
        "head.weight": torch.from_numpy(head.T),
        "head.bias": torch.zeros(4),
    }
    model.load_state_dict(state)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    options, _ = parser.parse_known_args()  # the other side may have options of its own

    model = Classifier()
    load(model)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3, alpha=0.95, eps=1e-6)
    run = lockstep.Run()
    run.begin(model, optimizer)
    hits = 0
    for sequences, kinds in shared.waves(options.steps):
        x, y = run.batch(torch.from_numpy(sequences), torch.from_numpy(kinds))
        optimizer.zero_grad()
        logits = model(x)
        loss = cross_entropy(logits, y)
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
        optimizer.step()
        run.step(loss)
        hits += int((logits.argmax(-1) == y).sum())
    print(f"loss after {options.steps} steps: {loss.item():.4f}")
    run.finish(accuracy=hits / (16 * options.steps))


if __name__ == "__main__":
    main()
