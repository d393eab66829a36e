"""A GAN in Flax NNX: points on a circle, two networks, two Adam optimizers."""

import argparse

import jax.numpy as jnp
import optax
import shared
from flax import nnx

import lockstep


class Network(nnx.Module):
    """For the generator and for the discriminator: they differ in their widths alone."""

    def __init__(self, seed: int, inputs: int, outputs: int) -> None:
        kernels = shared.dense(seed, inputs, 32, 32, outputs)
        self.layers = nnx.List([nnx.Linear(*k.shape, rngs=nnx.Rngs(0)) for k in kernels])
        for layer, kernel in zip(self.layers, kernels, strict=True):
            layer.kernel[...] = jnp.asarray(kernel)

    def __call__(self, x):
        *hidden, out = self.layers
        for layer in hidden:
            x = nnx.leaky_relu(layer(x), 0.2)
        return out(x)


def loss_of(logits, real: bool):
    return optax.sigmoid_binary_cross_entropy(logits, jnp.full_like(logits, float(real))).mean()


def loss_of_discriminator(discriminator, real, fake):
    return loss_of(discriminator(real), True) + loss_of(discriminator(fake), False)


def loss_of_generator(generator, discriminator, noise):
    fake = generator(noise)
    return loss_of(discriminator(fake), True), fake


@nnx.jit
def train_step(generator, discriminator, for_generator, for_discriminator, real, noise):
    of_discriminator, d_grads = nnx.value_and_grad(loss_of_discriminator)(
        discriminator, real, generator(noise)
    )
    for_discriminator.update(discriminator, d_grads)
    (of_generator, fake), g_grads = nnx.value_and_grad(loss_of_generator, has_aux=True)(
        generator, discriminator, noise
    )
    for_generator.update(generator, g_grads)
    losses = {"discriminator": of_discriminator, "generator": of_generator}
    return losses, (g_grads, d_grads), fake


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fault", choices=("none", "beta1"), default="none")
    options = parser.parse_args()
    beta1 = 0.9 if options.fault == "beta1" else 0.5

    generator, discriminator = Network(20, 2, 2), Network(21, 2, 1)
    for_generator = nnx.Optimizer(generator, optax.adam(2e-4, b1=0.5), wrt=nnx.Param)
    for_discriminator = nnx.Optimizer(discriminator, optax.adam(2e-4, b1=beta1), wrt=nnx.Param)
    run = lockstep.Run()
    run.begin(generator, discriminator, for_generator, for_discriminator)
    for points in shared.ring(options.steps):
        real = run.batch(points)
        noise = run.random("noise", (len(real), 2))
        losses, grads, fake = train_step(
            generator, discriminator, for_generator, for_discriminator, real, noise
        )
        run.step(losses, grads=grads)
    print(
        f"losses after {options.steps} steps: "
        f"{losses['discriminator']:.4f}, {losses['generator']:.4f}"
    )
    run.finish(points=fake)


if __name__ == "__main__":
    main()
