"""REINFORCE in plain JAX on walkers that NumPy moves: their policy draws each action."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
import shared

import lockstep

HORIZON, WALKERS = 12, 16


def initial_params():
    hidden, out = shared.dense(30, 2, 16, 3)
    return [(jnp.asarray(hidden), jnp.zeros(16)), (jnp.asarray(out), jnp.zeros(3))]


@jax.jit
def policy(params, states):
    (w1, b1), (w2, b2) = params
    return jnp.tanh(states @ w1 + b1) @ w2 + b2


def play(params, episode, draws):
    """States, actions and rewards of an episode, (HORIZON, WALKERS, ...) each."""
    walk = shared.Walk(episode, WALKERS)
    states, actions, rewards = [], [], []
    for draw in np.asarray(draws):
        states.append(walk.see())
        chances = np.asarray(jax.nn.softmax(policy(params, states[-1])))
        actions.append((chances.cumsum(-1)[:, :2] < draw[:, None]).sum(-1))
        rewards.append(walk.act(actions[-1]))
    return np.stack(states), np.stack(actions), np.stack(rewards)


def returns(rewards, discount):
    """What follows each step, discounted, without its mean."""
    found, following = np.zeros_like(rewards), np.zeros(WALKERS, rewards.dtype)
    for t in reversed(range(HORIZON)):
        following = rewards[t] + discount * following
        found[t] = following
    return found - found.mean()


def loss_of(params, states, actions, weights):
    chances = jax.nn.log_softmax(policy(params, states))
    chosen = jnp.take_along_axis(chances, actions[..., None], axis=-1)[..., 0]
    return -(chosen * weights).mean()


optimizer = optax.adam(1e-2)


@jax.jit
def train_step(params, opt_state, states, actions, weights):
    loss, grads = jax.value_and_grad(loss_of)(params, states, actions, weights)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss, grads


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fault", choices=("none", "discount"), default="none")
    options = parser.parse_args()
    discount = 0.9 if options.fault == "discount" else 0.95

    run = lockstep.Run()
    params = run.begin(initial_params())
    opt_state = optimizer.init(params)
    for episode in range(options.steps):
        draws = run.random("action", (HORIZON, WALKERS), kind="uniform")
        states, actions, rewards = play(params, episode, draws)
        batch = run.batch(states, actions, returns(rewards, discount))
        params, opt_state, loss, grads = train_step(params, opt_state, *batch)
        run.step(loss, params=params, grads=grads, opt_state=opt_state)
    print(f"reward after {options.steps} episodes: {rewards.mean():.4f}")
    run.finish(reward=rewards.mean())


if __name__ == "__main__":
    main()
