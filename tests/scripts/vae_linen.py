"""A variational autoencoder in Flax linen, on small pictures of bars; its noise comes from
`run.random`."""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import optax
import shared
from flax import linen as nn

import lockstep

LATENT = 4


class VAE(nn.Module):
    half: float = 0.5  # of the logarithm of the variance: the deviation's

    def setup(self):
        self.encoder = nn.Dense(32)
        self.mean = nn.Dense(LATENT)
        self.log_variance = nn.Dense(LATENT)
        self.decoder = nn.Sequential([nn.Dense(32), nn.silu, nn.Dense(64)])

    def __call__(self, x, noise):
        h = nn.silu(self.encoder(x))
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean + jnp.exp(self.half * log_variance) * noise
        return self.decoder(z), mean, log_variance


def load(params):
    (encoder,), (mean,) = shared.dense(40, 64, 32), shared.dense(41, 32, LATENT)
    (log_variance,), decoder = shared.dense(42, 32, LATENT), shared.dense(43, LATENT, 32, 64)
    tree = params["params"]
    tree["encoder"]["kernel"] = encoder
    tree["mean"]["kernel"] = mean
    tree["log_variance"]["kernel"] = log_variance
    tree["decoder"]["layers_0"]["kernel"], tree["decoder"]["layers_2"]["kernel"] = decoder
    return jax.tree.map(jnp.asarray, params)


optimizer = optax.adam(2e-3)


def loss_of(params, model, x, noise):
    logits, mean, log_variance = model.apply(params, x, noise)
    reconstruction = optax.sigmoid_binary_cross_entropy(logits, x).sum(1).mean()
    divergence = -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum(1).mean()
    loss = reconstruction + divergence
    losses = {"loss": loss, "reconstruction": reconstruction, "divergence": divergence}
    return loss, (losses, logits)


@partial(jax.jit, static_argnames="model")
def train_step(params, opt_state, model, x, noise):
    grads, (losses, logits) = jax.grad(loss_of, has_aux=True)(params, model, x, noise)
    updates, opt_state = optimizer.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state, losses, grads, logits


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fault", choices=("none", "deviation"), default="none")
    options = parser.parse_args()

    model = VAE(half=1.0 if options.fault == "deviation" else 0.5)
    params = load(model.init(jax.random.key(0), jnp.zeros((1, 64)), jnp.zeros((1, LATENT))))
    run = lockstep.Run()
    params = run.begin(params)
    opt_state = optimizer.init(params)
    for pictures in shared.digits(options.steps):
        x = run.batch(pictures)
        noise = run.random("noise", (len(x), LATENT))
        params, opt_state, losses, grads, logits = train_step(params, opt_state, model, x, noise)
        run.step(losses, params=params, grads=grads, opt_state=opt_state)
    print(f"loss after {options.steps} steps: {losses['loss']:.4f}")
    run.finish(pictures=jax.nn.sigmoid(logits))


if __name__ == "__main__":
    main()
