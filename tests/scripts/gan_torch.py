"""A GAN in PyTorch: points on a circle, two networks, two Adam optimizers."""

import argparse

import shared
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import lockstep


class Network(nn.Module):
    """For the generator and for the discriminator: they differ in their widths alone."""

    def __init__(self, seed: int, inputs: int, outputs: int) -> None:
        super().__init__()
        kernels = shared.dense(seed, inputs, 32, 32, outputs)
        self.layers = nn.ModuleList(nn.Linear(*kernel.shape) for kernel in kernels)
        for layer, kernel in zip(self.layers, kernels, strict=True):
            assert isinstance(layer, nn.Linear)
            layer.weight.data.copy_(torch.from_numpy(kernel.T))
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = nn.functional.leaky_relu(layer(x), 0.2)
        return self.layers[-1](x)


def loss_of(logits: torch.Tensor, real: bool) -> torch.Tensor:
    return binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(real)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    options, _ = parser.parse_known_args()  # the other side may have options of its own

    generator, discriminator = Network(20, 2, 2), Network(21, 2, 1)
    for_generator = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    for_discriminator = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    run = lockstep.Run()
    run.begin(generator, discriminator, for_generator, for_discriminator)
    for points in shared.ring(options.steps):
        real = run.batch(torch.from_numpy(points))
        noise = run.random("noise", (len(real), 2))
        for_discriminator.zero_grad()
        fake = generator(noise)
        of_discriminator = loss_of(discriminator(real), True)
        of_discriminator = of_discriminator + loss_of(discriminator(fake.detach()), False)
        of_discriminator.backward()
        for_discriminator.step()
        for_generator.zero_grad()
        of_generator = loss_of(discriminator(fake), True)
        of_generator.backward()
        for_generator.step()
        run.step({"discriminator": of_discriminator, "generator": of_generator})
    print(f"losses after {options.steps} steps: {of_discriminator:.4f}, {of_generator:.4f}")
    run.finish(points=fake)


if __name__ == "__main__":
    main()
