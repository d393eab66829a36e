"""A variational autoencoder in PyTorch, on small pictures of bars; its noise comes from
`run.random`."""

import argparse

import shared
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import lockstep

LATENT = 4


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(64, 32)
        self.mean = nn.Linear(32, LATENT)
        self.log_variance = nn.Linear(32, LATENT)
        self.decoder = nn.Sequential(nn.Linear(LATENT, 32), nn.SiLU(), nn.Linear(32, 64))

    def forward(self, x, noise):
        h = nn.functional.silu(self.encoder(x))
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + torch.exp(0.5 * log_variance) * noise
        return self.decoder(z), mean, log_variance


def load(model: VAE) -> None:
    (encoder,), (mean,) = shared.dense(40, 64, 32), shared.dense(41, 32, LATENT)
    (log_variance,), (first, second) = (
        shared.dense(42, 32, LATENT),
        shared.dense(43, LATENT, 32, 64),
    )
    kernels = {
        "encoder": encoder,
        "mean": mean,
        "log_variance": log_variance,
        "decoder.0": first,
        "decoder.2": second,
    }
    for name, kernel in kernels.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight.data.copy_(torch.from_numpy(kernel.T))
        nn.init.zeros_(layer.bias)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    options, _ = parser.parse_known_args()  # the other side may have options of its own

    model = VAE()
    load(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    run = lockstep.Run()
    run.begin(model, optimizer)
    for pictures in shared.digits(options.steps):
        x = run.batch(torch.from_numpy(pictures))
        optimizer.zero_grad()
        logits, mean, log_variance = model(x, run.random("noise", (len(x), LATENT)))
        reconstruction = binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)
        divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum(1).mean()
        loss = reconstruction + divergence
        loss.backward()
        optimizer.step()
        run.step({"loss": loss, "reconstruction": reconstruction, "divergence": divergence})
    print(f"loss after {options.steps} steps: {loss.item():.4f}")
    run.finish(pictures=logits.sigmoid())


if __name__ == "__main__":
    main()
