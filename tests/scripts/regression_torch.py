"""A regression with two inputs in PyTorch: Huber loss, SGD with Nesterov momentum, a learning rate
that decays."""

import argparse

import shared
import torch
from torch import nn

import lockstep


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fields = nn.Linear(12, 16)
        self.station = nn.Linear(3, 8)
        self.hidden = nn.Linear(24, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        fields = torch.tanh(self.fields(inputs["fields"]))
        station = torch.relu(self.station(inputs["station"]))
        return self.out(torch.relu(self.hidden(torch.cat([fields, station], dim=1))))


def load(model: Network) -> None:
    (fields,), (station,) = shared.dense(1, 12, 16), shared.dense(2, 3, 8)
    hidden, out = shared.dense(3, 24, 16, 1)
    for name, kernel in {
        "fields": fields,
        "station": station,
        "hidden": hidden,
        "out": out,
    }.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight.data.copy_(torch.from_numpy(kernel.T))
        nn.init.zeros_(layer.bias)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    options, _ = parser.parse_known_args()  # the other side may have options of its own

    model = Network()
    load(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3
    )
    decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    huber = nn.HuberLoss(delta=1.0)
    run = lockstep.Run()
    run.begin(model, optimizer)
    for fields, target in shared.stations(options.steps):
        inputs, y = run.batch(
            {name: torch.from_numpy(array) for name, array in fields.items()},
            torch.from_numpy(target),
        )
        optimizer.zero_grad()
        found = model(inputs)
        loss = huber(found, y)
        loss.backward()
        optimizer.step()
        decay.step()
        run.step(loss)
    print(f"loss after {options.steps} steps: {loss.item():.4f}")
    run.finish(predictions=found)


if __name__ == "__main__":
    main()
